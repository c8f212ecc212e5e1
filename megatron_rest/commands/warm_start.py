"""Supervised warm start: ``torchrun ... -m megatron_rest.commands.warm_start --config run.yaml``.

Cross-entropy on the reference answers (prompt tokens carry no loss) through the same policy, schedule and optimiser
as RL, at any layout; the result is an HF folder ``<trainer.run_dir>/hf`` that the RL run starts from.
"""

from __future__ import annotations

from megatron_rest.rollout.process import has_gpu_driver, prepare_process

prepare_process(cpu=not has_gpu_driver())

import sys  # noqa: E402
from collections.abc import Iterator  # noqa: E402
from pathlib import Path  # noqa: E402

import numpy as np  # noqa: E402

from megatron_rest.config import OptimizerConfig, RestConfig  # noqa: E402
from megatron_rest.data.prompts import PromptDataset, prompts_for_step  # noqa: E402
from megatron_rest.trainer.entry import worker_main  # noqa: E402
from megatron_rest.types import LossInputs, LossOutput, TokenRegion, TrainSample  # noqa: E402

__all__ = ["main", "supervised_loss", "warm_start"]

_WARM_UP_SHARE = 0.05  # of all updates
_BETA2 = 0.95  # a few hundred updates: 0.999 would remember the first, largest gradients to the end


def supervised_loss(inputs: LossInputs) -> LossOutput:
    """Negative log-likelihood of the answer tokens, summed; Megatron divides by their global count."""
    nll = -inputs.log_probs[inputs.loss_mask].sum()
    count = inputs.loss_mask.sum()
    entropy = inputs.entropy
    metrics = {"nll": (nll.detach(), count)}
    if entropy is not None:
        metrics["entropy"] = (entropy[inputs.loss_mask].sum().detach(), count)
    return LossOutput(loss_sum=nll, num_tokens=count, metrics=metrics)


def warm_start(config: RestConfig) -> None:
    """Train on the reference answers of ``warm_start.answers`` (or ``data.train``) and export an HF folder."""
    from megatron_rest.trainer.console import Console
    from megatron_rest.trainer.export import export_hf
    from megatron_rest.trainer.setup import (
        Stopwatch,
        build_policy,
        make_batch,
        open_prompts,
        set_threads,
        weight_source,
    )
    from megatron_rest.trainer.skips import SkipCount

    set_threads(config)
    settings = config.warm_start
    answers = open_prompts(config, settings.answers)
    per_pass = -(-len(answers) // settings.batch_size)
    num_updates = settings.epochs * per_pass
    parts = build_policy(config, optimizer=_optimizer(config, num_updates), num_updates=num_updates)
    console = Console(enabled=parts.context.rank == 0)
    console.line(
        f"warm start: {len(answers)} reference answers ({answers.num_left_out} too long), at most {num_updates} "
        f"updates of {settings.batch_size}"
    )
    skips = SkipCount(config.optimizer.max_skipped, is_reporting=parts.context.rank == 0)
    seconds, tokens = Stopwatch(), 0
    losses: list[float] = []
    with console.progress("warm start", total=num_updates, unit="update") as progress:
        for samples in sample_batches(answers, config, num_updates):
            batch = make_batch(parts, samples, max_tokens=config.trainer.max_tokens_per_microbatch)
            report = parts.policy.update(batch, supervised_loss)
            skips.note(report, where=f"update {len(losses) + 1} of the warm start")
            losses.append(report.loss)
            tokens += sum(len(s.token_ids) for s in samples)
            progress.update()
            if len(losses) >= per_pass and np.mean(losses[-per_pass:]) <= settings.target_loss:
                break
    console.line(
        f"warm start: {len(losses)} updates, {tokens} tokens in {seconds():.0f} s ({tokens / seconds():.0f} a second), "
        f"loss {np.mean(losses[:per_pass]):.3f} in the first pass, {np.mean(losses[-per_pass:]):.3f} in the last, "
        "nats a token"
    )
    source = weight_source(parts, bucket_bytes=config.weight_sync.bucket_bytes)
    folder = export_hf(iter(source), base=config.model.path, output=Path(config.trainer.run_dir) / "hf")
    console.line(f"warm start: wrote {folder}")


def _optimizer(config: RestConfig, num_updates: int) -> OptimizerConfig:
    return OptimizerConfig(
        lr=config.warm_start.lr,
        weight_decay=config.optimizer.weight_decay,
        clip_grad=config.optimizer.clip_grad,
        adam_beta2=_BETA2,
        warmup_steps=max(int(_WARM_UP_SHARE * num_updates), 1),
        decay="linear",
    )


def sample_batches(answers: PromptDataset, config: RestConfig, num_updates: int) -> Iterator[list[TrainSample]]:
    """Batches of all replicas; order is a pure function of the seed."""
    size = config.warm_start.batch_size
    for update in range(1, num_updates + 1):
        rows = prompts_for_step(len(answers), size, seed=config.trainer.seed, step=update)
        yield [_sample(answers, row, sequence_id=i) for i, row in enumerate(rows)]


def _sample(dataset: PromptDataset, row: int, *, sequence_id: int) -> TrainSample:
    prompt, answer = dataset[row].token_ids, dataset.reference_token_ids(row)
    is_answer = np.arange(len(prompt) + len(answer)) >= len(prompt)
    return TrainSample(
        token_ids=np.concatenate([prompt, answer]).astype(np.int32),
        loss_mask=is_answer,
        region_ids=np.where(is_answer, int(TokenRegion.FORMAT), int(TokenRegion.CONTEXT)).astype(np.int8),
        rollout_log_probs=np.zeros(len(is_answer), np.float32),
        advantage=0.0,
        sequence_id=sequence_id,
    )


def main(argv: list[str] | None = None) -> int:
    """Parse, train, export; returns the exit status."""
    return worker_main(warm_start, __doc__, argv, prog="megatron-rest warm-start")


if __name__ == "__main__":
    sys.exit(main())
