"""Compute a recorded microbatch again: float64, dense, on this CPU, by other code; say which term differs.

    megatron-rest replay RUN_DIR/replay/step_000010_update_0.safetensors

A run records with trainer.replay_every.  Exit status 0: every term agrees; 1: one does not, the first is named; 2: the
file cannot be used.  Needs about five times the weights in float64.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from megatron_rest.replay.bundle import BundleError, read_bundle
from megatron_rest.replay.compare import Term, compare
from megatron_rest.replay.reference import compute

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """0: agrees, 1: differs, 2: no bundle."""
    parser = argparse.ArgumentParser(
        prog="megatron-rest replay", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", help="a file of RUN_DIR/replay")
    parser.add_argument("--all", action="store_true", help="every parameter's gradient, not only the worst")
    parser.add_argument("--json", action="store_true", help="for programs")
    args = parser.parse_args(argv)
    try:
        bundle = read_bundle(args.bundle)
        terms = compare(bundle, compute(bundle))
    except BundleError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    wrong = [term for term in terms if not term.is_right]
    if args.json:
        rows = [{"name": t.name, "difference": t.difference, "tolerance": t.tolerance} for t in terms]
        print(json.dumps({"first_wrong": wrong[0].name if wrong else None, "terms": rows}))
        return int(bool(wrong))
    facts = bundle.facts
    print(
        f"step {facts.step}, update {facts.update}: {facts.num_tokens:.0f} loss tokens of "
        f"{len(bundle.batch['token_ids'])}, model in {facts.model_dtype}, against float64"
    )
    for term in terms if args.all else _shortened(terms):
        print(_line(term))
    if wrong:
        more = f"; {len(wrong) - 1} more, which may follow from it" if len(wrong) > 1 else ""
        print(f"DIFFERS: {wrong[0].name} is the first{more}")
        return 1
    print("agrees")
    return 0


def _shortened(terms: list[Term]) -> list[Term]:
    """Of the gradients the wrong ones, or the worst."""
    gradients = [term for term in terms if term.name.startswith("gradient ")]
    worst = sorted(gradients, key=lambda term: -term.difference)[:1]
    return [t for t in terms if t not in gradients] + ([t for t in gradients if not t.is_right] or worst)


def _line(term: Term) -> str:
    mark = "  " if term.is_right else "! "
    where = "" if term.is_right or not term.where else f"   {term.where}"
    return f"{mark}{term.name:46s} {term.difference:9.2e} {term.what} (at most {term.tolerance:g}){where}"


if __name__ == "__main__":
    sys.exit(main())
