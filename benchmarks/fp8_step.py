"""One training step in BF16 and under every FP8 recipe of this GPU: time and memory of a 4B-shaped stack.

    python -m benchmarks.fp8_step [--layers 6] [--tokens 8192] [--microbatches 2] [--steps 5] [--json FILE]

Hidden sizes, heads and vocabulary are Qwen3-4B's, the layers are few, the weights random.  A row is a configuration:
the scoring pass without gradients, then the training step (forward, loss, backward, optimiser), both through the
policy that the trainer uses.  Times are medians of CUDA events around the whole pass; memory is the allocator's peak
over one step with everything resident.  Rows run one after the other in processes of their own; no new row starts after
``--minutes``.  Without a GPU or Transformer Engine nothing is measured, and the table says so.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_rest.config import Fp8Recipe, RestConfig, load
from megatron_rest.fp8_support import REQUIREMENTS, why_not

QWEN3_4B = {
    "model_type": "qwen3", "hidden_size": 2560, "intermediate_size": 9728, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "tie_word_embeddings": True, "rms_norm_eps": 1e-6,
    "rope_theta": 1e6, "max_position_embeddings": 40960,
}  # fmt: skip
_SEQUENCE = 1024  # tokens of one packed sequence
_WARM_UP = 2


@dataclass(frozen=True, kw_only=True)
class Row:
    """What one configuration took."""

    recipe: str
    fp8_parameters: bool
    device: str
    score_ms: float
    update_ms: float
    peak_gib: float
    loss: float


def configuration(recipe: str, fp8_parameters: bool, tokens: int) -> RestConfig:
    return load(
        overrides=[
            "model.dtype=bfloat16",
            f"model.max_sequence_length={_SEQUENCE}",
            "data.max_prompt_tokens=512",
            "rollout.max_response_tokens=512",
            f"trainer.max_tokens_per_microbatch={tokens}",
            "parallel.distributed_optimizer=true",
            f"precision.recipe={recipe}",
            f"precision.parameters={str(fp8_parameters).lower()}",
        ]
    )


def measure(recipe: str, fp8_parameters: bool, arguments: argparse.Namespace) -> Row:
    """Build, settle, time; in this process, which is then done with."""
    import torch
    import torch.distributed as dist

    from megatron_rest.mcore import build
    from megatron_rest.mcore.policy import MegatronPolicy
    from megatron_rest.model_map import ModelShape

    config = configuration(recipe, fp8_parameters, arguments.tokens)
    shape = ModelShape.from_hf_config({**QWEN3_4B, "num_hidden_layers": arguments.layers})
    with tempfile.TemporaryDirectory() as folder:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        dist.init_process_group("cpu:gloo,cuda:nccl", init_method=f"file://{folder}/store", rank=0, world_size=1)
        context = build.initialize(config)
        megatron_config = build.transformer_config(shape, config)
        chunks = build.build_chunks(shape, config, context, megatron_config)
        wrapped = build.wrap(chunks, megatron_config, config, context)
        adam, scheduler = build.build_optimizer(
            wrapped, megatron_config, config, optimizer=config.optimizer, num_updates=100
        )
        policy = MegatronPolicy(chunks=wrapped, optimizer=adam, scheduler=scheduler, context=context)
        row = _time(policy, config, shape.vocab_size, arguments, fp8_parameters=fp8_parameters)
        dist.destroy_process_group()
    return row


def _time(
    policy: Any, config: RestConfig, vocab_size: int, arguments: argparse.Namespace, *, fp8_parameters: bool
) -> Row:
    import torch

    batch = _batch(config, vocab_size, arguments)
    if config.precision.recipe is Fp8Recipe.DELAYED:
        policy.settle_scales(batch.microbatches)
    loss = 0.0

    def update() -> None:
        nonlocal loss
        loss = policy.update(batch, _negative_log_likelihood).loss

    def score() -> None:
        policy.score(batch.microbatches)

    for _ in range(_WARM_UP):
        score()
        update()
    torch.cuda.reset_peak_memory_stats()
    times = [(_elapsed_ms(score), _elapsed_ms(update)) for _ in range(arguments.steps)]
    return Row(
        recipe=str(config.precision.recipe),
        fp8_parameters=fp8_parameters,
        device=torch.cuda.get_device_name(),
        score_ms=statistics.median(t[0] for t in times),
        update_ms=statistics.median(t[1] for t in times),
        peak_gib=torch.cuda.max_memory_allocated() / 2**30,
        loss=loss,
    )


def _elapsed_ms(work: Callable[[], None]) -> float:
    import torch

    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    work()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


def _negative_log_likelihood(inputs: Any) -> Any:
    from megatron_rest.types import LossOutput

    count = inputs.loss_mask.sum()
    return LossOutput(loss_sum=-inputs.log_probs[inputs.loss_mask].sum(), num_tokens=count, metrics={})


def _batch(config: RestConfig, vocab_size: int, arguments: argparse.Namespace) -> Any:
    """Full microbatches of sequences of ``_SEQUENCE`` random tokens, the second half of each with loss."""
    from megatron_rest.data.alignment import packing_alignment
    from megatron_rest.data.batching import make_train_batch
    from megatron_rest.types import TrainSample

    rng = np.random.default_rng(0)
    count = arguments.tokens * arguments.microbatches // _SEQUENCE
    has_loss = np.arange(_SEQUENCE + 1) > _SEQUENCE // 2
    samples = [
        TrainSample(
            token_ids=rng.integers(0, vocab_size, _SEQUENCE + 1).astype(np.int32),
            loss_mask=has_loss,
            region_ids=has_loss.astype(np.int8),
            rollout_log_probs=np.zeros(_SEQUENCE + 1, np.float32),
            advantage=1.0,
            sequence_id=i,
        )
        for i in range(count)
    ]
    alignment = packing_alignment(config.precision.recipe, config.parallel)
    return make_train_batch(samples, max_tokens=arguments.tokens, alignment=alignment)


def rows_to_measure() -> tuple[list[tuple[str, bool]], list[str]]:
    """(recipe, FP8 parameters) of every row that can run here; a line for each that cannot."""
    from megatron_rest.mcore.precision import this_machine

    machine = this_machine()
    if not machine.gpu:
        return [], ["not measured: there is no CUDA device"]
    rows, missing = [("none", False)], []
    for recipe in REQUIREMENTS:
        obstacle = why_not(recipe, machine)
        if obstacle is None:
            rows += [(str(recipe), False), (str(recipe), True)]
        else:
            missing.append(f"{recipe} not measured: {obstacle}")
    return rows, missing


def _in_own_process(recipe: str, fp8_parameters: bool, arguments: argparse.Namespace) -> Row | str:
    """The row, or what went wrong (the last line of the error)."""
    command = [sys.executable, "-m", "benchmarks.fp8_step", "--row", recipe, str(int(fp8_parameters))]
    for name in ("layers", "tokens", "microbatches", "steps"):
        command += [f"--{name}", str(getattr(arguments, name))]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    if done.returncode:
        return (done.stderr.strip().splitlines() or ["no output"])[-1]
    return Row(**json.loads(done.stdout.strip().splitlines()[-1]))


def main(argv: Sequence[str] | None = None) -> int:
    """Measure every row and print the table; 1 if a row failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=6, help="transformer layers (%(default)s)")
    parser.add_argument("--tokens", type=int, default=8192, help="packed tokens of a microbatch (%(default)s)")
    parser.add_argument("--microbatches", type=int, default=2, help="microbatches of a step (%(default)s)")
    parser.add_argument("--steps", type=int, default=5, help="timed steps (%(default)s)")
    parser.add_argument("--minutes", type=float, default=5, help="no new row starts after so many (%(default)s)")
    parser.add_argument("--json", help="file to write the rows to")
    parser.add_argument("--row", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.row:
        print(json.dumps(asdict(measure(arguments.row[0], bool(int(arguments.row[1])), arguments))))
        return 0
    wanted, missing = rows_to_measure()
    per_step = arguments.tokens * arguments.microbatches
    print(f"4B-shaped stack, {arguments.layers} layers, {per_step} tokens a step; medians of {arguments.steps}")
    print(f"{'recipe':11s} {'FP8 weights':11s} {'score ms':>9s} {'update ms':>9s} {'ratio':>6s} {'peak GiB':>8s}  loss")
    rows: list[Row] = []
    failed = 0
    deadline = time.monotonic() + 60 * arguments.minutes
    for recipe, fp8_parameters in wanted:
        label = f"{recipe.replace('none', 'bf16'):11s} {'yes' if fp8_parameters else 'no':11s}"
        if time.monotonic() > deadline:
            print(f"{label} not measured: out of time")
            continue
        row = _in_own_process(recipe, fp8_parameters, arguments)
        if isinstance(row, str):
            failed += 1
            print(f"{label} FAILED: {row}", flush=True)
            continue
        rows.append(row)
        ratio = row.update_ms / rows[0].update_ms
        print(
            f"{label} {row.score_ms:9.1f} {row.update_ms:9.1f} {ratio:6.2f} {row.peak_gib:8.2f}  {row.loss:.4f}",
            flush=True,
        )
    for line in missing:
        print(line)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps([asdict(row) for row in rows], indent=1))
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
