"""Configuration in, Megatron objects out.  The one place that reads Megatron's global state and the process
environment.

Refused here, because Megatron-Core computes silently wrong numbers with them on gloo (and nothing is gained by them
in RL): dropout, interleaved PP=2 without overlapped point-to-point messages, deallocated pipeline outputs with
overlapped messages.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from megatron_rest.config import ConfigError, Fp8Recipe, OptimizerConfig, RestConfig, validate
from megatron_rest.mcore import accelerations, cpu, groups, precision, rng, settings
from megatron_rest.model_map import ModelShape, padded_vocab_size
from megatron_rest.network import use_one_network

__all__ = ["ParallelContext", "build_chunks", "build_optimizer", "initialize", "transformer_config", "wrap"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelContext:
    """Groups and ranks of this process.  ``pg_collection`` is Megatron's own type under Megatron's own name."""

    pg_collection: Any
    rank: int
    world_size: int
    ranks_per_node: int
    tp_rank: int
    tp_size: int
    pp_rank: int
    pp_size: int
    dp_rank: int
    dp_size: int
    cp_rank: int
    cp_size: int
    ep_rank: int
    ep_size: int
    device: torch.device

    @property
    def tp_group(self) -> dist.ProcessGroup:
        return self.pg_collection.tp

    @property
    def pp_group(self) -> dist.ProcessGroup:
        return self.pg_collection.pp

    @property
    def dp_group(self) -> dist.ProcessGroup:
        """Replicas that hold other sequences."""
        return self.pg_collection.dp

    @property
    def cp_group(self) -> dist.ProcessGroup:
        return self.pg_collection.cp

    @property
    def dp_cp_group(self) -> dist.ProcessGroup:
        """Ranks that hold other tokens: replicas and the shares of one sequence."""
        return self.pg_collection.dp_cp

    @property
    def ep_group(self) -> dist.ProcessGroup:
        """Ranks of one stage that together hold all its experts; ``model_map.expert_owner`` says which holds which."""
        return self.pg_collection.ep

    @property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.pp_size - 1

    @property
    def last_stage_rank(self) -> int:
        """Global rank of the last stage of this rank's pipeline."""
        return dist.get_global_rank(self.pp_group, self.pp_size - 1)


def initialize(config: RestConfig) -> ParallelContext:
    """Start torch.distributed if need be (torchrun's environment) and Megatron's groups; seed; check the layout.

    Raises :class:`ConfigError` if the world size does not fit the layout, or this machine lacks the FP8 recipe.
    """
    if config.precision.recipe is not Fp8Recipe.NONE:
        precision.require(config.precision.recipe, precision.this_machine())
    is_cpu = cpu.enable()
    if not is_cpu:
        _take_device(int(os.environ.get("LOCAL_RANK", "0")))
    if not dist.is_initialized():
        ranks = int(os.environ.get("WORLD_SIZE", "1"))
        use_one_network(several_machines=ranks > int(os.environ.get("LOCAL_WORLD_SIZE", ranks)))
        groups.connect_on_demand()
        # Numbers that live on the host (metrics, flags) are reduced as CPU tensors, over the same groups.
        backend = "gloo" if is_cpu else "cpu:gloo,cuda:nccl"
        dist.init_process_group(backend, timeout=timedelta(minutes=config.trainer.timeout_minutes))
    validate(config, world_size=dist.get_world_size())
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection

    p = config.parallel
    with groups.own_groups_only():
        parallel_state.initialize_model_parallel(
            p.tensor_parallel,
            p.pipeline_parallel,
            p.virtual_pipeline if p.virtual_pipeline > 1 else None,
            context_parallel_size=p.context_parallel,
            expert_model_parallel_size=p.expert_parallel,
            expert_tensor_parallel_size=1,  # model_map: an expert is never cut
            distributed_timeout_minutes=config.trainer.timeout_minutes,  # groups do not inherit it
            create_gloo_process_groups=False,  # every group carries CPU tensors already, where it is not gloo itself
        )
    made = ProcessGroupCollection.use_mpu_process_groups()
    cpu.seed_model_parallel(config.trainer.seed, tp_rank=made.tp.rank(), ep_rank=made.ep.rank())
    rng.seed_host(config.trainer.seed, rank=dist.get_rank())
    return ParallelContext(
        pg_collection=made,
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        ranks_per_node=int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size())),
        tp_rank=made.tp.rank(),
        tp_size=made.tp.size(),
        pp_rank=made.pp.rank(),
        pp_size=made.pp.size(),
        dp_rank=made.dp.rank(),
        dp_size=made.dp.size(),
        cp_rank=made.cp.rank(),
        cp_size=made.cp.size(),
        ep_rank=made.ep.rank(),
        ep_size=made.ep.size(),
        device=torch.device("cpu") if is_cpu else torch.device("cuda", torch.cuda.current_device()),
    )


