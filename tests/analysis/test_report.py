"""Plots, report and comparison of runs written to disk by the real writer."""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_rest.analysis import compare, report
from megatron_rest.analysis.plots import PLOTS, moving_mean, plot_runs
from megatron_rest.analysis.series import MetricsFileError, RunMetrics, Window, load_runs
from megatron_rest.analysis.summary import own_rewards
from megatron_rest.trainer.metrics import MetricsWriter
from tests.analysis.runs import draw_only, make_report, make_run

DRAWN = set(PLOTS) - {"variance_ratio", "validation"}  # those two want what these runs do not have


def picture(path: Path) -> np.ndarray:
    """Pixels [height, width, 3]; fails unless the file is a picture with something drawn in it."""
    from matplotlib.image import imread

    pixels = imread(path)[..., :3]
    height, width, _ = pixels.shape
    assert height >= 350 and width >= 550, path
    ink = np.any(pixels < 0.9, axis=-1).mean()
    assert 0.005 < ink < 0.8, (path, ink)
    colourful = (pixels.max(axis=-1) - pixels.min(axis=-1) > 0.3).mean()
    assert colourful > 1e-4, (path, colourful)  # six dots at least
    return pixels


def has_colour(pixels: np.ndarray, colour: str) -> bool:
    from matplotlib.colors import to_rgb

    return bool((np.abs(pixels - np.array(to_rgb(colour))).max(axis=-1) < 0.02).sum() > 20)


