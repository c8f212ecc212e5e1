"""A run that is small enough to be killed for fun: random model of 0.2 M parameters, the sample data, two ranks.

What ``megatron-rest resume-check`` trains without a configuration of yours, and ``make chaos``.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

__all__ = ["RANKS", "make_base", "tiny_settings"]

RANKS = 2
_SAMPLE = Path("samples") / "rlla_sft.json"


def make_base(folder: Path) -> Path:
    """Tokenizer, prompts and a random model in ``folder``, by the commands of the toy's recipe; about ten seconds."""
    import data_tools

    sample, tokenizer = str(Path(data_tools.__path__[0]) / _SAMPLE), str(folder / "tokenizer")
    style = ("--prompt-style", "slim", "--max-think-words", "6", "--processes", "1")
    shape = ("--hidden-size", "64", "--layers", "2", "--heads", "2", "--kv-heads", "2", "--ffn-size", "160")
    for arguments in (
        ("data_tools", "train-tokenizer", sample, "--vocab-size", "1001", "--output", tokenizer),
        ("data_tools", "convert", "--input", sample, "--output", str(folder / "train"),
         "--tokenizer", tokenizer, *style),
        ("megatron_rest.commands.init_model", "--tokenizer", tokenizer, "--output", str(folder / "model"),
         "--max-length", "512", *shape),
    ):  # fmt: skip
        run_command(*arguments)
    return folder


def run_command(module: str, *arguments: str) -> None:
    """``python -m module arguments``; raises CalledProcessError if it fails."""
    subprocess.run([sys.executable, "-m", module, *arguments], check=True, stdout=subprocess.DEVNULL)


def tiny_settings(base: Path) -> list[str]:
    """Overrides for :data:`RANKS` ranks (TP 2) and one engine process."""
    return [
        f"model.path={base / 'model'}",
        f"data.train={base / 'train'}",
        "model.max_sequence_length=352",
        "data.max_prompt_tokens=256",
        "data.prompts_per_step=6",
        "data.require_reachable=true",
        "rollout.replicas=1",
        "rollout.rollouts_per_prompt=4",
        "rollout.max_response_tokens=96",
        "weight_sync.transport=gloo",
        f"parallel.tensor_parallel={RANKS}",
        "optimizer.lr=1e-3",
        "loss.entropy_coef=0.01",  # gradients also where all siblings of a group fail alike
        "trainer.max_tokens_per_microbatch=1024",
        "trainer.timeout_minutes=5",
    ]