def _take_device(local_rank: int) -> None:
    if local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"local rank {local_rank} of {socket.gethostname()} sees {torch.cuda.device_count()} GPUs: start at most "
            "one rank a GPU, and let every rank see all of its node's (no --gpus-per-task, no CUDA_VISIBLE_DEVICES of "
            "its own)"
        )
    torch.cuda.set_device(local_rank)


def transformer_config(shape: ModelShape, config: RestConfig) -> Any:
    """Megatron's ``TransformerConfig`` for a HF model shape and a layout that it can be cut into (``model_fit``)."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_rest.mcore.specs import is_sharing_prompts

    p = config.parallel
    dtype = getattr(torch, config.model.dtype)
    is_cpu = not torch.cuda.is_available()
    interleaved = p.virtual_pipeline > 1
    is_overlapped = interleaved and p.pipeline_parallel == 2
    ours = dict(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        ffn_hidden_size=shape.ffn_hidden_size,
        num_attention_heads=shape.num_attention_heads,
        num_query_groups=shape.num_query_groups,
        kv_channels=shape.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=shape.norm_eps,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=shape.has_qkv_bias,
        qk_layernorm=shape.has_qk_norm,
        # RL compares log-probs of the same network in different passes: dropout would make every ratio noise.
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=p.tensor_parallel,
        pipeline_model_parallel_size=p.pipeline_parallel,
        virtual_pipeline_model_parallel_size=p.virtual_pipeline if interleaved else None,
        context_parallel_size=p.context_parallel,
        sequence_parallel=p.sequence_parallel,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        use_cpu_initialization=is_cpu,
        calculate_per_token_loss=True,  # Megatron divides by the global token count: no split changes the gradient
        variable_seq_lengths=False,  # MegatronPolicy pads the microbatches of a call to one length
        moe_token_dispatcher_type="alltoall",
        attention_softmax_in_fp32=True,
        masked_softmax_fusion=not is_cpu,
        gradient_accumulation_fusion=accelerations.has_apex_weight_gradients(),
        persist_layer_norm=False,
        # The fused kernel would spare four reads of the device a layer, but Transformer Engine's leaves rows outside
        # cu_seqlens unwritten and is reported to give NaN gradients on packed Qwen3 models.
        apply_rope_fusion=False,
        bias_activation_fusion=True,
        bias_dropout_fusion=True,
        # Interleaved PP=2 without overlap matches messages in the wrong order; with overlap, deallocating outputs frees
        # storage that gloo is still sending.  Both are silent.  Longer pipelines need no overlap to be right, and have
        # been seen to hang with it (Megatron-LM issue 5240).
        overlap_p2p_comm=is_overlapped,
        batch_p2p_comm=not is_overlapped,
        deallocate_pipeline_outputs=not is_overlapped,
        **_recompute(config.parallel.recompute, is_moe=bool(shape.num_experts)),
        **_expert_settings(shape, config),
        **precision.transformer_settings(config.precision),
    )
    made = settings.make(TransformerConfig, "transformer", ours, config.megatron.transformer)
    if made.apply_rope_fusion and is_sharing_prompts(config):
        raise ConfigError(
            "megatron.transformer.apply_rope_fusion=true counts positions from where a segment begins, and an answer "
            "that continues a prompt does not begin at 0: leave it out, or set trainer.share_prompts=off"
        )
    return made


def _expert_settings(shape: ModelShape, config: RestConfig) -> dict[str, Any]:
    """Mixture of experts: every token goes to its ``top k`` experts, none is dropped.

    No auxiliary loss: it is a mean over the tokens of one microbatch, so that how the work is split would change it.
    """
    from megatron_rest.mcore.specs import has_transformer_engine

    if not shape.num_experts:
        return {}
    return {
        "num_moe_experts": shape.num_experts,
        "moe_ffn_hidden_size": shape.moe_ffn_hidden_size,
        "moe_layer_freq": [int(layer not in shape.dense_layers) for layer in range(shape.num_layers)],
        "moe_router_topk": shape.num_experts_per_token,
        # Softmax over all experts and then a choice, or a choice and then softmax over the chosen.
        "moe_router_pre_softmax": not shape.has_normalized_expert_probs,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
        "moe_grouped_gemm": has_transformer_engine(),  # one kernel for all experts; one product after the other without
        "moe_permute_fusion": accelerations.has_fused_permutation(),  # else the host waits for each expert's count
        "expert_model_parallel_size": config.parallel.expert_parallel,
        "expert_tensor_parallel_size": 1,  # model_map: an expert is never cut
    }


def _recompute(what: str, *, is_moe: bool) -> dict[str, Any]:
    """Megatron's settings for ``parallel.recompute``."""
    if what == "full":
        return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    if what == "mlp":
        return {"recompute_granularity": "selective", "recompute_modules": ["mlp", "moe"] if is_moe else ["mlp"]}
    return {}


