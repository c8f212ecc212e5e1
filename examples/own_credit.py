"""A rule of token credit of your own, in one class; any training command takes it by name.

    python examples/own_credit.py                                  # what it gives to two answers, beside others' rules

    cd examples && torchrun ... -m megatron_rest.trainer ... \\
        weighting.source=own_credit:BlameCalls weighting.options.boost=2.0

The idea: an answer that did worse than its siblings usually did so by what it called, not by what it thought.  So in
failures the tokens of calls get more of the weight, in successes all get the same.  The rule declares that it looks at
one rollout at a time, measures nothing, and gives weights of mean 1: so nothing is scored for it, nothing is sent
between ranks, and the trainer checks the mean.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_rest.regions import label_regions
from megatron_rest.types import TokenRegion, TrainSample
from megatron_rest.weighting import Credit, CreditRows, CreditRule, CreditTraits, Normalisation, find_credit

__all__ = ["BlameCalls"]


@dataclass(frozen=True)
class BlameCalls(CreditRule):
    """``boost``: how much more a token of a call weighs in a failure, before the mean is made 1."""

    boost: float = 1.0
    traits = CreditTraits(normalisation=Normalisation.ROLLOUT)

    def __post_init__(self) -> None:
        if self.boost < 0:
            raise ValueError(f"boost is {self.boost}, expected a number >= 0")

    def credit(self, rows: CreditRows) -> Credit:
        """float64 [N] weights of the step's N loss tokens, or of those of one microbatch: the same."""
        is_call = np.isin(rows.regions, [TokenRegion.TOOL_NAME, TokenRegion.TOOL_ARGS])
        has_failed = rows.each(rows.advantages < 0)
        return Credit(weights=rows.mean_one(1.0 + self.boost * (is_call & has_failed)))


ANSWERS = (
    '<think> Paris </think> \n <tool_call> {"name": " weather ", "parameters": {"city":"Paris"} } </tool_call>',
    '<think> Paris </think> \n <tool_call> {"name": " search ", "parameters": {"q":"?"} } </tool_call>',
)


def main() -> None:
    from megatron_rest.config import WeightingConfig

    samples, words = [], []
    for number, (answer, advantage) in enumerate(zip(ANSWERS, (1.0, -1.0), strict=True)):
        pieces = answer.split(" ")
        words.append(pieces)
        regions = label_regions([piece.encode() for piece in pieces])
        samples.append(
            TrainSample(
                token_ids=np.arange(len(pieces) + 1, dtype=np.int32),
                loss_mask=np.arange(len(pieces) + 1) > 0,
                region_ids=np.concatenate([[0], regions]).astype(np.int8),
                rollout_log_probs=np.zeros(len(pieces) + 1, np.float32),
                advantage=advantage,
                sequence_id=number,
                group_id=0,
            )
        )
    rows = CreditRows.of_samples(samples, rewards=[4.0, 1.0], progress=0.0)
    rules = {
        "constant": find_credit(WeightingConfig()),
        "hicra": find_credit(WeightingConfig(source="hicra")),
        "BlameCalls": BlameCalls(boost=2.0),
    }
    columns = []
    for name, rule in rules.items():
        credit = rule.credit(rows).check(rows, rule.traits, name)
        weights = np.ones(len(rows.sequence)) if credit.weights is None else credit.weights
        advantages = rows.each(rows.advantages) if credit.advantages is None else credit.advantages
        columns.append(weights * advantages)
    print(f"{'token':<20}{'region':<12}" + "".join(f"{name:>12}" for name in rules) + "   weight x advantage")
    for i, word in enumerate(word for pieces in words for word in pieces):
        region = TokenRegion(int(rows.regions[i])).name.lower()
        print(f"{word!r:<20}{region:<12}" + "".join(f"{column[i]:>12.3f}" for column in columns))


if __name__ == "__main__":
    main()
