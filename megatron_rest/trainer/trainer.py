"""RL training with ResT: :meth:`RestTrainer.step` is the data flow of ``docs/architecture.md`` in code.

Every method is collective: all ranks run the same steps on the same prompts, each with its own share of rollouts and
of the pipeline.  The trainer knows no algorithm; it carries tensors from the part that makes them to the part that
uses them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import accumulate, pairwise, zip_longest
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rest.algorithms import RestPolicyLoss
from megatron_rest.algorithms.ratio_losses import find_ratio_loss
from megatron_rest.config import Fp8Recipe, RestConfig, TrainerConfig
from megatron_rest.data.prompts import PromptDataset, prompts_for_step
from megatron_rest.data.rollout_file import RolloutWriter, SavedRollouts
from megatron_rest.data.sample_file import write_samples
from megatron_rest.mcore import checkpoint, rng
from megatron_rest.mcore.policy import Scores, UpdateReport
from megatron_rest.mcore.reference import ReferencePolicy
from megatron_rest.passes import is_scored, keeps_zero_groups
from megatron_rest.trainer.canary import Canary, Sentry, Song, canary_prompt, canary_tolerance
from megatron_rest.trainer.certificate import MismatchCertificate, canary_samples, measure_mismatch
from megatron_rest.trainer.credit import check_rule, give_credit
from megatron_rest.trainer.exchange import all_token_scores, token_versions
from megatron_rest.trainer.fleet import EngineFleet, Singers
from megatron_rest.trainer.judge import Judge, Verdict
from megatron_rest.trainer.metrics import PhaseTimer
from megatron_rest.trainer.pace import Pace
from megatron_rest.trainer.profiler import Profiler
from megatron_rest.trainer.replay import is_recorded, record_update
from megatron_rest.trainer.run_state import RunState, prompt_names
from megatron_rest.trainer.sample_rows import chosen, sample_rows
from megatron_rest.trainer.setup import PolicyParts, make_batch
from megatron_rest.trainer.skips import SkipCount
from megatron_rest.trainer.step_metrics import (
    TokenAges,
    packing_metrics,
    reward_metrics,
    rollout_metrics,
    token_metrics,
    update_metrics,
)
from megatron_rest.trainer.updates import UpdateSamples, split_updates
from megatron_rest.trainer.validation import Validator
from megatron_rest.types import (
    BatchTotals,
    MicroBatch,
    PromptSample,
    Rollout,
    RolloutGroup,
    StepReport,
    TokenRegion,
    TrainBatch,
    TrainSample,
)
from megatron_rest.weight_sync.source import MegatronWeightSource
from megatron_rest.weighting import CreditRule, RestWeighting, region_sums

__all__ = ["RestTrainer"]

_CERTIFICATE_PROMPTS = 16  # with answers of a hundred tokens: a mean of each region that holds


class RestTrainer:
    """One RL run.

    Args:
        config: the whole configuration.
        parts: Megatron policy and its layout.
        prompts: what to train on.
        fleet: the rollout engines.
        source: the policy's weights as full HF tensors.
        judge: regions, rewards, advantages.
        weighting: the rule of token credit.
        validator: benchmarks while training; None = none.
        reference: of the KL term; None = no such term.
    """

    def __init__(
        self,
        config: RestConfig,
        *,
        parts: PolicyParts,
        prompts: PromptDataset,
        fleet: EngineFleet,
        source: MegatronWeightSource,
        judge: Judge,
        weighting: CreditRule,
        validator: Validator | None = None,
        reference: ReferencePolicy | None = None,
    ) -> None:
        self.config = config
        self.parts = parts
        self.policy = parts.policy
        self.context = parts.context
        self.prompts = prompts
        self.fleet = fleet
        self.source = source
        self.judge = judge
        check_rule(weighting, config)
        find_ratio_loss(config.loss)  # raises now what the first update would
        self.weighting = weighting
        self.validator = validator
        self.reference = reference
        prompt, num_tokens = canary_prompt(prompts[0], config)
        self.canary = Canary(prompt=prompt, num_tokens=num_tokens)
        self.sentry = Sentry(
            tolerance=canary_tolerance(config),
            run_dir=config.trainer.run_dir,
            setting=f"{config.parallel} {config.model.dtype} {config.precision} {config.rollout}",
            is_moe=bool(parts.policy.modules[0].config.num_moe_experts),
            rank=parts.context.rank,
        )
        self.checkpoints = checkpoint.CheckpointWriter(Path(config.trainer.run_dir) / "checkpoints", config.checkpoint)
        self.rollout_files = RolloutWriter(config.trainer.run_dir)
        self.loss = RestPolicyLoss(config.loss)
        self.skips = SkipCount(config.optimizer.max_skipped, is_reporting=self.context.rank == 0)
        context = parts.context
        self.pace = Pace(rank=context.rank, world_size=context.world_size, device=context.device)
        self.profiler = Profiler(config.profile, run_dir=config.trainer.run_dir, rank=context.rank)
        self.on_phase: Callable[[int, str], object] = lambda step, phase: None
        """Told the step and the name of every phase that begins."""
        self.draw_metrics: dict[str, float] = {}  # of this step's extra draws

    def progress(self, step: int) -> float:
        """Curriculum progress in [0, 1]; steps count from 1."""
        return (step - 1) / max(self.config.trainer.steps - 1, 1)

    def step(self, step: int) -> StepReport:
        """Prompts -> rollouts -> rewards -> scores -> weights -> update -> weights into the engines.

        With ``rollout.max_staleness`` K > 0 the weights of the step before go in as soon as this step's rollouts are
        there, and the engines sample those of the next K steps, in their order, while this one trains.
        """
        metrics: dict[str, float] = {}
        with self.profiler.step(step), self.timer(step) as timer:
            with timer.phase("rollout"):
                groups = self.roll_out(step)
            if self.is_ahead:
                with timer.phase("sync"):
                    metrics |= self.sync_weights(version=step - 1)
                metrics |= self.validate(step - 1, timer)
                self.begin_rollouts(step + 1, until=step + self.config.rollout.max_staleness)
            with timer.phase("reward"):
                verdict = self.judge(groups, step=step)
                updates = self.updates(verdict)
                batches = [self.batch(update.trained, totals=update.totals) for update in updates]
                rest = self.rest(updates, step=step)
            with timer.phase("score"):
                scores = [self.score(batch, number, step=step) for number, batch in enumerate(batches)]
                rest_scores = [self.policy.score(b.microbatches, with_beta=self.with_score_norms) for b in rest]
                ref_log_probs = self.score_reference(batches)
            with timer.phase("weights"):
                self.measure([*batches, *rest], [*scores, *rest_scores])
                batches = [
                    self.with_old(batch, part, reference)
                    for batch, part, reference in zip(batches, scores, ref_log_probs, strict=True)
                ]
                every = self.weigh([*batches, *rest], [*scores, *rest_scores], verdict, step=step)
                batches, rest = every[: len(batches)], every[len(batches) :]
            with timer.phase("update"):
                reports: list[UpdateReport] = []
                for number, batch in enumerate(batches):
                    if is_recorded(step, self.config):
                        self.record(step, number, batch, groups, verdict)
                    # The first update's own forward pass is that of the policy as the step began.
                    is_first_look = number == 0 and not scores[0]
                    reports.append(self.policy.update(batch, self.loss, with_scores=is_first_look))
                    if is_first_look:
                        scores[0] = reports[0].scores
                    self.skips.note(reports[-1], where=f"step {step}, update {number + 1}")
                metrics |= reward_metrics(verdict, num_groups=len(groups))
                metrics |= rollout_metrics(groups, step=step, num_restarts=self.fleet.num_restarts)
                metrics |= packing_metrics(batches, num_left_out=sum(len(u.left_out) for u in updates))
                metrics |= self.draw_metrics
                metrics |= self.token_metrics(batches, scores, groups, verdict, step=step)
                metrics |= update_metrics(reports)
                self.save_samples(step, groups, verdict)
                if is_saved(step, self.config.trainer):
                    self.save_rollouts(step, groups, verdict, [*batches, *rest], [*scores, *rest_scores])
            if not self.is_ahead:
                with timer.phase("sync"):
                    metrics |= self.sync_weights(version=step)
                metrics |= self.validate(step, timer)
        self.pace.compare(step, judging_seconds=timer.seconds["reward"] - self.judge.waited)
        metrics["progress"] = self.progress(step)
        return StepReport(step=step, policy_version=self.fleet.version, metrics=metrics, seconds=timer.seconds)

    def timer(self, step: int) -> PhaseTimer:
        """Of a part of a step; phases are announced, and named in a trace."""
        return PhaseTimer(on_phase=partial(self.on_phase, step), around=self.profiler.phase)

    def prompts_of(self, step: int, *, draw: int = 0) -> list[PromptSample]:
        """Prompts of a step, or of one of its extra draws: a pure function of the seed and these numbers."""
        indices = prompts_for_step(
            len(self.prompts), self.config.data.prompts_per_step, seed=self.config.trainer.seed, step=step, draw=draw
        )
        return [self.prompts[i] for i in indices]

    @property
    def is_ahead(self) -> bool:
        """Whether engines sample for later steps while a step trains."""
        return self.config.rollout.max_staleness > 0

    def steps_under_way(self, step: int) -> range:
        """Steps whose rollouts may be under way, or there, when ``step`` begins; it is the first of them."""
        ahead = max(self.config.rollout.max_staleness, 1)
        return range(step, min(step + ahead, self.config.trainer.steps + 1))

    def begin_rollouts(self, step: int, *, until: int) -> None:
        """The engines start on the prompts of ``step``, which is the oldest that is wanted, to ``until``."""
        for later in range(step + self.fleet.num_planned, min(until, self.config.trainer.steps) + 1):
            self.fleet.plan(self.prompts_of(later), seed=step_seed(self.config.trainer.seed, later))
        self.fleet.begin()

    def roll_out(self, step: int) -> list[RolloutGroup]:
        """All groups of the step in prompt order, no token of them sampled by a policy older than the bound."""
        self.settle(step)
        groups = self.draw_again(step, self.fleet.take())
        self.fleet.sleep()
        oldest = min(rollout.oldest_version for rollout in _rollouts(groups))
        if oldest < self.oldest_allowed(step):
            raise RuntimeError(f"step {step} was handed tokens of policy version {oldest}: older than the bound")
        return groups

    def oldest_allowed(self, step: int) -> int:
        """Policy version that tokens of a step's rollouts are of at least."""
        return step - 1 - self.config.rollout.max_staleness

    def settle(self, step: int) -> None:
        """Wait for the rollouts of ``step``; what there is of later ones then belongs to a checkpoint that waits."""
        if not self.fleet.can_settle:
            self.begin_rollouts(step, until=self.steps_under_way(step)[-1])
        self.fleet.settle(refresh=partial(self.sync_weights, version=step - 1))
        if self.checkpoints.is_waiting:
            self.checkpoints.complete(RunState.queue_tensors(self.fleet.known()))

    def draw_again(self, step: int, groups: list[RolloutGroup]) -> list[RolloutGroup]:
        """More prompts while too few groups have rewards that differ (``data.resample_zero_groups``).

        As many groups as the step has prompts: those with a signal first, in the order they were drawn.  Draws are a
        function of seed, step and number, so a resumed run makes the same.
        """
        most, wanted = self.config.data.resample_zero_groups, self.config.data.prompts_per_step
        self.draw_metrics = {}
        if not most:
            return groups
        seed, is_zero = self.config.trainer.seed, list(self.judge(groups, step=step).is_zero_group)
        draw = 0
        while is_zero.count(False) < wanted and draw < most:
            draw += 1
            prompts = self.prompts_of(step, draw=draw)
            self.fleet.plan(prompts, seed=step_seed(seed, step, draw=draw))
            self.fleet.begin()
            more = self.fleet.collect(refresh=partial(self.sync_weights, version=step - 1))
            groups = [*groups, *more]
            is_zero += self.judge(more, step=step).is_zero_group
        self.draw_metrics = {"rollout/extra_draws": float(draw), "rollout/dropped_groups": float(len(groups) - wanted)}
        order = sorted(range(len(groups)), key=lambda i: is_zero[i])  # stable
        return [groups[i] for i in sorted(order[:wanted])]

    def updates(self, verdict: Verdict) -> list[UpdateSamples]:
        """Samples of each optimiser update."""
        num_updates = self.config.optimizer.updates_per_step
        keeps_all = keeps_zero_groups(self.config, self.weighting.traits)
        return split_updates(verdict.samples, num_updates=num_updates, loss=self.config.loss, keeps_all=keeps_all)

    def batch(self, samples: Sequence[TrainSample], *, totals: BatchTotals | None = None) -> TrainBatch:
        """This replica's packed microbatches."""
        return make_batch(self.parts, samples, max_tokens=self.config.trainer.max_tokens_per_microbatch, totals=totals)

    def rest(self, updates: Sequence[UpdateSamples], *, step: int) -> list[TrainBatch]:
        """What is scored and not trained: samples without a gradient, where a statistic or a file is of all samples."""
        left_out = [sample for update in updates for sample in update.left_out]
        is_wanted = self.weighting.traits.is_of_all or is_saved(step, self.config.trainer)
        return [self.batch(left_out)] if left_out and is_wanted else []

    @property
    def with_score_norms(self) -> bool:
        return self.weighting.traits.with_score_norms

    def score(self, batch: TrainBatch, number: int, *, step: int) -> Sequence[Scores]:
        """Scores of an update's microbatches, as the step begins; empty where nothing needs them before the update."""
        traits = self.weighting.traits
        if not is_scored(self.config, number, is_saved=is_saved(step, self.config.trainer), traits=traits):
            return ()
        return self.policy.score(batch.microbatches, with_beta=self.with_score_norms)

    def measure(self, batches: Sequence[TrainBatch], scores: Sequence[Sequence[Scores]]) -> None:
        """Region entropies or score norms of this step into the weighting, for sources that follow them.

        Collectives: one all-reduce of 12 float64 numbers over the data-parallel group; none if nothing is measured.
        """
        statistic = self.weighting.traits.follows
        if not statistic:
            return
        assert isinstance(self.weighting, RestWeighting), "region means are what ResT's sources follow"
        total = torch.zeros(2, len(TokenRegion), dtype=torch.float64)
        for batch, part in zip(batches, scores, strict=True):
            for microbatch, score in zip(batch.microbatches, part, strict=True):
                values = score.entropy if statistic == "entropy" else score.beta
                assert values is not None, "the scoring pass was asked for what the weighting wants"
                sums = region_sums(values.cpu(), microbatch.region_ids, microbatch.loss_mask)
                total += torch.stack(sums)
        dist.all_reduce(total, group=self.context.dp_group)
        self.weighting.update(*total)

    def score_reference(self, batches: Sequence[TrainBatch]) -> list[Sequence[Tensor | None]]:
        """The reference policy's log-probs of every microbatch; None where no loss asks for them."""
        if self.reference is None:
            return [[None] * len(batch.microbatches) for batch in batches]
        flat = self.reference.log_probs([m for batch in batches for m in batch.microbatches])  # the weights go in once
        ends = list(accumulate(len(batch.microbatches) for batch in batches))
        return [flat[begin:end] for begin, end in pairwise([0, *ends])]

    def with_old(
        self, batch: TrainBatch, scores: Sequence[Scores], ref_log_probs: Sequence[Tensor | None]
    ) -> TrainBatch:
        """Old and reference log-probs into every microbatch.

        Without scores the update's own log-probs are the old ones (every ratio is 1), or else the engine's.
        """
        filled = []
        for microbatch, score, reference in zip_longest(batch.microbatches, scores, ref_log_probs):
            old = None if score is None else score.log_probs.cpu()
            if self.config.loss.old_log_probs == "engine":
                old = microbatch.rollout_log_probs
            filled.append(microbatch.with_scores(old_log_probs=old, ref_log_probs=reference))
        return replace(batch, microbatches=tuple(filled))

    def weigh(
        self, batches: Sequence[TrainBatch], scores: Sequence[Sequence[Scores]], verdict: Verdict, *, step: int
    ) -> list[TrainBatch]:
        """Token credit into every microbatch of the step, by ``weighting.source``."""
        return give_credit(
            self.weighting,
            batches,
            scores,
            samples=verdict.samples,
            rewards=verdict.scored_rewards,
            progress=self.progress(step),
            name=str(self.config.weighting.source),
            dp_group=self.context.dp_group,
        )

    def token_metrics(
        self,
        batches: Sequence[TrainBatch],
        scores: Sequence[Sequence[Scores]],
        groups: Sequence[RolloutGroup],
        verdict: Verdict,
        *,
        step: int,
    ) -> dict[str, float]:
        """Entropy, weight mass and mismatch over all updates of the step that were scored."""
        microbatches: list[MicroBatch] = [
            m for b, part in zip(batches, scores, strict=True) if part for m in b.microbatches
        ]
        parts = [s for part in scores for s in part]
        ages = None
        if self.is_ahead:
            most = self.config.rollout.max_staleness
            ages = TokenAges.of(verdict.samples, _rollouts(groups), step=step, oldest=most)
        return token_metrics(microbatches, parts, self.config.loss, dp_group=self.context.dp_group, ages=ages)

    def save_samples(self, step: int, groups: Sequence[RolloutGroup], verdict: Verdict) -> None:
        """Rollouts to read, written by rank 0: all where the arrays are saved, else some."""
        if self.context.rank != 0:
            return
        section = self.config.trainer
        count = len(verdict.rewards) if is_saved(step, section) else section.samples_per_step
        only = chosen(verdict, count)
        if only:
            table = self.judge.token_bytes
            write_samples(section.run_dir, step, sample_rows(groups, verdict, table, step=step, only=only))

    def save_rollouts(
        self,
        step: int,
        groups: Sequence[RolloutGroup],
        verdict: Verdict,
        batches: Sequence[TrainBatch],
        scores: Sequence[Sequence[Scores]],
    ) -> None:
        """This step's rollouts with regions, scores and weights into one file; rank 0 writes it while training goes on.

        Collectives: one all-reduce of ``[3, T]`` float32 over rank 0's replicas (a row more with score norms, and
        one with advantages by token).
        """
        if dist.get_global_rank(self.context.dp_group, 0) != 0:
            return
        values = all_token_scores(
            [s.num_tokens for s in verdict.samples],
            [m for batch in batches for m in batch.microbatches],
            [s for part in scores for s in part],
            dp_group=self.context.dp_group,
            with_advantages=not isinstance(self.weighting, RestWeighting),
        )
        if self.context.rank != 0:
            return
        rollouts = SavedRollouts.of(
            verdict.samples,
            step=step,
            progress=self.progress(step),
            rewards=[reward.total for reward in verdict.rewards],
            group_ids=[i for i, group in enumerate(groups) for _ in group.rollouts],
            scores=values | {"versions": token_versions(verdict.samples, _rollouts(groups))},
        )
        self.rollout_files.write(rollouts)

    def record(
        self, step: int, update: int, batch: TrainBatch, groups: Sequence[RolloutGroup], verdict: Verdict
    ) -> None:
        """A replay bundle of the update that comes next (``trainer/replay.py``)."""
        record_update(
            self.parts,
            self.config,
            batch,
            step=step,
            update=update,
            progress=self.progress(step),
            groups=groups,
            verdict=verdict,
            region_means=self.weighting.state_dict()["mean"],
        )

    def settle_precision(self) -> None:
        """First scales of delayed FP8 scaling; nothing for other recipes.  Before anything is scored."""
        if self.config.precision.recipe is Fp8Recipe.DELAYED:
            self.policy.settle_scales(self.canary_batch().microbatches)

    def certify_precision(self) -> MismatchCertificate:
        """FP8 against BF16 on prompts with their reference answers; two scoring passes."""
        microbatches = self.canary_batch().microbatches
        log_probs, reference = (
            [s.log_probs for s in self.policy.score(microbatches, in_bf16=in_bf16)] for in_bf16 in (False, True)
        )
        name = f"{self.config.precision.recipe} against bf16"
        return measure_mismatch(name, microbatches, log_probs, reference, group=self.context.dp_group)

    def canary_batch(self) -> TrainBatch:
        """This replica's share of what precision is judged on."""
        longest = min(self.config.model.max_sequence_length, self.config.trainer.max_tokens_per_microbatch)
        count = max(_CERTIFICATE_PROMPTS, self.context.dp_size)
        return self.batch(canary_samples(self.prompts, self.judge, count=count, max_tokens=longest))

    def sync_weights(self, *, version: int) -> dict[str, float]:
        """Push the policy's weights into the engines and let the canary sing."""
        if self.config.trainer.offload:  # the engines wake up for it
            self.policy.offload()
        report, song = self.sentry.guard(version, lambda: self.fleet.deliver(version, self.sing))
        self.fleet.admit(version)
        return {
            "sync/seconds": report.seconds,
            "sync/bytes": float(report.num_bytes),
            "sync/engines": float(self.fleet.num_engines),
            "sync/canary_max_abs": song.worst,
            "sync/canary_middle_abs": song.middle,
            "sync/canary_far": song.far,
            "sync/canary_order": song.order,
        }

    def sing(self, singers: Singers) -> Song | None:
        """The canary's song with engines that have just been given weights."""
        return self.canary.sing(
            singers,
            self.policy,
            tolerance=self.sentry.tolerance,
            alignment=self.parts.alignment,
            is_sharing=self.parts.is_sharing,
        )

    def validate(self, version: int, timer: PhaseTimer) -> dict[str, float]:
        """Benchmarks answered by the engines, which hold ``version``, if they are due; metrics on rank 0."""
        if self.validator is None or not self.validator.is_due(version):
            return {}
        with timer.phase("validation"):
            return self.validator(self.fleet, version=version, refresh=partial(self.sync_weights, version=version))

    def save(self, step: int, metrics: Mapping[str, float], timer: PhaseTimer, *, is_last: bool) -> Path:
        """A checkpoint of this step and all that the run is; complete at once, or when ``checkpoints`` has written it.

        Where engines are ahead the rollouts of the next steps are under way, and belong to the checkpoint, since no
        engine will hold the weights again that sample them.  Those of the next step are waited for (phase ``wait``) if
        this is the run's last; else training goes on, and the checkpoint is whole when the next step has them: then no
        engine samples, and what there is of later steps belongs to it, too.  A run that continues from here does not
        write the files of rollouts before it again: they are complete first.
        """
        with timer.phase("wait"):
            self.rollout_files.wait()
        has_queue = self.is_ahead and step < self.config.trainer.steps
        if has_queue and is_last:
            with timer.phase("wait"):
                self.settle(step + 1)
        # After the last step, too: the run may be given more steps.
        later = self.steps_under_way(step + 1) or range(step + 1, step + 2)
        state = RunState(
            weighting=self.weighting.state_dict(),
            num_restarts=self.fleet.num_restarts,
            skipped_in_a_row=self.skips.in_a_row,
            next_prompts=prompt_names([self.prompts_of(s) for s in later]),
            group_size=self.config.rollout.rollouts_per_prompt,
            queue=self.fleet.known() if has_queue and is_last else None,
        )
        is_for_any = step == self.config.trainer.steps or self.config.checkpoint.any_layout == "every"
        if self.config.trainer.offload:  # the optimiser's state comes back to be saved
            self.fleet.sleep()
        with timer.phase("checkpoint"):
            path = self.checkpoints.save(
                self.policy,
                step=step,
                extra=state.as_extra(),
                metrics=metrics,
                form=checkpoint.ANY_LAYOUT if is_for_any else checkpoint.AS_IT_LIES,
                is_complete=is_last or not has_queue,
            )
        if self.config.trainer.offload and not is_last and step < self.config.trainer.steps:
            with timer.phase("sync"):
                self.sync_weights(version=step)  # asleep they may have dropped them
        return path

    def resume(self, path: str | Path, *, is_verified: bool = False) -> tuple[int, list[str]]:
        """Load a checkpoint, put its weights into the engines.

        Returns the last finished step, and what is not as it was, a line each; nothing at the same layout with the same
        data.
        """
        loaded = checkpoint.load(path, self.policy, is_verified=is_verified)
        prompts, notes = [self.prompts_of(step) for step in self.steps_under_way(loaded.step + 1)], []
        state = RunState.of_extra(loaded.extra, prompts, group_size=self.config.rollout.rollouts_per_prompt)
        if prompts and state.next_prompts[:1] != prompt_names(prompts)[:1]:
            notes.append(
                f"the prompts of step {loaded.step + 1} are not those that this checkpoint's run would have come to: "
                "data.* or trainer.seed differ"
            )
        if state.weighting.keys() == self.weighting.state_dict().keys():
            self.weighting.load_state_dict(state.weighting)
        else:
            notes.append("saved under another rule of token credit (weighting.source): this one begins anew")
        self.fleet.continue_count(state.num_restarts)
        self.skips.in_a_row = state.skipped_in_a_row
        self.plan_again(loaded.step + 1, state.queue or ())
        self.sync_weights(version=loaded.step)
        if loaded.rng is not None:
            rng.restore(loaded.rng)
        else:
            notes.append("saved at another layout: random streams begin anew from trainer.seed")
        dist.barrier()
        return loaded.step, notes

    def plan_again(self, step: int, queue: Sequence[Mapping[int, Rollout]]) -> None:
        """What a checkpoint holds of the rollouts of ``step`` and later ones; the oldest that are too old for this
        configuration are dropped, and sampled again."""
        for later, known in enumerate(queue, step):
            oldest, can_go_on = self.oldest_allowed(later), not self.config.rollout.environment
            kept = {k: r for k, r in known.items() if r.oldest_version >= oldest and (r.is_whole or can_go_on)}
            self.fleet.plan(self.prompts_of(later), seed=step_seed(self.config.trainer.seed, later), known=kept)


def _rollouts(groups: Sequence[RolloutGroup]) -> list[Rollout]:
    """In the order of the step's samples."""
    return [rollout for group in groups for rollout in group.rollouts]


def is_saved(step: int, config: TrainerConfig) -> bool:
    """Whether this step's rollouts go to a file.

    Always the first and the last: their weights stay on disk (``model.path`` and the export).
    """
    every = config.save_rollouts_every
    return step in (1, config.steps) or bool(every and step % every == 0)


def step_seed(seed: int, step: int, *, draw: int = 0) -> int:
    """Sampling seed of a step or of an extra draw: different for every (seed, step, draw), the same in every run."""
    digest = hashlib.sha256(f"{seed}/{step}{f'/{draw}' if draw else ''}".encode()).digest()
    return int.from_bytes(digest[:4], "little") >> 1
