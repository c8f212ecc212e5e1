"""The Megatron policy on real gloo ranks.

1. scores equal Hugging Face's logits of the same weights (float64 reference), tied and untied, padded vocabulary
2. loss, gradient norm and parameters after updates are the same for every layout and microbatch split
3. first-step identities: ratio exactly 1, KL exactly 0; uniform weights = plain GRPO bit for bit
4. the seam: equal to Megatron's own cross-entropy, reversible, one instance only
5. nothing of a pass is left when it is over
"""

from __future__ import annotations

import json
import weakref
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_rest.algorithms import rest_policy_loss
from megatron_rest.config import ConfigError, LossConfig
from megatron_rest.mcore.hf import read_shape
from megatron_rest.types import LossInputs, LossOutput, TrainBatch
from megatron_rest.weighting import RestWeighting
from tests.helpers.distributed import run_distributed
from tests.helpers.policies import LAYERS, batch_of, layout_config, make_policy, random_samples
from tests.helpers.tiny_model import build_tiny_model, read_config

# One group of ranks runs all layouts of its size: most of a distributed test's time is starting processes.
LAYOUTS: dict[int, dict[str, dict]] = {
    2: {"tp2": {"tp": 2}, "dp2": {}, "pp2_vpp2": {"pp": 2, "vpp": 2}},
    4: {
        "tp2_pp2": {"tp": 2, "pp": 2},
        "tp2_pp2_sp": {"tp": 2, "pp": 2, "sp": True},
        "tp4": {"tp": 4},
        "tp2_dp2": {"tp": 2},
    },
}


def make_model(folder: Path, *, tied: bool) -> Path:
    return build_tiny_model(
        folder / "hf",
        tied=tied,
        layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=16,
        max_position_embeddings=256,
    )


@pytest.fixture(scope="module")
def tied_model(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("tied"), tied=True)


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def model(request, tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"), tied=request.param)


def smooth_loss(inputs: LossInputs) -> LossOutput:
    """Log-probs and entropy with per-token factors: no clipping, so that layouts can be compared tightly."""
    mask = inputs.loss_mask
    value = -(inputs.log_probs * inputs.advantages * inputs.token_weights + 0.1 * inputs.entropy)[mask].sum()
    return LossOutput(
        loss_sum=value, num_tokens=mask.sum(), metrics={"entropy": (inputs.entropy[mask].sum(), mask.sum())}
    )


def with_weights(batch: TrainBatch) -> TrainBatch:
    """Non-uniform weights that depend on the token alone."""
    return replace(
        batch,
        microbatches=tuple(
            m.with_scores(old_log_probs=m.rollout_log_probs, token_weights=0.5 + (m.labels % 7).float() / 7)
            for m in batch.microbatches
        ),
    )


def train_on(rank: int, world_size: int, model: str, runs: list[tuple[dict, int]]) -> list[dict]:
    """For every (layout, max_tokens): scores of all sequences, then three updates."""
    from megatron.core import parallel_state

    results = []
    for layout, max_tokens in runs:
        results.append(_train_on(model, layout, max_tokens))
        parallel_state.destroy_model_parallel()
    return results


def _train_on(model: str, layout: dict, max_tokens: int) -> dict:
    parts = make_policy(layout_config(model, **layout))
    samples = random_samples(parts.shape.vocab_size)
    batch = with_weights(batch_of(parts, samples, max_tokens=max_tokens))
    scores = {}
    for microbatch, score in zip(batch.microbatches, parts.policy.score(batch.microbatches), strict=True):
        for i in microbatch.sequence_ids.unique().tolist():
            at = (microbatch.sequence_ids == i) & microbatch.loss_mask  # other rows are not projected
            scores[i] = torch.stack([score.log_probs[at], score.entropy[at]]).numpy()
    scores.pop(-1, None)  # padding
    reports = [parts.policy.update(batch, smooth_loss) for _ in range(3)]
    return {
        "scores": scores,
        "loss": [r.loss for r in reports],
        "grad_norm": [r.grad_norm for r in reports],
        "entropy": [r.metrics["entropy"][0] for r in reports],
        "count": [r.metrics["entropy"][1] for r in reports],
    }


@pytest.fixture(scope="module")
def on_one_rank(model) -> list[dict]:
    """Everything in one microbatch, then the same work in many small ones."""
    return run_distributed(train_on, 1, str(model), [({}, 512), ({}, 64)])[0]


@pytest.fixture(scope="module")
def single(on_one_rank) -> dict:
    return on_one_rank[0]


def test_scores_equal_hugging_face_in_float64(model, single):
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)
    for sample in random_samples(read_config(model)["vocab_size"]):
        ids = torch.from_numpy(sample.token_ids.astype(np.int64))
        log_softmax = reference(ids[None, :-1]).logits[0].double().log_softmax(-1)
        log_probs = log_softmax.gather(-1, ids[1:, None])[:, 0]
        entropy = -(log_softmax.exp() * log_softmax).sum(-1)
        got, mask = single["scores"][sample.sequence_id], torch.from_numpy(sample.loss_mask[1:])
        np.testing.assert_allclose(got[0], log_probs[mask].detach().numpy(), atol=2e-5)
        np.testing.assert_allclose(got[1], entropy[mask].detach().numpy(), atol=2e-5)


