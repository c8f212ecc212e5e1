"""Loss, gradient norm and every parameter's gradient of the ResT loss in every valid layout of at most four ranks.

The reference is Hugging Face's model in float64 on one process, sequence by sequence, with the same loss function.
Ours is the trainer's own path in float32: packed microbatches, Megatron's schedule, DistributedDataParallel, gradient
finalisation, clipping and optimiser; or a Megatron loop of one's own over padded batches [b, s].  Both sides clip the
gradient to norm 1, so clipping is compared too.

1. dense: TP 1/2/4, PP 1/2, VPP 2, CP 1/2, DP 1/2, sequence parallelism, distributed optimiser, three microbatch splits
2. mixture of experts: EP 1/2/4 over data-, context- and tensor-parallel ranks, with PP and VPP
3. padded batches: each axis once, and together
4. scoring: log-probs and entropy of every label

Tolerances, all relative to the float64 value: loss 1e-6, gradient norm 5e-6, a parameter's gradient 2e-5 in norm,
scores 1e-5 absolute in nats.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_rest.algorithms import RestPolicyLoss, rest_policy_loss
from megatron_rest.config import LossConfig
from megatron_rest.types import BatchTotals, LossInputs, TrainSample
from megatron_rest.weighting import RestWeighting
from tests.helpers.distributed import run_distributed
from tests.helpers.gradients import full_gradient
from tests.helpers.padded import padded_update
from tests.helpers.policies import LAYERS, batch_of, layout_config, make_policy, random_samples
from tests.helpers.tiny_model import build_tiny_model, read_config

LOSS = LossConfig(clip_low=0.05, clip_high=0.05, entropy_coef=0.01)
CLIP_GRAD = 1.0  # OptimizerConfig's default
WEIGHTING, PROGRESS = RestWeighting.paper(), 0.3
SPLITS = (512, 64, 128)  # most tokens of a microbatch


def dense_layouts() -> dict[int, list[dict[str, Any]]]:
    """World size -> every valid layout; splits and the distributed optimiser go round among them."""
    layouts: dict[int, list[dict[str, Any]]] = {1: [], 2: [], 4: []}
    number = 0
    for tp, pp, cp, dp in product((1, 2, 4), (1, 2), (1, 2), (1, 2)):
        world = tp * pp * cp * dp
        for vpp, sp in product((1, 2) if pp > 1 else (1,), (False, True) if tp > 1 else (False,)):
            if world > 4:
                continue
            is_replicated = dp * cp > 1
            layout = {"tp": tp, "pp": pp, "vpp": vpp, "cp": cp, "sp": sp}
            layouts[world].append(
                layout | {"distributed_optimizer": is_replicated and number % 2 == 0, "max_tokens": SPLITS[number % 3]}
            )
            number += 1
    return layouts


DENSE = dense_layouts()
PADDED: dict[int, list[dict[str, Any]]] = {
    1: [{"padded": True}],
    2: [{"padded": True} | x for x in ({}, {"tp": 2, "sp": True}, {"pp": 2, "vpp": 2}, {"cp": 2})],
    4: [
        {"padded": True} | x
        for x in ({"tp": 2, "cp": 2, "sp": True}, {"pp": 2, "cp": 2, "distributed_optimizer": True})
    ],
}
EXPERTS: dict[int, list[dict[str, Any]]] = {
    1: [{}, {"padded": True}],
    2: [
        {"ep": 2, "max_tokens": 64},
        {"ep": 2, "padded": True},
        {"ep": 2, "cp": 2},
        {"ep": 2, "tp": 2, "sp": True, "max_tokens": 128},
        {"tp": 2, "sp": True},
        {"pp": 2, "vpp": 2, "max_tokens": 64},
    ],
    4: [
        {"ep": 2, "pp": 2, "max_tokens": 64, "distributed_optimizer": True},
        {"ep": 2, "pp": 2, "vpp": 2, "max_tokens": 128},
        {"ep": 2, "tp": 2, "pp": 2, "sp": True},
        {"ep": 2, "tp": 2, "cp": 2, "sp": True, "max_tokens": 128},
        {"ep": 2, "cp": 2, "distributed_optimizer": True},
        {"ep": 4, "tp": 2, "sp": True, "max_tokens": 64},
        {"ep": 2, "max_tokens": 64, "distributed_optimizer": True},
    ],
}


def make_model(folder: Path, arch: str) -> Path:
    return build_tiny_model(
        folder / arch,
        arch=arch,
        tied=arch == "qwen3",
        layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=16,
        max_position_embeddings=256,
        initializer_range=0.05,
        pad_token_id=None,  # Hugging Face gives a padding row no gradient
        **({"mlp_only_layers": [2]} if arch == "qwen3_moe" else {}),
    )


@pytest.fixture(scope="module", params=["qwen3", "qwen3_moe"])
def model(request, tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("matrix"), request.param)


class Reference:
    """Hugging Face in float64: scores, loss and clipped gradient of all samples as one batch."""

    def __init__(self, folder: Path, loss: LossConfig = LOSS) -> None:
        from transformers import AutoModelForCausalLM

        is_moe = read_config(folder)["model_type"] == "qwen3_moe"
        # The grouped kernel of experts has no float64.
        options = {"experts_implementation": "eager"} if is_moe else {}
        hf = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, **options)
        samples = random_samples(read_config(folder)["vocab_size"])
        scores = [self._score(hf, sample) for sample in samples]
        self.scores = {s.sequence_id: torch.stack(x).detach().numpy() for s, x in zip(samples, scores, strict=True)}
        # Ratios on both sides of the clip.
        labels = [torch.from_numpy(s.token_ids[1:].astype(np.float64)) for s in samples]
        self.old_log_probs = {
            s.sequence_id: (x[0].detach() + 0.1 * torch.cos(y)).float().numpy()
            for s, x, y in zip(samples, scores, labels, strict=True)
        }
        out = rest_policy_loss(self._inputs(samples, scores), loss)
        if loss is LOSS:
            assert all(out.metrics[f"clip_fraction_{side}"][0] > 10 for side in ("low", "high")), "the clip is at work"
        self.loss = float(out.loss_sum) / float(out.num_tokens)
        (out.loss_sum / out.num_tokens).backward()
        gradient = per_expert({n: p.grad.numpy() for n, p in hf.named_parameters()})
        self.grad_norm = float(np.sqrt(sum(np.square(g).sum() for g in gradient.values())))
        self.gradient = {n: g * min(1.0, CLIP_GRAD / self.grad_norm) for n, g in gradient.items()}

    @staticmethod
    def _score(hf: Any, sample: TrainSample) -> tuple[torch.Tensor, torch.Tensor]:
        ids = torch.from_numpy(sample.token_ids.astype(np.int64))
        log_softmax = hf(ids[None, :-1]).logits[0].log_softmax(-1)
        return log_softmax.gather(-1, ids[1:, None])[:, 0], -(log_softmax.exp() * log_softmax).sum(-1)

    def _inputs(self, samples: list[TrainSample], scores: list[tuple[torch.Tensor, torch.Tensor]]) -> LossInputs:
        masks = [torch.from_numpy(s.loss_mask[1:]) for s in samples]
        weights = [weights_of(s) for s in samples]
        counts = [int(m.sum()) for m in masks]
        per_token = [m.new_full(m.shape, 1.0, dtype=torch.float64) for m in masks]
        return LossInputs(
            log_probs=torch.cat([s[0] for s in scores]),
            entropy=torch.cat([s[1] for s in scores]),
            old_log_probs=torch.cat([torch.from_numpy(self.old_log_probs[s.sequence_id]).double() for s in samples]),
            advantages=torch.cat([one * np.float32(s.advantage) for one, s in zip(per_token, samples, strict=True)]),
            loss_mask=torch.cat(masks),
            sequence_lengths=torch.cat([one * n for one, n in zip(per_token, counts, strict=True)]),
            token_weights=torch.from_numpy(np.concatenate(weights)).double(),
            totals=BatchTotals(num_tokens=sum(counts), num_sequences=len(samples), weight_sum=sum(counts)),
        )


def per_expert(gradient: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """transformers 5 holds the experts of a layer fused in memory; checkpoints have one tensor an expert."""
    names: dict[str, np.ndarray] = {}
    for name, value in gradient.items():
        prefix, is_fused, kind = name.partition(".mlp.experts.")
        if not is_fused:
            names[name] = value
        for expert, matrix in enumerate(value if is_fused else ()):
            parts = {"gate_proj": matrix[: len(matrix) // 2], "up_proj": matrix[len(matrix) // 2 :]}
            parts = parts if kind == "gate_up_proj" else {"down_proj": matrix}
            names |= {f"{prefix}.mlp.experts.{expert}.{part}.weight": x for part, x in parts.items()}
    return names


@pytest.fixture(scope="module")
def reference(model) -> Reference:
    return Reference(model)


def run_layouts(
    rank: int,
    world_size: int,
    model: str,
    layouts: list[dict[str, Any]],
    old_log_probs: dict[int, np.ndarray],
    loss: LossConfig = LOSS,
) -> list[dict[str, Any]]:
    from megatron.core import parallel_state

    results = []
    for layout in layouts:
        results.append(run_layout(model, old_log_probs, loss, **layout))
        parallel_state.destroy_model_parallel()
    return results


def run_layout(
    model: str,
    old: dict[int, np.ndarray],
    config: LossConfig,
    *,
    max_tokens: int = 512,
    padded: bool = False,
    **layout: Any,
) -> dict[str, Any]:
    """Scores of this rank's sequences, one update, the full gradient."""
    parts = make_policy(layout_config(model, **layout))
    samples = random_samples(parts.shape.vocab_size)
    batch = batch_of(parts, samples, max_tokens=max_tokens)
    scores, weighed = {}, []
    for m, score in zip(batch.microbatches, parts.policy.score(batch.microbatches), strict=True):
        old_log_probs = torch.zeros(len(m.token_ids))
        for i in sorted(set(m.sequence_ids.tolist()) - {-1}):
            at = m.sequence_ids == i
            scores[i] = torch.where(m.loss_mask, torch.stack([score.log_probs, score.entropy]).cpu(), torch.nan)[
                :, at
            ].numpy()
            old_log_probs[at] = torch.from_numpy(old[i])
        weights = WEIGHTING.packed(m.region_ids, m.sequence_ids, loss_mask=m.loss_mask, progress=PROGRESS)
        weighed.append(m.with_scores(old_log_probs=old_log_probs, token_weights=weights))
    loss = RestPolicyLoss(config)
    if padded:
        columns = {
            s.sequence_id: {"old_log_probs": old[s.sequence_id], "token_weights": weights_of(s)} for s in samples
        }
        numbers = padded_update(parts, samples, columns, loss, micro_batch_size=3)
    else:
        report = parts.policy.update(replace(batch, microbatches=tuple(weighed)), loss)
        assert not report.is_skipped
        numbers = report.loss, report.grad_norm
    return {"scores": scores, "loss": numbers[0], "grad_norm": numbers[1], "gradient": full_gradient(parts)}


