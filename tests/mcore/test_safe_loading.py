"""A checkpoint folder that somebody else wrote: loading it runs nothing of what its files say.

1. without our limits each of the hostile folders leaves its file: the attacks are real
2. with them each is refused by name, and nothing ran; an untouched folder loads
3. cut and empty files are refused by name
"""

from __future__ import annotations

import io
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_rest.config import CheckpointConfig, ConfigError
from megatron_rest.mcore import checkpoint
from megatron_rest.mcore.checkpoint import CheckpointWriter
from megatron_rest.mcore.checkpoint_files import file_sum, files_of, write_sums
from megatron_rest.mcore.safe_loading import check_description, data_only
from tests.helpers.distributed import run_distributed
from tests.helpers.policies import batch_of, layout_config, make_policy, random_samples
from tests.helpers.tiny_model import build_tiny_model
from tests.mcore.test_policy import smooth_loss, with_weights


class Touch:
    """Unpickling this leaves the file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch {self.path}",)


def in_description(folder: Path, canary: Path) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps(Touch(canary)))


def beside_the_description(folder: Path, canary: Path) -> None:
    """A description that is right, with something more in it."""
    description = pickle.loads((folder / ".metadata").read_bytes())
    description.planner_data = Touch(canary)
    (folder / ".metadata").write_bytes(pickle.dumps(description))


def in_entry(folder: Path, canary: Path) -> None:
    """Every entry that is no tensor becomes the same pickle, appended to its file."""
    description = pickle.loads((folder / ".metadata").read_bytes())
    buffer = io.BytesIO()
    torch.save(Touch(canary), buffer)
    for index, place in description.storage_data.items():
        if "_extra_state" in index.fqn:
            file = folder / place.relative_path
            place.offset, place.length = file.stat().st_size, len(buffer.getvalue())
            with file.open("ab") as stream:
                stream.write(buffer.getvalue())
    (folder / ".metadata").write_bytes(pickle.dumps(description))


def in_common(folder: Path, canary: Path) -> None:
    torch.save({"step": Touch(canary)}, folder / "common.pt")


ATTACKS = (in_description, beside_the_description, in_entry, in_common)
UNLIMITED = (in_description, beside_the_description, in_entry)  # Megatron reads common.pt with weights_only by itself


def outcome_of(call: Any) -> str:
    """What it raised, in one line."""
    try:
        call()
    except BaseException as error:  # noqa: BLE001  PyTorch's CheckpointException is no Exception
        return f"{type(error).__name__}: {error}"
    return ""


def loaded(path: Path, policy: Any) -> tuple[int, dict[str, Any]]:
    result = checkpoint.load(path, policy)
    return result.step, result.extra


def sum_up(folder: Path) -> None:
    """Sums find damage, not malice: who writes a folder writes its sums."""
    write_sums(folder, {name: file_sum(folder / name) for name in files_of(folder)})


def attack(rank: int, world_size: int, model: str, folder: str) -> dict[str, Any]:
    from megatron.core import dist_checkpointing

    parts = make_policy(layout_config(model))
    policy = parts.policy
    policy.update(with_weights(batch_of(parts, random_samples(parts.shape.vocab_size))), smooth_loss)
    good = CheckpointWriter(folder, CheckpointConfig(keep_last=1)).save(policy, step=3, extra={"weighting": {}})
    results: dict[str, Any] = {"good": loaded(good, policy)}
    for make in ATTACKS:
        bad, canary = Path(folder) / make.__name__, Path(folder) / f"{make.__name__}.owned"
        shutil.copytree(good, bad)
        make(bad, canary)
        sum_up(bad)
        said = outcome_of(lambda bad=bad: checkpoint.load(bad, policy))
        results[make.__name__] = (said, canary.exists())
        if make in UNLIMITED:
            state = checkpoint._sharded_state(policy, is_loading=True, form=checkpoint.ANY_LAYOUT)
            outcome_of(lambda bad=bad, state=state: dist_checkpointing.load(state, str(bad)))
            results[f"unlimited {make.__name__}"] = canary.exists()
    for name in ("cut", "empty"):
        bad = Path(folder) / name
        shutil.copytree(good, bad)
        data = (bad / ".metadata").read_bytes()
        (bad / ".metadata").write_bytes(data[: len(data) // 2] if name == "cut" else b"")
        sum_up(bad)
        results[name] = outcome_of(lambda bad=bad: checkpoint.load(bad, policy))
    results["again"] = loaded(good, policy)
    return results


def test_hostile_checkpoints_are_refused_and_nothing_of_them_runs(tmp_path: Path) -> None:
    model = build_tiny_model(tmp_path / "model")
    [results] = run_distributed(attack, 1, str(model), str(tmp_path / "checkpoints"))
    assert results["good"] == results["again"] == (3, {"weighting": {}})
    for make in ATTACKS:
        said, has_run = results[make.__name__]
        assert said and not has_run, make.__name__
    for make in UNLIMITED:
        assert results[f"unlimited {make.__name__}"], "the attack is real"
    for name in ("in_description", "beside_the_description"):
        assert "names posix.system, which no checkpoint needs" in results[name][0]
    for name in ("in_entry", "in_common"):
        assert "posix.system" in results[name][0]
    for name in ("cut", "empty"):
        assert results[name].startswith("ConfigError") and ".metadata is damaged" in results[name]


def test_the_switch_that_lifts_the_limit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"no \.metadata"):
        check_description(tmp_path)
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    with pytest.raises(ConfigError, match="TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"), data_only():
        pass
