"""Kill rollout engines with SIGKILL, in the middle of generation and in the middle of a sync, and compare with peace.

    python -m benchmarks.chaos [--kills 10] [--steps 3] [--ranks 2] [--replicas 1]

Two runs of the trainer with the same seeds: one undisturbed, one in which engine processes are killed one after another
as soon as there is something to interrupt (generation: after some rollouts of a batch were handed over, others being
half sampled; sync: between the first and the last byte of a transfer, the one that repairs the kill before included).
Equal are: the number of rollouts of every step, every metric that is no time, and the final weights, bit for bit.
Exit status 1 if anything differs.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PHASES = ("generation", "sync")
_ROLLOUTS_BEFORE = 3  # handed over before an engine is killed in the middle of generation
_SYNC_SECONDS = 0.005  # after the first byte may have been sent; a transfer of the toy takes some 30 ms


def disturb(kills: int) -> None:
    """Let this process kill its engine ``kills`` times, generation and sync by turns."""
    from megatron_rest.rollout.remote import RemoteEngine

    due = deque(PHASES[i % 2] for i in range(kills))
    run, update = RemoteEngine.run, RemoteEngine.update_weights

    def kill(engine: RemoteEngine, phase: str) -> None:
        print(f"chaos: SIGKILL to engine {engine.pid} in the middle of {phase}", file=sys.stderr, flush=True)
        os.kill(engine.pid, signal.SIGKILL)

    def killing_run(self: RemoteEngine, requests: Any, *, max_response_tokens: int, on_rollout: Any) -> None:
        is_due = bool(due) and due[0] == "generation" and len(requests) > _ROLLOUTS_BEFORE
        if is_due:
            due.popleft()
        handed = []

        def take(key: int, rollout: Any) -> None:
            on_rollout(key, rollout)
            handed.append(key)
            if is_due and len(handed) == _ROLLOUTS_BEFORE:
                kill(self, "generation")

        run(self, requests, max_response_tokens=max_response_tokens, on_rollout=take)

    def killing_update(self: RemoteEngine, update_info: dict[str, Any]) -> None:
        if due and due[0] == "sync":
            due.popleft()
            threading.Timer(_SYNC_SECONDS, kill, (self, "sync")).start()
        update(self, update_info)

    RemoteEngine.run, RemoteEngine.update_weights = killing_run, killing_update  # type: ignore[method-assign]


def make_base(folder: Path) -> Path:
    """Tokenizer, prompts and a random model, as the demo makes them."""
    sample, tokenizer = str(ROOT / "data_tools/samples/rlla_sft.json"), str(folder / "tokenizer")
    style = ("--prompt-style", "slim", "--max-think-words", "6", "--processes", "1")
    shape = ("--hidden-size", "64", "--layers", "2", "--heads", "2", "--kv-heads", "2", "--ffn-size", "160")
    for arguments in (
        ("data_tools", "train-tokenizer", sample, "--vocab-size", "1001", "--output", tokenizer),
        ("data_tools", "convert", "--input", sample, "--output", str(folder / "train"),
         "--tokenizer", tokenizer, *style),
        ("megatron_rest.trainer.init_model", "--tokenizer", tokenizer, "--output", str(folder / "model"),
         "--max-length", "512", *shape),
    ):  # fmt: skip
        subprocess.run([sys.executable, "-m", *arguments], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return folder


def train(base: Path, run_dir: Path, *overrides: str, ranks: int, replicas: int, kills: int) -> float:
    """One run under torchrun; returns its seconds.  Raises CalledProcessError if it fails."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m",
               "benchmarks.chaos", "--worker", str(kills)]  # fmt: skip
    settings = [
        f"model.path={base / 'model'}",
        f"data.train={base / 'train'}",
        f"trainer.run_dir={run_dir}",
        "model.max_sequence_length=352",
        "data.max_prompt_tokens=256",
        "data.prompts_per_step=6",
        "data.require_reachable=true",
        f"rollout.replicas={replicas}",
        "rollout.rollouts_per_prompt=4",
        "rollout.max_response_tokens=96",
        f"rollout.max_restarts={max(kills, 1)}",
        "weight_sync.transport=gloo",
        f"parallel.tensor_parallel={ranks}",
        "optimizer.lr=1e-3",
        "loss.entropy_coef=0.01",  # gradients also where all siblings of a group fail alike
        "trainer.max_tokens_per_microbatch=1024",
        "trainer.timeout_minutes=5",
        "checkpoint.save_every=0",
        *overrides,
    ]
    started = time.perf_counter()
    subprocess.run([*command, *settings], cwd=ROOT, check=True)
    return time.perf_counter() - started


def steps_of(run_dir: Path) -> list[dict[str, Any]]:
    """Metrics of every step, without those that speak of time or of the engines replaced."""
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    timeless = ("sync/seconds", "rollout/restarts")
    return [{k: v for k, v in line["metrics"].items() if k not in timeless} for line in lines]


def differences(calm: Path, disturbed: Path) -> list[str]:
    """What is not equal between two runs; empty if all is."""
    import torch
    from safetensors.torch import load_file

    found = []
    for step, (a, b) in enumerate(zip(steps_of(calm), steps_of(disturbed), strict=True), start=1):
        found += [f"step {step}: {name} {a[name]!r} != {b.get(name)!r}" for name in a if a[name] != b.get(name)]
    first, second = load_file(calm / "hf" / "model.safetensors"), load_file(disturbed / "hf" / "model.safetensors")
    for name, tensor in first.items():
        if not torch.equal(tensor, second[name]):
            found.append(f"{name} differs by up to {float((tensor - second[name]).abs().max()):.3g}")
    return found


def restarts_of(run_dir: Path) -> int:
    """Engines that were started again in a run."""
    last = (run_dir / "metrics.jsonl").read_text().splitlines()[-1]
    return int(json.loads(last)["metrics"]["rollout/restarts"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10, help="how many times an engine is killed")
    parser.add_argument("--steps", type=int, default=3, help="RL steps of both runs")
    parser.add_argument("--ranks", type=int, default=2, help="training ranks (tensor parallel)")
    parser.add_argument("--replicas", type=int, default=1, help="engine processes")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        base = make_base(Path(folder))
        setting: dict[str, Any] = {"ranks": args.ranks, "replicas": args.replicas}
        steps = f"trainer.steps={args.steps}"
        calm, disturbed = base / "calm", base / "disturbed"
        runs = ((calm, 0), (disturbed, args.kills))
        seconds = [train(base, run_dir, steps, kills=kills, **setting) for run_dir, kills in runs]
        found = differences(calm, disturbed)
        counts = [int(step["rollout/count"]) for step in steps_of(disturbed)]
        print(f"undisturbed {seconds[0]:.0f} s, with {restarts_of(disturbed)} engines replaced {seconds[1]:.0f} s")
        print(f"rollouts of each step: {counts}")
        print("\n".join(found) or "every metric of every step and the final weights are equal, bit for bit")
        return int(bool(found))


def worker(kills: int, settings: list[str]) -> int:
    """A training rank; the one with an engine kills it."""
    from megatron_rest.rollout.process import prepare_process

    prepare_process()
    from megatron_rest.trainer.entry import worker_main
    from megatron_rest.trainer.run import train as run_training

    if kills and os.environ["RANK"] == "0":
        disturb(kills)
    return worker_main(run_training, None, settings)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        sys.exit(worker(int(sys.argv[2]), sys.argv[3:]))
    sys.exit(main())
