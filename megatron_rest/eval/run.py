"""A model's greedy answers to benchmarks, and their scores: what ``megatron-rest eval run`` does.

OUTPUT/run.json                     what is asked of whom; a folder of another run is refused
OUTPUT/<benchmark>/answers.jsonl    appended while the model answers; the same command continues
OUTPUT/<benchmark>/verdicts.jsonl, summary.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_rest.config import RolloutConfig
from megatron_rest.data.chat_template import STOCK
from megatron_rest.eval.answers import ANSWERS_FILE, AnswerLog
from megatron_rest.eval.asking import Interviewer, choose
from megatron_rest.eval.cases import EvalCase
from megatron_rest.eval.models import Model
from megatron_rest.eval.scoring import judge, summary_lines, write_json, write_scores
from megatron_rest.eval.selection import draw, find_categories, load_cases
from megatron_rest.regions import TOOLRL
from megatron_rest.rollout.chat import ChatSettings
from megatron_rest.rollout.engine import RolloutEngine, RolloutRequest
from megatron_rest.types import Rollout

__all__ = ["RunSettings", "TooLongError", "answer_cases", "evaluate"]

_RUN_FILE = "run.json"


class TooLongError(ValueError):
    """Prompts do not fit the context: they would have to be cut, and a cut prompt is another question."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunSettings:
    """What is asked, and how the model is served."""

    categories: tuple[str, ...]  # of benchmarks, or a benchmark's name for all of its own
    cases: int = 0  # of each category, drawn by seed; 0 = all
    seed: int = 0
    prompt_style: str = "original"
    max_model_len: int = 0  # 0 = what the model was made for, at most 32,768
    max_response_tokens: int = 2048
    leave_out_long: bool = False  # draw among prompts that fit, name the others in the summary; else an error
    dtype: str = "bfloat16"
    tensor_parallel: int = 1
    max_concurrent: int = 256
    gpu_memory_utilization: float = 0.9
    kv_cache_bytes: int = 1 << 30  # on CPU
    dialect: str = TOOLRL.name
    chat_template: str = STOCK  # or append_only, or a path

    @property
    def chat(self) -> ChatSettings:
        """How the model is asked and read."""
        return ChatSettings(dialect=self.dialect, chat_template=self.chat_template)


_DEFAULT_CONTEXT = 32_768


def evaluate(model: Model, output: Path, settings: RunSettings) -> None:
    """Answer what is not answered yet, score, and print the tables.

    Raises ValueError for a folder of another run, for names that do not exist, and :class:`TooLongError`.
    """
    context = settings.max_model_len or min(model.max_positions, _DEFAULT_CONTEXT)
    interviewer = Interviewer(
        model.tokenizer(),
        prompt_style=settings.prompt_style,
        max_model_len=context,
        max_response_tokens=settings.max_response_tokens,
        chat=settings.chat,
    )
    asked: dict[str, list[EvalCase]] = {}
    left_out: dict[str, list[EvalCase]] = {}
    for benchmark, categories in find_categories(settings.categories).items():
        cases = load_cases(benchmark, categories)
        if settings.leave_out_long:
            asked[benchmark], left_out[benchmark] = choose(interviewer, cases, settings.cases, seed=settings.seed)
        else:
            asked[benchmark], left_out[benchmark] = draw(cases, settings.cases, seed=settings.seed), []
            _check_lengths(asked[benchmark], interviewer)
    _claim(output, {"model": model.identity(), "settings": asdict(settings)})
    _answer_all(model, output, settings, context, interviewer, asked)
    for benchmark, cases in asked.items():
        folder = output / benchmark
        with AnswerLog(folder / ANSWERS_FILE) as log:
            verdicts = judge(cases, log.known)
        more = {
            "answers": ANSWERS_FILE,
            "model": model.identity(),
            "left_out": [case.case_id for case in left_out[benchmark]],
            "decontamination": model.decontamination(),
        }
        summary = write_scores(folder, benchmark, verdicts, **more)
        print("\n".join([f"{benchmark} ({folder})", *summary_lines(summary), ""]))


