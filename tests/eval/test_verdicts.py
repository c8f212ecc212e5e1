"""What counts as better, worse, equal and undecided, from policies with known scores."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megatron_rest.eval.outcomes import Experiment, Policy
from megatron_rest.eval.verdicts import FAMILIES, verdict_lines, verdicts

PROMPTS = 80


def experiment(shifts: dict[str, float], *, noise: float = 0.05, seeds: int = 5, of_seeds: float = 0.0) -> Experiment:
    """Accuracies around 0.4 with a shift for each algorithm; ``of_seeds``: how far apart its seeds are, but GRPO's."""
    rng = np.random.default_rng(0)
    base = rng.uniform(0.1, 0.7, PROMPTS)

    def scores(shift: float) -> dict[str, dict[str, np.ndarray]]:
        return {"heldout": {"accuracy": base + shift + rng.normal(0, noise, PROMPTS)}}

    def policy(name: str, shift: float, seed: int) -> Policy:
        own = 0.0 if name == "grpo" else of_seeds * (seed - (seeds + 1) / 2)
        return Policy(seed=seed, run=None, scores=scores(shift + own))  # type: ignore[arg-type]

    policies = {
        name: [policy(name, shift, seed) for seed in range(1, seeds + 1)]
        for name, shift in {"grpo": 0.0, **shifts}.items()
    }
    return Experiment(folder=Path(), start=scores(0.0), policies=policies)


def words(found: Experiment) -> dict[str, str]:
    return {v.algorithm: v.word for v in verdicts(found)}


def test_a_difference_over_seeds_and_prompts_decides():
    assert words(experiment({"dr_grpo": -0.1, "paper": 0.1, "variance_optimal": 0.001})) == {
        "dr_grpo": "worse",
        "paper": "better",
        "variance_optimal": "equal",
    }


def test_what_seeds_or_prompts_leave_open_is_undecided():
    assert words(experiment({"paper": 0.05}, of_seeds=0.1)) == {"paper": "undecided"}, "the seeds disagree"
    assert words(experiment({"paper": 0.03}, noise=0.4)) == {"paper": "undecided"}, "the prompts disagree"


def test_the_number_of_planned_comparisons_is_paid_for():
    """p of about 0.02: significant alone, not among three, of which two are still to be made."""
    found = experiment({"paper": 0.06}, noise=0.01, seeds=3, of_seeds=0.015)
    [verdict] = verdicts(found)
    assert 0.05 / 3 < verdict.p_value < 0.05
    assert verdict.corrected == pytest.approx(3 * verdict.p_value)
    assert verdict.word == "undecided"


def test_weights_on_other_advantages_are_compared_with_those_advantages():
    found = experiment({"dr_grpo": 0.1, "paper_dr": 0.2})
    by_name = {v.algorithm: v for v in verdicts(found)}
    assert by_name["paper_dr"].base == "dr_grpo" and by_name["dr_grpo"].base == "grpo"
    assert by_name["paper_dr"].over_seeds.estimate == pytest.approx(0.1, abs=0.02)
    assert set(by_name) <= {name for family in FAMILIES.values() for name in family}
    lines = verdict_lines(list(by_name.values()))
    assert sum(line.startswith("## Verdicts") for line in lines) == 2
    assert any("| ResT, paper, on Dr. GRPO | Dr. GRPO | 5 |" in line for line in lines)
