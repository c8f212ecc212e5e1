"""What it saves to compute the prompt of a group once: the trainer's scoring and update, plain and shared in turns.

    python -m benchmarks.shared_prompts [--cases 512/64/16 2048/64/8] [--layers 4] [--repeats 3] [--tp 1]
        [--verl PYTHON] [--json FILE]

A case is P/R/G: one group of G answers of R tokens to a prompt of P tokens.  *plain* scores and updates every sequence
whole, as trainers do; *shared* has the prompt's rows once; *update alone* is what a step costs whose scoring pass adds
nothing.  The peer is Megatron's own cross-entropy step (packed alike, no scoring, no entropy, no ratios) on the plain
rows: the least that a trainer without shared prompts could do on this machine.  ``--verl PYTHON`` names an environment
that has verl (`verl_update.py` beside this file): its FSDP engine scores and updates the same rows, case by case.

Before anything is timed, the gradient of the shared packing is compared with the plain one's.  CPU seconds of one
thread and rank, best of the repeats.  The bound counts floating-point operations (``RowCost``).
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch

from megatron_rest.algorithms import RestPolicyLoss
from megatron_rest.config import LossConfig
from megatron_rest.data.batching import make_train_batch
from megatron_rest.data.packing import RowCost
from megatron_rest.mcore.forward_step import packed_seq_params
from megatron_rest.mcore.output import attach, detach
from megatron_rest.trainer.setup import PolicyParts
from megatron_rest.types import MicroBatch, TokenRegion, TrainBatch, TrainSample
from tests.helpers.distributed import run_distributed
from tests.helpers.gradients import full_gradient
from tests.helpers.policies import layout_config, make_policy
from tests.helpers.tiny_model import build_tiny_model

CASES = ("512/64/16", "1024/128/8", "2048/64/8", "760/362/4")
GOALS = {"512/64/16": 4.0, "1024/128/8": 3.4, "2048/64/8": 5.5, "760/362/4": 1.6}
_PEER_GOAL = 0.5  # of Megatron's cross-entropy step, with 8 answers and more
_VOCAB, _HIDDEN = 16384, 512
_TOLERANCE = 5e-6  # of a tensor's largest value: rounding of another order of sums makes 2e-6
_LOG_PROBS = 1e-4  # nats between two implementations in float32
_LOSS = RestPolicyLoss(LossConfig())


def make_group(case: str) -> list[TrainSample]:
    prompt_tokens, answer_tokens, size = map(int, case.split("/"))
    rng = np.random.default_rng(0)
    prompt = rng.integers(0, _VOCAB, prompt_tokens)
    mask = np.arange(prompt_tokens + answer_tokens) >= prompt_tokens
    return [
        TrainSample(
            token_ids=np.concatenate([prompt, rng.integers(0, _VOCAB, answer_tokens)]).astype(np.int32),
            loss_mask=mask,
            region_ids=np.where(mask, int(TokenRegion.THINK), int(TokenRegion.CONTEXT)).astype(np.int8),
            rollout_log_probs=np.where(mask, -9.7, 0.0).astype(np.float32),
            advantage=float(rng.normal()),
            sequence_id=i,
            group_id=0,
        )
        for i in range(size)
    ]


def pack(parts: PolicyParts, samples: list[TrainSample], *, is_sharing: bool, max_tokens: int) -> TrainBatch:
    return make_train_batch(
        samples, max_tokens=max_tokens, is_sharing=is_sharing, alignment=parts.alignment,
        cost=RowCost.of_shape(parts.shape),
    )  # fmt: skip


def score_and_update(parts: PolicyParts, batch: TrainBatch) -> tuple[float, float]:
    """CPU seconds of the scoring pass and of the update."""
    gc.collect()
    begin = time.process_time()
    scores = parts.policy.score(batch.microbatches)
    scored = time.process_time()
    microbatches = [
        m.with_scores(old_log_probs=s.log_probs, token_weights=None)
        for m, s in zip(batch.microbatches, scores, strict=True)
    ]
    middle = time.process_time()
    parts.policy.update(replace(batch, microbatches=tuple(microbatches)), _LOSS)
    return scored - begin, time.process_time() - middle


def cross_entropy_update(parts: PolicyParts, batch: TrainBatch) -> float:
    """CPU seconds of Megatron's own step on the same rows."""

    def step(data_iterator: Iterator[MicroBatch], model: Any) -> Any:
        m = next(data_iterator)
        params = packed_seq_params(m)
        output = model(m.token_ids[None], m.position_ids[None], None, labels=m.labels[None], packed_seq_params=params)
        mask = m.loss_mask.float()

        def loss(losses: torch.Tensor) -> Any:
            total = torch.sum(losses.view(-1).float() * mask)
            return total, mask.sum().to(torch.int), {"loss": torch.stack([total.detach(), mask.sum()])}

        return output, loss

    policy = parts.policy
    for module in policy.modules:
        detach(module)
    gc.collect()
    begin = time.process_time()
    for chunk in policy.chunks:
        chunk.train()
        chunk.zero_grad_buffer()
    policy.optimizer.zero_grad()
    policy._schedule(step, batch.microbatches, forward_only=False)
    policy.optimizer.step()
    seconds = time.process_time() - begin
    for module in policy.modules:
        attach(module, vocab_size=parts.shape.vocab_size, temperature=1.0, form="fused")
    return seconds