def build_chunks(shape: ModelShape, config: RestConfig, context: ParallelContext, megatron_config: Any) -> list[Any]:
    """This rank's ``GPTModel`` chunks, unwrapped, with random weights and our output in place of the cross-entropy."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt.gpt_model import GPTModel

    from megatron_rest.mcore.output import attach
    from megatron_rest.mcore.segments import follow_positions
    from megatron_rest.mcore.specs import block_spec

    chunks = []
    for i in range(config.parallel.virtual_pipeline):
        stage = i if config.parallel.virtual_pipeline > 1 else None
        model = GPTModel(
            megatron_config,
            block_spec(megatron_config, vp_stage=stage),
            vocab_size=padded_vocab_size(shape.vocab_size, context.tp_size, shape.vocab_multiple),
            max_sequence_length=config.model.max_sequence_length,
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=stage),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=stage),
            share_embeddings_and_output_weights=shape.tied_embeddings,
            position_embedding_type="rope",
            rotary_base=shape.rope_theta,
            **_rope_scaling(shape),
            pg_collection=context.pg_collection,
            vp_stage=stage,
        )
        attach(model, vocab_size=shape.vocab_size, temperature=config.rollout.temperature, form=config.model.head)
        follow_positions(model)
        accelerations.fuse_weight_gradients(model)
        _mark_experts(model, context)
        _let_go_of_routing(model)
        chunks.append(model.to(context.device))
    return chunks


def _mark_experts(model: Any, context: ParallelContext) -> None:
    """Let DistributedDataParallel and the optimiser treat experts as experts.

    Megatron marks them itself where EP > 1.  With EP = 1 it takes them for parameters that TP has cut, and adds their
    gradients up over data-parallel ranks only; but every TP rank has whole experts, and other tokens for them.
    """
    if context.ep_size == 1 and context.tp_size > 1:
        for name, parameter in model.named_parameters():
            if ".mlp.experts." in name:
                parameter.allreduce = False


def _let_go_of_routing(model: Any) -> None:
    """Let dispatchers drop a pass's router probabilities when its rows are back from their experts.

    Megatron's keeps them until the layer's next forward pass.  Of a recomputed layer they hold the graph, and by it the
    layer's input and that input's gradient: two hidden states a layer, 3 GB of a 30B-A3B rank.
    """
    for module in model.modules():
        dispatcher = getattr(module, "token_dispatcher", None)
        if dispatcher is not None:
            dispatcher.combine_postprocess = partial(_combine_and_let_go, dispatcher, dispatcher.combine_postprocess)


def _combine_and_let_go(dispatcher: Any, combine: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    rows = combine(*args, **kwargs)
    dispatcher.probs = None
    return rows


def _rope_scaling(shape: ModelShape) -> dict[str, Any]:
    """Llama-3's frequency scaling, the one that ``GPTModel`` knows (:class:`ModelShape` refuses other constants)."""
    return (
        {"rope_scaling": True, "rope_scaling_factor": float(shape.rope_scaling["factor"])} if shape.rope_scaling else {}
    )