# Tied embeddings in `make test`: tests/mcore/test_parallel_matrix.py, against float64.
@pytest.mark.parametrize(
    "model", [pytest.param(True, marks=pytest.mark.extended), False], ids=["tied", "untied"], indirect=True
)
@pytest.mark.parametrize("world_size", LAYOUTS)
@pytest.mark.slow
def test_every_layout_gives_the_same_numbers(world_size, model, single):
    layouts = LAYOUTS[world_size]
    by_rank = run_distributed(train_on, world_size, str(model), [(layout, 128) for layout in layouts.values()])
    for number, name in enumerate(layouts):
        scored = {}
        for result in (results[number] for results in by_rank):
            scored |= result["scores"]
            for key in ("loss", "grad_norm", "entropy"):
                # The first update sees the same weights: what is left is the order of float32 sums.  Adam then turns
                # rounding of gradients near 0 into steps of either sign.
                np.testing.assert_allclose(result[key][0], single[key][0], rtol=1e-6, err_msg=f"{name} {key}")
                np.testing.assert_allclose(result[key], single[key], rtol=3e-5, err_msg=f"{name} {key}")
            assert result["count"] == single["count"]
        assert scored.keys() == single["scores"].keys()
        for i, expected in single["scores"].items():
            np.testing.assert_allclose(scored[i], expected, atol=1e-5, err_msg=f"{name} sequence {i}")


def test_microbatch_split_does_not_matter(on_one_rank):
    whole, small = on_one_rank
    for key in ("loss", "grad_norm", "entropy"):
        np.testing.assert_allclose(small[key][0], whole[key][0], rtol=1e-6)
        np.testing.assert_allclose(small[key], whole[key], rtol=1e-5)


def rest_update(rank: int, world_size: int, model: str, runs: list[tuple[dict, int, int]]) -> list[dict]:
    """The first update of the real loss with region weights, for every (layout, max_tokens, packing seed)."""
    from megatron.core import parallel_state

    weighting = RestWeighting.paper()
    results = []
    for layout, max_tokens, seed in runs:
        parts = make_policy(layout_config(model, **layout))
        samples = random_samples(parts.shape.vocab_size)
        samples = [samples[i] for i in np.random.default_rng(seed).permutation(len(samples))]
        batch = batch_of(parts, samples, max_tokens=max_tokens)
        scored = tuple(
            m.with_scores(
                old_log_probs=s.log_probs + 0.1 * torch.cos(m.labels.float()),  # ratios on both sides of the clip
                token_weights=weighting.packed(m.region_ids, m.sequence_ids, loss_mask=m.loss_mask, progress=0.3),
            )
            for m, s in zip(batch.microbatches, parts.policy.score(batch.microbatches), strict=True)
        )
        report = parts.policy.update(
            replace(batch, microbatches=scored), partial(rest_policy_loss, config=LossConfig(clip_low=0.05))
        )
        gradient = {n: p.main_grad.clone().numpy() for m in parts.policy.modules for n, p in m.named_parameters()}
        results.append({"loss": report.loss, "grad_norm": report.grad_norm, "gradient": gradient})
        parallel_state.destroy_model_parallel()
    return results


