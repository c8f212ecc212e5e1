"""What the authors' published code computes (column R of the golden vectors), defects included, to compare against.

After ``recipe/custom/token_weighting.py`` and ``verl/utils/reward_score/rlla.py`` of
github.com/1229095296/ResT_Tool_use_LLM, commit d6c29b5 (Apache-2.0; the reward is Bytedance's copy of ToolRL's),
reduced to what decides the numbers: the regular expressions, the off-by-one token spans, the first-call-only search,
the order of reward tests.  Prints, environment switches and debug branches are left out.  Nothing in the library
imports this.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

__all__ = ["build_token_weight", "compute_score", "piece_tokenizer"]

Offsets = list[tuple[int, int]]
Tokenizer = Callable[[str], Offsets]

_THINK = r"<think>(.*?)</think>"
_RESPONSE = r"<response>(.*?)</response>"
_TOOL_CALL = r"<tool_call>(.*?)</tool_call>"
_BLOCK = r"(?:<tool_call>|<toolcall>)(.*?)(?:</tool_call>|</toolcall>)"
_NAME = r'"name"\s*:\s*"([^"]+)"'
_ARGS = r'"(?:arguments|parameters)"\s*:\s*'


def piece_tokenizer(pattern: re.Pattern[str]) -> Tokenizer:
    """Character offsets of the pieces that ``pattern`` finds: a tokenizer for tests."""
    return lambda text: [match.span() for match in pattern.finditer(text)]


def build_token_weight(texts: Sequence[str], loss_mask: Tensor, tokenizer: Tokenizer, *, step: int) -> Tensor:
    """Published weights, float32 ``[B, T]`` for a mask ``[B, T]``.  Tokenises the whole text again for every span."""
    gamma_args = min(0.6 + 0.002 * step, 1.2)
    gamma_think = min(0.6 + 0.002 * step, 1.0)
    weights = torch.zeros_like(loss_mask, dtype=torch.float32)
    for row, text in zip(weights, texts, strict=True):
        for pattern in (_THINK, _RESPONSE, _TOOL_CALL):
            for match in re.finditer(pattern, text, flags=re.S):
                start, end = match.span(0)
                _raise_to(row, text, start, start + text[start:end].find(">") + 1, 1.0, tokenizer)
                _raise_to(row, text, start + text[start:end].rfind("<"), end, 1.0, tokenizer)
                if pattern is _THINK:
                    _raise_to(row, text, *match.span(1), gamma_think, tokenizer)
        for match in re.finditer(_BLOCK, text, flags=re.S):
            block, base = match.group(1), match.start(1)
            if name := re.search(_NAME, block):
                _raise_to(row, text, base + name.start(1), base + name.end(1), 1.2, tokenizer)
            if (key := re.search(_ARGS, block)) and (brace := block.find("{", key.end())) >= 0:
                end = _closing_brace(block, brace)
                if end > brace:
                    _raise_to(row, text, base + brace, base + end, gamma_args, tokenizer)
    return torch.stack([_normalized(row, mask) for row, mask in zip(weights, loss_mask, strict=True)])


def _normalized(row: Tensor, mask: Tensor) -> Tensor:
    positive = (row > 0) & (mask != 0)
    if positive.any():
        clamped = row[positive].clamp(0.001, 8.0)
        row = row.clone()
        row[positive] = clamped / clamped.mean().clamp_min(1e-8)
    return row * (mask != 0).float()


def _raise_to(row: Tensor, text: str, start: int, end: int, value: float, tokenizer: Tokenizer) -> None:
    """Published span: from the first token that starts in it to the first that ends at its end, EXCLUSIVE."""
    offsets = tokenizer(text)
    low = next(i for i, (a, _) in enumerate(offsets) if a >= start)
    high = max(low + 1, next((i for i, (_, b) in enumerate(offsets) if b >= end), len(offsets)))
    row[low:high] = row[low:high].clamp_min(value)


def _closing_brace(text: str, start: int) -> int:
    depth, in_string, escaped = 0, False, False
    for i in range(start, len(text)):
        character = text[i]
        if in_string:
            if escaped:
                escaped = False
            elif character == "\\":
                escaped = True
            elif character == '"':
                in_string = False
        elif character == '"':
            in_string = True
        elif character == "{":
            depth += 1
        elif character == "}":
            depth -= 1
            if depth == 0:
                return i + 1
    return start


def compute_score(text: str, ground_truth: str, *, step: int, schedule: bool = True) -> tuple[float, float, float]:
    """Published reward: (total, format, correctness), SCHEDULEREWARD=1 or 0 and every other switch 0."""
    text = text.split("<|im_start|>assistant")[-1].split("<|im_end|>")[0].strip()
    format_max, format_min, correct_max, correct_min = 1.0, 0.0, 3.0, -3.0
    if schedule:
        format_max, format_min = max(1.0, 2 - step / 150), min(-1.0, -2 + 2 * step / 150)
        correct_max, correct_min = min(3.0, 2 + step / 150), max(-3.0, -2 - step / 150)
    format_reward = format_max if _format_passes(text, ground_truth) else format_min
    correctness = _correctness(text, ground_truth, correct_max, correct_min)
    return correctness + format_reward, format_reward, correctness


def _format_passes(text: str, answer: str) -> bool:
    wanted = [name for name in ("tool_call", "response") if f"<{name}>" in answer]
    if not wanted:
        return text.count("<think>") == 1 and text.count("</think>") == 1
    tags = ["<think>", "</think>"] + [tag for name in wanted for tag in (f"<{name}>", f"</{name}>")]
    if not all(tag in text for tag in tags):
        return False
    if wanted == ["tool_call"] and ("<response>" in text or "</response>" in text):
        return False
    positions = [text.find(tag) for tag in tags]
    in_order = all(a < b for a, b in pairwise(positions))
    return in_order and all(text.count(tag) == 1 for tag in tags[2:])


def _correctness(text: str, answer: str, best: float, worst: float) -> float:
    if "<tool_call>" not in answer:
        return 0.0
    reference = _calls(answer)
    try:
        assert "<tool_call>" in text
        assert "</tool_call>" in text
        return _match(reference, _calls(text), best, worst)
    except Exception:  # noqa: BLE001  the published code has a bare except here
        return worst


def _calls(text: str) -> list[Any]:
    return [json.loads(line) for line in text.split("<tool_call>")[1].split("</tool_call>")[0].strip().split("\n")]


def _jaccard(first: list[Any], second: list[Any]) -> float:
    if first == second:
        return 1.0
    if not first or not second:
        return 0.0
    counts = Counter(first), Counter(second)
    common = sum(min(counts[0][key], counts[1][key]) for key in counts[0].keys() & counts[1].keys())
    return common / (len(first) + len(second) - common)


def _match(reference: list[Any], predicted: list[Any], best: float, worst: float) -> float:
    if reference == predicted:
        return best
    score = _jaccard([call["name"] for call in reference], [call["name"] for call in predicted])
    possible, used = 1.0, set()
    for call in reference:
        possible += 1.0 + len(call["parameters"])
        top, top_index = 0.0, -1
        for i, candidate in enumerate(predicted):
            if i in used or candidate["name"] != call["name"]:
                continue
            parameters = candidate["parameters"]
            value = _jaccard(list(call["parameters"]), list(parameters))
            value += sum(1.0 for k, v in call["parameters"].items() if k in parameters and parameters[k] == v)
            if value > top:
                top, top_index = value, i
        if top_index >= 0:
            used.add(top_index)
            score += top
    return (best - worst) * score / possible + worst
