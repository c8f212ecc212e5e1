"""Every key that a run logs is in one table, which docs/metrics.md shows."""

from __future__ import annotations

from pathlib import Path

from megatron_rest.analysis.metric_table import METRICS, find_metric, table
from megatron_rest.analysis.series import PHASES, REGIONS

ROOT = Path(__file__).resolve().parents[2]


def test_the_document_shows_the_table() -> None:
    assert table() in (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")


def test_keys_are_found_by_the_most_particular_row() -> None:
    assert len({metric.key for metric in METRICS}) == len(METRICS)
    for metric in METRICS:
        if "{" not in metric.key:
            assert find_metric(metric.key) is metric
    for key, row in {
        "reward/brevity": "reward/{term}",
        "reward/brevity/words": "reward/{term}/{part...}",
        "reward/brevity/a/b": "reward/{term}/{part...}",
        "stop/tool_timeout": "stop/{reason}",
        "validation/bfcl/simple_python/accuracy": "validation/{benchmark}/{category}/accuracy",
        **{f"seconds/{phase}": f"seconds/{phase}" for phase in PHASES},
        **{f"entropy/{region}": "entropy/{region}" for region in REGIONS},
    }.items():
        found = find_metric(key)
        assert found is not None and found.key == row, key
    assert find_metric("rewards/total") is None and find_metric("loss/nonsense") is None
