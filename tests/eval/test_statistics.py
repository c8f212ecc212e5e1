"""Intervals and tests against hand-computed and published values."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_rest.analysis.statistics import (
    bootstrap_p,
    holm,
    mcnemar,
    paired_bootstrap,
    seed_interval,
    student_p,
    wilson_interval,
)


def test_wilson_interval_of_published_examples():
    interval = wilson_interval(81, 263)  # Newcombe 1998, table I: 0.2553 to 0.3662
    assert (round(interval.low, 4), round(interval.high, 4)) == (0.2553, 0.3662)
    none = wilson_interval(0, 20)
    assert none.low == 0.0
    assert none.high == pytest.approx(0.1611, abs=1e-4)  # the same table
    with pytest.raises(ValueError, match="3 of 2"):
        wilson_interval(3, 2)


def test_mcnemar_is_the_binomial_test_of_the_discordant_pairs():
    a = [True] * 10 + [False] * 2 + [True] * 5
    b = [False] * 10 + [True] * 2 + [True] * 5
    test = mcnemar(a, b)
    assert (test.only_a, test.only_b) == (10, 2)
    assert test.p_value == pytest.approx(2 * (1 + 12 + 66) / 4096)
    assert mcnemar([True, False], [True, False]).p_value == 1.0


def test_paired_bootstrap_covers_the_truth_as_often_as_it_says():
    generator = np.random.default_rng(0)
    covered = 0
    for i in range(200):
        a = generator.random(150) < 0.5
        b = np.where(generator.random(150) < 0.2, generator.random(150) < 0.7, a)  # mean difference 0.2 * 0.2
        interval = paired_bootstrap(a, b, num_resamples=400, seed=i)
        covered += interval.low <= 0.04 <= interval.high
    assert 180 <= covered <= 199, covered


def test_interval_over_seeds_is_students():
    """Student's own sleep data (1908, additional hours, drug 2 - drug 1): mean 1.58, 95 % 0.7001 to 2.4599."""
    interval = seed_interval([1.2, 2.4, 1.3, 1.3, 0.0, 1.0, 1.8, 0.8, 4.6, 1.4])
    assert interval.estimate == pytest.approx(1.58)
    assert (interval.low, interval.high) == (pytest.approx(0.7001, abs=1e-4), pytest.approx(2.4599, abs=1e-4))


@pytest.mark.parametrize("count", [2, 3, 4, 5, 7, 10])
def test_interval_over_seeds_covers_the_truth_in_95_of_100_cases(count):
    generator = np.random.default_rng(count)
    covered = sum(i.low <= 3.0 <= i.high for i in map(seed_interval, generator.normal(3.0, 2.0, (4000, count))))
    assert covered / 4000 == pytest.approx(0.95, abs=0.012)  # 3.5 standard errors


@pytest.mark.parametrize("count", [0, 1, 32])
def test_interval_of_too_few_or_too_many_seeds_is_refused(count):
    with pytest.raises(ValueError, match="2 to 31"):
        seed_interval([0.0] * count)


def test_paired_scores_must_pair():
    with pytest.raises(ValueError, match="two equal lists"):
        paired_bootstrap([1.0], [1.0, 0.0])


def test_p_over_seeds_is_one_twentieth_where_the_interval_reaches_zero():
    generator = np.random.default_rng(0)
    for count in (2, 3, 4, 5, 6, 11, 20, 31):
        values = generator.normal(size=count)
        interval = seed_interval(values)
        assert student_p(values - interval.low) == pytest.approx(0.05, abs=1e-5)
        assert student_p(values - interval.high) == pytest.approx(0.05, abs=1e-5)
        assert student_p(values - values.mean()) == pytest.approx(1.0)
    assert (student_p([0.0, 0.0]), student_p([0.1, 0.1])) == (1.0, 0.0)
    with pytest.raises(ValueError, match="2 of them or more"):
        student_p([0.1])


def test_p_over_prompts_agrees_with_the_interval_over_prompts():
    generator = np.random.default_rng(1)
    zeros = np.zeros(60)
    for shift in (0.0, 0.02, 0.05, 0.08, 0.2):
        difference = generator.normal(shift, 0.2, size=60)
        interval = paired_bootstrap(zeros, difference)
        assert (bootstrap_p(difference) < 0.05) == (interval.low > 0 or interval.high < 0)
    assert bootstrap_p(np.ones(60)) == pytest.approx(2 / 10_001), "resamples cannot say less"
    assert bootstrap_p(zeros) == 1.0


def test_holm_of_a_worked_example_and_of_comparisons_that_are_missing():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.01], comparisons=3) == pytest.approx([0.03])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []
