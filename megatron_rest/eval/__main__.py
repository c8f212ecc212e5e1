"""``megatron-rest eval``: ask a model published benchmarks, score its answers, say how much of a difference is noise.

megatron-rest eval run MODEL --output DIR                         greedy answers by vLLM, scored
megatron-rest eval score api-bank ANSWERS.jsonl --output DIR      judge stored answers
megatron-rest eval compare DIR_A DIR_B                            paired intervals and McNemar's test
megatron-rest eval prompts bfcl --categories live_simple          what a model would be asked, for other engines
"""

from __future__ import annotations

from megatron_rest.rollout.process import has_gpu_driver, prepare_process

prepare_process(cpu=not has_gpu_driver(), allow_late=True)  # environment that torch and vLLM read when imported

import argparse  # noqa: E402
import json  # noqa: E402
import sys  # noqa: E402
from collections.abc import Sequence  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

from megatron_rest.analysis.statistics import mcnemar, paired_bootstrap  # noqa: E402
from megatron_rest.data.chat_template import STOCK  # noqa: E402
from megatron_rest.data.prompt_style import STYLES  # noqa: E402
from megatron_rest.eval.answers import read_answers  # noqa: E402
from megatron_rest.eval.decontamination import decontamination_of  # noqa: E402
from megatron_rest.eval.scoring import Verdict, judge, read_verdicts, summary_lines, write_scores  # noqa: E402
from megatron_rest.eval.selection import BENCHMARKS, load_cases  # noqa: E402
from megatron_rest.regions import DIALECTS, find_dialect  # noqa: E402
from megatron_rest.rollout.chat import AUTO  # noqa: E402

