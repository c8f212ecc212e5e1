"""The fused head inside real Megatron models on gloo ranks: the numbers of the materialised logits, at their place.

1. loss, metrics and every gradient equal those of form="logits", for TP, sequence parallel, PP, VPP, DP, tied and
   untied, for losses that are differentiated in the forward pass and for losses that cannot be
2. gradient accumulation fusion (``main_grad``) and DDP's overlapped reduction and gather: the same gradients
3. a padded [b, s] batch of a host's own loop, with and without context, and without totals: the packed numbers
4. the seam: hooks of the output layer run, nothing stays behind, what cannot be fused or attached to is refused by name
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch

from megatron_rest.algorithms import RestPolicyLoss
from megatron_rest.config import LossAggregation, LossConfig
from megatron_rest.mcore import segments
from megatron_rest.mcore.forward_step import forward_step, packed_seq_params
from megatron_rest.mcore.output import HeadContext, attach, detach, is_attached
from megatron_rest.mcore.step_loss import LossTokens, StepLoss
from megatron_rest.types import LossInputs, LossOutput, TrainBatch
from tests.helpers.distributed import run_distributed
from tests.helpers.policies import LAYERS, batch_of, layout_config, make_policy, random_samples
from tests.helpers.tiny_model import build_tiny_model

LAYOUTS: dict[int, dict[str, dict]] = {
    1: {"one": {}},
    2: {
        "tp2": {"tp": 2},
        "tp2_sp": {"tp": 2, "sp": True},
        "pp2": {"pp": 2},
        "pp2_vpp2": {"pp": 2, "vpp": 2},
        "dp2": {},
    },
}
# The first four are differentiated block by block in the forward pass, the last three need whole sequences or batches.
LOSSES: dict[str, RestPolicyLoss | str] = {
    "sequence_mean": RestPolicyLoss(LossConfig(clip_low=0.05, dual_clip=3.0)),
    "token_mean_entropy": RestPolicyLoss(LossConfig(aggregation=LossAggregation.TOKEN_MEAN, entropy_coef=0.1)),
    "tis_token": RestPolicyLoss(LossConfig(tis_cap=2.0)),
    "tis_sequence": RestPolicyLoss(LossConfig(tis_cap=2.0, tis_level="sequence")),
    "reference_code": RestPolicyLoss(LossConfig(aggregation=LossAggregation.REFERENCE_CODE)),
    "a_function": "squares",
}
# One of each kind, and the others: the same two paths of the head with other formulas.
MAIN = ("sequence_mean", "tis_sequence", "a_function")
OTHERS = tuple(name for name in LOSSES if name not in MAIN)
IN_MAIN = {"one": False, "tp2_sp": True, "pp2_vpp2": True, "dp2": False}  # layout -> whether its embedding is tied
Case = tuple[str, bool, tuple[str, ...]]  # layout, whether the embedding is tied, losses


def cases(world_size: int, *, is_main: bool) -> list[Case]:
    """In ``make test`` ``MAIN`` on a layout of every kind with one of the two embeddings; else what is left."""
    found: list[Case] = []
    for layout in LAYOUTS[world_size]:
        for is_tied in (True, False):
            in_main = IN_MAIN.get(layout) == is_tied
            if is_main and in_main:
                found.append((layout, is_tied, MAIN))
            elif not is_main:
                found.append((layout, is_tied, OTHERS if in_main else tuple(LOSSES)))
    return found


def squares(inputs: LossInputs) -> LossOutput:
    """A loss that says nothing of its tokens: the head has to take it as it is."""
    mask = inputs.loss_mask
    value = (inputs.log_probs * inputs.advantages)[mask].sum() + inputs.log_probs[mask].square().sum() / 100
    return LossOutput(loss_sum=value - 0.1 * inputs.entropy[mask].sum(), num_tokens=mask.sum())


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("models")
    shape = {"layers": LAYERS, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16}
    return [str(build_tiny_model(folder / str(tied), tied=tied, **shape)) for tied in (True, False)]


def scored_batch(parts) -> TrainBatch:
    """Ratios on both sides of the clip range, non-uniform weights; old log-probs that do not depend on the head."""
    batch = batch_of(parts, random_samples(parts.shape.vocab_size))
    weighed = tuple(
        m.with_scores(old_log_probs=-5.5 + torch.cos(m.labels.float()), token_weights=0.5 + (m.labels % 7).float() / 7)
        for m in batch.microbatches
    )
    return replace(batch, microbatches=weighed)


def gradients(parts, batch: TrainBatch, loss) -> dict[str, torch.Tensor]:
    """One forward and backward pass through Megatron's schedule: metrics, and ``main_grad`` of every parameter."""
    policy = parts.policy
    for chunk in policy.chunks:
        chunk.zero_grad_buffer()
    results = policy._schedule(
        partial(forward_step, loss=loss, totals=batch.totals), batch.microbatches, forward_only=False
    )
    found = {f"metric {k}": sum(r[k] for r in results) for k in (results[0] if results else {})}
    for i, module in enumerate(policy.modules):
        found |= {f"chunk {i} {name}": p.main_grad.clone() for name, p in module.named_parameters()}
    return found


