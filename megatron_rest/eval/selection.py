"""Which cases are asked: benchmarks or categories by name, and of each category a number drawn by seed."""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Sequence

from megatron_rest.eval import api_bank, bfcl
from megatron_rest.eval.cases import EvalCase

__all__ = ["BENCHMARKS", "draw", "find_categories", "load_cases"]

BENCHMARKS = {"api-bank": api_bank, "bfcl": bfcl}


def find_categories(names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """``["api-bank", "live_simple"]`` -> ``{"api-bank": ("level-1", ...), "bfcl": ("live_simple",)}``.

    Raises ValueError for a name that is neither a benchmark's nor a category's.
    """
    known = {category: name for name, module in BENCHMARKS.items() for category in module.CATEGORIES}
    found: dict[str, list[str]] = {}
    for name in names:
        if name not in BENCHMARKS and name not in known:
            near = difflib.get_close_matches(name, [*BENCHMARKS, *known], n=1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join([*BENCHMARKS, *known])}"
            raise ValueError(f"no benchmark or category {name!r}: {hint}")
        benchmark = known.get(name, name)
        found.setdefault(benchmark, []).extend(BENCHMARKS[name].CATEGORIES if name in BENCHMARKS else [name])
    return {benchmark: tuple(dict.fromkeys(categories)) for benchmark, categories in found.items()}


def load_cases(benchmark: str, categories: Sequence[str] = (), *, limit: int = 0) -> list[EvalCase]:
    """Cases of a benchmark; ``limit`` keeps the first so many of each category (0 = all)."""
    module = BENCHMARKS[benchmark]
    cases: list[EvalCase] = module.load(categories=tuple(categories) or module.CATEGORIES)
    return _keep(cases, cases, limit)


def draw(cases: Sequence[EvalCase], count: int, *, seed: int) -> list[EvalCase]:
    """``count`` cases of each category (0 = all) in the order of ``cases``.

    The same cases whatever the other categories are, and among them those that a smaller count draws.
    """

    def rank(case: EvalCase) -> bytes:
        return hashlib.blake2b(f"{seed}/{case.case_id}".encode(), digest_size=8).digest()

    return _keep(cases, sorted(cases, key=rank), count)


def _keep(cases: Sequence[EvalCase], ranked: Sequence[EvalCase], count: int) -> list[EvalCase]:
    if not count:
        return list(cases)
    kept: dict[str, set[str]] = {}
    for case in ranked:
        ids = kept.setdefault(case.category, set())
        if len(ids) < count:
            ids.add(case.case_id)
    return [case for case in cases if case.case_id in kept[case.category]]