def check(parts: PolicyParts, plain: TrainBatch, shared: TrainBatch) -> float:
    """Largest difference of a gradient, of its tensor's largest value; refuses to time what is wrong."""
    found = []
    for batch in (plain, shared):
        microbatches = tuple(
            m.with_scores(old_log_probs=m.rollout_log_probs, token_weights=None) for m in batch.microbatches
        )
        parts.policy.gradients(replace(batch, microbatches=microbatches), _LOSS)
        found.append(full_gradient(parts))
        parts.policy.forget_gradients()
    want, got = found
    worst = max(float(np.abs(want[k] - got[k]).max() / np.abs(want[k]).max()) for k in want)
    if not worst < _TOLERANCE:
        raise SystemExit(f"the shared packing gives another gradient ({worst:.1e} of its largest value): not timed")
    return worst


def log_probs_of(parts: PolicyParts, batch: TrainBatch, size: int) -> np.ndarray:
    """[size, R], what the scoring pass gives every answer's tokens."""
    found: list[list[float]] = [[] for _ in range(size)]
    for m, scores in zip(batch.microbatches, parts.policy.score(batch.microbatches), strict=True):
        for t in m.loss_mask.nonzero()[:, 0].tolist():
            found[int(m.sequence_ids[t])].append(float(scores.log_probs[t]))
    return np.array(found)


def measure_verl(python: str, folder: str, case: str, repeats: int, max_tokens: int, ours: np.ndarray) -> list[float]:
    """CPU seconds of verl's scoring pass and update of the same rows; refuses to time another model."""
    samples = make_group(case)
    with tempfile.TemporaryDirectory() as scratch:
        rows, output = Path(scratch) / "rows.npz", Path(scratch) / "out.json"
        np.savez(
            rows, tokens=np.stack([s.token_ids for s in samples]).astype(np.int64), prompt=int(case.split("/")[0]),
            advantages=np.array([s.advantage for s in samples], np.float32), max_tokens=max_tokens,
        )  # fmt: skip
        command = [python, str(Path(__file__).with_name("verl_update.py")), "--model", folder, "--rows", str(rows)]
        subprocess.run([*command, "--repeats", str(repeats), "--output", str(output)], check=True)
        found = json.loads(output.read_text())
    worst = float(np.abs(np.array(found["log_probs"]) - ours).max())
    if not worst < _LOG_PROBS:
        raise SystemExit(f"verl scores the rows otherwise (by {worst:.1e} nats): not timed")
    return [min(column) for column in zip(*found["seconds"], strict=True)]


