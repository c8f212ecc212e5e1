"""Two rewards: one for every call of an answer, one for the answer as a whole."""

from __future__ import annotations

from megatron_rest.rewards import read_reference
from megatron_rest.rewards.functions import Reward, RewardInput


def calls_match(answer: RewardInput, *, extra: float = -0.5) -> Reward:
    """Each call earns 1 if the reference makes it, ``extra`` if not: credit that lies on the call's own tokens."""
    wanted = [(call.name, call.parameters) for call in read_reference(answer.reference).calls]
    earned, findings = [], []
    for turn in answer.turns:
        for call in turn.calls:
            made = (call["name"], call["arguments"])
            if made in wanted:
                wanted.remove(made)
                earned.append(1.0)
            else:
                earned.append(extra)
                findings.append(f"{call['name']} is not in the reference")
    return Reward(
        calls=tuple(earned),
        parts={"missing": float(len(wanted)), "made": float(len(earned))},
        findings=tuple(findings),
    )


def brevity(answer: RewardInput, *, words: int = 60) -> float:
    """0 up to ``words`` words, then falling by 1 for every ``words`` more, to -1 at the least."""
    return -min(max(len(answer.text.split()) / words - 1.0, 0.0), 1.0)
