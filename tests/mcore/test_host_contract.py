"""What ``megatron_rest.mcore`` relies on in the installed Megatron-Core, name by name.

``make test-host`` runs this file, and the behaviour in ``test_head.py``, on the second supported line as well; it says
in ``MEGATRON_REST_HOST`` which version has to be found, so that the wrong one cannot pass.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import os

import megatron.core
import pytest
import torch

from megatron_rest.algorithms import RestPolicyLoss
from megatron_rest.config import LossConfig
from megatron_rest.mcore import cpu, output
from megatron_rest.mcore.head import PolicyHead
from megatron_rest.mcore.step_loss import LossTokens, StepLoss
from tests.helpers.distributed import run_distributed

# module, callable, its parameters that we pass or read by name
CALLS = {
    "model": (
        "megatron.core.models.gpt.gpt_model",
        "GPTModel.__init__",
        "config transformer_layer_spec vocab_size max_sequence_length pre_process post_process pg_collection vp_stage "
        "share_embeddings_and_output_weights position_embedding_type rotary_base rope_scaling rope_scaling_factor",
    ),
    "forward": (
        "megatron.core.models.gpt.gpt_model",
        "GPTModel.forward",
        "input_ids position_ids attention_mask decoder_input labels packed_seq_params",
    ),
    "end of forward": (
        "megatron.core.models.gpt.gpt_model",
        "GPTModel._postprocess",
        "hidden_states labels",
    ),
    "output layer": (
        "megatron.core.tensor_parallel.layers",
        "ColumnParallelLinear.forward",
        "input_ weight runtime_gather_output",
    ),
    "schedules": (
        "megatron.core.pipeline_parallel.schedules",
        "forward_backward_no_pipelining",
        "forward_step_func data_iterator model num_microbatches seq_length micro_batch_size forward_only",
    ),
    "packed sequences": (
        "megatron.core.packed_seq_params",
        "PackedSeqParams.__init__",
        "qkv_format cu_seqlens_q cu_seqlens_kv max_seqlen_q max_seqlen_kv",
    ),
    "groups": (
        "megatron.core.process_groups_config",
        "ProcessGroupCollection.use_mpu_process_groups",
        "required_pgs",
    ),
    "data parallel": (
        "megatron.core.distributed",
        "DistributedDataParallel.__init__",
        "config ddp_config module disable_bucketing",
    ),
    "core attention": (
        "megatron.core.transformer.dot_product_attention",
        "DotProductAttention.forward",
        "query key value attention_mask attn_mask_type attention_bias packed_seq_params",
    ),
}
FIELDS = {
    ("megatron.core.transformer.transformer_config", "TransformerConfig"): (
        "calculate_per_token_loss variable_seq_lengths defer_embedding_wgrad_compute gradient_accumulation_fusion "
        "sequence_parallel overlap_p2p_comm batch_p2p_comm deallocate_pipeline_outputs masked_softmax_fusion "
        "use_cpu_initialization finalize_model_grads_func grad_scale_func mtp_num_layers"
    ),
    ("megatron.core.distributed", "DistributedDataParallelConfig"): (
        "grad_reduce_in_fp32 use_distributed_optimizer overlap_grad_reduce overlap_param_gather"
    ),
    ("megatron.core.optimizer", "OptimizerConfig"): (
        "lr min_lr weight_decay clip_grad adam_beta1 adam_beta2 bf16 params_dtype use_distributed_optimizer"
    ),
}


def test_it_is_the_version_that_is_to_be_tested():
    wanted = os.environ.get("MEGATRON_REST_HOST")
    version = megatron.core.__version__
    release = version.partition("+")[0]  # behind it Megatron puts the commit of any Git checkout that it lies in
    assert wanted in (None, release), f"{version} from {megatron.core.__file__}"


@pytest.mark.parametrize("name", CALLS)
def test_callables_have_the_parameters_we_use(name):
    module, path, parameters = CALLS[name]
    value = importlib.import_module(module)
    for part in path.split("."):
        value = getattr(value, part)
    found = inspect.signature(value).parameters
    missing = [p for p in parameters.split() if p not in found]
    assert not missing, f"{module}.{path} has no {', '.join(missing)}"


@pytest.mark.parametrize("where", FIELDS, ids=lambda where: where[1])
def test_configurations_have_the_fields_we_set(where):
    module, name = where
    found = {f.name for f in dataclasses.fields(getattr(importlib.import_module(module), name))}
    missing = [f for f in FIELDS[where].split() if f not in found]
    assert not missing, f"{module}.{name} has no {', '.join(missing)}"


def test_labels_stand_where_the_seam_looks_for_them():
    from megatron.core.models.gpt.gpt_model import GPTModel

    names = [n for n in inspect.signature(GPTModel.forward).parameters if n != "self"]
    assert names[output._LABELS_POSITION] == "labels"


def misuses(model, wrap) -> dict[str, str]:
    """What an owner of this Megatron's model is told of calls that would be wrong."""
    tokens = torch.arange(4)[None]
    batch = {"loss_mask": torch.tensor([[0, 1, 1, 0]]), "advantages": torch.ones(1, 1)}
    step = StepLoss(RestPolicyLoss(LossConfig()), LossTokens.of_batch(batch))
    said = {}

    def note(name, call) -> None:
        with pytest.raises((TypeError, ValueError)) as error:
            call()
        said[name] = str(error.value)

    note("wrapped", lambda: output.attach(wrap(), vocab_size=32))
    note("too many ids", lambda: output.attach(model, vocab_size=33))
    note("forgotten", lambda: step(model(tokens, tokens, None, labels=tokens)))
    model.config.calculate_per_token_loss = False
    note("means of means", lambda: output.attach(model, vocab_size=32))
    model.config.calculate_per_token_loss = True
    output.attach(model, vocab_size=32)
    # labels that carry no loss may be anything, and where the mask is on a device nobody knows the rows
    blind = StepLoss(step.loss, dataclasses.replace(step.tokens, active_rows=None))
    marked = torch.where(torch.tensor([[False, True, True, False]]), tokens, -100)
    losses = [
        float(one(model(tokens, tokens, None, labels=labels, output_processor_context=one.context))[0])
        for one, labels in ((step, tokens), (step, marked), (blind, tokens), (blind, marked))
    ]
    assert losses[0] != 0 and max(losses) - min(losses) < 1e-6, losses
    if output.has_output_processor(model):
        model.config.mtp_num_layers = 1
        note("prompts in the loss", lambda: model(tokens, tokens, None, labels=tokens))
        model.config.mtp_num_layers = None
    output.detach(model)
    return said