def measure(rank: int, world_size: int, folder: str, case: str, repeats: int, max_tokens: int) -> dict[str, Any]:
    prompt_tokens, answer_tokens, _ = map(int, case.split("/"))
    parts = make_policy(
        layout_config(
            folder,
            tp=world_size,
            overrides=(
                "model.max_sequence_length=8192", f"trainer.max_tokens_per_microbatch={max_tokens}",
                f"data.max_prompt_tokens={prompt_tokens}", f"rollout.max_response_tokens={answer_tokens}",
            ),
        )
    )  # fmt: skip
    samples = make_group(case)
    plain = pack(parts, samples, is_sharing=False, max_tokens=max_tokens)
    shared = pack(parts, samples, is_sharing=True, max_tokens=max_tokens)
    gap = check(parts, plain, shared)
    log_probs = log_probs_of(parts, plain, len(samples))
    times: dict[str, list[tuple[float, ...]]] = {"plain": [], "shared": [], "peer": []}
    for turn in range(repeats + 1):  # the first turn warms up
        results = {
            "plain": score_and_update(parts, plain),
            "peer": (cross_entropy_update(parts, plain),),
            "shared": score_and_update(parts, shared),
        }
        for name, seconds in results.items() if turn else ():
            times[name].append(seconds)
    best = {name: [min(column) for column in zip(*seconds, strict=True)] for name, seconds in times.items()}
    cost = RowCost.of_shape(parts.shape)
    assert plain.packing is not None and shared.packing is not None
    own = answer_tokens
    flops = [
        sum(cost(len(s.token_ids) - 1, loss_rows=own) for s in samples),
        cost(prompt_tokens - 1) + sum(cost(own, above=prompt_tokens - 1, loss_rows=own) for _ in samples),
    ]
    return {
        "case": case,
        "gradient_gap": gap,
        "rows": [plain.packing.rows, shared.packing.rows],
        "seconds": best,
        "speed_up": sum(best["plain"]) / sum(best["shared"]),
        "bound": flops[0] / flops[1],
        "without_scoring": sum(best["plain"]) / best["shared"][1],
        "of_peer": best["shared"][1] / best["peer"][0],
        "log_probs": log_probs,
    }


def as_line(row: dict[str, Any]) -> str:
    plain, shared, arrow = row["seconds"]["plain"], row["seconds"]["shared"], " > ".join(map(str, row["rows"]))
    return (
        f"{row['case']:>12}{arrow:>16}{sum(plain):9.2f}{sum(shared):10.2f}{row['speed_up']:9.2f}x{row['bound']:7.2f}"
        f"{GOALS.get(row['case']) or '-':>6}{row['without_scoring']:11.2f}x{row['of_peer']:13.2f}"
        f"{row['gradient_gap']:10.1e}{_of_verl(row)}"
    )


def _of_verl(row: dict[str, Any]) -> str:
    """Ours, shared, as a part of verl's: scoring and update; update alone, which is what a step needs."""
    if "verl" not in row["seconds"]:
        return ""
    score, update = row["seconds"]["verl"]
    shared = row["seconds"]["shared"]
    return f"{score:9.2f} + {update:.2f}{sum(shared) / (score + update):8.2f}{shared[1] / (score + update):8.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=CASES, help="P/R/G each")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--max-tokens", type=int, default=2560, help="rows of a microbatch")
    parser.add_argument("--tp", type=int, default=1, help="tensor-parallel ranks")
    parser.add_argument("--verl", metavar="PYTHON", help="interpreter of an environment with verl, measured beside")
    parser.add_argument("--json", type=Path, help="also write the numbers there")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = build_tiny_model(
            Path(folder) / "model", tied=True, hidden=_HIDDEN, layers=args.layers, num_attention_heads=8,
            num_key_value_heads=4, head_dim=64, intermediate_size=1536, max_position_embeddings=8192,
            initializer_range=0.02, vocab_size=_VOCAB,
        )  # fmt: skip
        print(
            f"score + update of one group, hidden {_HIDDEN}, {args.layers} layers, vocabulary {_VOCAB}, float32, "
            f"TP {args.tp}, CPU seconds of one rank"
        )
        print(
            f"{'P/R/G':>12}{'rows':>16}{'plain s':>9}{'shared s':>10}{'speed-up':>10}{'bound':>7}{'goal':>6}"
            f"{'no scoring':>12}{'of Megatron':>13}{'gradient':>10}"
            + (f"{'verl s':>15}{'of it':>8}{'alone':>8}" if args.verl else "")
        )
        rows = []
        for case in args.cases:
            work = (str(model), case, args.repeats, args.max_tokens)
            row = run_distributed(measure, args.tp, *work, timeout=3600)[0]
            log_probs = row.pop("log_probs")
            if args.verl:
                row["seconds"]["verl"] = measure_verl(args.verl, *work, log_probs)
            rows.append(row)
            print(as_line(rows[-1]), flush=True)
    missed = [r["case"] for r in rows if r["speed_up"] < GOALS.get(r["case"], 0)]
    missed += [f"{r['case']} (peer)" for r in rows if int(r["case"].split("/")[2]) >= 8 and r["of_peer"] > _PEER_GOAL]
    print(f"goals: {'MISSED by ' + ', '.join(missed) if missed else 'reached'}")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"layers": args.layers, "tp": args.tp, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
