"""The canary agrees when engine and trainer hold the same weights, stops the run when a tensor is in the wrong place
(at 16 bit and for a mixture of experts, too), and says what is only unusual.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron_rest.trainer import canary as module
from megatron_rest.trainer.canary import CanaryError, Sentry, Song, canary_prompt, canary_tolerance
from megatron_rest.trainer.fleet import Singers
from megatron_rest.types import PromptSample
from tests.helpers.distributed import run_distributed
from tests.helpers.policies import layout_config, make_policy
from tests.helpers.tiny_model import EOS_ID, build_tiny_model

PROMPT = PromptSample(prompt_id="canary", token_ids=np.arange(40, 100, dtype=np.int32), ground_truth="")


def rolled(tensor: torch.Tensor) -> torch.Tensor:
    """Rows in the place of their neighbours: a slice at the wrong offset."""
    return tensor.roll(1, 0)


def swapped(tensor: torch.Tensor) -> torch.Tensor:
    """Halves exchanged: gate and up, or two shards."""
    first, second = tensor.chunk(2)
    return torch.cat([second, first])


def sing(rank: int, world_size: int, model: str, dtype: str, parts_of_model: tuple[str, ...]) -> dict[str, Song]:
    """The song with right weights, and with each of ``parts_of_model`` misplaced in the trainer alone."""
    from megatron_rest.rollout.process import prepare_process

    prepare_process(allow_late=True)
    from megatron_rest.rollout.vllm_engine import VllmEngine
    from megatron_rest.trainer.canary import Canary

    overrides = (f"model.dtype={dtype}", f"rollout.dtype={dtype}", "rollout.temperature=0.7")  # nothing is sampled
    config = layout_config(model, overrides=overrides)
    parts = make_policy(config)
    engine = VllmEngine(model, config.rollout, seed=1, max_model_len=128, stop_token_ids=[EOS_ID])
    canary, singers = Canary(prompt=PROMPT, num_tokens=8), Singers(engine, True, 0)
    tolerance = canary_tolerance(config)
    found = canary.sing(singers, parts.policy, tolerance=tolerance, is_sharing=parts.is_sharing)
    assert found is not None
    songs = {"right": found}
    shards = parts.policy.named_shards()
    for part in parts_of_model:
        names = [name for name in shards if name.endswith(part) or (part == "experts" and ".local_experts." in name)]
        before = {name: shards[name].clone() for name in names}
        assert names, part
        with torch.no_grad():
            for name in names:
                shards[name].copy_((swapped if "fc1" in name else rolled)(before[name]))
            found = canary.sing(singers, parts.policy, tolerance=tolerance, is_sharing=parts.is_sharing)
            for name in names:
                shards[name].copy_(before[name])
        assert found is not None
        songs[part] = found
    engine.close()
    return songs


DENSE = (
    "layers.1.self_attention.linear_qkv.weight",
    "layers.1.self_attention.linear_proj.weight",
    "layers.1.mlp.linear_fc1.weight",
    "layers.1.mlp.linear_fc2.weight",
    "embedding.word_embeddings.weight",
)
MOE = ("layers.1.self_attention.linear_qkv.weight", "experts", "embedding.word_embeddings.weight")


def check(songs: dict[str, Song], tolerance: float) -> None:
    for part, song in songs.items():
        print(f"{part:45s} middle {song.middle:.2e} worst {song.worst:.2e} far {song.far:.2f} order {song.order:.2f}")
        assert (song.middle <= tolerance) == (part == "right"), (part, song)
    assert songs["right"].order == 1.0


@pytest.mark.parametrize(
    ("arch", "dtype"),
    [
        pytest.param("qwen3", "float32", marks=pytest.mark.extended),
        pytest.param("qwen3", "bfloat16", marks=pytest.mark.extended),
        ("qwen3_moe", "bfloat16"),
    ],
)
@pytest.mark.slow
def test_a_misplaced_tensor_is_told_from_rounding(tmp_path: Path, arch: str, dtype: str) -> None:
    model = build_tiny_model(tmp_path / "hf", arch=arch, max_position_embeddings=256)
    [songs] = run_distributed(sing, 1, str(model), dtype, MOE if "moe" in arch else DENSE)
    check(songs, 1e-4 if dtype == "float32" else 0.05)


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def sentry(folder: Path, *, is_moe: bool = False, setting: str = "tp 1") -> Sentry:
    return Sentry(tolerance=0.05, run_dir=folder, setting=setting, is_moe=is_moe, rank=0)


def song(middle: float, **changes: float) -> Song:
    return Song(**{"middle": middle, "worst": 2 * middle, "far": 0.0, "order": 1.0, **changes})


def guard(watch: Sentry, version: int, *songs: Song) -> tuple[int, Song]:
    """How many pushes it took, and the last song."""
    left = list(songs)
    count, last = 0, song(0)

    def push() -> tuple[int, Song]:
        nonlocal count
        count += 1
        return count, left.pop(0)

    count, last = watch.guard(version, push)
    return count, last


@pytest.mark.usefixtures("one_rank")
def test_an_alarm_is_said_and_everything_sent_again_before_the_run_stops(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    watch = sentry(tmp_path)
    assert guard(watch, 1, song(0.01))[0] == 1 and not caplog.records
    assert guard(watch, 2, song(0.3), song(0.01)) == (2, song(0.01))
    assert "by 0.3 nats on the middle token" in caplog.text and "everything is sent once more" in caplog.text
    with pytest.raises(CanaryError, match=r"by 0\.3 nats .* also after everything was sent again") as error:
        guard(watch, 3, song(0.3), song(0.3))
    assert error.value.song == song(0.3) and error.value.is_on_every_rank


@pytest.mark.usefixtures("one_rank")
def test_a_restart_does_not_repeat_a_false_alarm_and_does_repeat_a_true_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = sentry(tmp_path)
    guard(first, 6, song(0.01))
    with pytest.raises(CanaryError):
        guard(first, 7, song(0.2), song(0.2))
    elsewhere = sentry(tmp_path, setting="tp 2")
    with pytest.raises(CanaryError):
        guard(elsewhere, 7, song(0.2), song(0.2))
    (tmp_path / "canary.json").unlink()
    with pytest.raises(CanaryError):
        guard(sentry(tmp_path), 7, song(0.2), song(0.2))  # the first transfer of a run: nothing was right before
    with pytest.raises(CanaryError):
        guard(sentry(tmp_path), 7, song(0.2), song(0.2))
    (tmp_path / "canary.json").unlink()
    again = sentry(tmp_path)
    guard(again, 6, song(0.01))
    with pytest.raises(CanaryError):
        guard(again, 7, song(0.2), song(0.2))
    started_again = sentry(tmp_path)
    assert guard(started_again, 7, song(0.2), song(0.21))[0] == 2
    assert "the same as when it stopped the run before" in caplog.text
    assert guard(started_again, 8, song(0.25))[0] == 1, "twice that is allowed from here on"
    with pytest.raises(CanaryError):
        guard(started_again, 9, song(2.0), song(2.0))
    (tmp_path / "canary.json").write_text('{"version": "what"}')
    assert guard(sentry(tmp_path), 7, song(0.01))[0] == 1, "what is no note of ours says nothing"


@pytest.mark.usefixtures("one_rank")
def test_what_is_only_unusual_is_said_by_its_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    watch = sentry(tmp_path, is_moe=True)
    for version in range(4):
        guard(watch, version, song(0.001))
    assert not caplog.records
    guard(watch, 4, song(0.04))
    assert "usual in this run: 0.001" in caplog.text
    caplog.clear()
    for version in range(5, 8):
        guard(watch, version, song(0.001, far=0.02, worst=1.5))
    [record] = caplog.records
    assert "2.0% of the canary's tokens are more than 0.5 nats apart (at most 1.5)" in record.getMessage()
    assert "its router takes other experts there" in record.getMessage()


def test_gaps_and_order() -> None:
    ten = torch.tensor([0.001] * 9 + [2.0], dtype=torch.float64)
    assert module._gaps(ten, 0.05).tolist() == [0.001, 2.0, 0.1], "a router's choice moves few tokens far"
    assert module._gaps(torch.tensor([0.0, torch.nan, torch.nan]), 0.05).tolist()[:2] == [torch.inf, torch.inf]
    likely = torch.tensor([-0.1, -1.0, -2.0, -2.01])
    assert module._same_order(likely, likely.flip(0), 0.05) == 0.0
    assert module._same_order(likely, likely[[0, 1, 3, 2]], 0.05) == 1.0, "those two are alike in the engine"


def test_the_prompt_always_fits() -> None:
    def config(length: int, tokens: int, microbatch: int = 4096) -> Any:
        return SimpleNamespace(
            model=SimpleNamespace(max_sequence_length=length),
            trainer=SimpleNamespace(max_tokens_per_microbatch=microbatch),
            weight_sync=SimpleNamespace(canary_tokens=tokens),
        )

    for prompt_length in (1, 5, 60, 5000):
        long = PromptSample(prompt_id="p", token_ids=np.zeros(prompt_length, np.int32), ground_truth="g")
        for length, tokens, microbatch in (
            (8192, 16, 4096),
            (64, 16, 4096),
            (12, 16, 4096),
            (3, 1, 64),
            (8192, 16, 20),
        ):
            prompt, num_tokens = canary_prompt(long, config(length, tokens, microbatch))
            assert 1 <= num_tokens <= tokens and 1 <= len(prompt.token_ids) <= prompt_length
            assert len(prompt.token_ids) + num_tokens <= min(length - 1, microbatch), "and room for one more"
