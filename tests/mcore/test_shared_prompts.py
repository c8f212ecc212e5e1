"""A prompt that is computed once for all answers of its group gives what as many copies of it give.

Every layout: scores, loss and every parameter's gradient of shared packing against plain packing, in float32 through
the trainer's own path, with whole groups and with groups cut over microbatches; a bare model in float64 besides.
Gradients are what tells: wrong positions move the loss of a small random model by 4e-4 only.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_rest.algorithms import RestPolicyLoss
from megatron_rest.config import LossConfig
from megatron_rest.data.batching import make_train_batch
from megatron_rest.types import LossInputs, LossOutput, TokenRegion, TrainBatch, TrainSample
from tests.helpers.distributed import run_distributed
from tests.helpers.gradients import full_gradient
from tests.helpers.policies import batch_of, layout_config, make_policy
from tests.helpers.tiny_model import build_tiny_model

GROUPS = (4, 1, 7, 3, 8, 2)  # answers
SHARED, CUT = 1024, 128  # most rows of a microbatch
LENGTHS = ("model.max_sequence_length=256", "trainer.max_tokens_per_microbatch=1024")


def grouped_samples(vocab_size: int, *, seed: int = 0) -> list[TrainSample]:
    """Groups of one and of many, answers of one token, tool outputs inside answers, a mask that begins late."""
    rng = np.random.default_rng(seed)
    samples: list[TrainSample] = []
    for group, size in enumerate(GROUPS):
        prompt = rng.integers(0, vocab_size, int(rng.integers(5, 40)))
        for member in range(size):
            answer = 1 if member == 2 else int(rng.integers(2, 30))
            mask = np.arange(len(prompt) + answer) >= len(prompt)
            if answer > 8:
                mask[len(prompt) + 3 : len(prompt) + 6] = False
            if group == 3:
                mask[len(prompt)] = answer == 1
            regions = np.where(mask, rng.integers(1, len(TokenRegion), len(mask)), int(TokenRegion.CONTEXT))
            samples.append(
                TrainSample(
                    token_ids=np.concatenate([prompt, rng.integers(0, vocab_size, answer)]).astype(np.int32),
                    loss_mask=mask,
                    region_ids=regions.astype(np.int8),
                    rollout_log_probs=np.where(mask, -5.0, 0.0).astype(np.float32),
                    advantage=float(rng.normal()),
                    sequence_id=len(samples),
                    group_id=group,
                )
            )
    return samples


def smooth_loss(inputs: LossInputs) -> LossOutput:
    mask = inputs.loss_mask
    assert inputs.token_weights is not None and inputs.entropy is not None
    terms = inputs.log_probs * inputs.advantages * inputs.token_weights + 0.1 * inputs.entropy
    return LossOutput(loss_sum=-torch.where(mask, terms, 0.0).sum(), num_tokens=mask.sum(), metrics={})


LOSSES = {"smooth": smooth_loss, "rest": RestPolicyLoss(LossConfig(clip_low=0.05, clip_high=0.05))}


def weighed(batch: TrainBatch) -> TrainBatch:
    """Weights and old log-probs that depend on the token alone, so that both packings have the same."""
    return replace(
        batch,
        microbatches=tuple(
            m.with_scores(
                old_log_probs=-4.85 + 0.1 * torch.cos(m.labels.float()), token_weights=0.5 + (m.labels % 7).float() / 7
            )
            for m in batch.microbatches
        ),
    )


def measure(parts: Any, samples: list[TrainSample], loss: Any, *, max_tokens: int) -> dict[str, Any]:
    """Scores by (sequence, position), loss and gradients of one packing."""
    batch = weighed(batch_of(parts, samples, max_tokens=max_tokens))
    scores = {}
    for m, s in zip(batch.microbatches, parts.policy.score(batch.microbatches), strict=True):
        for t in m.loss_mask.nonzero()[:, 0].tolist():
            scores[int(m.sequence_ids[t]), int(m.position_ids[t])] = float(s.log_probs[t]), float(s.entropy[t])
    metrics, _ = parts.policy.gradients(batch, loss)
    return {
        "scores": scores,
        "loss": metrics["loss"],
        "gradient": full_gradient(parts),
        "packing": batch.packing,
        "has_parents": any(m.parents is not None for m in batch.microbatches),
    }


def run_layouts(
    rank: int, world_size: int, model: str, layouts: list[dict[str, Any]], sharing: str = "ours"
) -> list[dict[str, Any]]:
    """Plain packing and shared packings of the same samples; on rank 0 with gradients."""
    from megatron.core import parallel_state

    results = []
    for layout in layouts:
        layout = dict(layout)
        loss = LOSSES[layout.pop("loss", "smooth")]
        overrides = (*LENGTHS, *layout.pop("overrides", ()))
        parts = make_policy(layout_config(model, overrides=overrides, **layout))
        assert parts.is_sharing, "local attention shares by itself"
        samples = grouped_samples(parts.shape.vocab_size)
        plain = measure(replace(parts, is_sharing=False), samples, loss, max_tokens=256)
        if sharing != "ours":
            BROKEN[sharing](parts)
        shared = [measure(parts, samples, loss, max_tokens=rows) for rows in (SHARED, CUT)]
        results.append({"plain": plain, "shared": shared})
        parallel_state.destroy_model_parallel()
    return results


def all_scores(results: list[dict[str, Any]]) -> dict[tuple[int, int], tuple[float, float]]:
    return {key: value for result in results for key, value in result["scores"].items()}


def distance(plain: list[dict[str, Any]], shared: list[dict[str, Any]]) -> tuple[float, float, float]:
    """Largest difference of loss (relative), log-prob or entropy (nats), gradient (of each tensor's largest value)."""
    want, got = all_scores(plain), all_scores(shared)
    assert want.keys() == got.keys(), "every loss token is scored once"
    scores = max(np.abs(np.subtract(want[key], got[key])).max() for key in want)
    (a, n), (b, m) = plain[0]["loss"], shared[0]["loss"]
    assert n == m, "the denominator does not depend on the packing"
    want, got = plain[0]["gradient"], shared[0]["gradient"]
    assert want.keys() == got.keys()
    gradient = max(float(np.abs(want[k] - got[k]).max() / max(np.abs(want[k]).max(), 1e-12)) for k in want)
    return abs(a - b) / abs(a), float(scores), gradient


def check(model: Path, world_size: int, layouts: list[dict[str, Any]]) -> None:
    ranks = run_distributed(run_layouts, world_size, str(model), layouts, timeout=540)
    for i, layout in enumerate(layouts):
        plain = [rank[i]["plain"] for rank in ranks]
        assert not plain[0]["has_parents"]
        for k in range(2):
            shared = [rank[i]["shared"][k] for rank in ranks]
            assert any(s["has_parents"] for s in shared), layout
            assert shared[0]["packing"].rows < plain[0]["packing"].rows
            loss, scores, gradient = distance(plain, shared)
            assert loss < 2e-6, (layout, k, loss)
            assert scores < 5e-6, (layout, k, scores)
            assert gradient < 5e-6, (layout, k, gradient)
        assert ranks[0][i]["shared"][0]["packing"].prompt_copies <= ranks[0][i]["shared"][1]["packing"].prompt_copies


def tiny(folder: Path, arch: str) -> Path:
    return build_tiny_model(
        folder / arch, arch=arch, tied=arch == "qwen3", layers=4, num_attention_heads=8, num_key_value_heads=4,
        head_dim=16, max_position_embeddings=512,
    )  # fmt: skip


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    return tiny(tmp_path_factory.mktemp("shared"), "qwen3")


@pytest.fixture(scope="module")
def experts(tmp_path_factory) -> Path:
    return tiny(tmp_path_factory.mktemp("shared"), "qwen3_moe")


ONE_RANK = [
    {},
    {"loss": "rest"},
    {"overrides": ("parallel.recompute=full",)},
    {"overrides": ("model.head=logits", "rollout.temperature=0.7")},
]
FOUR_RANKS = [{"tp": 2, "cp": 2, "sp": True}, {"pp": 4}, {"tp": 2, "pp": 2, "vpp": 2, "loss": "rest"}]


def test_one_rank(dense):
    check(dense, 1, ONE_RANK)


@pytest.mark.slow
def test_a_layout_of_every_kind(dense):
    check(dense, 4, FOUR_RANKS)


def test_experts(experts):
    check(experts, 2, [{"ep": 2, "tp": 2, "sp": True}])


@pytest.mark.extended
def test_more_layouts(dense, experts):
    check(dense, 1, [{"overrides": ("parallel.recompute=mlp",)}])
    check(dense, 2, [{"tp": 2}, {"tp": 2, "sp": True}, {"pp": 2, "vpp": 2}, {}, {"cp": 2}, {"pp": 2}])
    check(dense, 4, [{"cp": 2, "pp": 2}, {"tp": 4}, {"distributed_optimizer": True, "loss": "rest"}])
    check(experts, 1, [{}])
    check(experts, 4, [{"ep": 2, "pp": 2}, {"ep": 2, "cp": 2}, {"ep": 4, "tp": 2, "sp": True}])


def float64_passes(rank: int, world_size: int, folder: str) -> list[dict[str, Any]]:
    """Plain, plain in another order, shared: loss, gradients and log-probs of the bare model in float64."""
    from megatron_rest.mcore.forward_step import forward_step
    from megatron_rest.trainer.setup import build_bare_policy

    torch.set_num_threads(1)
    parts = build_bare_policy(layout_config(folder, overrides=LENGTHS))
    model = parts.policy.modules[0].double()
    model.rotary_pos_emb.inv_freq = model.rotary_pos_emb.inv_freq.float()  # as it is in training
    samples = grouped_samples(parts.shape.vocab_size)
    results = []
    for is_sharing, ordered in ((False, samples), (False, samples[::-1]), (True, samples)):
        model.zero_grad(set_to_none=True)
        batch = weighed(make_train_batch(ordered, max_tokens=4096, is_sharing=is_sharing))
        [m] = batch.microbatches
        output, step = forward_step(iter([m]), model, loss=smooth_loss, totals=batch.totals)
        loss, num_tokens, _ = step(output)
        loss.backward()
        at = [(int(m.sequence_ids[t]), int(m.position_ids[t]), t) for t in m.loss_mask.nonzero()[:, 0].tolist()]
        results.append(
            {
                "scores": {(i, p): (float(output.log_probs[0, t]), float(output.entropy[0, t])) for i, p, t in at},
                "loss": (float(loss), float(num_tokens)),
                "gradient": {name: p.grad.numpy().copy() for name, p in model.named_parameters()},
            }
        )
    return results


def test_in_float64_only_the_order_of_sums_differs(dense):
    [[plain, reordered, shared]] = run_distributed(float64_passes, 1, str(dense), timeout=240)
    noise, found = distance([plain], [reordered]), distance([plain], [shared])
    loss, scores, gradient = found
    assert loss < 1e-14 and scores < 1e-12 and gradient < 1e-13, (found, noise)


def restart_positions(parts: Any) -> None:
    """Answers begin at 0 again, as Megatron's packed sequences do."""
    from megatron_rest.mcore import forward_step, segments

    def wrong(microbatch: Any) -> Any:
        params = segments.segment_params(microbatch)
        bounds = torch.tensor(params.bounds)
        return replace(params, positions=torch.arange(int(bounds[-1])) - bounds[:-1].repeat_interleave(bounds.diff()))

    forward_step.segment_params = wrong


def hide_prompts(parts: Any) -> None:
    """Answers see themselves alone."""
    from megatron_rest.mcore import attention

    attention.ancestors = lambda parents, segment: []


def show_siblings(parts: Any) -> None:
    """An answer continues the sibling before it."""
    from megatron_rest.mcore import attention, segments

    def wrong(parents: tuple[int, ...], segment: int) -> list[int]:
        right = segments.ancestors(parents, segment)
        return [*right, segment - 1] if right and segment - 1 not in right else right

    attention.ancestors = wrong


BROKEN = {"positions": restart_positions, "hidden": hide_prompts, "siblings": show_siblings}


@pytest.mark.parametrize("how", BROKEN)
def test_a_wrong_structure_is_seen(dense, how):
    [[result]] = run_distributed(run_layouts, 1, str(dense), [{}], how, timeout=240)
    _, scores, gradient = distance([result["plain"]], [result["shared"][0]])
    assert scores > 1e-2 and gradient > 1e-2, (scores, gradient)
