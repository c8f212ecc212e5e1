"""Two policies on the same prompts: numbers, regions of the answers, and a page that hostile text cannot break."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_rest.analysis.before_after import COMPARED_FILE, read_compared
from megatron_rest.analysis.page import _pair
from megatron_rest.analysis.series import MetricsFileError
from megatron_rest.config import ConfigError, RewardConfig
from megatron_rest.eval.prompt_sets import RESULT_FILE, compare_policies, judge_group
from megatron_rest.types import PromptSample, Rollout, RolloutGroup, StopReason, TokenRegion

HOSTILE = "<script>alert(1)</script>"


def row(reward: list[float], text: str) -> dict[str, Any]:
    return {
        "prompt_id": "p", "prompt": f"tools {HOSTILE}", "answer": [text] * len(reward), "reward": reward,
        "accuracy": [0.5] * len(reward), "format_valid": [1.0] * len(reward), "length": [7] * len(reward),
        "first_answer_regions": [["<think>", int(TokenRegion.FORMAT)], [text, int(TokenRegion.THINK)]],
    }  # fmt: skip


def store(folder: Path, rewards: list[list[float]], text: str, **settings: Any) -> Path:
    folder.mkdir()
    stored = {"settings": {"weights_sha256": text, **settings}, "sets": {"heldout": [row(r, text) for r in rewards]}}
    (folder / RESULT_FILE).write_text(json.dumps(stored))
    return folder


def test_change_over_prompts(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    first = random.normal(size=(40, 4))
    second = first + 0.5 + random.normal(size=(40, 4)) * 0.1
    before = store(tmp_path / "a", first.tolist(), "old")
    after = store(tmp_path / "b", second.tolist(), HOSTILE)
    compare_policies(before, after)
    [compared] = read_compared(after)
    reward = compared.measures[0]
    change = (second - first).mean(axis=1)
    assert (compared.prompts, compared.answers, reward.name) == (40, 4, "reward")
    assert reward.before == pytest.approx(first.mean())
    assert reward.difference == pytest.approx(change.mean())
    error = change.std(ddof=1) / np.sqrt(40)
    assert reward.low == pytest.approx(change.mean() - 1.96 * error, abs=0.5 * error)
    assert reward.high == pytest.approx(change.mean() + 1.96 * error, abs=0.5 * error)
    assert "heldout: 40 prompts x 4 answers" in compared.lines()[0]
    assert len(compared.examples) == 5
    example = compared.examples[0]
    assert (example.before.regions[1][0], example.after.regions[1][0]) == ("old", HOSTILE)
    page = _pair(example.prompt, example.before, example.after)
    assert "<script>" not in page
    assert page.count("&lt;script&gt;") == 2  # the prompt, the answer


def test_what_cannot_be_compared_is_refused(tmp_path: Path) -> None:
    before = store(tmp_path / "a", [[1.0]], "old", temperature=1.0)
    with pytest.raises(ConfigError, match=r"b has no prompt_sets\.json"):
        compare_policies(before, tmp_path / "b")
    after = store(tmp_path / "b", [[1.0]], "new", temperature=0.5)
    with pytest.raises(ConfigError, match="asked other prompts, or in another way"):
        compare_policies(before, after)
    (after / COMPARED_FILE).write_text('{"sets": [{}]}')
    with pytest.raises(MetricsFileError, match="is no comparison"):
        read_compared(after)
    assert read_compared(before) == []


@pytest.mark.parametrize("opened", ["", "<think>"])
def test_regions_of_an_answer_begin_where_the_prompt_ends(opened: str) -> None:
    text = '<think> so </think>\n<tool_call>\n{"name": "f", "parameters": {"x": 1}}\n</tool_call>'.removeprefix(opened)
    table = [bytes([i]) for i in range(256)]
    rollout = Rollout(
        prompt_id="p",
        policy_version=0,
        token_ids=np.frombuffer(text.encode(), np.uint8).astype(np.int32),
        loss_mask=np.ones(len(text), bool),
        log_probs=np.zeros(len(text), np.float32),
        stop_reason=StopReason.EOS,
    )
    prompt = PromptSample(
        prompt_id="p", token_ids=np.frombuffer(f"q {opened}".encode(), np.uint8).astype(np.int32), ground_truth=text
    )
    judged = judge_group(RolloutGroup(prompt=prompt, rollouts=(rollout,)), table, RewardConfig())
    regions = judged["first_answer_regions"]
    assert "".join(part for part, _ in regions) == text
    assert (" so ", int(TokenRegion.THINK)) in regions
    assert ("f", int(TokenRegion.TOOL_NAME)) in regions
    assert judged["prompt"] == f"q {opened}"
