"""What people read: fixed columns, plain progress lines, numbers that equal the file's."""

from __future__ import annotations

import io
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_rest.analysis.series import load_runs
from megatron_rest.trainer.console import Console, fixed, scientific, step_columns
from megatron_rest.types import StepReport
from tests.analysis.runs import make_report, make_run


def step_lines(reports: list[StepReport], **options: object) -> list[str]:
    stream = io.StringIO()
    console = Console(stream, **options)  # type: ignore[arg-type]
    for report in reports:
        console.step(report)
    return stream.getvalue().splitlines()


@pytest.mark.parametrize(("width", "most"), [(160, 160), (200, 160), (100, 100), (159, 100)])
def test_step_lines_fit_and_align(width: int, most: int) -> None:
    huge = dict.fromkeys(make_report(1).metrics, 1e15)
    reports = [
        make_report(1),
        make_report(5),
        replace(make_report(7), metrics=huge),
        replace(make_report(8), metrics={}),
    ]
    legend, *rest = step_lines(reports, width=width)
    assert legend.startswith("ok %")
    rest = [line for line in rest if not line.startswith("train log-prob") and "not measured" not in line]
    top, titles, *lines = rest
    assert len(lines) == len(reports)
    assert {len(line) for line in (titles, *lines)} == {len(titles)}
    assert len(titles) <= most and len(top) <= most
    number_of_cells = {len(line.split()) for line in lines}
    assert number_of_cells == {len(step_columns(width))}  # huge numbers do not run into each other


def test_step_line_holds_the_report_s_numbers() -> None:
    report = make_report(4)
    line = step_lines([report], width=160)[-1].split()
    cells = dict(zip([column.metric for column in step_columns(160)], line, strict=True))
    assert cells["step"] == "4"
    assert float(cells["reward/total"]) == pytest.approx(report.metrics["reward/total"], abs=5e-4)
    assert float(cells["reward/format_valid"]) == pytest.approx(100 * report.metrics["reward/format_valid"], abs=0.05)
    assert float(cells["entropy/think"]) == pytest.approx(report.metrics["entropy/think"], abs=5e-4)
    mass = report.metrics["weight_mass/name"] / 15  # the regions hold 1 + 2 + 3 + 4 + 5
    assert float(cells["share/name"]) == pytest.approx(100 * mass, abs=0.05)
    assert float(cells["mismatch/abs_log_prob_mean"]) == pytest.approx(
        report.metrics["mismatch/abs_log_prob_mean"], rel=5e-3
    )
    assert float(cells["seconds/rollout"]) == pytest.approx(report.seconds["rollout"], abs=5e-3)
    assert cells["seconds/checkpoint"] == "-"


def test_absent_is_a_dash_and_nonfinite_stands_out() -> None:
    report = make_report(5)  # no response tokens
    broken = replace(report, metrics={**report.metrics, "optimizer/grad_norm": math.nan, "reward/total": -math.inf})
    [line] = step_lines([broken], width=160)[-1:]
    cells = dict(zip([column.metric for column in step_columns(160)], line.split(), strict=True))
    assert cells["entropy/response"] == "-" and cells["share/response"] == "-"
    assert cells["optimizer/grad_norm"] == "nan" and cells["reward/total"] == "-inf"
    [coloured] = step_lines([broken], width=160, is_terminal=True)[-1:]
    assert "\x1b[1;31m  nan\x1b[0m" in coloured
    assert re.sub(r"\x1b\[[0-9;]*m", "", coloured) == line


def test_no_colours_where_there_is_no_terminal_or_none_are_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "\x1b" not in "\n".join(step_lines([make_report(1)]))
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in "\n".join(step_lines([make_report(1)], is_terminal=True))


def test_header_comes_back_every_20_lines() -> None:
    lines = step_lines([make_report(step) for step in range(1, 46)], width=160)
    at = [i for i, line in enumerate(lines) if line.split()[:2] == ["step", "total"]]
    assert at == [2, 2 + 22, 2 + 44]


@pytest.mark.parametrize(
    ("value", "width", "decimals", "text"),
    [
        (0.12345, 5, 3, "0.123"),
        (-0.12345, 5, 3, "-0.12"),
        (123456.0, 5, 2, "1.2e5"),
        (12345.6, 5, 2, "12346"),
        (-0.0001, 5, 2, " 0.00"),
        (99.96, 4, 1, " 100"),
        (math.nan, 5, 2, "  nan"),
        (-math.inf, 5, 2, " -inf"),
    ],
)
def test_fixed(value: float, width: int, decimals: int, text: str) -> None:
    assert fixed(value, width, decimals) == text


@pytest.mark.parametrize(("value", "text"), [(1.234e-5, "1.23e-5"), (-1.2e-10, "-1e-10"), (0.0, "0"), (15.0, "1.50e1")])
def test_scientific(value: float, text: str) -> None:
    assert scientific(value, 7).strip() == text