TEMPERATURE = 0.7  # in the fused head and in front of the logits


def attach_all(parts, form: str) -> None:
    for module in parts.policy.modules:
        attach(module, vocab_size=parts.shape.vocab_size, temperature=TEMPERATURE, form=form)


def both_forms(rank: int, world_size: int, models: list[str], chosen: list[Case]) -> list[dict]:
    from megatron.core import parallel_state

    runs = []
    for layout, is_tied, losses in chosen:
        parts = make_policy(layout_config(models[0 if is_tied else 1], **LAYOUTS[world_size][layout]))
        batch = scored_batch(parts)
        found: dict[str, list] = {}
        for name in losses:
            loss = squares if name == "a_function" else LOSSES[name]
            for form in ("fused", "logits"):
                attach_all(parts, form)
                found.setdefault(name, []).append(gradients(parts, batch, loss))
        runs.append(found)
        parallel_state.destroy_model_parallel()
    return runs


@pytest.mark.parametrize("is_main", [True, pytest.param(False, marks=pytest.mark.extended)], ids=["main", "others"])
@pytest.mark.parametrize("world_size", LAYOUTS)
@pytest.mark.slow
def test_fused_head_has_the_loss_and_gradients_of_the_logits(world_size, is_main, models):
    chosen = cases(world_size, is_main=is_main)
    for runs in run_distributed(both_forms, world_size, models, chosen):
        for (layout, is_tied, _), run in zip(chosen, runs, strict=True):
            label = f"{'tied' if is_tied else 'untied'} {layout}"
            for loss, (fused, logits) in run.items():
                assert fused.keys() == logits.keys()
                for name, expected in logits.items():
                    scale = max(float(expected.abs().max()), 1e-3)
                    gap = float((fused[name] - expected).abs().max()) / scale
                    assert gap < 3e-6, f"{label}, {loss}, {name}: {gap:.1e} of {scale:.1e}"


