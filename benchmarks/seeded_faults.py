"""Does ``make test`` notice?  Breaks the code in one place at a time and runs the tests that should see it.

    python -m benchmarks.seeded_faults             # all, 30 minutes on two cores (make faults)
    python -m benchmarks.seeded_faults 3 17        # these
    python -m benchmarks.seeded_faults --list

Every fault is planted in a copy of the checkout; a fault is noticed if a test of ``make test``'s tier fails, within the
files named beside it (a failure there is a failure of the whole).  Status 1 if one is missed.  A place that has changed
since is an error, not a pass: give the fault its new place.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COPIED = ("megatron_rest", "launch", "data_tools", "tests", "benchmarks", "examples", "setup.cfg", "README.md", "docs")
_MOST_SECONDS = 1200


@dataclass(frozen=True)
class Fault:
    """``old`` stands exactly once in ``file`` and is replaced by ``new``; ``tests`` should see it."""

    what: str
    file: str
    old: str
    new: str
    tests: str


FAULTS = (
    Fault(
        "sign of the policy loss",
        "megatron_rest/algorithms/ratio_losses.py",
        "unclipped = -advantages * ratio",
        "unclipped = advantages * ratio",
        "tests/algorithms",
    ),
    Fault(
        "clip range: high and low swapped",
        "megatron_rest/algorithms/ratio_losses.py",
        "ratio.clamp(1.0 - config.clip_low, 1.0 + config.clip_high)",
        "ratio.clamp(1.0 - config.clip_high, 1.0 + config.clip_low)",
        "tests/algorithms",
    ),
    Fault(
        "entropy mask keeps the calm tokens",
        "megatron_rest/weighting/entropy_mask.py",
        "(rows.entropy >= threshold)",
        "(rows.entropy <= threshold)",
        "tests/weighting",
    ),
    Fault(
        "standard deviation left out of the advantage",
        "megatron_rest/algorithms/advantages.py",
        "return centred / (values.std(-1, keepdim=True) + epsilon)",
        "return centred",
        "tests/algorithms",
    ),
    Fault(
        "vocabulary shard begins one too late",
        "megatron_rest/ops/sharding.py",
        "start = rank * local_size",
        "start = rank * local_size + 1",
        "tests/ops/test_vocab_parallel.py",
    ),
    Fault(
        "entropy gradient without its sign",
        "megatron_rest/ops/row_statistics.py",
        "-(g + h * (entropy - log_sum)) * scale",
        "-(g - h * (entropy - log_sum)) * scale",
        "tests/ops",
    ),
    Fault(
        "temperature not applied in the fused head",
        "megatron_rest/mcore/head.py",
        '"temperature": self.temperature,',
        '"temperature": 1.0,',
        "tests/mcore/test_head.py tests/mcore/test_policy.py",
    ),
    Fault(
        "temperature not applied to the logits",
        "megatron_rest/mcore/head.py",
        "temperature=self.temperature,",
        "temperature=1.0,",
        "tests/mcore/test_head.py tests/mcore/test_policy.py",
    ),
    Fault(
        "labels not shifted",
        "megatron_rest/data/batching.py",
        'columns["labels"][here] = sample.token_ids[there]',
        'columns["labels"][here] = sample.token_ids[start:end]',
        "tests/data",
    ),
    Fault(
        "prompt tokens take part in the loss",
        "megatron_rest/data/batching.py",
        'columns["loss_mask"][here] = sample.loss_mask[there]',
        'columns["loss_mask"][here] = True',
        "tests/data",
    ),
    Fault(
        "answers do not see the prompt that they share",
        "megatron_rest/mcore/segments.py",
        "while parent >= 0:",
        "while False:",
        "tests/mcore/test_shared_prompts.py",
    ),
    Fault(
        "samples that were left out are not in the denominator",
        "megatron_rest/mcore/step_loss.py",
        "num_tokens = out.num_tokens + self.tokens.left_out_tokens",
        "num_tokens = out.num_tokens",
        "tests/trainer/test_updates.py",
    ),
    Fault(
        "token weights not normalised per sequence",
        "megatron_rest/weighting/rest.py",
        "return (raw * scale[sequence]).float()",
        "return raw.float()",
        "tests/weighting",
    ),
    Fault(
        "curriculum runs backwards",
        "megatron_rest/weighting/rest.py",
        "-self.config.alpha_format * progress",
        "self.config.alpha_format * progress",
        "tests/weighting",
    ),
    Fault(
        "closing tag counted into the thought",
        "megatron_rest/regions/dialect.py",
        "yield Segment(close, position, TokenRegion.FORMAT, is_tag=True)",
        "yield Segment(close, position, opened.region or TokenRegion.FORMAT, is_tag=True)",
        "tests/regions",
    ),
    Fault(
        "wrong format earns the pass",
        "megatron_rest/rewards/tool_call.py",
        "ranges.format_pass if judgement.is_format_valid else ranges.format_fail",
        "ranges.format_pass",
        "tests/rewards",
    ),
    Fault(
        "no stop id reaches the engine",
        "megatron_rest/rollout/vllm_engine.py",
        "self._stop_token_ids = [int(i) for i in stop_token_ids]",
        "self._stop_token_ids: list[int] = []",
        "tests/rollout/test_vllm_engine.py",
    ),
    Fault(
        "digest forgets the order of words",
        "megatron_rest/weight_sync/digest.py",
        "2 * torch.arange(count, dtype=torch.int64, device=device) + 1",
        "0 * torch.arange(count, dtype=torch.int64, device=device) + 1",
        "tests/weight_sync/test_digest.py",
    ),
    Fault(
        "a slice of the weights at the wrong offset",
        "megatron_rest/weight_sync/plan.py",
        "_shifted(wanted.start, begin, wanted.hf_start)",
        "_shifted(wanted.start, wanted.hf_start, wanted.hf_start)",
        "tests/weight_sync/test_plan.py tests/weight_sync/test_slices.py",
    ),
    Fault(
        "prefix cache kept over an update",
        "megatron_rest/weight_sync/sync.py",
        "done = self._engine is None or self._engine.reset_prefix_cache()",
        "done = True",
        "tests/weight_sync/test_sync.py",
    ),
    Fault(
        "context-parallel chunks dealt one after the other",
        "megatron_rest/mcore/context_parallel.py",
        "owner = torch.minimum(chunk, 2 * cp_size - 1 - chunk)",
        "owner = chunk // 2",
        "tests/mcore/test_context_parallel.py",
    ),
    Fault(
        "damaged checkpoint taken for whole",
        "megatron_rest/mcore/checkpoint_files.py",
        "if file_sum(path / name) != expected:",
        "if not file_sum(path / name):",
        "tests/mcore/test_checkpoint_files.py tests/mcore/test_checkpoint.py",
    ),
    Fault(
        "data order not resumed",
        "megatron_rest/data/prompts.py",
        "start = (step - 1) * prompts_per_step",
        "start = 0 * prompts_per_step",
        "tests/data",
    ),
    Fault(
        "importance correction not capped",
        "megatron_rest/algorithms/importance.py",
        ".clamp(max=config.tis_cap)",
        ".clamp(max=torch.inf)",
        "tests/algorithms",
    ),
    Fault(
        "canary always holds",
        "megatron_rest/trainer/canary.py",
        "if song.middle > self.tolerance and not self._is_known(version, song):",
        "if song.middle < 0:",
        "tests/trainer/test_canary.py",
    ),
    Fault(
        "learning rate does not decay",
        "megatron_rest/mcore/build.py",
        "lr_decay_style=optimizer.decay,",
        'lr_decay_style="constant",',
        "tests/mcore/test_schedule.py",
    ),
)


def plant(fault: Fault, folder: Path) -> None:
    """Raises ValueError when the place is not there, or not once."""
    path = folder / fault.file
    text = path.read_text(encoding="utf-8")
    if text.count(fault.old) != 1:
        raise ValueError(f"{fault.what}: {fault.old!r} stands {text.count(fault.old)} times in {fault.file}, not once")
    path.write_text(text.replace(fault.old, fault.new), encoding="utf-8")


def copy_checkout(folder: Path) -> None:
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder / name)


def is_noticed(fault: Fault) -> tuple[bool, str]:
    """Whether a test fails, and the last line that pytest printed.  Raises RuntimeError if pytest did not run."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        copy_checkout(folder)
        plant(fault, folder)
        command = [sys.executable, "-m", "pytest", "-x", "-m", "not extended", "-p", "no:cacheprovider"]
        done = subprocess.run(
            [*command, *fault.tests.split()], cwd=folder, capture_output=True, text=True, timeout=_MOST_SECONDS,
            check=False,
        )  # fmt: skip
    lines = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    said = (lines or done.stdout.splitlines()[-1:] or [""])[0]
    if done.returncode not in (0, 1) or said.startswith("ERROR"):
        raise RuntimeError(f"{fault.what}: pytest did not run (status {done.returncode}):\n{done.stdout[-3000:]}")
    return done.returncode == 1, said


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("numbers", nargs="*", type=int, help="which faults (default: all)")
    parser.add_argument("--list", action="store_true", help="print them and end")
    arguments = parser.parse_args(argv)
    if wrong := [n for n in arguments.numbers if not 1 <= n <= len(FAULTS)]:
        parser.error(f"there is no fault {wrong[0]}: they are 1 to {len(FAULTS)}")
    missed = 0
    for number in arguments.numbers or range(1, len(FAULTS) + 1):
        fault = FAULTS[number - 1]
        if arguments.list:
            print(f"{number:3} {fault.what:50} {fault.file}")
            continue
        started = time.monotonic()
        noticed, said = is_noticed(fault)
        missed += not noticed
        verdict = "noticed" if noticed else "MISSED "
        print(f"{number:3} {verdict} {time.monotonic() - started:4.0f} s  {fault.what}: {said}", flush=True)
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
