"""FP8 through Transformer Engine on one CUDA device: every recipe this GPU has, against BF16 and against its own rules.

1. the Transformer Engine path in BF16 scores like transformers in float64
2. a few training steps under each recipe: losses within 2 % of BF16, certificate printed and within its bound
3. delayed scaling: first scales are settled, scoring leaves no trace, training does
4. FP8 parameters: exported values and masters are the loaded model's, before and after a step
5. fused weight gradients equal unfused ones
6. a recipe that the GPU lacks is refused by name

One process, one rank; no rollout engine.  What cannot run here is skipped with the reason.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from megatron_rest.config import ConfigError, Fp8Recipe
from megatron_rest.fp8_support import REQUIREMENTS, why_not
from megatron_rest.mcore import accelerations, precision
from megatron_rest.trainer.certificate import measure_mismatch
from megatron_rest.types import LossInputs, LossOutput
from tests.helpers.policies import batch_of, layout_config, make_policy, random_samples
from tests.helpers.tiny_model import build_tiny_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs one CUDA device and Transformer Engine"),
]

RECIPES = list(REQUIREMENTS)
VOCAB, LAYERS, STEPS = 4096, 4, 3
TOKENS = 1024  # of a microbatch: several sequences, several microbatches a step


def skip_unless_available(recipe: Fp8Recipe) -> None:
    obstacle = why_not(recipe, precision.this_machine())
    if obstacle is not None:
        pytest.skip(obstacle)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sizes that every recipe can multiply."""
    return build_tiny_model(
        tmp_path_factory.mktemp("fp8") / "hf",
        hidden=512,
        layers=LAYERS,
        vocab_size=VOCAB,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        intermediate_size=1536,
        initializer_range=0.02,
        pad_token_id=None,  # its embedding would be zero, and the norm's gradient there a thousand times too large
        with_tokenizer=False,
        dtype=torch.bfloat16,
    )


@pytest.fixture(scope="module", autouse=True)
def process_group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    if not torch.cuda.is_available():
        yield
        return
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    store = tmp_path_factory.mktemp("store") / "file"
    dist.init_process_group("cpu:gloo,cuda:nccl", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(autouse=True)
def fresh_state(process_group: None) -> Iterator[None]:
    """Neither Megatron's groups nor Transformer Engine's global buffers outlive a test."""
    yield
    if not torch.cuda.is_available():
        return
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    if accelerations.active().are_layers_fused:
        precision._state_manager().reset()
    torch.cuda.empty_cache()


def policy(model: Path, recipe: str = "none", *overrides: str) -> Any:
    common = (
        "model.max_sequence_length=512",
        f"trainer.max_tokens_per_microbatch={TOKENS}",
        "model.dtype=bfloat16",
        "optimizer.lr=1e-5",  # small: what differs after a few steps is precision, not where two trajectories went
    )
    parts = make_policy(layout_config(model, overrides=(*common, f"precision.recipe={recipe}", *overrides)))
    if not accelerations.active().are_layers_fused:
        pytest.skip("Transformer Engine is not installed or does not import: see `megatron-rest doctor`")
    return parts


def batch(parts: Any) -> Any:
    return batch_of(parts, random_samples(VOCAB, count=96), max_tokens=TOKENS)


def negative_log_likelihood(inputs: LossInputs) -> LossOutput:
    """Mean over tokens of about log(4096) = 8.3: two percent of it are 0.17 nats a token."""
    count = inputs.loss_mask.sum()
    return LossOutput(loss_sum=-inputs.log_probs[inputs.loss_mask].sum(), num_tokens=count, metrics={})


def train(parts: Any, steps: int = STEPS) -> tuple[list[float], list[float]]:
    reports = [parts.policy.update(batch(parts), negative_log_likelihood) for _ in range(steps)]
    return [r.loss for r in reports], [r.grad_norm for r in reports]


@pytest.fixture(scope="module")
def bf16(model: Path, process_group: None) -> tuple[list[float], list[float]]:
    from megatron.core import parallel_state

    losses = train(policy(model))
    parallel_state.destroy_model_parallel()
    return losses


def settle_and_certify(parts: Any, recipe: str) -> Any:
    microbatches = batch(parts).microbatches
    if recipe == Fp8Recipe.DELAYED:
        parts.policy.settle_scales(microbatches)
    fp8, reference = (
        [s.log_probs for s in parts.policy.score(microbatches, in_bf16=in_bf16)] for in_bf16 in (False, True)
    )
    return measure_mismatch(f"{recipe} against bf16", microbatches, fp8, reference, group=parts.context.dp_group)


def test_transformer_engine_in_bf16_scores_like_transformers(model: Path) -> None:
    from transformers import AutoModelForCausalLM

    parts = policy(model)
    microbatches = batch(parts).microbatches
    scores = parts.policy.score(microbatches)
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64).cuda()
    gaps = []
    for microbatch, score in zip(microbatches, scores, strict=True):
        for sequence in microbatch.sequence_ids.unique().tolist():
            at = microbatch.sequence_ids == sequence
            if sequence < 0:
                continue  # what fills the microbatch up
            ids, labels = microbatch.token_ids[at].cuda(), microbatch.labels[at].cuda()
            with torch.no_grad():
                expected = reference(ids[None]).logits[0].log_softmax(-1).gather(-1, labels[:, None])[:, 0]
            gap = (score.log_probs[at.to(score.log_probs.device)].double() - expected).abs()
            gaps.append(gap[microbatch.loss_mask[at].cuda()])  # rows without loss are not projected
    gap = torch.cat(gaps)
    print(f"\nbf16 against float64: mean {gap.mean():.4g}, largest {gap.max():.4g} nats over {len(gap)} tokens")
    assert gap.mean() < 0.02
    assert gap.max() < 0.3


