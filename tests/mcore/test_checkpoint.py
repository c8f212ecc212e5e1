"""Distributed checkpoints: exact resume at the same layout, any other layout to rounding, whole or absent.

1. saved in the background at TP2 x PP2 while training goes on, with and without the distributed optimiser; continued at
   TP2 x PP2 (bit for bit), TP4, PP2 x VPP2, DP2 and in one process: same loss, gradient norm, learning rate, parameters
2. experts: saved at EP2 x DP2 with the distributed optimiser, continued at EP4 and EP2 x TP2; the distributed
   optimiser's state as it lies continues at the same layout bit for bit, at other replicas to rounding, no other way
3. every rank's random streams come back, at the same layout only
4. a damaged checkpoint is refused by name, and the newest intact one is found; none intact is an error
5. a writer that fails (disk full, file too large, folder not made, process killed) says so on every rank, and what was
   there before is untouched; what cannot be loaded is refused
"""

from __future__ import annotations

import errno
import os
import random
import re
import resource
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron_rest.config import CheckpointConfig, ConfigError
from megatron_rest.mcore import checkpoint, checkpoint_files, rng
from megatron_rest.mcore.checkpoint import CheckpointError, CheckpointWriter
from tests.helpers.distributed import run_distributed
from tests.helpers.gradients import full_parameters
from tests.helpers.policies import LAYERS, batch_of, layout_config, make_policy, random_samples
from tests.helpers.tiny_model import build_tiny_model
from tests.mcore.test_policy import make_model, smooth_loss, with_weights

Layout = dict[str, Any]
DISTRIBUTED = {"distributed_optimizer": True}

SAVED: dict[str, Layout] = {
    "plain": {"tp": 2, "pp": 2},
    "distributed": {"tp": 2, "pp": 2} | DISTRIBUTED,
    "experts": {"ep": 2, **DISTRIBUTED},
    "as it lies": {"pp": 2} | DISTRIBUTED,
    "experts as they lie": {"ep": 2, **DISTRIBUTED},
}
CONTINUED: dict[str, list[tuple[str, Layout]]] = {  # number of ranks, and more on as many
    "4": [
        ("plain", {"tp": 2, "pp": 2}),
        ("plain", {"tp": 4}),
        ("distributed", {"tp": 2, "pp": 2} | DISTRIBUTED),
        ("distributed", {"tp": 2, "sp": True} | DISTRIBUTED),
        ("experts", {"ep": 2, "tp": 2, "sp": True} | DISTRIBUTED),
        ("as it lies", {"pp": 2} | DISTRIBUTED),
        ("experts as they lie", {"ep": 2} | DISTRIBUTED),
    ],
    "4 more": [("distributed", {"tp": 4} | DISTRIBUTED), ("experts", {"ep": 4} | DISTRIBUTED)],
    "2": [
        ("plain", {"pp": 2, "vpp": 2}),
        ("distributed", {"cp": 2} | DISTRIBUTED),
        ("as it lies", {"pp": 2} | DISTRIBUTED),
    ],
    "2 more": [("plain", {}), ("distributed", {"pp": 2, "vpp": 2} | DISTRIBUTED)],
    "1": [("plain", {}), ("distributed", DISTRIBUTED)],
}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    dense = str(make_model(folder / "dense", tied=True))
    shape = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16}
    experts = build_tiny_model(folder / "experts", arch="qwen3_moe", tied=False, layers=LAYERS, **shape)
    return dict.fromkeys(("plain", "distributed", "as it lies"), dense) | dict.fromkeys(
        ("experts", "experts as they lie"), str(experts)
    )


def draw(count: int) -> list[float]:
    """``count`` numbers from each random stream of this process."""
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    numbers = [*np.random.random(count), *torch.rand(count).tolist(), *(random.random() for _ in range(count))]
    with get_cuda_rng_tracker().fork():
        return [*numbers, *torch.rand(count).tolist()]


def train_and_save(rank: int, world_size: int, models: dict[str, str], folder: str) -> dict[str, dict]:
    """Four updates of each; checkpoints after the second, third and fourth, the last two kept."""
    from megatron.core import parallel_state

    results = {}
    for name, layout in SAVED.items():
        parts = make_policy(layout_config(models[name], **layout))
        batch = with_weights(batch_of(parts, random_samples(parts.shape.vocab_size)))
        writer = CheckpointWriter(Path(folder) / name, CheckpointConfig(asynchronous=name != "experts"))
        for step in range(1, 5):
            report = parts.policy.update(batch, smooth_loss)  # the weights move while the step before is written
            writer.poll()
            if step >= 2:
                draw(1 + rank)  # every rank is at another place of its streams
                extra = {"weighting": {"mean": [None, 0.25]}, "step_seen": step}
                form = (
                    checkpoint.AS_IT_LIES
                    if name.endswith("as it lies") or "they lie" in name
                    else checkpoint.ANY_LAYOUT
                )
                writer.save(parts.policy, step=step, extra=extra, form=form)
            if step == 3:
                drawn = draw(2)
        writer.wait()
        numbers = (report.loss, report.grad_norm, report.lr)
        results[name] = {"numbers": numbers, "parameters": full_parameters(parts), "drawn": drawn}
        parallel_state.destroy_model_parallel()
    return results


