"""Folders of checkpoints as files: what is whole, what is damaged, what may go."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from megatron_rest.config import CheckpointConfig, ConfigError
from megatron_rest.mcore.checkpoint_files import (
    complete,
    damage,
    file_sum,
    files_of,
    latest,
    superfluous,
    write_summary,
    write_sums,
)


def save(folder: Path, step: int, metrics: dict[str, float]) -> Path:
    path = folder / f"step_{step:06d}"
    path.mkdir(parents=True)
    (path / "data").write_bytes(bytes(range(256)) * step)
    write_summary(path, step, metrics)
    write_sums(path, {name: file_sum(path / name) for name in files_of(path)})
    return path


def test_only_whole_checkpoints_are_found(tmp_path: Path) -> None:
    assert latest(tmp_path / "nothing") is None and complete(tmp_path / "nothing") == []
    paths = [save(tmp_path, step, {}) for step in (2, 10, 1_000_000)]
    (tmp_path / "step_000011.partial").mkdir()
    (tmp_path / "step_000012.damaged").mkdir()
    (tmp_path / "step_000013").mkdir()  # no sums: was never whole
    (tmp_path / "step_000014").write_text("no folder")
    assert complete(tmp_path) == paths and latest(tmp_path) == paths[-1]


def test_every_kind_of_damage_is_named(tmp_path: Path) -> None:
    def damaged(spoil) -> list[str]:  # type: ignore[no-untyped-def]
        path = save(tmp_path / spoil.__name__, 3, {"reward/total": 1.0})
        assert damage(path) == []
        assert subprocess.run(["sha256sum", "-c", "--quiet", "sha256sums"], cwd=path, check=False).returncode == 0
        spoil(path)
        return damage(path)

    def flipped(path: Path) -> None:
        data = bytearray((path / "data").read_bytes())
        data[100] ^= 1
        (path / "data").write_bytes(data)

    def truncated(path: Path) -> None:
        (path / "data").write_bytes((path / "data").read_bytes()[:-1])

    def missing(path: Path) -> None:
        (path / "step.json").unlink()

    def half_a_list(path: Path) -> None:
        (path / "sha256sums").write_text((path / "sha256sums").read_text()[:-5])

    def another_folder(path: Path) -> None:
        (path / "sha256sums").write_text(f"{file_sum('/etc/passwd')}  /etc/passwd\n")

    assert damaged(flipped) == damaged(truncated) == ["data is not what was written (sha256 differs)"]
    assert damaged(missing) == ["step.json is missing"]
    assert damaged(half_a_list) == damaged(another_folder) == ["sha256sums is not a list of sums"]


def test_ranks_share_the_reading(tmp_path: Path) -> None:
    path = save(tmp_path, 1, {})
    (path / "data").write_text("")
    parts = [damage(path, part=i, num_parts=3) for i in range(3)]
    assert sorted(map(len, parts)) == [0, 0, 1]


@pytest.mark.parametrize(
    ("keep_best", "metric", "kept"),
    [
        (0, "reward", [5, 6]),
        (1, "reward", [2, 5, 6]),
        (2, "reward", [2, 4, 5, 6]),  # 1 and 4 are equal: the newer
        (1, "-reward", [3, 5, 6]),
        (3, "rewrad", [5, 6]),
        (9, "reward", [1, 2, 3, 4, 5, 6]),
    ],
)
def test_the_last_and_the_best_are_kept(tmp_path: Path, keep_best: int, metric: str, kept: list[int]) -> None:
    rewards = {1: 0.5, 2: 0.9, 3: -2.0, 4: 0.5, 5: 0.1, 6: float("nan")}
    paths = {step: save(tmp_path, step, {"reward": reward}) for step, reward in rewards.items()}
    gone = superfluous(tmp_path, keep_last=2, keep_best=keep_best, best_metric=metric)
    assert [step for step, path in paths.items() if path not in gone] == kept


def test_numbers_out_of_range_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"checkpoint\.keep_best is -1"):
        CheckpointConfig(keep_best=-1)
