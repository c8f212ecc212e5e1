"""The metrics file survives what happens to runs: kills, full disks, NaN, resumption."""

from __future__ import annotations

import dataclasses
import errno
import json
import logging
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from megatron_rest.trainer.metrics import MetricsFileError, MetricsWriter, PhaseTimer, SumCount, read_metrics
from megatron_rest.types import StepReport


def report(step: int, **metrics: float) -> StepReport:
    return StepReport(
        step=step, policy_version=step, metrics=metrics or {"reward/total": step / 7}, seconds={"total": 1.5}
    )


def write_steps(run_dir: Path, steps: range) -> Path:
    with MetricsWriter(run_dir, tensorboard=False) as writer:
        for step in steps:
            writer.write(report(step))
    return run_dir / "metrics.jsonl"


def test_numbers_come_back_bit_for_bit(tmp_path: Path) -> None:
    values: dict[str, float] = {"reward/total": 0.1 + 0.2, "loss/policy": -1e-300, "response/length": 12}
    values["numpy"] = np.float32(0.3)  # type: ignore[assignment]
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.write(report(1, **values))
    [row] = read_metrics(tmp_path / "metrics.jsonl")
    assert row == {
        "step": 1,
        "policy_version": 1,
        "metrics": {k: float(v) for k, v in values.items()},
        "seconds": {"total": 1.5},
    }


def test_nonfinite_values_are_null_and_named(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.write(
            StepReport(
                step=1,
                policy_version=0,
                metrics={"loss/policy": math.nan, "reward/total": 1.0, "optimizer/grad_norm": -math.inf},
                seconds={"rollout": math.inf},
            )
        )
    text = (tmp_path / "metrics.jsonl").read_text()
    assert "NaN" not in text and "Infinity" not in text
    row = json.loads(text)
    assert row["metrics"] == {"loss/policy": None, "reward/total": 1.0, "optimizer/grad_norm": None}
    assert row["nonfinite"] == ["loss/policy", "optimizer/grad_norm", "seconds/rollout"]
    assert read_metrics(tmp_path / "metrics.jsonl") == [row]


def test_a_line_cut_anywhere_costs_only_that_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_steps(tmp_path, range(1, 4))
    whole = path.read_bytes()
    start = whole.rindex(b"\n", 0, -1) + 1
    for cut in range(start + 1, len(whole)):
        path.write_bytes(whole[:cut])
        caplog.clear()
        assert [row["step"] for row in read_metrics(path)] == [1, 2]
        assert "line 3 is half-written" in caplog.text
        MetricsWriter(tmp_path, tensorboard=False).write(report(3))
        assert path.read_bytes() == whole


_ENDLESS_WRITER = """
import sys
from types import SimpleNamespace
from megatron_rest.trainer.metrics import MetricsWriter
with MetricsWriter(sys.argv[1], tensorboard=False) as writer:
    for step in range(1, 1_000_000):
        metrics = {f"metric/{i}": step / (i + 1) for i in range(500)}
        writer.write(SimpleNamespace(step=step, policy_version=step, metrics=metrics, seconds={"total": 1.0}))
"""


def test_killed_process_leaves_a_file_that_continues(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    process = subprocess.Popen([sys.executable, "-c", _ENDLESS_WRITER, str(tmp_path)])
    deadline = time.monotonic() + 120
    while not (path.exists() and path.stat().st_size > 200_000):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    rows = read_metrics(path)
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    assert all(len(row["metrics"]) == 500 for row in rows)
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.write(report(len(rows) + 1))
    assert len(read_metrics(path)) == len(rows) + 1


@pytest.mark.parametrize(
    ("line", "what"),
    [
        (b'{"step": 2, "metrics": {"a": 1.0', "delimiter"),
        (b'{"step": 2, "metrics": {"a": NaN}, "seconds": {}}', "NaN is not JSON"),
        (b'{"metrics": {}, "seconds": {}}', '"step"'),
        (b'{"step": 2, "metrics": {"a": "high"}, "seconds": {}}', "metrics/a is 'high'"),
        (b'{"step": 2, "metrics": {}}', '"seconds"'),
        (b'{"step": 1, "metrics": {}, "seconds": {}}', "step 1 follows step 1"),
        (b"\x00\x00\xff", ""),
        (b"", ""),
    ],
)
def test_a_damaged_line_is_refused_with_its_number(tmp_path: Path, line: bytes, what: str) -> None:
    path = write_steps(tmp_path, range(1, 4))
    lines = path.read_bytes().split(b"\n")
    lines[1] = line
    path.write_bytes(b"\n".join(lines))
    with pytest.raises(MetricsFileError, match=r"metrics\.jsonl line 2 is damaged") as caught:
        read_metrics(path)
    assert what in str(caught.value)
    with pytest.raises(MetricsFileError, match="line 2"):
        MetricsWriter(tmp_path, tensorboard=False)
    assert path.read_bytes() == b"\n".join(lines)  # nobody's file is mended behind their back


def test_missing_file_says_so(tmp_path: Path) -> None:
    with pytest.raises(MetricsFileError, match=r"cannot read .*No such file"):
        read_metrics(tmp_path / "metrics.jsonl")


def test_resume_drops_later_steps_and_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_steps(tmp_path, range(1, 6))
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"step": 6, "met')
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.resume(3)
        assert writer.last_step == 3
        assert path.read_bytes() == b"".join(whole.splitlines(keepends=True)[:3])
        writer.write(report(4))
        writer.write(report(5))
    assert path.read_bytes() == whole
    assert "half-written" in caplog.text and "dropped the 2 steps after step 3" in caplog.text
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


def test_resume_from_scratch_empties_the_file(tmp_path: Path) -> None:
    path = write_steps(tmp_path, range(1, 4))
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.resume(0)
        assert path.read_bytes() == b""
        writer.write(report(1))
    assert [row["step"] for row in read_metrics(path)] == [1]


def test_failed_replacement_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_steps(tmp_path, range(1, 4))
    whole = path.read_bytes()
    writer = MetricsWriter(tmp_path, tensorboard=False)

    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        writer.resume(1)
    assert path.read_bytes() == whole


def test_a_full_disk_leaves_no_part_of_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_steps(tmp_path, range(1, 3))
    whole = path.read_bytes()
    writer = MetricsWriter(tmp_path, tensorboard=False)
    real_write = os.write
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda fd, data: real_write(fd, data[:10]))
        with pytest.raises(OSError, match=r"10 of \d+ bytes written; is the disk full"):
            writer.write(report(3))
    assert path.read_bytes() == whole
    writer.write(report(3))  # the step was not counted as written
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 3]