__all__ = ["compare_lines", "main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0, or 2 with one line that says what is wrong."""
    args = _parser().parse_args(argv)
    try:
        args.run(args)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        print(f"megatron-rest eval: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="megatron-rest eval", description="Judge a model's tool calls on API-Bank and BFCL."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_run(commands.add_parser("run", help="greedy answers of a model by vLLM, scored; started again, it continues"))

    score = commands.add_parser("score", help="judge a file of answers (JSON lines of case_id and answer)")
    _add_benchmark(score)
    score.add_argument("answers", type=Path, help="JSON lines {case_id, answer}")
    score.add_argument("--output", type=Path, required=True, help="new folder for verdicts.jsonl and summary.json")
    _add_training_data(score)
    score.set_defaults(run=_score)

    prompts = commands.add_parser("prompts", help="the cases' messages as JSON lines")
    _add_benchmark(prompts)
    prompts.set_defaults(run=_prompts)

    compare = commands.add_parser("compare", help="two scored runs of the same cases")
    compare.add_argument("run_a", type=Path, help="folder that `score` wrote")
    compare.add_argument("run_b", type=Path, help="another one, of the same cases")
    compare.set_defaults(run=lambda args: print("\n".join(compare_lines(args.run_a, args.run_b))))
    return parser


def _add_run(run: argparse.ArgumentParser) -> None:
    run.add_argument("model", type=Path, help="HF folder, folder of a run, or checkpoint of one")
    run.add_argument("--output", type=Path, required=True, help="new folder, or that of the same run to continue")
    run.add_argument(
        "--categories", nargs="+", default=list(BENCHMARKS), metavar="NAME",
        help=f"categories, or a benchmark for all of its own (default: {' '.join(BENCHMARKS)})",
    )  # fmt: skip
    run.add_argument("--cases", type=int, default=0, metavar="N", help="of each category, drawn by --seed (0 = all)")
    run.add_argument("--seed", type=int, default=0, help="of the draw; answers are greedy (%(default)s)")
    run.add_argument("--step", type=int, help="of a run: the checkpoint of this step (default: export or newest)")
    run.add_argument(
        "--dialect", type=_dialect, default=AUTO, metavar="NAME",
        help="how it is asked and read (default auto: as its training data was, else as its chat template shows): "
        f"{', '.join(DIALECTS)}, or package.module:DIALECT of your own",
    )  # fmt: skip
    run.add_argument("--chat-template", default=STOCK, metavar="NAME", help="as model.chat_template")
    run.add_argument("--prompt-style", choices=STYLES, help="as the training data (default: as a run's, else original)")
    run.add_argument("--max-model-len", type=int, default=0, metavar="N", help="tokens of prompt and answer (model's)")
    run.add_argument("--max-response-tokens", type=int, default=2048, metavar="N", help="longest answer (%(default)s)")
    run.add_argument("--leave-out-long", action="store_true", help="ask only what fits; the summary names the rest")
    run.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of the engine (default: the model's)")
    run.add_argument("--tensor-parallel", type=int, default=1, metavar="N", help="GPUs of the engine (%(default)s)")
    run.add_argument(
        "--max-concurrent", type=int, default=256, metavar="N", help="cases at the same time (%(default)s)"
    )
    run.add_argument("--gpu-memory", type=float, default=0.9, metavar="SHARE", help="of each GPU (%(default)s)")
    run.add_argument("--kv-cache-gib", type=float, default=1.0, metavar="GIB", help="on CPU (%(default)s)")
    _add_training_data(run)
    run.set_defaults(run=_run)


def _add_training_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--train-data", default="", metavar="DIR",
        help="prepared folder the model was trained on: what it was decontaminated against stands beside the score",
    )  # fmt: skip


def _add_benchmark(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("benchmark", choices=sorted(BENCHMARKS))
    parser.add_argument("--categories", nargs="+", default=(), metavar="NAME", help="default: all of the benchmark")
    parser.add_argument("--limit", type=int, default=0, metavar="N", help="first N cases of each category (0 = all)")


def _run(args: argparse.Namespace) -> None:
    from megatron_rest.eval.models import find_model
    from megatron_rest.eval.run import RunSettings, evaluate

    model = find_model(args.model, step=args.step, training_data=args.train_data)
    chat = model.chat(args.dialect, args.chat_template)
    settings = RunSettings(
        dialect=chat.dialect,
        chat_template=chat.chat_template,
        categories=tuple(args.categories),
        cases=args.cases,
        seed=args.seed,
        prompt_style=args.prompt_style or model.prompt_style or "original",
        max_model_len=args.max_model_len,
        max_response_tokens=args.max_response_tokens,
        leave_out_long=args.leave_out_long,
        dtype=args.dtype or model.dtype,
        tensor_parallel=args.tensor_parallel,
        max_concurrent=args.max_concurrent,
        gpu_memory_utilization=args.gpu_memory,
        kv_cache_bytes=int(args.kv_cache_gib * (1 << 30)),
    )
    evaluate(model, args.output, settings)


def _score(args: argparse.Namespace) -> None:
    cases = load_cases(args.benchmark, args.categories, limit=args.limit)
    verdicts = judge(cases, read_answers(args.answers))
    args.output.mkdir(parents=True)  # a folder of another run is an error: results never mix
    data = [decontamination_of(args.train_data)] if args.train_data else []
    summary = write_scores(args.output, args.benchmark, verdicts, answers=str(args.answers), decontamination=data)
    print("\n".join(summary_lines(summary)))


def _prompts(args: argparse.Namespace) -> None:
    for case in load_cases(args.benchmark, args.categories, limit=args.limit):
        row: dict[str, Any] = {"case_id": case.case_id, "category": case.category, "messages": case.messages}
        print(json.dumps(row, ensure_ascii=False))


def _dialect(name: str) -> str:
    if name != AUTO:
        try:
            find_dialect(name)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error
    return name


def compare_lines(run_a: str | Path, run_b: str | Path) -> list[str]:
    """B against A by category, over the cases of both; raises ValueError if they did not answer the same ones."""
    a, b = read_verdicts(run_a), read_verdicts(run_b)
    if a.keys() != b.keys():
        raise ValueError(
            f"{run_a} and {run_b} hold different cases ({len(a.keys() ^ b.keys())} are in one only): "
            "score both with the same benchmark, categories and limit"
        )
    categories: dict[str, list[str]] = {}
    for case_id, verdict in a.items():
        categories.setdefault(verdict.category, []).append(case_id)
    lines = [f"A = {run_a}", f"B = {run_b}", ""]
    lines.append(f"{'category':<24}{'cases':>6}{'A':>8}{'B':>8}   {'B - A, 95 %':<26}only A / only B   p (McNemar)")
    lines += [_row(name, ids, a, b) for name, ids in categories.items()]
    lines.append(_row("all", list(a), a, b))
    return [
        *lines,
        "",
        "Cases are the units: this is the noise of which cases were asked, not of another training seed.",
    ]


def _row(name: str, ids: Sequence[str], a: dict[str, Verdict], b: dict[str, Verdict]) -> str:
    first, second = [a[i].score.is_correct for i in ids], [b[i].score.is_correct for i in ids]
    difference, test = paired_bootstrap(first, second), mcnemar(first, second)
    interval = f"{difference.estimate:+.1%} ({difference.low:+.1%} to {difference.high:+.1%})"
    return (
        f"{name:<24}{len(ids):>6}{sum(first) / len(ids):>8.1%}{sum(second) / len(ids):>8.1%}   {interval:<26}"
        f"{test.only_a:>6} / {test.only_b:<6}   {test.p_value:.3g}"
    )


if __name__ == "__main__":
    sys.exit(main())
