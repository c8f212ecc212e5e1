"""Rewards of a user's own, by name: in this process, in processes of their own, over HTTP, on several ranks.

1. one function: its numbers under its name, its claims and no others, its arguments
2. several with weights; the built-in rule and an environment's reward among them
3. turns, calls and tokens: where their rewards lie
4. what fails masks its rollout and is counted; what fails always ends the run
5. worker processes: time limits, ends and prints hurt nobody else
6. servers: batches, repeated requests, refusals
7. ranks agree about a reward that says another thing at every call, and it is asked once
"""

from __future__ import annotations

import http.server
import json
import os
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from megatron_rest.config import AdvantageConfig, ConfigError, RewardConfig, WeightingConfig
from megatron_rest.errors import RunError
from megatron_rest.regions import TOOLRL
from megatron_rest.trainer.judge import Judge, Verdict
from megatron_rest.trainer.step_metrics import reward_metrics
from megatron_rest.types import PromptSample, Rollout, RolloutGroup, StopReason
from megatron_rest.weighting import CreditRows, find_credit
from tests.helpers.distributed import run_distributed

TABLE = [*(bytes([i]) for i in range(256)), b"<|im_end|>"]
END = 256
REFERENCE = TOOLRL.write([("w", {"city": "Bern"})], thought="t")

FUNCTIONS = """
import os, random, time
from megatron_rest.rewards.functions import Reward

def brevity(answer, *, target=10):
    return -abs(len(answer.text) - target)

def sees(answer):
    return {"value": 1.0, "parts": {"tools": len(answer.tools), "level": answer.metadata["level"]},
            "accuracy": 0.5, "findings": [answer.reference[:7], answer.messages[0]["content"]]}

def fine(answer):
    return Reward(value=1.0, turns=tuple(10.0 * (i + 1) for i in range(len(answer.turns))),
                  calls=tuple(100.0 for _ in range(answer.num_calls)))

def every_token(answer):
    return Reward(tokens=[float(t == "x") for t in answer.tokens])

def picky(answer):
    if "bad" in answer.text:
        raise KeyError("no such thing")
    return 1

def never(answer):
    raise RuntimeError("not today")

def nonsense(answer):
    return {"valeu": 1}

def dice(answer):
    with open(os.environ["ASKED"], "a") as file:
        file.write(answer.text + "\\n")
    return random.random()

def slow(answer):
    print("a line that is no reply")
    if "sleep" in answer.text:
        time.sleep(600)
    if "die" in answer.text:
        os._exit(3)
    return 2.0

class Judge:
    def __init__(self, answer):
        pass
"""


@pytest.fixture(scope="module", autouse=True)
def package(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("my folder")
    (folder / "myrewards.py").write_text(FUNCTIONS)
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))


def ids(text: str) -> np.ndarray:
    return np.array([*text.encode(), END], np.int32)


def rollout(*parts: str, reason: StopReason = StopReason.EOS, reward: float | None = None) -> Rollout:
    """Turns of the policy and what tools say, in turns."""
    tokens = [ids(part) for part in parts]
    mask = [np.full(len(part), number % 2 == 0) for number, part in enumerate(tokens)]
    joined = np.concatenate(tokens)
    return Rollout(
        prompt_id="p", token_ids=joined, log_probs=np.zeros(len(joined), np.float32), loss_mask=np.concatenate(mask),
        stop_reason=reason, policy_version=0, reward=reward,
    )  # fmt: skip


def prompt() -> PromptSample:
    return PromptSample(
        prompt_id="p", token_ids=ids("q"), ground_truth=REFERENCE,
        messages_json='[{"role": "user", "content": "asked"}]', metadata_json='{"level": 3}',
        tools_json='[{"name": "w", "description": "", "parameters": {"type": "object", "properties": {}}}]',
    )  # fmt: skip