@pytest.mark.parametrize("recipe", RECIPES)
def test_training_steps_are_within_two_percent_of_bf16(recipe: Fp8Recipe, model: Path, bf16: Any) -> None:
    skip_unless_available(recipe)
    parts = policy(model, recipe)
    certificate = settle_and_certify(parts, recipe)
    print("", *certificate.lines(), sep="\n")
    certificate.check(0.1)
    assert max(r.mean for r in certificate.regions.values()) > 1e-4, "equal to BF16: FP8 did not run"
    losses, norms = train(parts)
    print(f"losses {losses} against {bf16[0]}, gradient norms {norms} against {bf16[1]}")
    np.testing.assert_allclose(losses, bf16[0], rtol=0.02)
    # The first microbatch of a delayed run sends its gradients through scales of 1.
    np.testing.assert_allclose(norms[-1], bf16[1][-1], rtol=0.15)


@pytest.mark.parametrize("recipe", RECIPES)
def test_first_and_last_layers_stay_in_bf16(recipe: Fp8Recipe, model: Path) -> None:
    """All layers in BF16: nothing is left to differ."""
    skip_unless_available(recipe)
    if recipe is Fp8Recipe.DELAYED:
        pytest.skip("delayed scaling does not go with layers in BF16: the configuration refuses it")
    half = LAYERS // 2
    parts = policy(model, recipe, f"precision.bf16_layers_start={half}", f"precision.bf16_layers_end={half}")
    certificate = settle_and_certify(parts, recipe)
    assert all(r.largest == 0.0 for r in certificate.regions.values())


def delayed_states(parts: Any) -> list[torch.Tensor]:
    return [t.clone() for t in precision._scale_tensors(parts.policy.modules)]


def test_delayed_scales_are_settled_and_kept_from_the_scoring_pass(model: Path) -> None:
    skip_unless_available(Fp8Recipe.DELAYED)
    parts = policy(model, Fp8Recipe.DELAYED)
    microbatches = batch(parts).microbatches
    before = settle_and_certify(parts, Fp8Recipe.DELAYED)
    settled = delayed_states(parts)
    layers = [m for m in parts.policy.modules[0].modules() if hasattr(m, "fp8_meta") and hasattr(m, "weight")]
    assert len(layers) == 4 * LAYERS  # qkv, projection, two of the MLP
    for layer in layers:
        of_input, of_weight = layer.fp8_meta["scaling_fwd"].scale[:2].tolist()
        assert of_input != 1.0 and of_weight > 1.0
    parts.policy.score(microbatches, temperature=0.5)
    assert all(torch.equal(a, b) for a, b in zip(delayed_states(parts), settled, strict=True))
    train(parts, steps=1)
    trained = delayed_states(parts)
    assert not all(torch.equal(a, b) for a, b in zip(trained, settled, strict=True))
    parts.policy.score(microbatches)
    assert all(torch.equal(a, b) for a, b in zip(delayed_states(parts), trained, strict=True))
    assert before.regions