def test_report_draws_every_plot_and_prints_the_summary(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = make_run(tmp_path / "rest", 12)
    assert report.main([str(run_dir)]) == 0
    output = capsys.readouterr().out
    for name in DRAWN:
        path = run_dir / "plots" / f"{name}.png"
        picture(path)
        assert str(path) in output
    assert "reward, total" in output and "rollout" in output


def test_unjudged_answers_are_a_number_only_where_there_were_some(tmp_path: Path) -> None:
    for share in (0.0, 0.25):
        rows = [{"step": 1, "metrics": {"reward/not_judged": share, "reward/short": 0.0}}]
        names = [name for name, _, _ in own_rewards([RunMetrics(label="run", run_dir=tmp_path, rows=rows)])]
        assert names == (["reward/not_judged", "reward/short"] if share else ["reward/short"])


def test_several_runs_share_a_plot_in_their_own_colours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = make_run(tmp_path / "grpo", 12, slope=0.05, seed=1), make_run(tmp_path / "rest", 10)
    assert report.main([str(a), str(b), "--output", str(tmp_path / "both")]) == 0
    for name in DRAWN - {"phases"}:
        pixels = picture(tmp_path / "both" / f"{name}.png")
        assert has_colour(pixels, "#0072B2") and has_colour(pixels, "#D55E00"), name
    picture(tmp_path / "both" / "phases.png")
    assert not (a / "plots").exists()
    draw_only(monkeypatch, "reward")
    assert report.main([str(a), str(b)]) == 0  # the plots of run a alone are not overwritten
    assert sorted(path.name for path in a.iterdir()) == ["metrics.jsonl", "plots_compared"]


@pytest.mark.parametrize("num_steps", [1, *(pytest.param(n, marks=pytest.mark.extended) for n in (2, 4))])
def test_few_steps_draw_too(tmp_path: Path, num_steps: int) -> None:
    [run] = load_runs([make_run(tmp_path, num_steps)])
    for path in plot_runs([run], tmp_path / "plots"):
        picture(path)


@pytest.mark.slow
def test_metrics_that_no_step_has_are_left_out(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path / "bare", tensorboard=False) as writer:
        for step in range(1, 5):
            writer.write(replace(make_report(step), metrics={"reward/total": float(step)}, seconds={}))
    runs = load_runs([tmp_path / "bare"])
    assert [path.name for path in plot_runs(runs, tmp_path / "plots")] == ["reward.png"]
    picture(tmp_path / "plots" / "reward.png")
    runs = load_runs([tmp_path / "bare", make_run(tmp_path / "full", 5)])  # one has them, the other does not
    assert len(plot_runs(runs, tmp_path / "both")) == len(DRAWN)


def test_validation_is_drawn_by_category_where_it_was_done(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path / "run", tensorboard=False) as writer:
        for step in range(1, 7):
            scores = (
                {"validation/api-bank/level-1": 0.1 * step, "validation/bfcl/multiple": 0.5} if step % 3 == 0 else {}
            )
            writer.write(replace(make_report(step), metrics={"reward/total": 1.0, **scores}, seconds={}))
    [run] = load_runs([tmp_path / "run"])
    assert [path.name for path in plot_runs([run], tmp_path / "plots")] == ["reward.png", "validation.png"]
    assert has_colour(picture(tmp_path / "plots" / "validation.png"), "#0072B2")


def test_plots_survive_nonfinite_values(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        for step in range(1, 13):
            row = make_report(step)
            bad = dict.fromkeys(row.metrics, math.nan) if step in (1, 7) else row.metrics
            writer.write(replace(row, metrics=bad))
    for path in plot_runs(load_runs([tmp_path]), tmp_path / "plots"):
        picture(path)


def test_everything_not_finite_is_still_a_report(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        for step in range(1, 9):
            row = make_report(step)
            writer.write(replace(row, metrics=dict.fromkeys(row.metrics, math.nan)))
    assert report.main([str(tmp_path)]) == 0


def test_moving_mean_by_hand() -> None:
    values = np.array([1.0, 2.0, 6.0, np.nan, 5.0])
    np.testing.assert_allclose(moving_mean(values, 3), [1.5, 3.0, 4.0, np.nan, 5.0])


def test_shares_by_hand(tmp_path: Path) -> None:
    [run] = load_runs([make_run(tmp_path, 5)])
    shares = run.shares("weight_mass")
    np.testing.assert_allclose(shares["think"], [4 / 15] * 4 + [4 / 10])
    np.testing.assert_allclose(shares["response"], [5 / 15] * 4 + [0])


def test_window_by_hand() -> None:
    window = Window.of([1.0, 2.0, 6.0])
    assert (window.mean, window.num_steps) == (3.0, 3)
    assert window.standard_error == pytest.approx(statistics.stdev([1, 2, 6]) / math.sqrt(3))
    assert math.isnan(Window.of([]).mean) and math.isnan(Window.of([1.0]).standard_error)
    assert math.isnan(Window.of([1.0, math.nan]).mean)


def test_difference_equals_the_files(tmp_path: Path) -> None:
    dirs = [make_run(tmp_path / "grpo", 12, slope=0.05, seed=1), make_run(tmp_path / "rest", 10, seed=2)]
    a, b = load_runs(dirs)
    d = compare.difference(a, b, "reward/total")
    plain = [
        [json.loads(line)["metrics"]["reward/total"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in dirs
    ]
    assert d.first_a.mean == pytest.approx(statistics.fmean(plain[0][:3]), rel=1e-12)
    assert d.last_b.mean == pytest.approx(statistics.fmean(plain[1][-3:]), rel=1e-12)
    assert d.last == pytest.approx(statistics.fmean(plain[1][-3:]) - statistics.fmean(plain[0][-3:]), rel=1e-12)
    variances = [statistics.variance(values[-3:]) / 3 for values in plain]
    assert d.last_error == pytest.approx(math.sqrt(sum(variances)), rel=1e-9)
    steps = [y - x for x, y in zip(plain[0], plain[1], strict=False)]
    assert len(steps) == d.paired.num_steps == 10
    assert d.paired.mean == pytest.approx(statistics.fmean(steps), rel=1e-12)
    assert d.paired.standard_error == pytest.approx(statistics.stdev(steps) / math.sqrt(10), rel=1e-9)


@pytest.mark.slow
def test_compare_prints_a_table_and_never_calls_one_seed_evidence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    draw_only(monkeypatch, "reward")
    a, b = make_run(tmp_path / "grpo", 12, slope=0.0, seed=1), make_run(tmp_path / "rest", 10, slope=5.0)
    assert compare.main([str(a), str(b), "--output", str(tmp_path / "out")]) == 0
    output = capsys.readouterr().out
    assert "A = grpo (12 steps)   B = rest (10 steps)" in output
    assert "One seed a side is not evidence." in output
    assert "A ends at step 12, B at step 10" in output
    assert "significant" not in output
    [line] = [line for line in output.splitlines() if line.startswith("response length")]
    assert line.split()[3:7] == ["92.0", "101.0", "92.0", "99.0"]
    picture(tmp_path / "out" / "reward.png")


def test_comparison_of_different_metrics_names_them(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path / "bare", tensorboard=False) as writer:
        writer.write(replace(make_report(1), metrics={"reward/total": 1.0}))
    lines = compare.compare_lines(*load_runs([tmp_path / "bare", make_run(tmp_path / "full", 3)]))
    assert any(line.startswith("Only in B: reward/static, reward/format") for line in lines)


def test_labels_tell_runs_of_the_same_name_apart(tmp_path: Path) -> None:
    dirs = [make_run(tmp_path / seed / "rest", 2) for seed in ("seed1", "seed2")]
    assert [run.label for run in load_runs(dirs)] == ["seed1/rest", "seed2/rest"]
    with pytest.raises(MetricsFileError, match="given twice"):
        load_runs([dirs[0], dirs[0]])


@pytest.mark.parametrize("command", [report.main, compare.main])
def test_unusable_runs_are_one_line_and_status_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: object
) -> None:
    good, empty, damaged = make_run(tmp_path / "good", 2), tmp_path / "empty", tmp_path / "damaged"
    empty.mkdir()
    damaged.mkdir()
    (damaged / "metrics.jsonl").write_text("{}\n")
    unborn = tmp_path / "unborn"
    unborn.mkdir()
    (unborn / "metrics.jsonl").write_text('{"step"')
    for bad, message in (
        (tmp_path / "missing", "is not a folder"),
        (empty, "cannot read"),
        (damaged, "line 1 is damaged"),
        (unborn, "no complete step yet"),
    ):
        assert command([str(good), str(bad), "--output", str(tmp_path / "out")]) == 2  # type: ignore[operator]
        captured = capsys.readouterr()
        assert message in captured.err and captured.out == ""
        assert len([line for line in captured.err.splitlines() if line.startswith("megatron-rest")]) == 1
        assert not (tmp_path / "out").exists()
