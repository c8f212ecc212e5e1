"""The reference policy of a KL term: what the run began with, whatever was trained since; no trained weight moves."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron_rest.algorithms import RestPolicyLoss
from megatron_rest.config import LossConfig
from megatron_rest.mcore.reference import ReferencePolicy
from tests.helpers.distributed import run_distributed
from tests.helpers.policies import LAYERS, batch_of, layout_config, make_policy, random_samples
from tests.helpers.tiny_model import build_tiny_model
from tests.mcore.test_policy import with_weights

LAYOUTS: dict[int, list[dict[str, Any]]] = {
    1: [{}],
    4: [{"tp": 2, "pp": 2, "sp": True}, {"cp": 2, "distributed_optimizer": True}, {"pp": 2, "vpp": 2}],
}


def train(rank: int, world_size: int, model: str, layouts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    from megatron.core import parallel_state

    found = []
    for layout in layouts:
        parts = make_policy(layout_config(model, **layout))
        policy = parts.policy
        reference = ReferencePolicy(policy)
        batch = with_weights(batch_of(parts, random_samples(parts.shape.vocab_size)))
        before = [s.log_probs.clone() for s in policy.score(batch.microbatches)]
        masks = [m.loss_mask for m in batch.microbatches]
        kl = []
        for _ in range(3):
            ours = reference.log_probs(batch.microbatches)
            assert all(torch.equal(a[m], b[m]) for a, b, m in zip(ours, before, masks, strict=True)), "frozen"
            microbatches = tuple(
                replace(m, ref_log_probs=r, old_log_probs=s.log_probs)
                for m, r, s in zip(batch.microbatches, ours, policy.score(batch.microbatches), strict=True)
            )
            report = policy.update(replace(batch, microbatches=microbatches), RestPolicyLoss(LossConfig(kl_coef=0.5)))
            kl.append(report.metrics["kl_ref"][0] / report.metrics["kl_ref"][1])
        trained = {name: p.detach().clone() for name, p in policy.named_parameters()}
        reference.log_probs(batch.microbatches)
        score, policy.score = policy.score, _fails  # type: ignore[method-assign]
        with pytest.raises(RuntimeError, match="in the middle"):
            reference.log_probs(batch.microbatches)
        policy.score = score  # type: ignore[method-assign]
        is_restored = all(torch.equal(p, trained[name]) for name, p in policy.named_parameters())
        found.append({"kl": kl, "is_restored": is_restored})
        parallel_state.destroy_model_parallel()
    return found


def _fails(*_: Any) -> None:
    raise RuntimeError("in the middle")


@pytest.mark.parametrize("world_size", LAYOUTS)
def test_the_reference_stays_and_the_trained_weights_come_back(
    world_size: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    model = build_tiny_model(
        tmp_path_factory.mktemp("model") / "hf", layers=LAYERS, num_attention_heads=8, num_key_value_heads=4,
        head_dim=16, max_position_embeddings=256,
    )  # fmt: skip
    ranks = run_distributed(train, world_size, str(model), LAYOUTS[world_size])
    for result in (result for results in ranks for result in results):
        assert result["is_restored"]
        first, *later = result["kl"]
        assert first == 0.0, "the policy begins as its reference"
        assert all(value > 1e-6 for value in later), "and moves away from it"
