"""Settings that go to vLLM or Megatron-Core as they are, and those of theirs that are decided here.

``rollout.engine_args.{name}`` and ``megatron.{transformer,ddp,optimizer}.{name}`` take whatever the installed version
has, but for the names in these tables: what stands beside each says which key sets it instead, or why nothing may.
Where the packages are, the names and kinds of all others are checked against their own classes
(rollout/engine_args.py, mcore/settings.py).
"""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["OURS"]

_MODEL = "read from model.path"
_NUMBERS = "log-probs of engine and trainer would not be those of the same policy"
_REPLICAS = "an engine is rollout.tensor_parallel workers, more engines are rollout.replicas"
_LAUNCHER = "given by the launcher"
_TRANSFER = "weights come by transfer (weight_sync.transport)"

_ENGINE = {
    "model": "model.path",
    "model_weights": _TRANSFER,
    "tokenizer": "prompts arrive as token ids",
    "tokenizer_mode": "prompts arrive as token ids",
    "skip_tokenizer_init": "prompts arrive as token ids",
    "hf_config_path": _MODEL,
    "config_format": _MODEL,
    "revision": _MODEL,
    "code_revision": _MODEL,
    "model_class_overrides": _MODEL,
    "model_impl": "parameters would have other names than the transfer knows",
    "trust_remote_code": "nothing in a model's folder is executed",
    "runner": "an engine generates",
    "convert": "an engine generates",
    "dtype": "rollout.dtype",
    "quantization": "rollout.quantization",
    "quantization_config": "rollout.quantization",
    "hf_overrides": "rollout.quantization",
    "seed": "trainer.seed",
    "max_model_len": "model.max_sequence_length",
    "max_num_seqs": "rollout.max_concurrent",
    "gpu_memory_utilization": "rollout.gpu_memory_utilization",
    "kv_cache_memory_bytes": "rollout.kv_cache_bytes on CPU, rollout.gpu_memory_utilization on GPU",
    "enable_sleep_mode": "rollout.sleep_level",
    "enable_cumem_allocator": "rollout.sleep_level",
    "tensor_parallel_size": "rollout.tensor_parallel",
    "pipeline_parallel_size": _REPLICAS,
    "prefill_context_parallel_size": _REPLICAS,
    "decode_context_parallel_size": _REPLICAS,
    "data_parallel_size": _REPLICAS,
    "data_parallel_size_local": _REPLICAS,
    "data_parallel_rank": _REPLICAS,
    "data_parallel_start_rank": _REPLICAS,
    "data_parallel_backend": _REPLICAS,
    "data_parallel_hybrid_lb": _REPLICAS,
    "data_parallel_external_lb": _REPLICAS,
    "data_parallel_multi_port_external_lb": _REPLICAS,
    "data_parallel_address": _LAUNCHER,
    "data_parallel_rpc_port": _LAUNCHER,
    "distributed_executor_backend": _LAUNCHER,
    "device_ids": _LAUNCHER,
    "master_addr": _LAUNCHER,
    "master_port": _LAUNCHER,
    "nnodes": _LAUNCHER,
    "node_rank": _LAUNCHER,
    "enable_elastic_ep": "the transfer counts an engine's workers once",
    "enable_eplb": "experts would move between workers, and the transfer sends them where they were",
    "load_format": _TRANSFER,
    "weight_transfer_config": _TRANSFER,
    "worker_extension_cls": _TRANSFER,
    "worker_cls": _TRANSFER,
    "scheduler_cls": "engines take the same steps as the trainer expects",
    "enable_lora": "the policy's weights are sent whole",
    "logprobs_mode": "log-probs have to be those of the distribution that was sampled from",
    "generation_config": "rollout.temperature, top_p and top_k alone say how is sampled",
    "override_generation_config": "rollout.temperature, top_p and top_k alone say how is sampled",
    "logits_processors": _NUMBERS,
    "speculative_config": "its draft model would not get the policy's weights",
    "spec_method": "its draft model would not get the policy's weights",
    "spec_model": "its draft model would not get the policy's weights",
    "spec_tokens": "its draft model would not get the policy's weights",
    "watermark_config": _NUMBERS,
    "hf_token": "nothing is fetched: model.path is a folder",
}

_TP, _PP, _EP = "parallel.tensor_parallel", "parallel.pipeline_parallel", "parallel.expert_parallel"
_FP8 = "the precision section"
_BALANCE = "a mean over the tokens of one microbatch: how the work is split would change the gradient"
_DROPPED = "every token goes to its experts, as in the engine"
_SCHEDULE = "other values match or free messages wrongly, in silence"
_DROPOUT = "a probability ratio needs the same network in both passes"
_RECOMPUTE = "parallel.recompute"
_CODE = "code, not a value"

