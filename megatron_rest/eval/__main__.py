"""``megatron-rest eval``: score answers to published benchmarks, and say how much of a difference is noise.

megatron-rest eval score api-bank ANSWERS.jsonl --output DIR      judge stored answers
megatron-rest eval compare DIR_A DIR_B                            paired intervals and McNemar's test
megatron-rest eval prompts bfcl --categories live_simple          what a model would be asked, for other engines
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_rest.eval.scoring import (
    BENCHMARKS,
    Verdict,
    judge,
    load_cases,
    read_answers,
    read_verdicts,
    summarise,
    summary_lines,
    write_json,
    write_lines,
)
from megatron_rest.eval.statistics import mcnemar, paired_bootstrap

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

    score = commands.add_parser("score", help="judge a file of answers (JSON lines of case_id and answer)")
    _add_benchmark(score)
    score.add_argument("answers", type=Path, help="JSON lines {case_id, answer}")
    score.add_argument("--output", type=Path, required=True, help="new folder for verdicts.jsonl and summary.json")
    score.set_defaults(run=_score)

    prompts = commands.add_parser("prompts", help="the cases' messages as JSON lines")
    _add_benchmark(prompts)
    prompts.set_defaults(run=_prompts)

    compare = commands.add_parser("compare", help="two scored runs of the same cases")
    compare.add_argument("run_a", type=Path, help="folder that `score` wrote")
    compare.add_argument("run_b", type=Path, help="another one, of the same cases")
    compare.set_defaults(run=lambda args: print("\n".join(compare_lines(args.run_a, args.run_b))))
    return parser


def _add_benchmark(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("benchmark", choices=sorted(BENCHMARKS))
    parser.add_argument("--categories", nargs="+", default=(), metavar="NAME", help="default: all of the benchmark")
    parser.add_argument("--limit", type=int, default=0, metavar="N", help="first N cases of each category (0 = all)")


def _score(args: argparse.Namespace) -> None:
    cases = load_cases(args.benchmark, args.categories, limit=args.limit)
    verdicts = judge(cases, read_answers(args.answers))
    args.output.mkdir(parents=True)  # a folder of another run is an error: results never mix
    write_lines(args.output / "verdicts.jsonl", [asdict(verdict) for verdict in verdicts])
    summary = {"benchmark": args.benchmark, "answers": str(args.answers), **summarise(verdicts)}
    write_json(args.output / "summary.json", summary)
    print("\n".join(summary_lines(summary)))


def _prompts(args: argparse.Namespace) -> None:
    for case in load_cases(args.benchmark, args.categories, limit=args.limit):
        row: dict[str, Any] = {"case_id": case.case_id, "category": case.category, "messages": case.messages}
        print(json.dumps(row, ensure_ascii=False))


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