def continue_from(
    rank: int, world_size: int, models: dict[str, str], folder: str, runs: list[tuple[str, Layout]]
) -> list[dict]:
    """From step 3, with wrong weights that the checkpoint has to mend, to step 4."""
    from megatron.core import parallel_state

    results = []
    for name, layout in runs:
        parts = make_policy(layout_config(models[name], **layout))
        with torch.no_grad():
            for shard in parts.policy.named_shards().values():
                shard.mul_(1.5)
        loaded = checkpoint.load(Path(folder) / name / "step_000003", parts.policy)
        drawn = None
        if loaded.rng is not None:
            rng.restore(loaded.rng)
            drawn = draw(2)
        batch = with_weights(batch_of(parts, random_samples(parts.shape.vocab_size)))
        report = parts.policy.update(batch, smooth_loss)
        numbers = (report.loss, report.grad_norm, report.lr)
        result = {"step": loaded.step, "extra": loaded.extra, "numbers": numbers, "drawn": drawn}
        results.append(result | {"parameters": full_parameters(parts)})
        parallel_state.destroy_model_parallel()
    return results


@pytest.fixture(scope="module")
def saved(models, tmp_path_factory) -> tuple[Path, list[dict[str, dict]]]:
    folder = tmp_path_factory.mktemp("checkpoints")
    return folder, run_distributed(train_and_save, 4, models, str(folder))


def test_only_the_last_complete_checkpoints_are_kept(saved):
    folder, _ = saved
    folder = folder / "plain"
    assert sorted(p.name for p in folder.iterdir()) == ["step_000003", "step_000004"]
    assert checkpoint_files.latest(folder) == folder / "step_000004"
    for path in checkpoint_files.complete(folder):
        assert checkpoint_files.damage(path) == []
        listed = (path / "sha256sums").read_text()
        assert all(name in listed for name in checkpoint_files.files_of(path)), "nothing besides what is summed"


@pytest.mark.parametrize(
    "group", [pytest.param(x, marks=pytest.mark.extended) if x.endswith("more") else x for x in CONTINUED]
)
@pytest.mark.slow
def test_continue_at_any_layout(models, saved, group):
    folder, unbroken = saved
    runs = CONTINUED[group]
    ranks = run_distributed(continue_from, int(group.split()[0]), models, str(folder), runs)
    for number, (name, layout) in enumerate(runs):
        expected = unbroken[0][name]
        is_same = layout == SAVED[name] and group.split()[0] == "4"
        for rank, result in enumerate(results[number] for results in ranks):
            assert result["drawn"] == (unbroken[rank][name]["drawn"] if is_same else None)
            assert result["step"] == 3
            assert result["extra"] == {"weighting": {"mean": [None, 0.25]}, "step_seen": 3}
            tolerance = 0.0 if is_same else 3e-5
            np.testing.assert_allclose(result["numbers"], expected["numbers"], rtol=tolerance, err_msg=f"{layout}")
        parameters = ranks[0][number]["parameters"]
        assert parameters.keys() == expected["parameters"].keys()
        for key, value in expected["parameters"].items():
            # Adam divides gradients of rounding size by their own size: a step is lr = 1e-3 at most.
            np.testing.assert_allclose(parameters[key], value, atol=0 if is_same else 2e-5, err_msg=f"{layout} {key}")


def refused(rank: int, world_size: int, models: dict[str, str], folder: str, empty: str) -> list[str]:
    messages = []
    attempts = [
        ("plain", empty, {}),
        ("plain", f"{folder}/plain", DISTRIBUTED),
        ("experts", f"{folder}/experts", DISTRIBUTED),
        ("as it lies", f"{folder}/as it lies", DISTRIBUTED),
    ]
    for name, path, layout in attempts:
        parts = make_policy(layout_config(models[name], **layout))
        with pytest.raises(ConfigError) as error:
            checkpoint.load(Path(path) / "step_000004", parts.policy)
        messages.append(str(error.value))
        from megatron.core import parallel_state

        parallel_state.destroy_model_parallel()
    return messages


