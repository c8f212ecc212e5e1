"""Files of rollouts: exact round trip, atomic, and nothing in them is executed."""

from __future__ import annotations

import pickle
import zipfile
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest

from megatron_rest.data.rollout_file import RolloutWriter, read_rollouts, rollout_files, rollout_path, write_rollouts
from tests.analysis.test_run_variance import rollouts_of


@pytest.mark.parametrize("with_beta", [False, True])
def test_round_trip(tmp_path: Path, with_beta: bool) -> None:
    saved = rollouts_of(20, with_beta=with_beta)
    path = write_rollouts(tmp_path, saved)
    write_rollouts(tmp_path, rollouts_of(3))
    (path.parent / "step_000004.npz.partial").touch()
    assert rollout_files(tmp_path) == [(3, rollout_path(tmp_path, 3)), (20, path)]
    again = read_rollouts(path)
    for field in fields(saved):
        expected, found = getattr(saved, field.name), getattr(again, field.name)
        assert type(expected) is type(found)
        np.testing.assert_array_equal(found, expected)
    assert [again.token_ids[at].size for at in again.slices] == again.lengths.tolist()
    assert not list(path.parent.glob(".*")), "no partial file is left"


def test_wrong_arrays_are_refused() -> None:
    saved = rollouts_of(1)
    with pytest.raises(ValueError, match="token_weights is float64"):
        replace(saved, token_weights=saved.token_weights.astype(np.float64))
    with pytest.raises(ValueError, match=r"entropy is float32 \(3,\)"):
        replace(saved, entropy=saved.entropy[:3])


class _Bomb:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (pytest.fail, ("a pickle was executed",))


def test_pickles_and_damage_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "step_000001.npz"
    np.savez(path, step=np.array(1), progress=np.array([_Bomb()], dtype=object))
    with pytest.raises(ValueError, match=r"step_000001.npz is not a file of rollouts"):
        read_rollouts(path)
    good = write_rollouts(tmp_path, rollouts_of(2))
    for content in (b"", pickle.dumps(1), good.read_bytes()[:-50]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"step_000001.npz is not a file of rollouts"):
            read_rollouts(path)


@pytest.mark.parametrize(
    ("offset", "value"),
    [(8, 14), (8, 99), (6, 1)],
    ids=["another compression method", "an unknown compression method", "encrypted"],
)
def test_entries_that_say_something_else_of_themselves_are_refused_by_name(
    tmp_path: Path, offset: int, value: int
) -> None:
    """One field changed in both headers of every entry; zipfile raises something of its own for each."""
    path = write_rollouts(tmp_path, rollouts_of(2))
    data = bytearray(path.read_bytes())
    for magic, shift in ((b"PK\x03\x04", 0), (b"PK\x01\x02", 2)):  # local header, central directory
        at = data.find(magic)
        while at >= 0:
            data[at + shift + offset] = value
            at = data.find(magic, at + 4)
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"step_\d+.npz is not a file of rollouts"):
        read_rollouts(path)


@pytest.mark.parametrize("entry", ["lengths.npy", "entropy.npy"])
def test_an_entry_that_is_no_array_is_refused_by_name(tmp_path: Path, entry: str) -> None:
    path = write_rollouts(tmp_path, rollouts_of(2))
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in (entries | {entry: b"text"}).items():
            archive.writestr(name, data)
    with pytest.raises(ValueError, match=f"is not a file of rollouts: {entry.removesuffix('.npy')} is no array"):
        read_rollouts(path)


def test_files_are_written_behind_training_and_a_failure_is_raised(tmp_path):
    writer = RolloutWriter(tmp_path)
    for step in (1, 2, 3):
        writer.write(rollouts_of(step))
    writer.wait()
    assert [step for step, _ in rollout_files(tmp_path)] == [1, 2, 3]
    (tmp_path / "file").write_text("")
    broken = RolloutWriter(tmp_path / "file")
    broken.write(rollouts_of(4))
    with pytest.raises(NotADirectoryError):
        broken.wait()
    broken.wait()  # said once
