"""Intervals and tests against hand-computed and published values."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_rest.eval.statistics import mcnemar, paired_bootstrap, wilson_interval


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


def test_paired_scores_must_pair():
    with pytest.raises(ValueError, match="two equal lists"):
        paired_bootstrap([1.0], [1.0, 0.0])