def test_a_second_run_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    write_steps(tmp_path, range(1, 4))
    with (
        MetricsWriter(tmp_path, tensorboard=False) as writer,
        pytest.raises(ValueError, match=r"call resume\(0\).*or choose a new run_dir"),
    ):
        writer.write(report(1))


def test_the_last_line_is_replaced_by_one_that_knows_more(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        for step in (1, 2):
            writer.write(report(step))
        late = report(2)
        writer.amend(dataclasses.replace(late, seconds={**late.seconds, "checkpoint": 7.0}))
        writer.write(report(3))
        with pytest.raises(ValueError, match="step 2 is not the last"):
            writer.amend(report(2))
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    assert [row["seconds"].get("checkpoint") for row in read_metrics(tmp_path / "metrics.jsonl")] == [None, 7.0, None]


def scalars(folder: Path, tag: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), purge_orphaned_data=True)
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def test_tensorboard_shows_the_same_numbers_and_each_step_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with MetricsWriter(tmp_path) as writer:
        for step in range(1, 6):
            writer.write(report(step))
    time.sleep(1.1)  # event files are named, and read in order, by the second they start in
    caplog.set_level(logging.ERROR)
    with MetricsWriter(tmp_path) as writer:
        writer.resume(3)
        writer.write(report(4, **{"reward/total": 40.0, "loss/policy": math.nan}))
    shown = scalars(tmp_path / "tensorboard", "reward/total")
    assert [step for step, _ in shown] == [1, 2, 3, 4]
    in_file = [row["metrics"]["reward/total"] for row in read_metrics(tmp_path / "metrics.jsonl")]
    assert [value for _, value in shown] == pytest.approx(in_file, rel=1e-6)  # TensorBoard stores float32
    assert scalars(tmp_path / "tensorboard", "seconds/total")[0] == (1, 1.5)
    assert math.isnan(scalars(tmp_path / "tensorboard", "loss/policy")[0][1])


def test_sum_count_is_the_same_for_every_split() -> None:
    items = [("entropy/all", float(i), 1 + i % 3) for i in range(12)]
    whole = SumCount()
    for item in items:
        whole.add(*item)
    halves = [SumCount(), SumCount()]
    for i, item in enumerate(items):
        halves[i % 2].add(*item)
    merged = SumCount()
    merged.merge(halves[0])
    merged.merge(halves[1].as_dict())
    assert merged.as_dict() == whole.as_dict() == {"entropy/all": (66.0, 24.0)}
    assert merged.mean("entropy/all") == 66 / 24  # not the mean of means
    assert SumCount(merged.as_dict()).means() == {"entropy/all": 66 / 24}


def test_sum_count_without_items_has_no_mean() -> None:
    metrics = SumCount()
    metrics.add("entropy/name", 0.0, 0)
    assert metrics.mean("entropy/name") is None
    assert metrics.mean("never/seen") is None
    assert metrics.means() == {}
    with pytest.raises(ValueError, match="entropy/name came with count -1"):
        metrics.add("entropy/name", 1.0, -1)


def test_sum_count_takes_scalar_tensors() -> None:
    import torch

    metrics = SumCount({"loss": (torch.tensor(6.0), torch.tensor(4))})
    metrics.merge({"loss": (torch.tensor(2.0), 4)})
    assert metrics.means() == {"loss": 1.0}
    assert type(metrics.as_dict()["loss"][0]) is float


class FakeClock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_phase_timer_adds_up_and_counts_failures() -> None:
    clock = FakeClock()
    with PhaseTimer(clock) as timer:
        for _ in range(2):
            with timer.phase("rollout"):
                clock.now += 3
        with pytest.raises(RuntimeError), timer.phase("update"):
            clock.now += 5
            raise RuntimeError
        clock.now += 1
        assert timer.seconds["total"] == 12
    clock.now += 50
    assert timer.seconds == {"rollout": 6, "update": 5, "total": 12}


def test_phases_do_not_nest() -> None:
    timer = PhaseTimer()
    with (
        timer.phase("rollout"),
        pytest.raises(ValueError, match="'reward' starts inside phase 'rollout'"),
        timer.phase("reward"),
    ):
        pass
    with timer.phase("reward"):  # the refusal left no trace
        pass
    assert set(timer.seconds) == {"rollout", "reward"}


def test_importing_metrics_and_console_needs_neither_torch_nor_matplotlib() -> None:
    code = (
        "import sys, megatron_rest.trainer.metrics, megatron_rest.trainer.console, megatron_rest.analysis.report\n"
        "import megatron_rest.analysis.compare, megatron_rest.analysis.plots\n"
        "bad = {'torch', 'matplotlib', 'megatron', 'vllm', 'tensorboard'} & set(sys.modules)\n"
        "assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
