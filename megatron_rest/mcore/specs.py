"""Layer specs of decoder-only models: Transformer Engine where it is installed with a GPU, local modules otherwise.

Both name their parameters alike in checkpoints; what differs is where the norms live, which ``model_map`` knows.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_rest.config import RestConfig
from megatron_rest.mcore.attention import PackedCoreAttention
from megatron_rest.passes import shares_prompts

__all__ = ["block_spec", "has_transformer_engine", "is_sharing_prompts"]


def has_transformer_engine() -> bool:
    """Whether Megatron can use Transformer Engine here: installed, importable and with a CUDA device."""
    return torch.cuda.is_available() and getattr(gpt_layer_specs, "HAVE_TE", False)


def is_sharing_prompts(config: RestConfig) -> bool:
    """``trainer.share_prompts`` of this process; :class:`ConfigError` where its attention cannot do it."""
    return shares_prompts(config, has_transformer_engine=has_transformer_engine())


def block_spec(config: TransformerConfig, *, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    """Spec of the transformer block of one pipeline chunk; experts where ``config.moe_layer_freq`` has them."""
    if has_transformer_engine():
        return gpt_layer_specs.get_gpt_decoder_block_spec(config, use_transformer_engine=True, vp_stage=vp_stage)
    block = copy.deepcopy(
        gpt_layer_specs.get_gpt_decoder_block_spec(
            config, use_transformer_engine=False, normalization="RMSNorm", vp_stage=vp_stage
        )
    )
    for layer in block.layer_specs:
        submodules = layer.submodules
        submodules.input_layernorm = RMSNorm
        submodules.pre_mlp_layernorm = RMSNorm
        submodules.self_attention.submodules.core_attention = PackedCoreAttention
        if config.qk_layernorm:
            submodules.self_attention.submodules.q_layernorm = RMSNorm
            submodules.self_attention.submodules.k_layernorm = RMSNorm
    block.layer_norm = RMSNorm
    return block


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm with the mark that makes Megatron reduce its gradient over sequence-parallel ranks.

    Megatron's ``WrappedTorchNorm`` refuses sequence parallelism; without the mark the norm gradients are silently
    wrong.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **unused: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