def weights_of(sample: TrainSample) -> np.ndarray:
    """Of the labels of one sequence."""
    return WEIGHTING(sample.region_ids[1:].astype(np.int64), progress=PROGRESS, loss_mask=sample.loss_mask[1:])


ONE_OF_EVERY_KIND: dict[str, list[dict[str, Any]]] = {
    "qwen3": [
        {"tp": 4, "sp": True, "max_tokens": 64},
        {"tp": 2, "pp": 2, "vpp": 2, "max_tokens": 128},
        {"cp": 2, "pp": 2},
        {"distributed_optimizer": True},
        {"padded": True, "tp": 2, "cp": 2, "sp": True},
    ],
    "qwen3_moe": [
        {"ep": 2, "pp": 2, "max_tokens": 64, "distributed_optimizer": True},
        {"ep": 2, "tp": 2, "cp": 2, "sp": True, "max_tokens": 128},
    ],
}


@pytest.mark.slow
def test_a_layout_of_every_kind_equals_float64(model, reference):
    check_layouts(model, reference, 4, ONE_OF_EVERY_KIND[read_config(model)["model_type"]])


@pytest.mark.extended
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_every_layout_equals_float64(model, reference, world_size):
    is_moe = read_config(model)["model_type"] == "qwen3_moe"
    check_layouts(
        model, reference, world_size, EXPERTS[world_size] if is_moe else DENSE[world_size] + PADDED[world_size]
    )


def check_layouts(model: Path, reference: Reference, world_size: int, layouts: list[dict[str, Any]]) -> None:
    ranks = run_distributed(run_layouts, world_size, str(model), layouts, reference.old_log_probs, timeout=300)
    for number, layout in enumerate(layouts):
        scores: dict[int, np.ndarray] = {}
        for result in (results[number] for results in ranks):
            scores |= result["scores"]
            assert result["loss"] == pytest.approx(reference.loss, rel=1e-6), layout
            assert result["grad_norm"] == pytest.approx(reference.grad_norm, rel=5e-6), layout
        assert scores.keys() == reference.scores.keys()
        for i, expected in reference.scores.items():
            known = ~np.isnan(scores[i])
            np.testing.assert_allclose(scores[i][known], expected[known], atol=1e-5, err_msg=f"{layout} {i}")
        gradient = ranks[0][number]["gradient"]
        assert gradient.keys() == reference.gradient.keys()
        for name, expected in reference.gradient.items():
            error = np.linalg.norm(gradient[name] - expected) / np.linalg.norm(expected)
            assert error < 2e-5, f"{layout}: {name} is off by {error:.2g}"
