"""Score norms of the scoring pass on real gloo ranks against Hugging Face's hidden states and logits in float64.

1. beta = ||h||^2 (1 - sum p^2) / temperature^2 of every label, for TP, sequence parallelism, PP and VPP
2. it equals the squared gradient of the output matrix, averaged over all labels (autograd)
3. nothing stays behind: later passes measure nothing, log-probs are the same bits
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_rest.mcore.output import detach, measuring_beta
from tests.helpers.distributed import run_distributed
from tests.helpers.policies import LAYERS, batch_of, layout_config, make_policy, random_samples
from tests.helpers.tiny_model import build_tiny_model, read_config

LAYOUTS: dict[int, dict[str, dict]] = {
    1: {"one": {}},
    2: {"tp2": {"tp": 2}, "tp2_sp": {"tp": 2, "sp": True}, "pp2": {"pp": 2}, "pp2_vpp2": {"pp": 2, "vpp": 2}},
    4: {"tp2_pp2_sp": {"tp": 2, "pp": 2, "sp": True}},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return build_tiny_model(
        tmp_path_factory.mktemp("model") / "hf",
        tied=False,
        layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=16,
        max_position_embeddings=256,
    )


@torch.no_grad()
def expected_beta(model: Path, temperature: float) -> dict[int, np.ndarray]:
    """Sequence id -> float64 beta of labels 1, 2, ..."""
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)
    values = {}
    for sample in random_samples(read_config(model)["vocab_size"]):
        ids = torch.from_numpy(sample.token_ids.astype(np.int64))
        hidden = reference.model(ids[None, :-1]).last_hidden_state[0]
        p = (reference.lm_head(hidden) / temperature).softmax(-1)
        values[sample.sequence_id] = (hidden.square().sum(-1) * (1 - p.square().sum(-1)) / temperature**2).numpy()
    return values


def score_all(rank: int, world_size: int, model: str, runs: list[tuple[dict, float]]) -> list[dict[int, np.ndarray]]:
    from megatron.core import parallel_state

    results = []
    for layout, temperature in runs:
        parts = make_policy(layout_config(model, **layout, overrides=(f"rollout.temperature={temperature}",)))
        batch = batch_of(parts, random_samples(parts.shape.vocab_size))
        plain = parts.policy.score(batch.microbatches)
        measured = parts.policy.score(batch.microbatches, with_beta=True)
        again = parts.policy.score(batch.microbatches)
        assert all(s.beta is None for s in plain + again)
        for a, b, c in zip(plain, measured, again, strict=True):
            assert torch.equal(a.log_probs, b.log_probs)
            assert torch.equal(a.entropy, b.entropy)
            assert torch.equal(a.log_probs, c.log_probs)
        values = {}
        for microbatch, score in zip(batch.microbatches, measured, strict=True):
            assert score.beta is not None
            for i in microbatch.sequence_ids.unique().tolist():
                values[i] = score.beta[(microbatch.sequence_ids == i) & microbatch.loss_mask].numpy()
        values.pop(-1, None)  # padding
        results.append(values)
        parallel_state.destroy_model_parallel()
    return results


@pytest.mark.parametrize("world_size", LAYOUTS)
def test_beta_is_that_of_hugging_face_in_every_layout(world_size, model):
    runs = [(layout, 1.0) for layout in LAYOUTS[world_size].values()] + [({"tp": world_size}, 0.7)]
    by_rank = run_distributed(score_all, world_size, str(model), runs)
    for number, (layout, temperature) in enumerate(runs):
        found: dict[int, np.ndarray] = {}
        for results in by_rank:
            found |= results[number]
        expected = expected_beta(model, temperature)
        samples = random_samples(read_config(model)["vocab_size"])
        assert found.keys() == expected.keys()
        for i, beta in expected.items():
            mask = samples[i].loss_mask[1:]
            np.testing.assert_allclose(found[i], beta[mask], rtol=2e-5, err_msg=f"{layout} sequence {i}")


def test_beta_is_the_mean_squared_gradient_of_the_output_matrix(model):
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)
    sample = random_samples(read_config(model)["vocab_size"])[0]
    ids = torch.from_numpy(sample.token_ids.astype(np.int64))
    log_p = reference(ids[None, :-1]).logits[0, 3].log_softmax(-1)
    norms = [
        torch.autograd.grad(value, reference.lm_head.weight, retain_graph=True)[0].square().sum() for value in log_p
    ]
    mean = (log_p.exp() * torch.stack(norms)).sum().item()
    assert expected_beta(model, 1.0)[sample.sequence_id][3] == pytest.approx(mean, rel=1e-9)


def without_the_output(rank: int, world_size: int, model: str) -> list[bool]:
    """Chunks that have nothing to measure, and measuring after a failure."""
    parts = make_policy(layout_config(model, pp=2))
    chunk = parts.policy.modules[0]
    with pytest.raises(RuntimeError, match="midway"), measuring_beta(chunk):
        raise RuntimeError("midway")
    batch = batch_of(parts, random_samples(parts.shape.vocab_size))
    is_measured = [score.beta is not None for score in parts.policy.score(batch.microbatches)]
    detach(chunk)
    with measuring_beta(chunk):  # harmless on a chunk without the output or without a head
        pass
    return is_measured


def test_a_failure_ends_the_measuring_and_chunks_without_output_are_left_alone(model):
    for is_measured in run_distributed(without_the_output, 2, str(model)):
        assert is_measured
        assert not any(is_measured)
