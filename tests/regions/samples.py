"""Reference answers of the repository's sample data."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pyarrow.parquet as pq

SAMPLES = Path(__file__).resolve().parents[2] / "data_tools" / "samples"


@cache
def sample_answers() -> list[str]:
    """Answers with real thoughts (SFT rows), then with placeholder thoughts (RL test rows)."""
    sft = [row["output"] for row in json.loads((SAMPLES / "rlla_sft.json").read_text())]
    rl = [row["reward_model"]["ground_truth"] for row in pq.read_table(SAMPLES / "test.parquet").to_pylist()]
    return sft + rl
