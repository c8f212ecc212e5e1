"""API-Bank and BFCL, asked of a policy in the context that it was trained in: a measure of ``make experiment``.

python -m megatron_rest.eval.benchmarks RUN_DIR --config RUN.yaml [--cases N]

Levels 1 and 2 of API-Bank and the single-turn categories of BFCL, of which the same cases are drawn for every policy
among those whose prompts leave room for an answer.  Answers are greedy, judged by the benchmarks' own checkers and kept
in ``RUN_DIR/benchmarks``; the same command continues.  ``RUN_DIR/benchmarks.json`` holds what tables need: how many
cases there are, fit and were asked, and which of these were right.  A benchmark whose data is not installed is named
there and left out.
"""

from __future__ import annotations

from megatron_rest.rollout.process import cpu_share, has_gpu_driver, prepare_process

prepare_process(cpu=not has_gpu_driver(), allow_late=True)

import argparse  # noqa: E402
import hashlib  # noqa: E402
import sys  # noqa: E402
from collections.abc import Sequence  # noqa: E402
from dataclasses import asdict  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

from megatron_rest.config import ConfigError, RestConfig, load  # noqa: E402
from megatron_rest.eval import bfcl  # noqa: E402
from megatron_rest.eval.asking import Interviewer  # noqa: E402
from megatron_rest.eval.benchmark_scores import BENCHMARKS_FILE  # noqa: E402
from megatron_rest.eval.cases import EvalCase  # noqa: E402
from megatron_rest.eval.models import Model, find_model  # noqa: E402
from megatron_rest.eval.run import RunSettings, evaluate  # noqa: E402
from megatron_rest.eval.scoring import read_verdicts, write_json  # noqa: E402
from megatron_rest.eval.selection import load_cases  # noqa: E402

__all__ = ["ASKED", "ask", "main"]

ASKED = {"api-bank": ("level-1", "level-2"), "bfcl": bfcl.SINGLE_TURN}
"""Categories by benchmark."""


def ask(run_dir: Path, config: RestConfig, *, cases: int) -> dict[str, Any]:
    """Ask ``run_dir/hf`` ``cases`` cases of each category (0 = all), write the result and return it.

    ``config`` gives context, longest answer, dialect and the engine's memory.  Raises ValueError for a folder without
    weights, and for answers of other weights or settings that lie there.
    """
    model = find_model(run_dir / "hf")
    there, missing = _installed()
    settings = _settings(model, config, cases)
    interviewer = Interviewer(
        model.tokenizer(),
        prompt_style=settings.prompt_style,
        max_model_len=settings.max_model_len,
        max_response_tokens=settings.max_response_tokens,
        chat=settings.chat,
    )
    fitting = {name: sum(map(interviewer.fits, rows)) for name, rows in there.items()}
    asked = tuple(name for name, count in fitting.items() if count)
    if not asked:
        raise ValueError(f"no case of a benchmark fits {interviewer.max_prompt_tokens} tokens of prompt")
    settings = RunSettings(**{**asdict(settings), "categories": asked})
    evaluate(model, run_dir / "benchmarks", settings)
    result = {
        "settings": asdict(settings),
        "not_asked": missing,
        "categories": _categories(run_dir / "benchmarks", there, fitting),
    }
    write_json(run_dir / BENCHMARKS_FILE, result)
    return result


def _installed() -> tuple[dict[str, list[EvalCase]], dict[str, str]]:
    """Cases by category, and benchmarks whose data is not here with the reason."""
    found: dict[str, list[EvalCase]] = {}
    missing = {}
    for benchmark, categories in ASKED.items():
        try:
            for case in load_cases(benchmark, categories):
                found.setdefault(case.category, []).append(case)
        except (ModuleNotFoundError, FileNotFoundError) as error:
            missing[benchmark] = str(error)
            print(f"{benchmark} is not asked: {error}", file=sys.stderr, flush=True)
    return found, missing


def _settings(model: Model, config: RestConfig, cases: int) -> RunSettings:
    chat = model.chat(config.model.dialect, config.model.chat_template)
    return RunSettings(
        categories=(),
        cases=cases,
        prompt_style=model.prompt_style or "original",
        max_model_len=config.model.max_sequence_length,
        max_response_tokens=config.rollout.max_response_tokens,
        leave_out_long=True,
        dtype=config.rollout.dtype,
        max_concurrent=config.rollout.max_concurrent,
        gpu_memory_utilization=config.rollout.gpu_memory_utilization,
        kv_cache_bytes=config.rollout.kv_cache_bytes,
        dialect=chat.dialect,
        chat_template=chat.chat_template,
    )


def _categories(
    folder: Path, there: dict[str, list[EvalCase]], fitting: dict[str, int]
) -> dict[str, dict[str, int | str]]:
    benchmark_of = {category: name for name, categories in ASKED.items() for category in categories}
    verdicts = {name: read_verdicts(folder / name) for name in ASKED if (folder / name).is_dir()}
    found: dict[str, dict[str, int | str]] = {}
    for category, cases in there.items():
        benchmark = benchmark_of[category]
        mine = {case_id: v for case_id, v in verdicts.get(benchmark, {}).items() if v.category == category}
        found[category] = {
            "benchmark": benchmark,
            "all": len(cases),
            "fitting": fitting[category],
            "cases_sha256": hashlib.sha256("\n".join(mine).encode()).hexdigest(),
            "correct": "".join(str(int(v.score.is_correct)) for v in mine.values()),  # 1 or 0 a case, in their order
        }
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0, or 2 with one line that says what is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", type=Path, help="holds hf, the weights")
    parser.add_argument("--config", type=Path, required=True, help="YAML file of a run: context, answers, engine")
    parser.add_argument("--cases", type=int, default=0, metavar="N", help="of each category (0 = all that fit)")
    args = parser.parse_args(argv)
    try:
        config = load(args.config)
        import torch

        torch.set_num_threads(config.trainer.threads or cpu_share())
        ask(args.run_dir, config, cases=args.cases)
    except (ConfigError, ValueError, OSError) as error:
        print(f"megatron_rest.eval.benchmarks: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