def relative(a: np.ndarray, b: np.ndarray) -> float:
    """||a - b|| / ||b||."""
    return float(np.linalg.norm(a.astype(np.float64) - b) / np.linalg.norm(b.astype(np.float64)))


def test_rest_loss_and_gradient_do_not_depend_on_split_layout_or_packing_order(tied_model):
    """Region weights, clipped ratios, sequence means: equal to 1e-6 relative, in float32."""
    [alone] = run_distributed(rest_update, 1, str(tied_model), [({}, 512, 0), ({}, 64, 1), ({}, 128, 2)])
    layouts = [{}, {"tp": 2}, {"tp": 2, "sp": True}, {"pp": 2}, {"pp": 2, "vpp": 2}]
    ranks = run_distributed(rest_update, 2, str(tied_model), [(layout, 128, 3) for layout in layouts])
    reference = alone[0]
    assert abs(reference["loss"]) > 1e-3
    for result in (*alone[1:], *ranks[0], *ranks[1]):
        assert result["loss"] == pytest.approx(reference["loss"], rel=1e-6)
        assert result["grad_norm"] == pytest.approx(reference["grad_norm"], rel=1e-6)
    for result in (*alone[1:], ranks[0][0], ranks[1][0]):  # whole models: the gradients themselves
        for name, expected in reference["gradient"].items():
            assert relative(result["gradient"][name], expected) < 2e-6, name


def first_step(rank: int, world_size: int, model: str, layout: dict) -> dict:
    config = layout_config(model, **layout)
    loss = partial(rest_policy_loss, config=LossConfig(dual_clip=3.0))
    results = {}
    for name, weights in (("none", None), ("ones", 1.0), ("region", 2.0)):
        parts = make_policy(config)  # fresh weights each time
        batch = batch_of(parts, random_samples(parts.shape.vocab_size))
        scored = tuple(
            m.with_scores(
                old_log_probs=s.log_probs,
                token_weights=None if weights is None else torch.where(m.region_ids == 3, weights, 1.0),
            )
            for m, s in zip(batch.microbatches, parts.policy.score(batch.microbatches), strict=True)
        )
        report = parts.policy.update(replace(batch, microbatches=scored), loss)
        shards = {n: t.clone().numpy() for n, t in parts.policy.named_shards().items()}
        results[name] = (report.loss, report.grad_norm, dict(report.metrics), shards)
        from megatron.core import parallel_state

        parallel_state.destroy_model_parallel()
    return results


def test_first_step_identities(tied_model):
    for result in run_distributed(first_step, 4, str(tied_model), {"tp": 2, "pp": 2}):
        loss, grad_norm, metrics, shards = result["none"]
        assert grad_norm > 0
        total, count = metrics["ratio"]
        assert total == count, "old log-probs come from the same weights: every ratio is exactly 1"
        assert metrics["approx_kl"][0] == 0.0
        assert metrics["clip_fraction"][0] == 0.0
        ones = result["ones"]
        assert (ones[0], ones[1]) == (loss, grad_norm), "weights of 1 are plain GRPO, bit for bit"
        assert all(np.array_equal(ones[3][n], shards[n]) for n in shards)
        assert result["region"][1] != grad_norm, "other weights must change the gradient"