def with_fusion_and_overlap(rank: int, world_size: int, models: list[str]) -> list[float]:
    """``main_grad`` written by the head itself, then DDP with everything overlapped: worst relative difference."""
    from megatron.core import parallel_state

    gaps = []
    for model in models:
        parts = make_policy(layout_config(model, overrides=("parallel.distributed_optimizer=true",)))
        batch, [chunk] = scored_batch(parts), parts.policy.modules
        expected = gradients(parts, batch, LOSSES["sequence_mean"])
        chunk.output_layer.gradient_accumulation_fusion = True
        for loss in (LOSSES["sequence_mean"], squares):
            reference = expected
            if loss is squares:
                chunk.output_layer.gradient_accumulation_fusion = False
                reference = gradients(parts, batch, squares)
                chunk.output_layer.gradient_accumulation_fusion = True
            fused = gradients(parts, batch, loss)
            gaps.append(worst(fused, reference))
            weight = (
                chunk.embedding.word_embeddings.weight
                if chunk.output_layer.weight is None
                else chunk.output_layer.weight
            )
            assert weight.grad_added_to_main_grad, "the head must have taken the weight gradient itself"
        parallel_state.destroy_model_parallel()
        parts = make_overlapped(layout_config(model, overrides=("parallel.distributed_optimizer=true",)))
        [wrapped] = parts.policy.chunks
        overlapped = gradients(parts, scored_batch(parts), LOSSES["sequence_mean"])
        # The distributed optimizer reduce-scatters: only this rank's part of every buffer is whole.
        mine = whole_parameters(wrapped)
        assert mine
        gaps.append(worst({n: overlapped[n] for n in mine}, {n: expected[n] for n in mine}))
        parallel_state.destroy_model_parallel()
    return gaps


def make_overlapped(config):
    """A policy whose DDP reduces gradients and gathers parameters while the model runs, by hooks."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    from megatron_rest.mcore import build

    def wrap(chunks, megatron_config, config, context):
        settings = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            use_distributed_optimizer=True,
            overlap_grad_reduce=True,
            overlap_param_gather=True,
        )
        [wrapped] = [DistributedDataParallel(megatron_config, settings, chunk) for chunk in chunks]
        wrapped.broadcast_params()
        megatron_config.no_sync_func = wrapped.no_sync
        return [wrapped]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "wrap", wrap)
        return make_policy(config)


def whole_parameters(wrapped) -> list[str]:
    """Parameters whose reduced gradient lies wholly in this rank's shard of its bucket."""
    names = {p: f"chunk 0 {n}" for n, p in wrapped.module.named_parameters()}
    found = []
    for buffer in wrapped.buffers:
        for bucket in buffer.buckets:
            size = bucket.grad_data.numel() // buffer.data_parallel_world_size
            low = bucket.offset + buffer.data_parallel_group.rank() * size
            for parameter in bucket.params_list:
                begin, end, _ = buffer.param_index_map[parameter]
                if low <= begin and end <= low + size:
                    found.append(names[parameter])
    return found


