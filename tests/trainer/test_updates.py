"""What an update leaves out changes nothing: samples without a gradient, scoring passes, groups that teach nothing."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from megatron_rest.algorithms import RestPolicyLoss
from megatron_rest.config import ConfigError, LossAggregation, LossConfig, load, validate
from megatron_rest.data.prompts import prompts_for_step
from megatron_rest.trainer.setup import make_batch
from megatron_rest.trainer.trainer import RestTrainer, step_seed
from megatron_rest.trainer.updates import split_updates
from megatron_rest.types import TrainBatch, TrainSample
from tests.helpers.distributed import run_distributed
from tests.helpers.gradients import full_gradient
from tests.helpers.policies import layout_config, make_policy, random_samples
from tests.helpers.tiny_model import build_tiny_model

LOSS = LossConfig(aggregation=LossAggregation.SEQUENCE_MEAN, tis_cap=2.0)


def some_without_advantage(vocab_size: int) -> list[TrainSample]:
    """Groups of four; every other one has advantages of 0."""
    samples = random_samples(vocab_size, count=16)
    return [replace(s, advantage=0.0 if i // 4 % 2 else s.advantage, group_id=i // 4) for i, s in enumerate(samples)]


def test_samples_without_a_gradient_are_left_out_and_count():
    samples = some_without_advantage(50)
    first, second = split_updates(samples, num_updates=2, loss=LOSS)
    assert [s.sequence_id for s in first.trained] == [0, 1, 2, 3]
    assert [s.sequence_id for s in first.left_out] == [4, 5, 6, 7]
    assert first.totals.num_tokens == sum(int(s.loss_mask.sum()) for s in samples[:8])
    assert [s.sequence_id for s in second.trained] == [8, 9, 10, 11]


@pytest.mark.parametrize("term", [{"entropy_coef": 0.01}, {"kl_coef": 0.1}, {"aggregation": "reference_code"}])
def test_where_other_terms_have_gradients_nobody_leaves(term):
    loss = load(overrides=[f"loss.{name}={value}" for name, value in term.items()]).loss
    [update] = split_updates(some_without_advantage(50), num_updates=1, loss=loss)
    assert len(update.trained) == 16 and not update.left_out


def weighed(batch: TrainBatch, old: float | None = None) -> TrainBatch:
    return replace(
        batch,
        microbatches=tuple(
            m.with_scores(
                old_log_probs=None if old is None else torch.full((len(m.token_ids),), old),
                token_weights=0.5 + (m.labels % 7).float() / 7,
            )
            for m in batch.microbatches
        ),
    )


def run_both(rank: int, world_size: int, model: str, layouts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Gradient with everything there, and with what has none left out; scores of a pass and of the update itself."""
    from megatron.core import parallel_state

    results = []
    for layout in layouts:
        parts = make_policy(layout_config(model, **layout))
        samples = some_without_advantage(parts.shape.vocab_size)
        [update] = split_updates(samples, num_updates=1, loss=LOSS)
        loss = RestPolicyLoss(LOSS)
        found: dict[str, Any] = {}
        for name, kept, totals in (("all", samples, None), ("left out", update.trained, update.totals)):
            batch = weighed(make_batch(parts, kept, max_tokens=128, totals=totals))
            metrics, _ = parts.policy.gradients(batch, loss)
            found[name] = {"loss": metrics["loss"], "gradient": full_gradient(parts)}
        scores = parts.policy.score(batch.microbatches)
        scored = [
            m.with_scores(old_log_probs=s.log_probs.cpu(), token_weights=m.token_weights)
            for m, s in zip(batch.microbatches, scores, strict=True)
        ]
        metrics, _ = parts.policy.gradients(replace(batch, microbatches=tuple(scored)), loss)
        found["scored before"] = {"loss": metrics["loss"], "gradient": full_gradient(parts)}
        report = parts.policy.update(batch, loss, with_scores=True)
        found["gaps"] = [
            max(
                float((a.log_probs - b.log_probs)[m.loss_mask].abs().max()),
                float((a.entropy - b.entropy)[m.loss_mask].abs().max()),
            )
            for a, b, m in zip(scores, report.scores, batch.microbatches, strict=True)
            if m.loss_mask.any()
        ]
        found["ratio"] = report.metrics["ratio"]
        results.append(found)
        parallel_state.destroy_model_parallel()
    return results


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return build_tiny_model(
        tmp_path_factory.mktemp("updates") / "hf", tied=True, layers=4, num_attention_heads=8, num_key_value_heads=4,
        head_dim=16, max_position_embeddings=256,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("world_size", "layouts"), [(1, [{}]), (4, [{"tp": 2, "pp": 2}, {"cp": 2}])], ids=["one rank", "four ranks"]
)
def test_less_work_gives_the_same_gradient(model, world_size, layouts):
    for results in zip(*run_distributed(run_both, world_size, str(model), layouts, timeout=300), strict=True):
        first = results[0]
        (want, count), (got, present) = first["all"]["loss"], first["left out"]["loss"]
        assert count == present, "samples that were left out are in the denominator, once"
        assert got == pytest.approx(want, rel=1e-6)
        for name, gradient in first["all"]["gradient"].items():
            for other in ("left out", "scored before"):
                gap = np.abs(first[other]["gradient"][name] - gradient).max()
                assert gap <= 5e-6 * np.abs(gradient).max(), (other, name)
        assert first["scored before"]["loss"][0] == pytest.approx(want, rel=1e-6)
        assert first["ratio"][0] == first["ratio"][1], "without a scoring pass every ratio is exactly 1"
        assert all(gap < 1e-5 for rank in results for gap in rank["gaps"])
        assert any(rank["gaps"] for rank in results)


