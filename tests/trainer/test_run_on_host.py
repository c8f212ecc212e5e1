"""A whole tiny RL run on the second supported line of Megatron-Core: roll out, judge, update, save, go on from there.

``make test-host`` runs it; ``test_run.py`` has the same on the first line, in many more ways.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from megatron_rest.commands import tiny
from tests.helpers import forked

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not os.environ.get("MEGATRON_REST_HOST"), reason="for the second line of Megatron-Core: make test-host"
    ),
]


def call(*arguments: str, ranks: int = 0) -> None:
    done = forked.run_module(*arguments, ranks=ranks)
    assert done.returncode == 0, f"{' '.join(arguments)} failed:\n{done.stdout[-3000:]}\n{done.stderr[:8000]}"


def test_a_run_trains_saves_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny, "run_command", lambda *arguments: call(*arguments))
    base, run_dir = tiny.make_base(tmp_path / "base"), tmp_path / "run"
    arguments = [
        "megatron_rest.trainer", f"model.path={base / 'model'}", f"data.train={base / 'train'}",
        f"trainer.run_dir={run_dir}", "model.max_sequence_length=352", "data.max_prompt_tokens=256",
        "rollout.max_response_tokens=96", "trainer.max_tokens_per_microbatch=1024", "data.prompts_per_step=4",
        "rollout.rollouts_per_prompt=2", "optimizer.lr=1e-3", "loss.entropy_coef=0.01",
        "parallel.tensor_parallel=2", "checkpoint.save_every=1",
    ]  # fmt: skip
    call(*arguments, "trainer.steps=1", ranks=2)
    call(*arguments, "trainer.steps=2", ranks=2)
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    assert all(row["metrics"]["optimizer/grad_norm"] > 0 for row in rows)
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == ["step_000001", "step_000002"]
    starts = [json.loads(line) for line in (run_dir / "starts.jsonl").read_text().splitlines()]
    assert [start["after_step"] for start in starts] == [0, 1], "the second start went on from the first's checkpoint"
    assert (run_dir / "hf" / "model.safetensors").is_file()