def worst(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    assert found.keys() == expected.keys()
    return max(float((found[n] - e).abs().max()) / max(float(e.abs().max()), 1e-3) for n, e in expected.items())


@pytest.mark.parametrize("world_size", [1, 2])
def test_fused_weight_gradient_and_overlapped_ddp_change_nothing(world_size, models):
    for gaps in run_distributed(with_fusion_and_overlap, world_size, models):
        assert len(gaps) == 6
        assert max(gaps) < 3e-6


def host_batch(rank: int, world_size: int, model: str) -> dict[str, object]:
    """The sequences of a packed microbatch as a padded [b, s] batch: float mask, junk in the padding."""
    parts = make_policy(layout_config(model))
    [chunk] = parts.policy.modules
    batch = scored_batch(parts)
    [microbatch, *_] = batch.microbatches
    bounds = microbatch.cu_seqlens.tolist()
    longest = int(max(np.diff(bounds)))
    names = ("token_ids", "labels", "position_ids", "loss_mask", "advantages", "old_log_probs", "token_weights")
    padded = {}
    for name in names:
        value = getattr(microbatch, name)
        rows = [value[a:b] for a, b in pairwise(bounds)]
        padded[name] = torch.stack([torch.cat([r, r.new_ones(longest - len(r))]) for r in rows])
    for i, n in enumerate(np.diff(bounds)):
        padded["loss_mask"][i, n:] = False
        padded["old_log_probs"][i, n:] = torch.nan
    padded["loss_mask"] = padded["loss_mask"].float()
    loss = LOSSES["sequence_mean"]

    def run(tokens: LossTokens, columns: dict[str, torch.Tensor], *, with_context: bool = True, **packed) -> tuple:
        for wrapped in parts.policy.chunks:
            wrapped.zero_grad_buffer()
        step = StepLoss(loss, tokens)
        inputs = {"output_processor_context": step.context} if with_context else {}
        output = chunk(
            columns["token_ids"], columns["position_ids"], None, labels=columns["labels"], **inputs, **packed
        )
        loss_sum, count, metrics = step(output)
        loss_sum.backward()
        grads = {n: p.main_grad / count for n, p in chunk.named_parameters()}
        return float(loss_sum / count), grads, metrics, output

    flat = {n: getattr(microbatch, n)[None] for n in names}
    counted = batch_totals_of(microbatch)
    expected = run(LossTokens.of_microbatch(microbatch, counted), flat, packed_seq_params=packed_seq_params(microbatch))
    runs = {
        "totals": run(LossTokens.of_batch(padded, totals=counted), padded),
        "counted": run(LossTokens.of_batch(padded), padded),
        "no context": run(LossTokens.of_batch(padded), padded, with_context=False),
        "no rows": run(replace(LossTokens.of_batch(padded), active_rows=None), padded),
        "packed dict": run(
            LossTokens.of_batch({**flat, "cu_seqlens": microbatch.cu_seqlens[None]}),
            flat,
            packed_seq_params=packed_seq_params(microbatch),
        ),
    }
    assert set(padded["loss_mask"].unique().tolist()) == {0.0, 1.0}
    skipped = runs["totals"][3].log_probs[padded["loss_mask"] == 0]
    assert not skipped.any(), "rows without loss are not projected"
    return {
        "loss": expected[0],
        "losses": {n: r[0] for n, r in runs.items()},
        "gaps": {n: worst(r[1], expected[1]) for n, r in runs.items()},
        "ratio": {n: float(r[2]["ratio"][0]) for n, r in runs.items()} | {"expected": float(expected[2]["ratio"][0])},
    }


def batch_totals_of(microbatch):
    from megatron_rest.types import BatchTotals

    ids = microbatch.sequence_ids[microbatch.loss_mask]
    return BatchTotals(num_tokens=float(len(ids)), num_sequences=float(len(ids.unique())), weight_sum=float(len(ids)))


def test_a_hosts_padded_batch_gives_the_numbers_of_the_packed_one(models):
    [found] = run_distributed(host_batch, 1, models[0])
    assert abs(found["loss"]) > 1e-3
    for name, value in found["losses"].items():
        assert value == pytest.approx(found["loss"], rel=2e-6), name
        assert found["gaps"][name] < 5e-6, name
        assert found["ratio"][name] == pytest.approx(found["ratio"]["expected"], rel=1e-6), name


def seam(rank: int, world_size: int, model: str) -> dict[str, object]:
    from megatron_rest.mcore import head

    parts = make_policy(layout_config(model))
    [chunk] = parts.policy.modules
    [microbatch, *_] = batch_of(parts, random_samples(parts.shape.vocab_size)).microbatches
    tokens = microbatch.token_ids[None, :32], microbatch.position_ids[None, :32]
    labels = microbatch.labels[None, :32]
    calls = []
    hooks = [
        chunk.output_layer.register_forward_pre_hook(lambda *_: calls.append("before")),
        chunk.output_layer.register_forward_hook(lambda *_: calls.append("after")),
    ]
    with torch.no_grad():
        fused = chunk(*tokens, None, labels=labels)
        rows = chunk(
            *tokens, None, labels=labels, output_processor_context=HeadContext(active_rows=torch.tensor([3, 7]))
        )
        for hook in hooks:
            hook.remove()
        logits = chunk(*tokens, None)  # no labels: the model answers as before
        detach(chunk)
        cross_entropy = chunk(*tokens, None, labels=labels)
    left = [k for k in vars(chunk) if k in ("_postprocess", "_megatron_rest_seam")]
    # The hook that takes rotary tables by position is the model's, not the seam's.
    left += [h.__module__ for h in chunk._forward_pre_hooks.values() if h.__module__ != segments.__name__]
    assert not is_attached(chunk)
    messages = {}
    for name, broken in {
        "bias": {"bias": torch.zeros(1)},
        "forward": {"forward": lambda *_: None},
    }.items():
        vars(chunk.output_layer).update(broken)
        with pytest.raises(ValueError) as error:
            attach(chunk)
        messages[name] = str(error.value)
        attach(chunk, form="logits")  # is not refused
        detach(chunk)
        for key in broken:
            del vars(chunk.output_layer)[key]
    with pytest.raises(ValueError) as error:
        head.check_fusable(torch.nn.Linear(2, 2, bias=False), chunk.config)
    messages["type"] = str(error.value)
    reference = logits[..., : parts.shape.vocab_size].double().log_softmax(-1)
    return {
        "fused": fused.log_probs,
        "rows": rows.log_probs,
        "expected": reference.gather(-1, labels[..., None])[..., 0],
        "cross_entropy": cross_entropy,
        "calls": calls,
        "left": left,
        "forward": "forward" in vars(chunk.output_layer),
        "messages": messages,
    }


def test_the_head_goes_through_the_output_layer_and_leaves_nothing_behind(models):
    [found] = run_distributed(seam, 1, models[1])
    torch.testing.assert_close(found["fused"].double(), found["expected"], atol=2e-6, rtol=0)
    torch.testing.assert_close(found["rows"][0, [3, 7]], found["fused"][0, [3, 7]], atol=1e-6, rtol=0)
    assert found["rows"].count_nonzero() == 2
    assert found["cross_entropy"].shape == found["fused"].shape
    assert found["calls"] == ["before", "after"] * 2
    assert found["left"] == []
    assert not found["forward"]
    assert "output_layer has a bias" in found["messages"]["bias"]
    assert "another forward" in found["messages"]["forward"]
    assert "is a Linear with a forward of its own" in found["messages"]["type"]
    assert all('form="logits"' in message for message in found["messages"].values())


class MovedModel(torch.nn.Module):
    """A host that finishes its forward pass somewhere else."""

    post_process = True

    def forward(self, tokens, labels=None): ...


def test_a_host_that_moved_the_seam_is_refused_by_name():
    with pytest.raises(RuntimeError, match=r"MovedModel has neither an argument output_processor of forward nor a met"):
        attach(MovedModel(), form="logits")
    with pytest.raises(ValueError, match="form is 'fast', expected one of fused, logits"):
        attach(MovedModel(), form="fast")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss_mask": None}, "has no loss_mask, only"),
        ({"advantages": torch.zeros(3)}, r"advantages is \[3\], expected \[2, 4\] like loss_mask"),
        ({"loss_mask": torch.full((2, 4), 0.5)}, "numbers besides 0 and 1"),
        ({"loss_mask": torch.ones(4)}, r"expected \[b, s\]"),
        ({"cu_seqlens": torch.tensor([0, 2, 4])}, "packed batch of 1"),
    ],
)
def test_batches_that_do_not_fit_are_refused(change, message):
    batch = {"loss_mask": torch.ones(2, 4), "advantages": torch.zeros(2), "tokens": torch.zeros(2, 4)}
    batch = {k: v for k, v in (batch | change).items() if v is not None}
    with pytest.raises(ValueError, match=message):
        LossTokens.of_batch(batch)


def test_advantages_may_be_one_a_sequence():
    mask = torch.tensor([[0, 1, 1, 0], [0, 0, 1, 1]])
    for advantages in (torch.tensor([1.0, 2.0]), torch.tensor([[1.0], [2.0]])):
        tokens = LossTokens.of_batch({"loss_mask": mask, "advantages": advantages})
        assert tokens.advantages.tolist() == [1, 2] * 4  # rows are [s, b]
    packed = {"loss_mask": torch.ones(1, 5), "advantages": torch.tensor([1.0, 2.0])}
    tokens = LossTokens.of_batch(packed | {"cu_seqlens": torch.tensor([0, 3, 5])})
    assert tokens.advantages.tolist() == [1, 1, 1, 2, 2]