def call_of_the_head(rank: int, world_size: int) -> dict[str, object]:
    """What this Megatron hands to a head, and whether its own argument carried it."""
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear
    from megatron.core.transformer.transformer_config import TransformerConfig

    cpu.enable()
    parallel_state.initialize_model_parallel()
    cpu.seed_model_parallel(0, tp_rank=0)
    config = TransformerConfig(
        num_layers=1, hidden_size=16, num_attention_heads=2, use_cpu_initialization=True, masked_softmax_fusion=False,
        calculate_per_token_loss=True,
    )  # fmt: skip
    model = GPTModel(
        config, get_gpt_layer_local_spec(), vocab_size=32, max_sequence_length=8, position_embedding_type="rope"
    )
    said = misuses(model, lambda: DistributedDataParallel(config, DistributedDataParallelConfig(), model))
    output.attach(model, vocab_size=32)
    seen: dict[str, object] = {}
    real = PolicyHead.__call__

    def call(self, **arguments):
        seen.update(arguments)
        return real(self, **arguments)

    PolicyHead.__call__ = call
    tokens = torch.arange(6)[None]
    context = output.HeadContext(active_rows=torch.tensor([1, 4]))
    result = model(tokens, tokens, None, None, tokens, output_processor_context=context)  # labels by position
    wrapped = DistributedDataParallel(config, DistributedDataParallelConfig(), model)
    layer = model.output_layer
    return {
        "said": said,
        "is native": output.has_output_processor(model),
        "replaced": [name for name in ("_postprocess", "forward") if name in vars(model)],
        "hidden": tuple(seen["hidden_states"].shape),
        "layer": seen["output_layer"] is layer and isinstance(layer, ColumnParallelLinear),
        "labels": torch.equal(seen["labels"], tokens),
        "context": seen["context"] is context,
        "rows": result.log_probs.detach().nonzero()[:, 1].tolist(),
        "layer attributes": [
            n
            for n in ("tp_group", "sequence_parallel", "gradient_accumulation_fusion", "weight")
            if not hasattr(layer, n)
        ],
        "main_grad": hasattr(layer.weight, "main_grad") and layer.weight.grad_added_to_main_grad is False,
        "takes context": "output_processor_context" in inspect.signature(type(model).forward).parameters,
        "wrapped": type(wrapped(tokens, tokens, None, labels=tokens)).__name__,
    }


def test_the_head_gets_what_it_needs_through_the_place_that_this_megatron_offers():
    [found] = run_distributed(call_of_the_head, 1)
    # By capability: where the argument exists nothing of Megatron is replaced, elsewhere one method of one instance.
    assert found["replaced"] == ([] if found["is native"] else ["_postprocess"])
    assert found["takes context"] == found["is native"]
    assert found["hidden"] == (6, 1, 16)
    assert found["layer"]
    assert found["labels"]
    assert found["context"]
    assert found["rows"] == [1, 4]
    assert found["layer attributes"] == []
    assert found["main_grad"]
    assert found["wrapped"] == "PolicyOutput"
    assert "DistributedDataParallel around a GPTModel" in found["said"]["wrapped"]
    assert found["said"]["too many ids"] == "vocab_size is 33, but the output layer has 32 columns, padding included"
    assert "call attach(model, vocab_size=...)" in found["said"]["forgotten"]
    assert "--calculate-per-token-loss" in found["said"]["means of means"]
    assert not found["is native"] or "pass loss_mask=[b, s]" in found["said"]["prompts in the loss"]