def test_what_cannot_be_loaded_is_refused(models, saved, tmp_path):
    folder, _ = saved
    [[incomplete, kind, experts, layout]] = run_distributed(refused, 1, models, str(folder), str(tmp_path))
    assert "not a complete checkpoint: sha256sums cannot be read" in incomplete
    assert "parallel.distributed_optimizer=false" in kind
    assert "parallel.expert_parallel > 1" in experts
    assert "was saved at parallel.pipeline_parallel=2, with the optimiser's state as it lay" in layout
    assert "megatron-rest reshard" in layout


def damaged(rank: int, world_size: int, models: dict[str, str], folder: str) -> list[Any]:
    """From the newest intact one, twice; then from none."""
    parts = make_policy(layout_config(models["plain"], tp=2))
    with pytest.raises(ConfigError) as refusal:
        checkpoint.load(Path(folder) / "step_000004", parts.policy)
    path, notes = checkpoint.newest_intact(folder)
    step = checkpoint.load(path, parts.policy, is_verified=True).step
    again = checkpoint.newest_intact(folder)
    dist.barrier()
    if rank == 0:
        (Path(folder) / "step_000003" / "common.pt").unlink()
    dist.barrier()
    with pytest.raises(CheckpointError) as nothing:
        checkpoint.newest_intact(folder)
    return [str(refusal.value), str(path), notes, step, [str(again[0]), again[1]], str(nothing.value)]


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_found(models, saved, tmp_path):
    folder = tmp_path / "checkpoints"
    shutil.copytree(saved[0] / "plain", folder)
    newest = folder / "step_000004"
    name = sorted(p.name for p in newest.glob("*.distcp"))[-1]
    data = bytearray((newest / name).read_bytes())
    data[len(data) // 2] ^= 1
    (newest / name).write_bytes(data)
    (folder / "step_000009.partial").mkdir()  # what a run leaves that is killed while it writes
    first, second = run_distributed(damaged, 2, models, str(folder))
    assert first == second, "the same on every rank"
    refusal, path, notes, step, again, nothing = first
    assert (
        refusal
        == f"checkpoint.load: {newest} is not a complete checkpoint: {name} is not what was written (sha256 differs)"
    )
    assert (path, step) == (str(folder / "step_000003"), 3)
    assert notes == [f"{newest} is DAMAGED: {name} is not what was written (sha256 differs)"]
    assert again == [str(folder / "step_000003"), []], "it was put aside"
    assert "no checkpoint" in nothing and "common.pt is missing" in nothing
    assert sorted(p.name for p in folder.iterdir()) == [
        "step_000003.damaged",
        "step_000004.damaged",
        "step_000009.partial",
    ]


def unwritable(rank: int, world_size: int, models: dict[str, str], folder: str) -> list[str]:
    """A checkpoint that is whole, then one failure after the other, then another one."""
    parts = make_policy(layout_config(models["plain"], tp=2))
    messages = []
    for is_asynchronous in (True, False):
        own = Path(folder) / f"{is_asynchronous}"
        writer = CheckpointWriter(own, CheckpointConfig(asynchronous=is_asynchronous))
        writer.save(parts.policy, step=1, extra={})
        writer.wait()
        for failure in (_disk_full, _file_too_large, _killed if is_asynchronous else _not_a_folder):
            with failure(own if rank == 0 else None), pytest.raises(CheckpointError) as error:
                writer.save(parts.policy, step=2, extra={})
                writer.wait()
            messages.append(str(error.value))
            dist.barrier()
            found, notes = checkpoint.newest_intact(own)
            assert (found.name, notes) == ("step_000001", []), "nothing half-written is found, nothing whole is lost"
        writer.save(parts.policy, step=3, extra={})
        writer.wait()
        assert checkpoint.newest_intact(own)[0].name == "step_000003"
        dist.barrier()
        assert not list(own.glob("*.partial"))
    with pytest.raises(CheckpointError) as error:
        CheckpointWriter("/sys/checkpoints", CheckpointConfig()).check_writable()
    return [*messages, str(error.value)]


def late(rank: int, world_size: int, models: dict[str, str], folder: str) -> list[Any]:
    """Checkpoints that are whole when what they wait for has come, in the background and at once."""
    parts = make_policy(layout_config(models["plain"], tp=2))
    parts.policy.update(with_weights(batch_of(parts, random_samples(parts.shape.vocab_size))), smooth_loss)
    queue = {"queue.integers": torch.arange(5), "queue.floats": torch.rand(3)}
    found = []
    for is_asynchronous in (True, False):
        own = Path(folder) / f"late-{is_asynchronous}"
        writer = CheckpointWriter(own, CheckpointConfig(asynchronous=is_asynchronous))
        writer.save(parts.policy, step=1, extra={"queue": None, "other": 7}, is_complete=False)
        writer.wait()
        dist.barrier()
        before = [path.name for path in own.iterdir()], writer.is_waiting
        dist.barrier()
        writer.complete(queue)
        writer.wait()
        dist.barrier()
        loaded = checkpoint.load(own / "step_000001", parts.policy)
        is_same = all(torch.equal(loaded.extra["queue"][name.partition(".")[2]], t) for name, t in queue.items())
        found.append([*before, writer.is_waiting, is_same or rank > 0, loaded.extra["other"]])
        writer.save(parts.policy, step=2, extra={}, is_complete=False)  # a run that ends before it is whole
        writer.wait()
        dist.barrier()
        assert checkpoint.newest_intact(own)[0].name == "step_000001"
        with (own / "step_000001" / "late.safetensors").open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"x")
        dist.barrier()
        with pytest.raises(ConfigError, match=r"late\.safetensors is not what was written"):
            checkpoint.load(own / "step_000001", parts.policy)
    return found


