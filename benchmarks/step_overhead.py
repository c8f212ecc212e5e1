"""What the policy step costs over Megatron's own cross-entropy step: the same model, the same process, taking turns.

    python -m benchmarks.step_overhead [--vocab 32768 --hidden 256 --layers 4 --tokens 2048 --length 256 --repeats 5]
                                       [--json FILE]

A step is Megatron's ``forward_backward_func`` with its DistributedDataParallel (gradients into fp32 ``main_grad``), no
optimizer: that is the same in both and would only hide the difference.  The baseline is ``GPTModel``'s cross-entropy
with the masked sum of Megatron-LM's ``loss_func``; it yields log-probs only, ours also the entropy of every row,
ratios, clipping, token weights and metrics.  Before anything is timed, our log-probs are compared with Megatron's loss.

Times are CPU seconds of this one thread (what others do on the machine counts little), the median over the repeats of
the ratio within a round; memory is the high-water mark of resident memory during the step beyond what was resident
before it.  No GPU path is measured here.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_rest.algorithms import RestPolicyLoss, rest_policy_loss
from megatron_rest.config import LossConfig
from megatron_rest.mcore import cpu
from megatron_rest.mcore.output import attach, detach
from megatron_rest.mcore.step_loss import LossTokens, PolicyLoss, StepLoss

Batch = dict[str, torch.Tensor]
_LOSS = RestPolicyLoss(LossConfig())
_GOAL_TIME, _TOLERANCE = 1.05, 2e-5
_FEW = 0.25  # share of rows with loss where a prompt and tool outputs fill the rest


def cross_entropy_step(data_iterator: Iterator[Batch], model: Any) -> Any:
    """As ``pretrain_gpt.py`` has it."""
    batch = next(data_iterator)
    mask = batch["loss_mask"].view(-1)

    def loss_func(output: torch.Tensor) -> Any:
        loss = torch.sum(output.view(-1).float() * mask)
        count = mask.sum().to(torch.int)
        return loss, count, {"lm loss": torch.stack([loss.detach(), count.float()])}

    return model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"]), loss_func


def policy_step(data_iterator: Iterator[Batch], model: Any, *, loss: PolicyLoss) -> Any:
    batch = next(data_iterator)
    step = StepLoss(loss, LossTokens.of_batch(batch))
    output = model(
        batch["tokens"], batch["position_ids"], None, labels=batch["labels"], output_processor_context=step.context
    )
    return output, step


def build(args: argparse.Namespace) -> tuple[GPTModel, Any]:
    cpu.enable()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    cpu.seed_model_parallel(0, tp_rank=0)
    config = TransformerConfig(
        num_layers=args.layers,
        hidden_size=args.hidden,
        num_attention_heads=8,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        calculate_per_token_loss=True,
    )
    model = GPTModel(
        config,
        get_gpt_layer_local_spec(),
        vocab_size=args.vocab,
        max_sequence_length=args.tokens,
        position_embedding_type="rope",
    )
    config.finalize_model_grads_func = finalize_model_grads
    return model, DistributedDataParallel(config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), model)


def make_batch(args: argparse.Namespace, share: float) -> Batch:
    """Sequences of which the last ``share`` carries loss."""
    generator = torch.Generator().manual_seed(1)
    shape = number, length = args.tokens // args.length, args.length
    tokens = torch.randint(0, args.vocab, (number, length + 1), generator=generator)
    mask = (torch.arange(length) >= round((1.0 - share) * length)).float().expand(shape).contiguous()
    return {
        "tokens": tokens[:, :-1].contiguous(),
        "labels": tokens[:, 1:].contiguous(),
        "position_ids": torch.arange(length).expand(shape).contiguous(),
        "loss_mask": mask,
        "advantages": torch.linspace(-1.0, 1.0, number),
        "old_log_probs": torch.full(shape, -float(torch.tensor(float(args.vocab)).log())),
        "token_weights": 0.5 + torch.rand(shape, generator=generator),
    }


class Case:
    """One way to take the step."""

    def __init__(self, name: str, step: Callable[..., Any], share: float, form: str | None) -> None:
        self.name, self.step, self.share, self.form = name, step, share, form
        self.seconds: list[float] = []
        self.extra: list[int] = []

    def run(self, args: argparse.Namespace, module: GPTModel, model: Any) -> None:
        if self.form is None:
            detach(module)
        else:
            attach(module, form=self.form)
        batch = make_batch(args, self.share)
        model.zero_grad_buffer()
        before = _memory("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
        begin = time.process_time()
        schedule(self.step, batch, model)
        self.seconds.append(time.process_time() - begin)
        self.extra.append(_memory("VmHWM") - before)


def schedule(step: Callable[..., Any], batch: Batch, model: Any) -> list[Any]:
    return get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=iter([batch]),
        model=model,
        num_microbatches=1,
        seq_length=batch["tokens"].shape[1],
        micro_batch_size=len(batch["tokens"]),
        forward_only=False,
    )


def check(args: argparse.Namespace, module: GPTModel) -> float:
    """Largest |log-prob + Megatron's loss| over all tokens; refuses to time what is wrong."""
    batch = make_batch(args, 1.0)
    inputs = batch["tokens"], batch["position_ids"], None
    gaps = []
    with torch.no_grad():
        detach(module)
        reference = module(*inputs, labels=batch["labels"])
        for form in ("fused", "logits"):
            attach(module, form=form)
            gaps.append((module(*inputs, labels=batch["labels"]).log_probs + reference).abs().max())
    worst = float(torch.stack(gaps).max())  # NaN stays NaN
    if not worst < _TOLERANCE:
        raise SystemExit(f"log-probs differ from Megatron's cross-entropy by {worst:.1e} nats: not timed")
    return worst