@pytest.mark.parametrize("recipe", RECIPES)
def test_fp8_parameters_hold_the_loaded_model(recipe: Fp8Recipe, model: Path) -> None:
    from megatron_rest.trainer.setup import weight_source

    skip_unless_available(recipe)
    overrides = ("precision.parameters=true", "parallel.distributed_optimizer=true")
    parts = policy(model, recipe, *overrides)
    original = {k: v for file in model.glob("*.safetensors") for k, v in load_file(file).items()}

    def exported() -> dict[str, float]:
        """Relative distance of every tensor to the loaded one."""
        source = weight_source(parts, bucket_bytes=64 << 20)
        distances = {}
        for name, tensor in source:
            assert tensor.dtype == torch.bfloat16
            expected = original[name].double()
            distances[name] = float((tensor.cpu().double() - expected).norm() / expected.norm())
        assert distances.keys() == original.keys()
        return distances

    quantised = [n for n, d in exported().items() if d > 0]
    assert len(quantised) == 7 * LAYERS, "q, k, v, o, gate, up, down of every layer, and nothing else"
    assert max(exported().values()) < 0.05
    certificate = settle_and_certify(parts, recipe)
    print("", *certificate.lines(), sep="\n")
    losses, _ = train(parts, steps=2)
    # Masters made from the constructor's random weights would replace the model in the first step.
    assert max(exported().values()) < 0.06
    assert abs(losses[1] - losses[0]) < 0.1


def test_fused_weight_gradients_equal_unfused_ones(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.core import parallel_state

    gradients: list[dict[str, torch.Tensor]] = []
    for is_fused in (False, True):
        if not is_fused:
            monkeypatch.setattr(accelerations, "fuse_weight_gradients", lambda module: 0)
        else:
            monkeypatch.undo()
        parts = policy(model)
        switched = [m for m in parts.policy.modules[0].modules() if getattr(m, "fuse_wgrad_accumulation", False)]
        assert bool(switched) is is_fused or accelerations.has_apex_weight_gradients()
        train(parts, steps=1)
        gradients.append({n: p.main_grad.clone() for n, p in parts.policy.named_parameters()})
        parallel_state.destroy_model_parallel()
    for name, expected in gradients[0].items():
        assert expected.norm() > 0, name
        assert (gradients[1][name] - expected).norm() / expected.norm() < 1e-2, name


def test_a_recipe_that_this_gpu_lacks_is_refused_by_name(model: Path) -> None:
    missing = [recipe for recipe in RECIPES if why_not(recipe, precision.this_machine()) is not None]
    if not missing:
        pytest.skip("this GPU has every recipe")
    with pytest.raises(ConfigError) as error:
        policy(model, missing[0])
    assert f"precision.recipe={missing[0]} cannot run here" in str(error.value)
    assert f"{missing[0]} needs Transformer Engine" in str(error.value)


def test_weights_are_scored_alike_in_both_passes(model: Path) -> None:
    """A recipe without memory: the training pass sees the log-probs of the scoring pass."""
    skip_unless_available(Fp8Recipe.TENSORWISE)
    parts = policy(model, Fp8Recipe.TENSORWISE)
    whole = batch(parts)
    scored = [
        m.with_scores(old_log_probs=s.log_probs.cpu(), token_weights=None)
        for m, s in zip(whole.microbatches, parts.policy.score(whole.microbatches), strict=True)
    ]
    gaps: list[float] = []

    def loss(inputs: LossInputs) -> LossOutput:
        gaps.append(float((inputs.log_probs - inputs.old_log_probs)[inputs.loss_mask].detach().abs().max()))
        return negative_log_likelihood(inputs)

    parts.policy.update(replace(whole, microbatches=tuple(scored)), loss)
    print(f"\nlargest |training - scoring| log-prob: {max(gaps):.3g} nats")
    assert max(gaps) < 1e-2