def verdict(config: RewardConfig, *rollouts: Rollout) -> Verdict:
    judge = Judge(TABLE, reward=config, advantage=AdvantageConfig(), stop_token_ids=(END,))
    try:
        return judge([RolloutGroup(prompt=prompt(), rollouts=rollouts)], step=1)
    finally:
        if judge.terms is not None:
            judge.terms.close()


def test_one_function_and_nothing_that_it_did_not_say() -> None:
    config = RewardConfig(function="myrewards:brevity", arguments={"target": 5})
    found = verdict(config, rollout("12345"), rollout("123456789"))
    assert [r.total for r in found.rewards] == [0.0, -4.0]
    assert found.samples[0].advantage == -found.samples[1].advantage > 0
    metrics = reward_metrics(found, num_groups=1)
    assert metrics["reward/brevity"] == metrics["reward/total"] == metrics["reward/static"] == -2.0
    for claim in ("accuracy", "format_valid", "format", "correctness", "failed"):
        assert f"reward/{claim}" not in metrics


def test_a_function_sees_the_row_and_may_claim() -> None:
    found = verdict(RewardConfig(function="myrewards:sees"), rollout("x"))
    metrics = reward_metrics(found, num_groups=1)
    assert (metrics["reward/sees/tools"], metrics["reward/sees/level"]) == (1.0, 3.0)
    assert metrics["reward/accuracy"] == 0.5 and "reward/format_valid" not in metrics
    assert found.rewards[0].detail == (f"sees: {REFERENCE[:7]}", "sees: asked")


def test_an_environments_reward_claims_neither_format_nor_accuracy() -> None:
    found = verdict(RewardConfig(), rollout("x", reward=0.75), rollout("y", reward=0.25))
    metrics = reward_metrics(found, num_groups=1)
    assert metrics["reward/environment"] == metrics["reward/total"] == 0.5
    assert not {"reward/accuracy", "reward/format_valid", "reward/format", "reward/correctness"} & metrics.keys()


def test_several_are_added_up_by_weight() -> None:
    terms = {
        "tool_call": {"weight": 2.0},
        "environment": {"weight": 0.5},
        "short": {"function": "myrewards:brevity", "weight": 0.25, "arguments": {"target": 0}},
    }
    found = verdict(
        RewardConfig(terms=terms, schedule=False), rollout(REFERENCE, reward=8.0), rollout("no", reward=4.0)
    )
    length = len(REFERENCE)
    assert found.rewards[0].total == 2 * 4.0 + 0.5 * 8.0 - 0.25 * length
    metrics = reward_metrics(found, num_groups=1)
    assert metrics["reward/tool_call"] == pytest.approx((4.0 - 3.0) / 2)
    assert metrics["reward/environment"] == 6.0 and metrics["reward/short"] == -(length + 2) / 2
    assert (metrics["reward/accuracy"], metrics["reward/format_valid"]) == (0.5, 0.5)
    scheduled = verdict(RewardConfig(terms=terms), rollout(REFERENCE, reward=8.0))
    assert scheduled.static_rewards[0] == found.rewards[0].total


def test_turns_calls_and_tokens_earn_where_they_stand() -> None:
    call = TOOLRL.write([("w", {"city": "Bern"})])
    found = verdict(RewardConfig(function="myrewards:fine"), rollout(call, "seen", "done"))
    earned = found.rewards[0].token_rewards
    assert earned is not None and found.rewards[0].total == 1.0 + 10.0 + 20.0 + 100.0
    first, last = len(call), len(call) + len("seen") + 1 + len("done") + 1
    assert {int(i): float(earned[i]) for i in np.flatnonzero(earned)} == {
        first: 10.0,  # the turn's end
        last: 20.0,
        call.rindex('"}', 0, len(call)) + 1: 100.0,  # the last of the arguments
    }
    found = verdict(RewardConfig(function="myrewards:every_token"), rollout("axx", "xx", "x"))
    earned = found.rewards[0].token_rewards
    assert earned is not None and np.flatnonzero(earned).tolist() == [1, 2, 7], "a tool's text earns nothing"
    told = found.rewards[0].is_rewarded
    assert told is not None and told.tolist() == [True] * 4 + [False] * 3 + [True] * 2, "0 was said of the others"
    [sample] = found.samples
    assert sample.token_rewards is not None
    assert np.isfinite(sample.token_rewards).tolist() == sample.loss_mask.tolist()