def test_a_checkpoint_may_wait_for_what_is_not_there_yet(models, tmp_path):
    for of_rank in run_distributed(late, 2, models, str(tmp_path)):
        assert of_rank == [[["step_000001.partial"], True, False, True, 7]] * 2


@contextmanager
def _disk_full(folder: Path | None) -> Iterator[None]:
    """Rank 0's files cannot be synced; processes that write are forked and inherit it."""
    with pytest.MonkeyPatch.context() as patch:
        if folder is not None:
            patch.setattr("os.fsync", _no_space)
        yield


def _no_space(descriptor: int) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@contextmanager
def _file_too_large(folder: Path | None) -> Iterator[None]:
    """The kernel's own refusal in the middle of a write, on rank 0 alone: files of more than 100 kB."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if folder is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextmanager
def _not_a_folder(folder: Path | None) -> Iterator[None]:
    """Rank 0 cannot make the checkpoint's folder; root may write into a read-only one, so a file is in its place."""
    if folder is not None:
        shutil.rmtree(folder / "step_000002.partial", ignore_errors=True)
        (folder / "step_000002.partial").write_text("")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("shutil.rmtree", lambda *_, **__: None)
            yield
        (folder / "step_000002.partial").unlink()
    else:
        yield


@contextmanager
def _killed(folder: Path | None) -> Iterator[None]:
    """Rank 0's writing process is killed, as the kernel does when memory runs out."""
    with pytest.MonkeyPatch.context() as patch:
        if folder is not None:
            patch.setattr("os.fsync", lambda _: os.kill(os.getpid(), signal.SIGKILL))
        yield


def test_what_cannot_be_written_is_said_on_every_rank_and_loses_nothing(models, tmp_path):
    first, second = run_distributed(unwritable, 2, models, str(tmp_path))
    assert first[-1] == second[-1], "said by rank 0 to all"
    assert "could not be written: /sys/checkpoints: " in first.pop(), "a read-only file system"
    second.pop()
    assert len(first) == len(second) == 6
    reasons = ["No space left on device", "unexpected pos .* MB are free in", "killed, or out of memory"] * 2
    reasons[-1] = "File exists"
    for message, other, reason in zip(first, second, reasons, strict=True):
        assert re.search(f"could not be written: .*{reason}", message), message
        assert re.search(f"could not be written: .*(another rank says why|{reason})", other), other


def resharded(rank: int, world_size: int, model: str, folder: str, run_dir: str) -> None:
    from megatron_rest.rollout.process import prepare_process

    prepare_process(allow_late=True)
    from megatron_rest.commands.reshard import reshard

    overrides = (f"checkpoint.load={folder}/as it lies/step_000003", f"trainer.run_dir={run_dir}")
    reshard(layout_config(model, pp=2, **DISTRIBUTED, overrides=overrides))


def loaded_alone(rank: int, world_size: int, model: str, path: str) -> dict[str, Any]:
    parts = make_policy(layout_config(model, **DISTRIBUTED))
    loaded = checkpoint.load(path, parts.policy)
    assert loaded.extra["step_seen"] == 3
    batch = with_weights(batch_of(parts, random_samples(parts.shape.vocab_size)))
    report = parts.policy.update(batch, smooth_loss)
    return {"numbers": (report.loss, report.grad_norm, report.lr)}


def test_a_checkpoint_as_it_lies_is_written_for_any_layout(models, saved, tmp_path):
    """Saved at PP 2 x DP 2, written again by two ranks (PP 2), continued in one process."""
    folder, unbroken = saved
    run_distributed(resharded, 2, models["as it lies"], str(folder), str(tmp_path))
    path = tmp_path / "any_layout" / "step_000003"
    assert checkpoint_files.damage(path) == []
    [result] = run_distributed(loaded_alone, 1, models["as it lies"], str(path))
    np.testing.assert_allclose(result["numbers"], unbroken[0]["as it lies"]["numbers"], rtol=3e-5)
