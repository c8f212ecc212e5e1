"""Rollouts to read: a line of JSON each, with the row that they answer, beside the arrays of ``rollout_file.py``.

    RUN_DIR/rollouts/step_000020.jsonl

Every step leaves some (``trainer.samples_per_step``), one whose arrays are saved all of them, in the arrays' order.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

__all__ = ["FIELDS", "read_sample_rows", "sample_files", "sample_path", "write_samples"]

FIELDS = {
    "step": "RL step, from 1",
    "index": "place among the step's rollouts, as in the arrays",
    "prompt_id": "of the row",
    "group": "place of its prompt in the step",
    "sibling": "place in the group",
    "policy_version": "of the weights that sampled its last token",
    "oldest_version": "of those that sampled its oldest",
    "stop_reason": "as `stop/...` in the metrics",
    "is_judged": "false: it carries no loss, `findings` say why",
    "prompt": "as the policy saw it, template included",
    "messages": "the prompt before the template",
    "tools": "the row's tools with their schemas",
    "metadata": "the row's other columns",
    "reference": "the reference answer",
    "answer": "what followed the prompt, tool outputs included",
    "regions": "runs of the answer: `[region, text]`; `context` is what the policy has not written",
    "reward": "`total`, `static` (without the schedule), and every part that the reward gave",
    "token_rewards": "`[token of the answer, reward]` of tokens that earned something of their own",
    "advantage": "of the rollout",
    "findings": "what was wrong, a line each",
}
"""Fields of a line, and what they hold."""
_FILE = re.compile(r"step_(\d{6,})\.jsonl")


def sample_path(run_dir: str | Path, step: int) -> Path:
    """Where the samples of ``step`` are."""
    return Path(run_dir) / "rollouts" / f"step_{step:06d}.jsonl"


def sample_files(run_dir: str | Path) -> list[tuple[int, Path]]:
    """(step, file) of every step that left samples, in order."""
    found = [(_FILE.fullmatch(path.name), path) for path in (Path(run_dir) / "rollouts").glob("*.jsonl")]
    return sorted((int(match[1]), path) for match, path in found if match)


def write_samples(run_dir: str | Path, step: int, rows: Iterable[Mapping[str, Any]]) -> Path:
    """Write the file of this step, the whole or nothing of it; an older one is replaced."""
    path = sample_path(run_dir, step)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with partial.open("w", encoding="utf-8", errors="replace") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    return path


def read_sample_rows(path: str | Path) -> list[dict[str, Any]]:
    """The lines of one file.  Raises ValueError naming the one that is damaged."""
    rows = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").split("\n")[:-1], 1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path} line {number} is damaged: {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path} line {number} is damaged: it is no object")
        rows.append(row)
    return rows