_TRANSFORMER = {
    **dict.fromkeys(
        (
            "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels",
            "normalization", "layernorm_epsilon", "layernorm_zero_centered_gamma", "gated_linear_unit",
            "add_bias_linear", "add_qkv_bias", "qk_layernorm", "qk_l2_norm", "softmax_scale", "softmax_type",
            "rotary_interleaved", "window_size", "window_attn_skip_freq", "multi_latent_attention", "no_rope_freq",
            "experimental_attention_variant", "attention_output_gate", "glu_linear_offset",
            "activation_func_clamp_value", "num_moe_experts", "moe_ffn_hidden_size", "moe_layer_freq",
            "moe_router_topk", "moe_router_pre_softmax", "moe_router_num_groups", "moe_router_group_topk",
            "moe_router_topk_scaling_factor", "moe_router_score_function", "moe_router_enable_expert_bias",
            "moe_shared_expert_intermediate_size", "moe_latent_size", "mtp_num_layers", "is_hybrid_model",
            "apply_residual_connection_post_layernorm", "apply_query_key_layer_scaling", "heterogeneous_block_specs",
        ),
        _MODEL,
    ),
    "tensor_model_parallel_size": _TP,
    "pipeline_model_parallel_size": _PP,
    "virtual_pipeline_model_parallel_size": "parallel.virtual_pipeline",
    "context_parallel_size": "parallel.context_parallel",
    "expert_model_parallel_size": _EP,
    "expert_tensor_parallel_size": "an expert is never cut: the transfer counts on it",
    "sequence_parallel": "parallel.sequence_parallel",
    "params_dtype": "model.dtype",
    "pipeline_dtype": "model.dtype",
    "bf16": "model.dtype",
    "fp16": "model.dtype",
    "enable_autocast": "model.dtype",
    "hidden_dropout": _DROPOUT,
    "attention_dropout": _DROPOUT,
    "calculate_per_token_loss": "the loss divides by the tokens of the global batch",
    "variable_seq_lengths": "the microbatches of a call are padded to one length",
    "moe_token_dispatcher_type": "ranks hold different numbers of tokens",
    "overlap_p2p_comm": _SCHEDULE,
    "batch_p2p_comm": _SCHEDULE,
    "deallocate_pipeline_outputs": _SCHEDULE,
    "overlap_moe_expert_parallel_comm": _SCHEDULE,
    "defer_embedding_wgrad_compute": "the output layer is this project's own (model.head)",
    "cross_entropy_loss_fusion": "the output layer is this project's own (model.head)",
    "use_cpu_initialization": "the device decides",
    "init_model_with_meta_device": "weights are read before Megatron wraps the model",
    "tp_comm_overlap": "Transformer Engine's buffers have one size, and packed microbatches differ",
    "recompute_granularity": _RECOMPUTE,
    "recompute_method": _RECOMPUTE,
    "recompute_num_layers": _RECOMPUTE,
    "recompute_modules": _RECOMPUTE,
    "moe_layer_recompute": _RECOMPUTE,
    "moe_router_load_balancing_type": _BALANCE,
    "moe_aux_loss_coeff": _BALANCE,
    "moe_z_loss_coeff": _BALANCE,
    "moe_input_jitter_eps": _DROPOUT,
    "moe_token_dropping": _DROPPED,
    "moe_expert_capacity_factor": _DROPPED,
    "moe_pad_expert_input_to_capacity": _DROPPED,
    "moe_router_force_load_balancing": _DROPPED,
    "moe_enable_routing_replay": "nothing here records routes",
    "flash_decode": "vLLM samples",
    **dict.fromkeys(
        (
            "fp8", "fp8_recipe", "fp8_param", "fp8_margin", "fp8_amax_history_len", "fp8_amax_compute_algo",
            "first_last_layers_bf16", "num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16", "fp4", "fp4_recipe",
            "fp4_param", "fp8_quantizer_factory", "fp4_quantizer_factory", "quant_recipe", "use_kitchen",
        ),
        _FP8,
    ),
    **dict.fromkeys(
        (
            "activation_func", "timers", "finalize_model_grads_func", "grad_scale_func", "no_sync_func",
            "grad_sync_func", "param_sync_func", "init_method", "output_layer_init_method", "embedding_init_method",
        ),
        _CODE,
    ),
}  # fmt: skip

_FSDP = "the trainer is written for DistributedDataParallel"

_DDP = {
    "grad_reduce_in_fp32": "gradients are added up in float32",
    "use_distributed_optimizer": "parallel.distributed_optimizer",
    "num_distributed_optimizer_instances": "checkpoints and groups know one instance",
    "check_for_nan_in_grad": "an update whose gradients are not finite is skipped and named instead of ending the run",
    "average_in_collective": "the loss divides by the tokens of the global batch",
    "fp8_param_gather": "precision.parameters",
    "reuse_grad_buf_for_mxfp8_param_ag": "precision.parameters",
    "align_param_gather": "the schedule starts no gather",
    "use_megatron_fsdp": _FSDP,
    "use_custom_fsdp": _FSDP,
    "data_parallel_sharding_strategy": _FSDP,
    "outer_dp_sharding_strategy": _FSDP,
}

_OPTIMIZER = {
    "optimizer": "Adam (the optimizer section)",
    "lr": "optimizer.lr",
    "min_lr": "optimizer.decay",
    "decoupled_lr": "optimizer.lr",
    "decoupled_min_lr": "optimizer.decay",
    "weight_decay": "optimizer.weight_decay",
    "clip_grad": "optimizer.clip_grad",
    "adam_beta1": "optimizer.adam_beta1",
    "adam_beta2": "optimizer.adam_beta2",
    "decoupled_weight_decay": "AdamW, as the paper",
    "bf16": "model.dtype",
    "fp16": "model.dtype",
    "params_dtype": "model.dtype",
    "fp8_recipe": _FP8,
    "reuse_grad_buf_for_mxfp8_param_ag": "precision.parameters",
    "use_distributed_optimizer": "parallel.distributed_optimizer",
    "overlap_param_gather": "megatron.ddp.overlap_param_gather, which sets both",
    "overlap_param_gather_with_optimizer_step": "the schedule starts no gather",
    "timers": _CODE,
}

OURS: Mapping[str, Mapping[str, str]] = {
    "rollout.engine_args": _ENGINE,
    "megatron.transformer": _TRANSFORMER,
    "megatron.ddp": _DDP,
    "megatron.optimizer": _OPTIMIZER,
}
"""By the key that takes them: names that are decided here, and what decides."""