@dataclass
class Recorder:
    """Stand-in for the engines: every prompt's group is its index, asked for or not."""

    begun: list[tuple[list[int], int]] = field(default_factory=list)

    def plan(self, prompts: list[int], *, seed: int) -> None:
        self.begun.append((prompts, seed))

    def begin(self) -> None:
        assert self.begun

    def collect(self, refresh: Any) -> list[Any]:
        return list(self.begun[-1][0])


def draw(is_zero: set[int], *, most: int, prompts: int = 100) -> tuple[list[int], RestTrainer]:
    """The groups that a step with 4 prompts of ``prompts`` trains on, where those in ``is_zero`` teach nothing."""
    trainer = object.__new__(RestTrainer)
    trainer.config = load(overrides=["data.prompts_per_step=4", f"data.resample_zero_groups={most}"])
    trainer.prompts = list(range(prompts))  # type: ignore[assignment]
    trainer.fleet = Recorder()  # type: ignore[assignment]
    trainer.judge = lambda groups, step: SimpleNamespace(  # type: ignore[assignment]
        is_zero_group=tuple(group in is_zero for group in groups)
    )
    return trainer.draw_again(3, trainer.prompts_of(3)), trainer  # type: ignore[arg-type]


def test_no_draw_where_every_group_has_a_signal():
    groups, trainer = draw(set(), most=5)
    assert groups == trainer.prompts_of(3)
    assert trainer.draw_metrics == {"rollout/extra_draws": 0.0, "rollout/dropped_groups": 0.0}


def test_draws_until_enough_groups_have_a_signal():
    first = prompts_for_step(100, 4, seed=1, step=3)
    groups, trainer = draw({first[0], first[2]}, most=5)
    assert len(groups) == 4 and groups[:2] == [first[1], first[3]]
    assert trainer.draw_metrics == {"rollout/extra_draws": 1.0, "rollout/dropped_groups": 4.0}
    [(prompts, seed)] = trainer.fleet.begun  # type: ignore[attr-defined]
    assert groups[2:] == prompts[:2]
    assert prompts == prompts_for_step(100, 4, seed=1, step=3, draw=1) != first
    assert seed == step_seed(1, 3, draw=1) != step_seed(1, 3)
    assert draw({first[0], first[2]}, most=5)[0] == groups, "a resumed run draws the same"


def test_one_group_too_few_is_drawn_again():
    first = prompts_for_step(100, 4, seed=1, step=3)
    groups, trainer = draw({first[1]}, most=1)
    assert groups == [first[0], first[2], first[3], trainer.fleet.begun[0][0][0]]  # type: ignore[attr-defined]


def test_draws_are_bounded_and_a_step_is_whole_nevertheless():
    groups, trainer = draw(set(range(100)), most=2)
    assert groups == prompts_for_step(100, 4, seed=1, step=3), "all teach nothing: the first ones stay"
    assert trainer.draw_metrics == {"rollout/extra_draws": 2.0, "rollout/dropped_groups": 8.0}


@pytest.mark.parametrize(
    ("overrides", "names"),
    [
        (["loss.old_log_probs=engine", "loss.tis_cap=2.0"], "loss.tis_cap=null"),
        (["loss.old_log_probs=engine", "rollout.top_p=0.9"], "set loss.tis_cap=2.0"),
        (["data.resample_zero_groups=2", "rollout.max_staleness=1", "rollout.replicas=1", "loss.tis_cap=2.0",
          "weight_sync.transport=gloo"], "set one of them to 0"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused(overrides, names):
    with pytest.raises(ConfigError, match=names.replace(".", r"\.")):
        validate(load(overrides=overrides), world_size=1)


def test_ratios_to_the_engine_are_a_correction():
    """What needs loss.tis_cap otherwise is allowed."""
    config = load(overrides=["loss.old_log_probs=engine", "rollout.quantization=fp8_channel"])
    validate(config, world_size=1)
    with pytest.raises(ConfigError, match="rounded policy"):
        validate(replace(config, loss=LossConfig()), world_size=1)