def _memory(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab", type=int, default=32768)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=2048, help="tokens of the microbatch")
    parser.add_argument("--length", type=int, default=256, help="tokens of a sequence")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write the numbers there")
    args = parser.parse_args()
    module, model = build(args)
    gap = check(args, module)
    fused = partial(policy_step, loss=_LOSS)
    recompute = partial(policy_step, loss=partial(rest_policy_loss, config=_LOSS.config))  # says nothing of its tokens
    cases = [
        Case("megatron cross-entropy", cross_entropy_step, 1.0, None),
        Case("ours, fused", fused, 1.0, "fused"),
        Case("ours, fused, any loss (recompute)", recompute, 1.0, "fused"),
        Case("ours, from logits", fused, 1.0, "logits"),
        Case(f"megatron cross-entropy, {_FEW:.0%} of rows with loss", cross_entropy_step, _FEW, None),
        Case(f"ours, fused, {_FEW:.0%} of rows with loss", fused, _FEW, "fused"),
    ]
    for _ in range(args.repeats + 1):
        for case in cases:
            case.run(args, module, model)
    rows = [summarize(case, cases[0]) for case in cases]
    print(
        f"one step, {args.tokens} tokens in sequences of {args.length}, hidden {args.hidden}, {args.layers} layers, "
        f"vocabulary {args.vocab}, float32, 1 thread; largest difference in log-prob {gap:.1e} nats"
    )
    print(f"{'':54}{'CPU s':>8}{'ratio':>8}{'extra MiB':>11}{'ratio':>8}")
    for row in rows:
        print(f"{row['case']:54}{row['seconds']:8.3f}{row['time_ratio']:8.3f}{row['extra_mib']:11.0f}"
              f"{row['memory_ratio']:8.2f}")  # fmt: skip
    is_reached = rows[1]["time_ratio"] <= _GOAL_TIME and rows[1]["memory_ratio"] < 1.0
    verdict = "reached" if is_reached else "MISSED"
    print(f"goal (fused, all rows): at most {_GOAL_TIME:.2f} of the time, and less memory: {verdict}")
    if args.json:
        settings = {k: v for k, v in vars(args).items() if k != "json"}
        args.json.write_text(json.dumps({"settings": settings, "log_prob_gap": gap, "rows": rows}, indent=2) + "\n")
    dist.destroy_process_group()


def summarize(case: Case, baseline: Case) -> dict[str, Any]:
    """Medians without the first, warming round."""
    ratios = [a / b for a, b in zip(case.seconds[1:], baseline.seconds[1:], strict=True)]
    extra, reference = statistics.median(case.extra[1:]), statistics.median(baseline.extra[1:])
    return {
        "case": case.name,
        "seconds": statistics.median(case.seconds[1:]),
        "time_ratio": statistics.median(ratios),
        "extra_mib": extra / 2**20,
        "memory_ratio": extra / max(reference, 1),  # at tiny sizes everything fits into memory that is there already
    }


if __name__ == "__main__":
    main()