def seam(rank: int, world_size: int, model: str) -> dict:
    from megatron_rest.mcore.forward_step import packed_seq_params
    from megatron_rest.mcore.output import attach, detach, is_attached

    parts = make_policy(layout_config(model, tp=2))
    [chunk] = parts.policy.modules
    [microbatch, *_] = batch_of(parts, random_samples(parts.shape.vocab_size)).microbatches

    def forward() -> torch.Tensor:
        return chunk(
            microbatch.token_ids[None],
            microbatch.position_ids[None],
            None,
            labels=microbatch.labels[None],
            packed_seq_params=packed_seq_params(microbatch),
        )

    with torch.no_grad():
        attach(chunk)  # Megatron's cross-entropy counts the padding of the vocabulary in: compare without the true size
        ours = forward()
        detach(chunk)
        megatron = forward()
        was_detached = not is_attached(chunk)
        detach(chunk)  # harmless twice
        attach(chunk)
        attach(chunk)
        again = forward()
    return {
        "ours": ours.log_probs, "megatron": megatron, "again": again.log_probs, "was_detached": was_detached
    }  # fmt: skip


def test_seam_replaces_megatrons_cross_entropy_and_gives_it_back(tied_model):
    for result in run_distributed(seam, 2, str(tied_model)):
        assert result["was_detached"]
        torch.testing.assert_close(-result["ours"], result["megatron"], atol=1e-5, rtol=0)
        assert torch.equal(result["ours"], result["again"])


def test_dropout_is_refused(tied_model, tmp_path):
    config = {**read_config(tied_model), "attention_dropout": 0.1}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"dropout \{'attention_dropout': 0.1\}"):
        read_shape(tmp_path)


def misfit(rank: int, world_size: int, model: str, layouts: list[dict]) -> list[str]:
    messages = []
    for layout in layouts:
        with pytest.raises(ConfigError) as error:
            make_policy(layout_config(model, **layout))
        messages.append(str(error.value))
    return messages


def test_layouts_that_cannot_run_are_refused_by_name(tied_model):
    layouts = [{"tp": 2, "pp": 2}, {"overrides": ("parallel.expert_parallel=2",)}, {"sp": True}]
    for fit, experts, sequence in run_distributed(misfit, 2, str(tied_model), layouts):
        assert "world size 2 does not fit tensor_parallel 2 x pipeline_parallel 2" in fit
        assert "has no experts" in experts
        assert "sequence_parallel=false" in sequence


def inputs_still_there(rank: int, world_size: int, model: str) -> dict[str, int]:
    """``parallel.recompute`` -> inputs of layers and routers that are alive after their backward passes."""
    from megatron.core import parallel_state
    from megatron.core.transformer.moe.router import TopKRouter
    from megatron.core.transformer.transformer_layer import TransformerLayer

    found = {}
    for recompute in ("none", "mlp", "full"):
        parts = make_policy(layout_config(model, overrides=(f"parallel.recompute={recompute}",)))
        seen: list[weakref.ref] = []

        def note(_, args, kwargs, seen=seen) -> None:
            seen.append(weakref.ref(args[0] if args else kwargs["hidden_states"]))

        for module in parts.policy.chunks[0].modules():
            if isinstance(module, TransformerLayer | TopKRouter):
                module.register_forward_pre_hook(note, with_kwargs=True)
        batch = batch_of(parts, random_samples(parts.shape.vocab_size), max_tokens=512)
        parts.policy.gradients(with_weights(batch), smooth_loss)
        assert len(seen) >= 2 * LAYERS
        found[recompute] = sum(reference() is not None for reference in seen)
        parallel_state.destroy_model_parallel()
    return found


def test_nothing_of_a_pass_outlives_it(tmp_path):
    """Megatron's dispatcher of experts held each recomputed layer's input and its gradient until the next pass."""
    model = build_tiny_model(
        tmp_path / "moe", arch="qwen3_moe", layers=LAYERS, mlp_only_layers=[], with_tokenizer=False
    )
    [found] = run_distributed(inputs_still_there, 1, str(model))
    assert found == {"none": 0, "mlp": 0, "full": 0}