def test_what_turns_earn_becomes_their_tokens_advantage() -> None:
    """From the built-in reward by turn to advantages, by the numbers of the authors' formula written out."""
    call, other = TOOLRL.write([("w", {"city": "Bern"})]), TOOLRL.write([("w", {"city": "Rome"})])
    config = RewardConfig(function="matched_turns")
    found = verdict(config, rollout(call, "seen", "done"), rollout(other, "seen", "done"), rollout("no"))
    assert [r.total for r in found.rewards] == [1.0, 2 / 3, 0.0]
    assert found.rewards[0].parts == {"matched_turns": 1.0, "matched_turns/matched": 1.0, "matched_turns/missing": 0.0}
    rule = find_credit(WeightingConfig(source="matchtir"))
    rows = CreditRows.of_samples(found.samples, rewards=found.scored_rewards, progress=0.0)
    advantages = rule.credit(rows).check(rows, rule.traits, "matchtir").advantages
    assert advantages is not None
    first = (np.array([1.0, 2 / 3, 0.0]) - 5 / 9) / (np.std([1.0, 2 / 3, 0.0], ddof=1) + 1e-6)
    whole = np.array([s.advantage for s in found.samples])
    wanted = [[(whole[0] + first[0]) / 2, whole[0] / 2], [(whole[1] + first[1]) / 2, whole[1] / 2], [whole[2]]]
    for i, turns in enumerate(wanted):  # second turns earned 0 both: compared with each other
        mine = rows.sequence == i
        got = [advantages[mine & (rows.turn == j)] for j in range(len(turns))]
        for numbers, want in zip(got, turns, strict=True):
            np.testing.assert_allclose(numbers, want, rtol=1e-12)


@pytest.mark.parametrize("workers", [0, 1])
def test_what_fails_masks_its_rollout_and_is_counted(workers: int, caplog: pytest.LogCaptureFixture) -> None:
    config = RewardConfig(function="myrewards:picky", workers=workers)
    rollouts = rollout("a"), rollout("bad"), rollout("b"), rollout("c", reason=StopReason.TOOL_FAILED)
    found = verdict(config, *rollouts)
    assert found.is_judged == (True, False, True, False)
    assert [bool(sample.loss_mask.any()) for sample in found.samples] == list(found.is_judged)
    assert "KeyError" in found.rewards[1].detail[0] and "failed on 1 of 3" in caplog.text
    metrics = reward_metrics(found, num_groups=1)
    assert (metrics["reward/not_judged"], metrics["reward/failed"]) == (0.5, 0.5) and metrics["reward/total"] == 1.0


@pytest.mark.parametrize("name", ["never", "nonsense"])
def test_what_fails_always_ends_the_run(name: str) -> None:
    with pytest.raises(
        RunError, match=rf"reward.function myrewards:{name} judged none of 2 rollouts: .*(not today|valeu)"
    ):
        verdict(RewardConfig(function=f"myrewards:{name}"), rollout("a"), rollout("b"))


def test_a_process_that_hangs_or_ends_takes_one_answer_with_it() -> None:
    config = RewardConfig(function="myrewards:slow", workers=1, call_timeout_seconds=1.0)
    found = verdict(config, rollout("a"), rollout("sleep"), rollout("die"), rollout("b"))
    assert found.is_judged == (True, False, False, True)
    assert "within 1 s" in found.rewards[1].detail[0] and "status 3" in found.rewards[2].detail[0]
    here = verdict(replace(config, workers=0, call_timeout_seconds=0.2), rollout("a"), rollout("sleep"))
    assert here.is_judged == (True, False) and "took longer than 0.2 s" in here.rewards[1].detail[0]


