"""How well predicted calls match the reference's: S_acc in [0, 1] (paper Eq. 10-13, published code).

    S = (Jaccard(names) + sum over reference calls of best(Jaccard(parameter names) + equal values))
        / (1 + sum over reference calls of (1 + number of its parameters))

Texts are compared in NFC.  Jaccard is of multisets.
Each reference call, in order, takes the best unused predicted call of its name (greedy).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

from megatron_rest.rewards.findings import Finding
from megatron_rest.rewards.parsing import ToolCall, canonical
from megatron_rest.token_region import TokenRegion

__all__ = ["call_likeness", "match_calls"]

_MAX_SHOWN = 80  # characters of a value in a message


def match_calls(
    reference: Sequence[ToolCall], predicted: Sequence[ToolCall], *, granularity: str = "fine"
) -> tuple[float, list[Finding]]:
    """S_acc and what kept it below 1.  ``granularity`` as in :class:`RewardConfig`."""
    if [call.raw for call in reference] == [call.raw for call in predicted]:
        return 1.0, []
    reference, predicted = [_canonical(call) for call in reference], [_canonical(call) for call in predicted]
    strict_sets = granularity == "exact_sets"
    whole = granularity == "whole_calls"
    names = [_key(call.name) for call in reference], [_key(call.name) for call in predicted]
    score, possible = _jaccard(*names, strict_sets), 1.0
    used: set[int] = set()
    findings: list[Finding] = []
    for call in reference:
        possible += 1.0 if whole else 1.0 + len(call.parameters)
        best_score, best = 0.0, None
        for i, candidate in enumerate(predicted):
            if i in used or candidate.name != call.name:
                continue
            candidate_score = float(call.raw == candidate.raw) if whole else _call_score(call, candidate, strict_sets)
            if candidate_score > best_score:
                best_score, best = candidate_score, i
        if best is None:
            findings.append(Finding(region=TokenRegion.TOOL_NAME, message=f"no matching call of {_show(call.name)}"))
            continue
        used.add(best)
        score += best_score
        findings += _parameter_findings(call, predicted[best], best)
    for i, extra in enumerate(predicted):
        if i not in used:
            message = f"call of {_show(extra.name)} matches no reference call"
            findings.append(Finding(region=TokenRegion.TOOL_NAME, call=i, message=message))
    return (0.0 if granularity == "coarse" else score / possible), findings


def call_likeness(reference: ToolCall, predicted: ToolCall) -> float:
    """How much of one reference call a call has, in [0, 1]: name, parameter names and values; 0 of another name."""
    reference, predicted = _canonical(reference), _canonical(predicted)
    if reference.name != predicted.name:
        return 0.0
    return (1.0 + _call_score(reference, predicted, strict_sets=False)) / (2.0 + len(reference.parameters))


def _canonical(call: ToolCall) -> ToolCall:
    return ToolCall(name=canonical(call.name), parameters=canonical(call.parameters), raw=canonical(call.raw))


def _call_score(reference: ToolCall, predicted: ToolCall, strict_sets: bool) -> float:
    equal = sum(
        key in predicted.parameters and predicted.parameters[key] == value
        for key, value in reference.parameters.items()
    )
    return _jaccard(list(reference.parameters), list(predicted.parameters), strict_sets) + equal


def _jaccard(first: list[Any], second: list[Any], strict: bool) -> float:
    """Multiset Jaccard, 1 for equal lists (empty ones too); ``strict``: 0 unless the lists are equal in order."""
    if first == second:
        return 1.0
    if strict or not first or not second:
        return 0.0
    common = (Counter(first) & Counter(second)).total()
    return common / (len(first) + len(second) - common)


def _key(name: Any) -> Any:
    """A name that is no string (a list, say) cannot be counted, and can match no reference name but itself."""
    return name if isinstance(name, str) else ("not a string", json.dumps(name))


def _parameter_findings(reference: ToolCall, predicted: ToolCall, index: int) -> list[Finding]:
    messages = []
    for key, value in reference.parameters.items():
        if key not in predicted.parameters:
            messages.append(f"parameter {_show(key)} is missing, expected {_show(value)}")
        elif predicted.parameters[key] != value:
            messages.append(f"parameter {_show(key)}: expected {_show(value)}, got {_show(predicted.parameters[key])}")
    messages += [
        f"parameter {_show(key)} is not wanted" for key in predicted.parameters if key not in reference.parameters
    ]
    return [Finding(region=TokenRegion.TOOL_ARGS, call=index, message=message) for message in messages]


def _show(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _MAX_SHOWN else text[:_MAX_SHOWN] + "..."
