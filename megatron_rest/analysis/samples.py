"""Rollouts worth reading: the best and the worst of the first and the last saved step, token by token.

Page and terminal show the same ones; each token says its region, its weight and the policy's entropy there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_rest.token_region import TokenRegion

if TYPE_CHECKING:
    from megatron_rest.data.rollout_file import SavedRollouts

__all__ = ["REGION_WORDS", "SampleRollout", "SampleToken", "read_samples"]

MAX_TOKENS = 1200  # of one rollout; what is left out is counted
REGION_WORDS = {
    TokenRegion.FORMAT: "format",
    TokenRegion.TOOL_NAME: "tool name",
    TokenRegion.TOOL_ARGS: "arguments",
    TokenRegion.THINK: "thinking",
    TokenRegion.RESPONSE: "response",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleToken:
    """One token after the prompt."""

    text: str  # half characters replaced
    region: TokenRegion  # CONTEXT: a tool's output, or sampled text that the run's regions leave out
    weight: float
    entropy: float  # nats
    is_sampled: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleRollout:
    """One rollout, with the row that it answers where the run has left that to read."""

    step: int
    reward: float
    advantage: float
    num_tokens: int
    tokens: tuple[SampleToken, ...]  # the first of them
    prompt: str = ""
    reference: str = ""
    findings: tuple[str, ...] = ()

    @property
    def num_left_out(self) -> int:
        return self.num_tokens - len(self.tokens)

    @property
    def heading(self) -> str:
        return f"Step {self.step}, reward {self.reward:.3f}, advantage {self.advantage:+.3f}, {self.num_tokens} tokens"


def read_samples(run_dir: Path, tokenizer: Any) -> list[SampleRollout]:
    """``tokenizer`` has ``get_vocab``.  Nothing if the run has saved no rollouts; ValueError if a file is damaged."""
    from megatron_rest.data.rollout_file import read_rollouts, rollout_files
    from megatron_rest.data.sample_file import read_sample_rows, sample_path
    from megatron_rest.regions import token_bytes_table

    files = rollout_files(run_dir)
    table = token_bytes_table(tokenizer)
    found = []
    for path in dict([files[0], files[-1]]).values() if files else ():
        rollouts = read_rollouts(path)
        order = np.argsort(rollouts.rewards, kind="stable")
        told = sample_path(run_dir, rollouts.step)
        rows = {row.get("index"): row for row in read_sample_rows(told)} if told.is_file() else {}
        found += [_sample(rollouts, i, table, rows.get(i, {})) for i in dict.fromkeys((int(order[-1]), int(order[0])))]
    return found


def _sample(rollouts: SavedRollouts, index: int, table: Sequence[bytes], row: Mapping[str, Any]) -> SampleRollout:
    at = rollouts.slices[index]
    start = at.start + int(np.argmax(rollouts.loss_mask[at]))
    return SampleRollout(
        step=rollouts.step,
        reward=float(rollouts.rewards[index]),
        advantage=float(rollouts.advantages[index]),
        num_tokens=at.stop - start,
        prompt=str(row.get("prompt", "")),
        reference=str(row.get("reference", "")),
        findings=tuple(map(str, row.get("findings", ()))),
        tokens=tuple(
            SampleToken(
                text=table[int(rollouts.token_ids[i])].decode("utf-8", errors="replace"),
                region=TokenRegion(int(rollouts.region_ids[i])),
                weight=float(rollouts.token_weights[i]),
                entropy=float(rollouts.entropy[i]),
                is_sampled=bool(rollouts.loss_mask[i]),
            )
            for i in range(start, min(at.stop, start + MAX_TOKENS))
        ),
    )