def answer_cases(
    engine: RolloutEngine, interviewer: Interviewer, cases: Sequence[EvalCase], log: AnswerLog, progress: Any
) -> None:
    """Answers to the cases that ``log`` does not know, as the engine finishes them; ``progress`` counts them."""
    missing = [case for case in cases if case.case_id not in log.known]
    for part in interviewer.exams(missing):

        def keep(key: int, rollout: Rollout, cases: Sequence[EvalCase] = part.cases) -> None:
            log.add(
                cases[key].case_id,
                interviewer.answer(cases[key], rollout),
                stop_reason=str(rollout.stop_reason),
                tokens=int(rollout.loss_mask.sum()),
            )
            progress.update()

        engine.run(
            [RolloutRequest(key=key, prompt=prompt, seed=0) for key, prompt in enumerate(part.prompts)],
            max_response_tokens=part.max_response_tokens,
            on_rollout=keep,
            exam=part.exam,
        )


def _answer_all(
    model: Model,
    output: Path,
    settings: RunSettings,
    context: int,
    interviewer: Interviewer,
    asked: dict[str, list[EvalCase]],
) -> None:
    """The engine is started only if something is left to answer."""
    known: dict[str, int] = {}
    for benchmark in asked:
        (output / benchmark).mkdir(exist_ok=True)
        with AnswerLog(output / benchmark / ANSWERS_FILE) as log:
            known[benchmark] = len(log.known)
    total, done = sum(map(len, asked.values())), sum(known.values())
    if done == total:
        return
    print(
        f"{model.folder}: {total - done} of {total} answers to give, in the dialect {settings.dialect}",
        file=sys.stderr,
        flush=True,
    )
    engine = _start_engine(model, settings, context)
    try:
        with tqdm(total=total, initial=done, unit="case", desc="eval", disable=None, smoothing=0.05) as progress:
            for benchmark, cases in asked.items():
                with AnswerLog(output / benchmark / ANSWERS_FILE) as log:
                    answer_cases(engine, interviewer, cases, log, progress)
    finally:
        engine.close()


def _start_engine(model: Model, settings: RunSettings, context: int) -> RolloutEngine:
    from megatron_rest.rollout.vllm_engine import VllmEngine

    config = RolloutConfig(
        rollouts_per_prompt=1,
        dtype=settings.dtype,
        tensor_parallel=settings.tensor_parallel,
        max_concurrent=settings.max_concurrent,
        gpu_memory_utilization=settings.gpu_memory_utilization,
        kv_cache_bytes=settings.kv_cache_bytes,
    )
    return VllmEngine(
        model.folder,
        config,
        seed=0,
        max_model_len=context,
        stop_token_ids=settings.chat.stop_token_ids(model.folder),
        chat=settings.chat,
        in_process=settings.tensor_parallel == 1,
    )


def _claim(output: Path, wanted: dict[str, Any]) -> None:
    """A new folder, or that of the same run: answers of two models or settings never mix."""
    path = output / _RUN_FILE
    wanted = json.loads(json.dumps(wanted))
    if path.is_file():
        found = json.loads(path.read_text(encoding="utf-8"))
        if found != wanted:
            parts = [(part, key) for part in wanted for key in wanted[part]]
            keys = [f"{part}.{key}" for part, key in parts if found[part].get(key) != wanted[part][key]]
            raise ValueError(
                f"{output} holds answers of another run (it differs in {', '.join(keys)}): choose another --output"
            )
        return
    if output.exists() and any(output.iterdir()):
        raise ValueError(f"{output} is not empty and holds no {_RUN_FILE}: choose a new folder")
    output.mkdir(parents=True, exist_ok=True)
    write_json(path, wanted)


def _check_lengths(asked: Sequence[EvalCase], interviewer: Interviewer) -> None:
    cases = [case for case in asked if not interviewer.fits(case)]
    if cases:
        longest = max(interviewer.length(case) for case in cases)
        raise TooLongError(
            f"{len(cases)} prompts, such as that of {cases[0].case_id}, are longer than the "
            f"{interviewer.max_prompt_tokens} tokens that the context leaves (the longest has {longest}): raise "
            "--max-model-len, lower --max-response-tokens, choose a shorter --prompt-style, or say --leave-out-long"
        )
