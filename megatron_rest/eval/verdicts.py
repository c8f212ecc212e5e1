"""Better, worse, equal or undecided: what an experiment's primary measure says of every algorithm.

The rules are those of docs/experiment_plan.md, written before its runs.  A difference counts if it is one over seeds
and over prompts, after Holm's correction over the comparisons that were planned together; two algorithms are equal if
both intervals lie within a margin that would not matter.  No other measure decides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_rest.analysis.groups import paired_differences
from megatron_rest.analysis.statistics import Interval, bootstrap_p, holm, student_p
from megatron_rest.eval.outcomes import TITLES, Experiment

__all__ = ["FAMILIES", "Verdict", "verdict_lines", "verdicts"]

FAMILIES = {
    "primary": ("dr_grpo", "paper", "variance_optimal"),
    "secondary": (
        *("paper_grpo_rate", "entropy_ema", "otb", "empg", "entropy_mask", "gtpo"),
        *("paper_still", "paper_backwards", "paper_dr"),
    ),
}
"""Comparisons that are corrected together."""

_MEASURE, _PROMPTS = "accuracy", "heldout"
_LEVEL = 0.05
_MARGIN = 0.03  # of accuracy


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """One algorithm beside the one that it is compared with, by accuracy on prompts that no training has seen."""

    algorithm: str
    base: str
    family: str
    num_seeds: int
    over_seeds: Interval
    over_prompts: Interval
    p_value: float  # the larger of Student's over seeds and the bootstrap's over prompts
    corrected: float  # Holm's, over the family
    word: str  # better, worse, equal or undecided


def verdicts(experiment: Experiment) -> list[Verdict]:
    """Of every algorithm of a family that has runs; none where the held-out prompts were not asked."""
    found: list[Verdict] = []
    if _PROMPTS not in experiment.sets:
        return found
    for family, planned in FAMILIES.items():
        made = [name for name in planned if name in experiment.policies]
        pairs = [experiment.pair(name, _PROMPTS, _MEASURE) for name in made]
        p_values = [
            max(student_p((own - base).mean(axis=1)), bootstrap_p((own - base).mean(axis=0))) for base, own in pairs
        ]
        for name, (base, own), p_value, corrected in zip(
            made, pairs, p_values, holm(p_values, comparisons=len(planned)), strict=True
        ):
            over_seeds, over_prompts = paired_differences(base, own)
            assert over_seeds is not None and over_prompts is not None, "read_experiment asks for two seeds"
            found.append(
                Verdict(
                    algorithm=name,
                    base=experiment.base_of(name),
                    family=family,
                    num_seeds=len(own),
                    over_seeds=over_seeds,
                    over_prompts=over_prompts,
                    p_value=p_value,
                    corrected=corrected,
                    word=_word(float(np.mean(own - base)), corrected, over_seeds, over_prompts),
                )
            )
    return found


def _word(difference: float, corrected: float, *intervals: Interval) -> str:
    if corrected < _LEVEL:
        return "better" if difference > 0 else "worse"
    return "equal" if all(i.low >= -_MARGIN and i.high <= _MARGIN for i in intervals) else "undecided"


def verdict_lines(found: Sequence[Verdict]) -> list[str]:
    """Markdown: one table a family."""
    lines: list[str] = []
    for family in FAMILIES:
        rows = [v for v in found if v.family == family]
        if not rows:
            continue
        lines += [
            f"## Verdicts, {family} comparisons (accuracy on {_PROMPTS} prompts)",
            "",
            "| | against | seeds | difference, 95 % over seeds | 95 % over prompts | p | p, Holm | verdict |",
            "|---|---|---|---|---|---|---|---|",
            *(
                f"| {TITLES[v.algorithm]} | {TITLES[v.base]} | {v.num_seeds} | {v.over_seeds} "
                f"| {v.over_prompts} | {v.p_value:.3f} | {v.corrected:.3f} | {v.word} |"
                for v in rows
            ),
            "",
        ]
    return lines
