"""``megatron-rest eval``: generation against bare ``vllm.LLM.generate``, and how long stored answers take to score.

    python -m benchmarks.evaluation [--cases 40] [--tokens 64] [--rounds 5] [--json FILE]

Generation: the same engine object, BFCL's own prompts, greedy, answers stored as ``eval run`` stores them; the two take
turns on an empty prefix cache, medians of the rounds count.  Scoring: ``eval score`` as a user runs it, on stored
answers to all 5,038 cases (references, in conversations with mistakes), in one process, imports included.
"""

from __future__ import annotations

from megatron_rest.rollout.process import has_gpu_driver, prepare_process

prepare_process(cpu=not has_gpu_driver())

import argparse  # noqa: E402
import json  # noqa: E402
import random  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
import tempfile  # noqa: E402
import time  # noqa: E402
from pathlib import Path  # noqa: E402
from types import SimpleNamespace  # noqa: E402
from typing import Any  # noqa: E402

from benchmarks.rollout import measure  # noqa: E402
from megatron_rest.config import RolloutConfig  # noqa: E402
from megatron_rest.eval.answers import AnswerLog  # noqa: E402
from megatron_rest.eval.asking import Interviewer  # noqa: E402
from megatron_rest.eval.run import answer_cases  # noqa: E402
from megatron_rest.eval.selection import BENCHMARKS, draw, load_cases  # noqa: E402
from megatron_rest.rollout.environments.executor import parse_call  # noqa: E402
from megatron_rest.rollout.vllm_engine import VllmEngine  # noqa: E402

SAMPLE = Path(__file__).resolve().parent.parent / "data_tools" / "samples" / "rlla_sft.json"
CONTEXT = 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=40, help="of each of five categories (%(default)s)")
    parser.add_argument("--tokens", type=int, default=64, help="of each answer (%(default)s)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", help="write the numbers here")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        numbers = {"generation": generation(Path(name), args), "scoring": scoring(Path(name))}
    base = numbers["generation"]["vllm.LLM.generate"]
    print("| way | tokens/s | of bare | tokens/s of CPU | of bare |\n|---|---|---|---|---|")
    for way, row in numbers["generation"].items():
        print(f"| {way} | {row['wall']:.0f} | {row['wall'] / base['wall']:.1%} | {row['cpu']:.0f} "
              f"| {row['cpu'] / base['cpu']:.1%} |")  # fmt: skip
    print("\n| scoring | cases | seconds |\n|---|---|---|")
    for what, row in numbers["scoring"].items():
        print(f"| {what} | {row['cases']} | {row['seconds']:.1f} |")
    if args.json:
        Path(args.json).write_text(json.dumps(numbers, indent=1), encoding="utf-8")


def generation(folder: Path, args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Tokens a second of both ways, on a random model of the demo's size with a tokenizer of its own."""
    tokenizer = str(folder / "tokenizer")
    call("data_tools", "train-tokenizer", str(SAMPLE), "--vocab-size", "2048", "--output", tokenizer)
    shape = ("--heads", "4", "--kv-heads", "2", "--max-length", str(CONTEXT))
    call("megatron_rest.commands.init_model", "--tokenizer", tokenizer, "--output", str(folder / "model"), *shape)
    from transformers import AutoTokenizer

    interviewer = Interviewer(
        AutoTokenizer.from_pretrained(folder / "model"),
        prompt_style="slim", max_model_len=CONTEXT, max_response_tokens=args.tokens,
    )  # fmt: skip
    categories = ("simple_python", "multiple", "parallel", "live_simple", "irrelevance")
    cases = draw([c for c in load_cases("bfcl", categories) if interviewer.fits(c)], args.cases, seed=0)
    config = RolloutConfig(kv_cache_bytes=256 << 20, max_concurrent=64)
    engine = VllmEngine(folder / "model", config, seed=0, max_model_len=CONTEXT)  # no stop token: equal lengths

    def ours() -> int:
        engine.reset_prefix_cache()
        path = folder / "answers.jsonl"
        path.unlink(missing_ok=True)
        with AnswerLog(path) as log:
            answer_cases(engine, interviewer, cases, log, SimpleNamespace(update=lambda: None))
        return sum(json.loads(line)["tokens"] for line in path.read_text(encoding="utf-8").split("\n")[:-1])

    def bare() -> int:
        from vllm import SamplingParams

        engine.reset_prefix_cache()
        params = SamplingParams(temperature=0.0, max_tokens=args.tokens, ignore_eos=True, detokenize=False)
        prompts: list[Any] = [
            {"prompt_token_ids": p.token_ids.tolist()} for part in interviewer.exams(cases) for p in part.prompts
        ]
        outputs = engine._open().generate(prompts, params, use_tqdm=False)
        return sum(len(output.outputs[0].token_ids) for output in outputs)

    numbers = measure({"vllm.LLM.generate": bare, "eval run": ours}, args.rounds)
    engine.close()
    return numbers


def scoring(folder: Path) -> dict[str, dict[str, float]]:
    """Seconds of ``eval score`` as a user runs it, for each benchmark, answers to every case."""
    numbers = {}
    for benchmark in BENCHMARKS:
        cases = load_cases(benchmark)
        answers = folder / f"{benchmark}.jsonl"
        with AnswerLog(answers) as log:
            for case in cases:
                log.add(case.case_id, stored_answer(case, random.Random(case.case_id)))
        started = time.perf_counter()
        call("megatron_rest.eval", "score", benchmark, str(answers), "--output", str(folder / f"scored-{benchmark}"))
        numbers[benchmark] = {"cases": len(cases), "seconds": time.perf_counter() - started}
    return numbers


def stored_answer(case: Any, generator: random.Random) -> Any:
    """The reference as a model would tell it, every fifth call left out: no case is over before it is checked."""
    keywords = case.score.keywords
    if case.environment:
        turns = [[c for c in turn if generator.random() < 0.8] for turn in keywords["reference"]]
        told = [[block([named(parse_call(text), keywords["row"]) for text in turn])] if turn else [] for turn in turns]
        return [[*texts, "Done."] for texts in told]
    if "reference" in keywords:
        return block([keywords["reference"]])
    calls = [{"name": n, "parameters": {k: v[0] for k, v in p.items() if isinstance(v, list) and v}}
             for possible in keywords["possible"] or () for n, p in possible.items()]  # fmt: skip
    return block(calls) if calls else "I cannot do that."


def named(call_: Any, row: dict[str, Any]) -> dict[str, Any]:
    import inspect

    from megatron_rest.rollout.environments.bfcl import bfcl_objects

    for target in bfcl_objects({**row, "initial_config": {}}).values():
        if method := getattr(target, call_.name, None):
            bound = inspect.signature(method).bind(*call_.positional, **call_.keywords)
            return {"name": call_.name, "arguments": dict(bound.arguments)}
    raise ValueError(call_.name)


def block(calls: list[dict[str, Any]]) -> str:
    return "<think> so </think>\n<tool_call>\n" + "\n".join(map(json.dumps, calls)) + "\n</tool_call>"


def call(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", *arguments], check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