def test_plain_progress_is_whole_lines_with_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("megatron_rest.trainer.console.time.monotonic", lambda: now[0])
    stream = io.StringIO()
    console = Console(stream, plain_interval=5)
    with console.progress("rollouts", total=100, unit="sequences") as progress:
        for _ in range(100):
            now[0] += 1.0
            progress.update()
    with console.progress("steps", total=10, plain_interval=60) as progress:
        for _ in range(10):
            now[0] += 20.0
            progress.update()
    text = stream.getvalue()
    assert "\r" not in text and "\x1b" not in text and text.endswith("\n")
    lines = text.splitlines()
    lines, slow = lines[:21], lines[21:]  # one every 5 seconds and the last word; one every 60 seconds
    assert [line.split()[1] for line in slow] == ["3/10", "6/10", "9/10", "10/10"]
    assert lines[3] == "rollouts: 20/100 (20 %) sequences, 1/s, 20 s, 1 min 20 s left"
    assert lines[-1] == "rollouts: 100/100 (100 %) sequences, 1/s, 1 min 40 s, done"


def test_plain_progress_says_how_it_ended() -> None:
    stream = io.StringIO()
    console = Console(stream)
    with pytest.raises(RuntimeError), console.progress("warm start", total=10) as progress:
        progress.update(4)
        raise RuntimeError
    with console.progress("scan") as progress:
        progress.update(7)
    assert list(console.track(iter("abc"), "letters", total=5)) == ["a", "b", "c"]
    assert list(console.track([], "nothing")) == []
    first, second, third, fourth = stream.getvalue().splitlines()
    assert first.startswith("warm start: 4/10 (40 %)") and first.endswith("failed")
    assert second.startswith("scan: 7 it") and second.endswith("done")
    assert third.startswith("letters: 3/5") and third.endswith("stopped early")
    assert fourth.startswith("nothing: 0 it") and fourth.endswith("done")


def test_terminal_progress_is_a_bar_and_lines_stay_whole() -> None:
    stream = io.StringIO()
    console = Console(stream, is_terminal=True, width=160)
    with console.progress("rollouts", total=3) as progress:
        for step in range(1, 4):
            progress.update()
            console.line(f"line {step}")
    text = stream.getvalue()
    assert "\r" in text and "3/3" in text
    assert all(f"line {step}\n" in text for step in (1, 2, 3))


def test_disabled_console_prints_nothing(tmp_path: Path) -> None:
    stream = io.StringIO()
    console = Console(stream, enabled=False, is_terminal=True)
    console.line("x")
    console.step(make_report(1))
    console.summary(make_run(tmp_path, 3))
    assert list(console.track(range(3), "rollouts")) == [0, 1, 2]
    assert stream.getvalue() == ""


def test_summary_numbers_equal_the_file_s(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "run", 12)
    stream = io.StringIO()
    Console(stream).summary(run_dir, peak_memory_bytes=3 << 30, files={"checkpoint": run_dir / "checkpoints"})
    text = stream.getvalue()
    [run] = load_runs([run_dir])
    table = {re.split(r" {2,}", line)[0]: re.split(r" {2,}", line)[1:] for line in text.splitlines()}
    for label, name in (
        ("reward, total", "reward/total"),
        ("reward, format", "reward/format"),
        ("reward, correctness", "reward/correctness"),
        ("accuracy (0 to 1)", "reward/accuracy"),
        ("entropy, think (nats)", "entropy/think"),
    ):
        rows = [row["metrics"][name] for row in run.rows]
        first, last = sum(rows[:3]) / 3, sum(rows[-3:]) / 3
        assert table[label] == [f"{first:.3f}", f"{last:.3f}", f"{last - first:+.3f}"]
    # the response region has no tokens in step 10: its last mean is over the two steps that have it
    values = [row["metrics"]["entropy/response"] for row in run.rows[-3:] if "entropy/response" in row["metrics"]]
    assert len(values) == 2
    assert table["entropy, response (nats)"][1] == f"{sum(values) / 2:.3f}"
    rollout = sum(row["seconds"]["rollout"] for row in run.rows)
    assert table["rollout"][:2] == [f"{rollout:.1f}", f"{rollout / 12:.2f}"]
    assert table["checkpoint"][0] in ("2.0", str(run_dir / "checkpoints"))
    assert float(table["other"][0]) == pytest.approx(0.5 * 12, abs=0.05)
    assert "peak memory, all processes: 3.00 GiB" in text
    assert str(run_dir / "metrics.jsonl") in text and str(run_dir / "checkpoints") in text


def test_summary_of_a_short_or_broken_run_says_so(tmp_path: Path) -> None:
    from megatron_rest.trainer.metrics import MetricsWriter

    stream = io.StringIO()
    Console(stream).summary(make_run(tmp_path / "short", 4))
    assert "only 4 steps: first and last overlap" in stream.getvalue()
    stream = io.StringIO()
    with MetricsWriter(make_run(tmp_path / "broken", 7), tensorboard=False) as writer:
        report = make_report(8)
        writer.write(replace(report, metrics={**report.metrics, "reward/total": math.nan}))
    Console(stream).summary(tmp_path / "broken")
    assert "NOT FINITE: reward/total in 1 step(s), first in step 8" in stream.getvalue()
    [line] = [line for line in stream.getvalue().splitlines() if line.startswith("reward, total")]
    assert line.split()[-2:] == ["nan", "+nan"]  # never a mean that leaves the bad step out in silence
