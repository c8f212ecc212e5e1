"""A reward for every turn from calls matched to the reference's: MatchTIR's turn rewards (arXiv 2601.10712).

    sim(call, reference call) = 0 if their names differ, else
        (1 + Jaccard(parameter names) + equal values) / (2 + number of the reference's parameters)
    pairs are matched from the most alike on, each call and each reference call once; a call earns its pair's sim
    r_j = mean over the calls of turn j; 0 for a turn without calls

As the authors' code does it (``compute_process_KM``, which pairs in this greedy order), but names and values are
compared as everywhere here (:mod:`megatron_rest.rewards.matching`), names with their case.  What the code adds for the
final answer, an F1 of words, is another term's affair: what an answer earns as a whole counts for its last turn.
Credit by turn: ``weighting.source=matchtir``.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_rest.rewards.functions import Reward, RewardInput
from megatron_rest.rewards.matching import call_likeness
from megatron_rest.rewards.parsing import ToolCall, read_reference

__all__ = ["match_pairs", "matched_turns"]


def matched_turns(answer: RewardInput, *, unmatched: float = 0.0) -> Reward:
    """``unmatched``: what a call earns that matches none (the authors' code has 0 and -0.5 by their side)."""
    wanted = read_reference(answer.reference).calls
    made = [
        (number, ToolCall(name=call["name"], parameters=dict(call["arguments"]), raw={}))
        for number, turn in enumerate(answer.turns)
        for call in turn.calls
    ]
    pairs = match_pairs([call for _, call in made], wanted)
    earned: list[list[float]] = [[] for _ in answer.turns]
    for i, (number, _) in enumerate(made):
        earned[number].append(pairs[i][1] if i in pairs else unmatched)
    missing = [call.name for j, call in enumerate(wanted) if j not in {j for j, _ in pairs.values()}]
    return Reward(
        turns=tuple(sum(values) / len(values) if values else 0.0 for values in earned),
        parts={"matched": float(len(pairs)), "missing": float(len(missing))},
        findings=tuple(f"no matching call of {name}" for name in missing),
    )


def match_pairs(made: Sequence[ToolCall], wanted: Sequence[ToolCall]) -> dict[int, tuple[int, float]]:
    """Call -> (reference call, likeness in (0, 1]); the most alike first, ties in the order of calls."""
    likeness = [(-call_likeness(w, m), i, j) for i, m in enumerate(made) for j, w in enumerate(wanted)]
    pairs: dict[int, tuple[int, float]] = {}
    taken: set[int] = set()
    for value, i, j in sorted(likeness):
        if value < 0 and i not in pairs and j not in taken:
            pairs[i] = (j, -value)
            taken.add(j)
    return pairs