class _Server(http.server.BaseHTTPRequestHandler):
    asked: ClassVar[list[int]] = []
    replies: ClassVar[list[Any]] = []  # before the right ones

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        texts = [answer["text"] for answer in asked["answers"]]
        self.asked.append(len(texts))
        said: Any = [{"error": "no idea"} if t == "odd" else asked["arguments"]["pay"] * len(t) for t in texts]
        reply = self.replies.pop(0) if self.replies else said
        self.send_response(reply if isinstance(reply, int) else 200)
        self.end_headers()
        self.wfile.write(json.dumps({"rewards": reply}).encode())

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    _Server.asked, _Server.replies = [], []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Server) as listening:
        thread = threading.Thread(target=listening.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{listening.server_address[1]}/judge"
        listening.shutdown()
        thread.join()


def test_a_server_is_asked_in_batches_and_again(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_rest.rewards.server._FIRST_PAUSE", 0.0)
    config = RewardConfig(function=server, arguments={"pay": 2}, batch_size=2)
    found = verdict(config, *(rollout("x" * n) for n in (1, 2, 3)), rollout("odd"))
    assert [r.total for r in found.rewards] == [2.0, 4.0, 6.0, 0.0] and sorted(_Server.asked) == [2, 2]
    assert found.is_judged == (True, True, True, False) and "no idea" in found.rewards[3].detail[0]
    assert reward_metrics(found, num_groups=1)["reward/server"] == 4.0
    _Server.asked, _Server.replies = [], [503, [1.0], "what"]
    assert verdict(config, rollout("xx"), rollout("x")).is_judged == (True, True) and len(_Server.asked) == 4
    _Server.asked, _Server.replies = [], [404]
    with pytest.raises(RunError, match=r"judged none of 1 rollouts: .* answered 404"):
        verdict(config, rollout("x"))
    assert len(_Server.asked) == 1, "the same request would be refused again"


def on_a_rank(rank: int, world_size: int, folder: str, asked: str) -> tuple[list[float], int]:
    sys.path.insert(0, folder)
    os.environ["ASKED"] = asked
    judge = Judge(
        TABLE, reward=RewardConfig(function="myrewards:dice"), advantage=AdvantageConfig(), stop_token_ids=(END,)
    )
    groups = [RolloutGroup(prompt=prompt(), rollouts=(rollout("a"), rollout("b"), rollout("c")))]
    first = [r.total for r in judge(groups, step=1).rewards]
    assert [r.total for r in judge(groups, step=1).rewards] == first, "a step that judges twice asks once"
    return first, len(Path(asked).read_text().split())


def test_ranks_agree_and_each_rollout_is_asked_about_once(package: Path, tmp_path: Path) -> None:
    results = run_distributed(on_a_rank, 2, str(package), str(tmp_path / "asked"))
    assert results[0][0] == results[1][0] and len(set(results[0][0])) == 3
    assert sorted((tmp_path / "asked").read_text().split()) == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"function": "myrewards:brevity", "arguments": {"aim": 3}}, r"called as brevity\(answer, aim=3\).*'aim'"),
        ({"function": "myrewards:absent"}, "defines no absent"),
        ({"function": "nowhere:f"}, "there is no package nowhere"),
        ({"terms": {"one": {"function": "myrewards:picky", "wieght": 2}}}, "did you mean weight"),
        ({"terms": {"total": {"function": "myrewards:picky"}}}, "none of accuracy"),
        ({"terms": {"one": {}}}, "reward.terms.one.function is empty"),
        ({"terms": {"one": "myrewards:picky"}, "function": "myrewards:never"}, "leave those two out"),
        ({"function": "tool_cal"}, "did you mean tool_call"),
        ({"function": "tool_call", "arguments": {"x": 1}}, "takes no arguments"),
        ({"function": "matched_turns", "arguments": {"x": 1}}, "called as matched_turns.answer, x=1.*'x'"),
        ({"function": "ftp://x/y"}, "begins with http"),
    ],
)
def test_what_cannot_work_is_refused_at_the_start(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        verdict(RewardConfig(**config), rollout("a"))
