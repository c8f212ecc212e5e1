"""``megatron.{transformer,ddp,optimizer}``: checked against Megatron's own classes, and right where they overlap work.

1. names, kinds and combinations that Megatron-Core has not are one line; what is decided elsewhere is refused by name
2. gradients that travel, and parameters that are gathered, beside the computation: the same policy to the bit
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer.enums import AttnBackend

from megatron_rest.config import ConfigError, MegatronConfig
from megatron_rest.mcore import build, settings
from megatron_rest.mcore.hf import read_shape
from tests.helpers.distributed import run_distributed
from tests.helpers.policies import LAYERS, batch_of, layout_config, make_policy, random_samples
from tests.helpers.tiny_model import build_tiny_model
from tests.mcore.test_policy import smooth_loss, with_weights

GATHERS = tuple(
    f"megatron.ddp.{setting}"
    for setting in ("overlap_grad_reduce=true", "overlap_param_gather=true", "bucket_size=4000")
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("model") / "hf", layers=LAYERS, max_position_embeddings=256)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("transformer.aply_rope_fusion=true", "has no aply_rope_fusion: did you mean apply_rope_fusion"),
        ("transformer.attention_backend=fast", "takes flash or fused or unfused"),
        ("transformer.cp_comm_type=3", "and Megatron-Core takes"),
        ("transformer.moe_flex_dispatcher_backend=deep", "takes Literal"),
        ("transformer.cpu_offloading=maybe", "takes bool"),
        (
            "transformer.cpu_offloading=true transformer.cpu_offloading_num_layers=99",
            "TransformerConfig refuses megatron.transformer cpu_offloading=True",
        ),
    ],
)
def test_what_megatron_does_not_take_is_one_line(override: str, words: str, model: Path) -> None:
    config = layout_config(model, overrides=tuple(f"megatron.{one}" for one in override.split()))
    with pytest.raises(ConfigError, match=words):
        build.transformer_config(read_shape(model), config)


@pytest.mark.parametrize(
    ("section", "name", "words"),
    [
        ("transformer", "attention_dropout", "the same network in both passes"),
        ("transformer", "tensor_model_parallel_size", "parallel.tensor_parallel"),
        ("transformer", "fp8", "the precision section"),
        ("ddp", "use_megatron_fsdp", "written for DistributedDataParallel"),
        ("optimizer", "lr", "optimizer.lr"),
    ],
)
def test_what_is_decided_elsewhere_is_refused_by_name(section: str, name: str, words: str) -> None:
    with pytest.raises(ConfigError, match=rf"megatron.{section}.{name} is decided elsewhere: .*{words}"):
        MegatronConfig(**{section: {name: 1}})


def test_values_become_what_megatron_wants(model: Path) -> None:
    config = layout_config(
        model,
        overrides=(
            "megatron.transformer.attention_backend=flash",
            "megatron.transformer.init_method_std=1e-2",
            "megatron.transformer.batch_p2p_sync=false",
        ),
    )
    made = build.transformer_config(read_shape(model), config)
    assert (made.attention_backend, made.init_method_std, made.batch_p2p_sync) == (AttnBackend.flash, 0.01, False)
    assert made.hidden_dropout == 0.0, "ours stand"
    record = settings.resolved(made)
    assert record["attention_backend"] == "flash" and record["params_dtype"] == "float32"
    assert settings.make(OptimizerConfig, "optimizer", {}, {"exp_avg_dtype": "float32"}).exp_avg_dtype is torch.float32
    with pytest.raises(ConfigError, match=r"OptimizerConfig refuses .*main_grads_dtype can only be fp32"):
        settings.make(OptimizerConfig, "optimizer", {}, {"main_grads_dtype": "bfloat16"})
    assert settings.make(DistributedDataParallelConfig, "ddp", {}, {"bucket_size": None}).bucket_size is None


def trained(rank: int, world_size: int, model: Path, layout: dict[str, int]) -> list[dict[str, torch.Tensor]]:
    """Parameters after two updates with and without overlap, read as a transfer and a checkpoint would."""
    found = []
    for overrides in ((), GATHERS):
        parts = make_policy(layout_config(model, distributed_optimizer=True, overrides=overrides, **layout))
        for seed in range(2):
            batch = with_weights(batch_of(parts, random_samples(128, count=24, seed=seed)))
            assert len(batch.microbatches) > 1, "gradients are added up over microbatches before they travel"
            parts.policy.update(batch, smooth_loss)
        found.append({name: shard.clone() for name, shard in parts.policy.named_shards().items()})
        parts.policy.score(batch.microbatches)
        from megatron.core import parallel_state

        parallel_state.destroy_model_parallel()
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world_size", "arch", "layout"),
    [
        (2, "qwen3", {}),
        (4, "qwen3", {"pp": 2, "vpp": 2}),
        pytest.param(4, "qwen3", {"pp": 2}, marks=pytest.mark.extended),
        pytest.param(4, "qwen3_moe", {"ep": 2}, marks=pytest.mark.extended),
    ],
)
def test_overlapping_changes_no_parameter(world_size: int, arch: str, layout: dict[str, int], tmp_path: Path) -> None:
    model = build_tiny_model(tmp_path / "hf", arch=arch, layers=LAYERS, max_position_embeddings=256)
    for plain, gathered in run_distributed(trained, world_size, model, layout):
        for name in plain:
            torch.testing.assert_close(gathered[name], plain[name], rtol=0, atol=1e-6)


def test_fused_rotary_embeddings_do_not_go_with_shared_prompts(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They count from where a segment begins.  Transformer Engine's kernel is made out to be there."""
    from megatron.core.models.common.embeddings import rope_utils

    monkeypatch.setattr(rope_utils, "fused_apply_rotary_pos_emb_thd", lambda *_: None)
    fused = ("megatron.transformer.apply_rope_fusion=true",)
    with pytest.raises(ConfigError, match=r"apply_rope_fusion=true counts positions .* trainer\.share_prompts=off"):
        build.transformer_config(read_shape(model), layout_config(model, overrides=fused))
    plain = layout_config(model, overrides=(*fused, "trainer.share_prompts=off"))
    assert build.transformer_config(read_shape(model), plain).apply_rope_fusion
