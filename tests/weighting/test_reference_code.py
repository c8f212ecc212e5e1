"""Column R: the published function, defects included, as ``benchmarks/reference_code.py`` keeps it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks.reference_code import build_token_weight, piece_tokenizer
from megatron_rest.regions import TokenRegion, label_regions
from megatron_rest.weighting import RestWeighting
from tests.regions.golden import END, PIECE, TEXTS, pieces

TOLERANCE = 1e-6


def reference(text: str, *, step: int = 0, padding: int = 0) -> np.ndarray:
    n = len(pieces(text))
    mask = torch.ones(1, n + padding)
    mask[:, n:] = 0
    return build_token_weight([text + END], mask, piece_tokenizer(PIECE), step=step)[0].numpy()


# text -> counts of positive weights by value
COLUMN_R = {
    "A": {1.355932: 4, 0.813559: 4 + 7, 1.627119: 1},
    "B": {1.355932: 4, 0.813559: 4 + 7, 1.627119: 1},
    "C": {1.170213: 7, 0.702128: 4},
    "D": {1.351351: 2, 1.621622: 1, 0.810811: 7},
    "E": {1.09375: 4, 0.65625: 1 + 1, 1.3125: 1},
    "F": {1.320755: 4, 0.792453: 1 + 8, 1.584906: 1},
    "G": {1.307692: 4, 0.784615: 1 + 10, 1.569231: 2},
    "J": {},
}


@pytest.mark.parametrize("name", COLUMN_R)
def test_column_r(name: str) -> None:
    weights = reference(TEXTS[name])
    expected = sorted(value for value, count in COLUMN_R[name].items() for _ in range(count))
    np.testing.assert_allclose(np.sort(weights[weights > 0]), expected, atol=TOLERANCE)


def test_text_h_weights_the_tag_in_the_thought_and_not_the_true_one() -> None:
    weights, tokens = reference(TEXTS["H"]), pieces(TEXTS["H"])
    fake, true = (i for i, token in enumerate(tokens) if token == b"<tool_call>")
    assert weights[fake] == pytest.approx(1.339286, abs=TOLERANCE)
    assert weights[true] == 0


def test_the_name_in_the_arguments_wins_in_text_f() -> None:
    weights, tokens = reference(TEXTS["F"]), pieces(TEXTS["F"])
    assert weights[tokens.index(b"z")] == pytest.approx(1.584906, abs=TOLERANCE)
    assert weights[tokens.index(b"f")] == 0


def test_padding_keeps_values() -> None:
    padded = reference(TEXTS["A"], padding=3)
    np.testing.assert_array_equal(padded[:-3], reference(TEXTS["A"]))
    assert (padded[-3:] == 0).all()


@pytest.mark.parametrize(
    ("step", "tag", "think", "name", "args"),
    [
        (0, 1.355932, 0.813559, 1.627119, 0.813559),
        (1, 1.353409, 0.814752, 1.624091, 0.814752),
        (50, 1.24031, 0.868217, 1.488372, 0.868217),
        (100, 1.142857, 0.914286, 1.371429, 0.914286),
        (105, 1.133948, 0.918498, 1.360737, 0.918498),
        (200, 0.987654, 0.987654, 1.185185, 0.987654),
        (300, 0.909091, 0.909091, 1.090909, 1.090909),
        (1000, 0.909091, 0.909091, 1.090909, 1.090909),
    ],
)
def test_steps_table(step: int, tag: float, think: float, name: float, args: float) -> None:
    weights, tokens = reference(TEXTS["A"], step=step), pieces(TEXTS["A"])
    where = [0, 1, tokens.index(b"get_x"), tokens.index(b"k")]
    np.testing.assert_allclose(weights[where], [tag, think, name, args], atol=TOLERANCE)
    assert weights.sum() == pytest.approx(16, abs=1e-4)


def test_a_non_canonical_split_shifts_every_later_weight() -> None:
    """R2: the published weights of the canonical tokens land on the sampled ones, one place off; ours do not."""
    text = '<think>ok</think>\n<tool_call>\n{"name": "Search Managers", "parameters": {"name": "Ann"}}\n</tool_call>'
    canonical = pieces(text)
    at = canonical.index(b"Search")
    sampled = [*canonical[:at], b"S", b"earch", *canonical[at + 1 :]]
    theirs = reference(text)  # length of the canonical split: indexes the sampled tokens without a check
    close = sampled.index(b"</tool_call>")
    assert theirs[close - 1] == theirs[0]  # the closing tag's weight, on the newline before it
    ours = RestWeighting()(label_regions(sampled), progress=0.0)
    assert ours[at] == ours[at + 1] == ours.max()
    assert ours[close] == ours[0]
    assert label_regions(sampled)[close] == TokenRegion.FORMAT
