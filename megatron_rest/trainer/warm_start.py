"""Supervised warm start: ``torchrun ... -m megatron_rest.trainer.warm_start --config run.yaml --``.

Cross-entropy on the reference answers (prompt tokens carry no loss) through the same policy, schedule and optimiser as RL,
at any layout; the result is an HF folder ``<trainer.run_dir>/hf`` that the RL run starts from.
"""

from __future__ import annotations

from megatron_rest.rollout.process import prepare_process

prepare_process()

import sys  # noqa: E402
from collections.abc import Iterator  # noqa: E402
from pathlib import Path  # noqa: E402

import numpy as np  # noqa: E402

from megatron_rest.config import ConfigError, OptimizerConfig, RestConfig  # noqa: E402
from megatron_rest.data.batching import make_train_batch  # noqa: E402
from megatron_rest.data.prompts import PromptDataset, prompts_for_step  # noqa: E402
from megatron_rest.trainer.entry import worker_main  # noqa: E402
from megatron_rest.types import LossInputs, LossOutput, TokenRegion, TrainSample  # noqa: E402

__all__ = ["main", "supervised_loss", "warm_start"]

_WARM_UP_SHARE = 0.05  # of all updates
_BETA2 = 0.98  # a few hundred updates: 0.999 would remember the first, largest gradients to the end


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
    from megatron_rest.trainer.setup import Stopwatch, build_policy, open_dataset, set_threads, weight_source

    set_threads()
    settings = config.warm_start
    dataset = open_dataset(settings.answers or config.data.train, config)
    usable = usable_rows(dataset, config.model.max_sequence_length)
    num_updates = max(settings.epochs * len(usable) // settings.batch_size, 1)
    optimizer = OptimizerConfig(
        lr=settings.lr,
        weight_decay=config.optimizer.weight_decay,
        clip_grad=config.optimizer.clip_grad,
        adam_beta2=_BETA2,
        warmup_steps=max(int(_WARM_UP_SHARE * num_updates), 1),
        decay="linear",
    )
    parts = build_policy(config, optimizer=optimizer, num_updates=num_updates)
    context = parts.context
    console = Console(enabled=context.rank == 0)
    console.line(
        f"warm start: {len(usable)} of {len(dataset)} reference answers fit in {config.model.max_sequence_length} tokens, "
        f"{num_updates} updates of {settings.batch_size}"
    )
    seconds, tokens, nll = Stopwatch(), 0, []
    with console.progress("warm start", total=num_updates, unit="update") as progress:
        for samples in sample_batches(dataset, usable, config, num_updates):
            batch = make_train_batch(
                samples,
                max_tokens=config.trainer.max_tokens_per_microbatch,
                dp_rank=context.dp_rank,
                dp_size=context.dp_size,
                alignment=parts.alignment,
                num_microbatches_multiple=parts.num_microbatches_multiple,
            )
            report = parts.policy.update(batch, supervised_loss)
            nll.append(report.loss)
            tokens += sum(len(s.token_ids) for s in samples)
            progress.update()
    console.line(
        f"warm start: {tokens} tokens in {seconds():.0f} s ({tokens / seconds():.0f} a second), "
        f"loss {np.mean(nll[:10]):.3f} -> {np.mean(nll[-10:]):.3f} nats a token"
    )
    source = weight_source(parts, bucket_bytes=config.weight_sync.bucket_bytes)
    folder = export_hf(iter(source), base=config.model.path, output=Path(config.trainer.run_dir) / "hf")
    console.line(f"warm start: wrote {folder}")


def usable_rows(dataset: PromptDataset, max_sequence_length: int) -> list[int]:
    """Rows whose prompt and answer fit the model."""
    fits = [
        i
        for i in range(len(dataset))
        if len(dataset[i].token_ids) + len(dataset.reference_token_ids(i)) <= max_sequence_length
    ]
    if not fits:
        raise ConfigError(f"no reference answer fits model.max_sequence_length={max_sequence_length}")
    return fits


def sample_batches(
    dataset: PromptDataset, usable: list[int], config: RestConfig, num_updates: int
) -> Iterator[list[TrainSample]]:
    """Batches of all replicas; order is a pure function of the seed."""
    size = config.warm_start.batch_size
    for update in range(1, num_updates + 1):
        rows = prompts_for_step(len(usable), size, seed=config.trainer.seed, step=update)
        yield [_sample(dataset, usable[row], sequence_id=i) for i, row in enumerate(rows)]


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
    return worker_main(warm_start, __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