def wrap(chunks: list[Any], megatron_config: Any, config: RestConfig, context: ParallelContext) -> list[Any]:
    """Megatron's DistributedDataParallel around every chunk; replicas start from the weights of DP rank 0."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    ours = dict(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=config.parallel.distributed_optimizer,
        check_for_nan_in_grad=False,  # it would end the run; MegatronPolicy.update skips the update and says why
        **precision.ddp_settings(config.precision),
    )
    ddp = settings.make(DistributedDataParallelConfig, "ddp", ours, config.megatron.ddp)
    wrapped = [
        DistributedDataParallel(megatron_config, ddp, chunk, disable_bucketing=i > 0) for i, chunk in enumerate(chunks)
    ]
    if not config.precision.parameters:  # collectives take no FP8 tensors; every replica quantised the same values
        for chunk in wrapped:
            chunk.broadcast_params()
    return wrapped


def build_optimizer(
    chunks: list[Any], megatron_config: Any, config: RestConfig, *, optimizer: OptimizerConfig, num_updates: int
) -> tuple[Any, Any]:
    """Megatron's Adam and learning-rate schedule for ``num_updates`` optimiser steps.

    Update i of N (from 0) has the learning rate ``lr (i + 1) / warmup_steps`` up to ``lr``; then ``linear`` falls to a
    tenth of it at update N - 1.  A loaded checkpoint says how many updates were done; the schedule is the configured
    one.  Also hooks them into the pipeline's schedules.
    """
    from megatron.core.distributed import finalize_model_grads
    from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
    from megatron.core.optimizer import get_megatron_optimizer
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    min_lr = optimizer.lr if optimizer.decay == "constant" else 0.1 * optimizer.lr
    # Megatron's ramp begins with the value before the first update; ours has reached a first step then.
    warmup_steps = max(optimizer.warmup_steps - 1, 0)
    ours = dict(
        optimizer="adam",
        lr=optimizer.lr,
        min_lr=min_lr,  # the scheduler prefers what the parameter groups say to its own
        weight_decay=optimizer.weight_decay,
        clip_grad=optimizer.clip_grad,
        adam_beta1=optimizer.adam_beta1,
        adam_beta2=optimizer.adam_beta2,
        bf16=megatron_config.bf16,
        params_dtype=megatron_config.params_dtype,
        use_distributed_optimizer=config.parallel.distributed_optimizer,
        overlap_param_gather=chunks[0].ddp_config.overlap_param_gather,
        **precision.optimizer_settings(config.precision),
    )
    adam = get_megatron_optimizer(
        settings.make(MegatronOptimizerConfig, "optimizer", ours, config.megatron.optimizer),
        chunks,
        use_gloo_process_groups=False,
    )
    scheduler = OptimizerParamScheduler(
        adam,
        init_lr=optimizer.lr / max(optimizer.warmup_steps, 1),
        max_lr=optimizer.lr,
        min_lr=min_lr,
        lr_warmup_steps=warmup_steps,
        lr_decay_steps=max(num_updates - 1, warmup_steps + 1),
        lr_decay_style=optimizer.decay,
        start_wd=optimizer.weight_decay,
        end_wd=optimizer.weight_decay,
        wd_incr_steps=num_updates,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,  # a loaded state brings the count of updates, and nothing else
    )
    megatron_config.finalize_model_grads_func = finalize_model_grads
    megatron_config.grad_scale_func = adam.scale_loss
    if chunks[0].ddp_config.overlap_grad_reduce:  # gradients travel after the last microbatch, not after each
        no_sync = [chunk.no_sync for chunk in chunks]
        megatron_config.no_sync_func = no_sync if len(chunks) > 1 else no_sync[0]
    return adam, scheduler
