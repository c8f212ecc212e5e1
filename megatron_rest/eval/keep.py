"""What the tables need of a judged run, in a folder small enough for a repository: no weights, no texts.

    python -m megatron_rest.eval.keep RUN_DIR FOLDER [--unjudged] [--remove-checkpoints]

Copies ``config.yaml`` (or a warm start's ``run.yaml``), ``metrics.jsonl``, the scores of ``prompt_sets.json`` by prompt
without prompts and answers, and, where they were measured, ``benchmarks.json`` and ``variance.json``; ``kept.json``
says which weights they belong to and has the digest of each file.  Paths below the working directory are written as
seen from it, so that nothing tells whose machine it was.  ``megatron_rest.eval.experiment`` reads such folders like
those of runs.  A run that is kept is never continued, so ``--remove-checkpoints`` takes away what it would continue
from, which is most of what an experiment of many runs has on the disk; its last weights stay.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_rest.analysis.evidence import EVIDENCE_FILE
from megatron_rest.eval.benchmark_scores import BENCHMARKS_FILE
from megatron_rest.eval.scoring import write_json, write_text

__all__ = ["keep", "main", "remove_checkpoints"]

_SCORES = "prompt_sets.json"
_FILES = (("config.yaml", "run.yaml"), ("metrics.jsonl",), (BENCHMARKS_FILE,), (EVIDENCE_FILE,))
_TEXTS = ("prompt", "answer", "first_answer_regions")


def keep(run_dir: Path, folder: Path, *, is_judged: bool = True) -> list[Path]:
    """Write ``folder``, whole or not at all; returns its files.

    Raises FileNotFoundError if the run was not judged though it should be, FileExistsError if ``folder`` is there.
    """
    if folder.exists():
        raise FileExistsError(f"{folder} is there: take it away if it is to be made anew")
    scores = _scores(run_dir) if is_judged else None
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".keep-") as name:
        partial = Path(name) / folder.name
        partial.mkdir()
        for names in _FILES:
            found = next((run_dir / n for n in names if (run_dir / n).is_file()), None)
            if found is not None:  # a warm start has no metrics.jsonl, and not every run is asked and measured
                text = found.read_text(encoding="utf-8").replace(f"{Path.cwd()}{os.sep}", "")
                write_text(partial / names[0], text)
        of_weights = {}
        if scores is not None:
            write_json(partial / _SCORES, scores)
            of_weights = {"weights_sha256": scores["settings"]["weights_sha256"]}
        digests = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(partial.iterdir())}
        write_json(partial / "kept.json", {**of_weights, "files": digests})
        os.rename(partial, folder)
    return sorted(folder.iterdir())


def remove_checkpoints(run_dir: Path) -> int:
    """Take a finished run's checkpoints and the folders made of them away, not ``hf``; returns how many bytes went."""
    gone = 0
    for folder in (run_dir / "checkpoints", *run_dir.glob("hf_step_*")):
        if folder.is_dir():
            gone += sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
            shutil.rmtree(folder)
    return gone


def _scores(run_dir: Path) -> dict[str, Any]:
    scores: dict[str, Any] = json.loads((run_dir / _SCORES).read_text(encoding="utf-8"))
    for rows in scores["sets"].values():
        for row in rows:
            for name in _TEXTS:
                row.pop(name, None)
    return scores


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0, or 2 with one line that says what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", type=Path, help="a finished run that eval.prompt_sets has judged, or a warm start")
    parser.add_argument("folder", type=Path, help="where its small files go")
    parser.add_argument("--unjudged", action="store_true", help="training alone says what is wanted of this run")
    parser.add_argument("--remove-checkpoints", action="store_true", help="of RUN_DIR, once the small files are safe")
    args = parser.parse_args(argv)
    try:
        files = keep(args.run_dir, args.folder, is_judged=not args.unjudged)
        gone = remove_checkpoints(args.run_dir) if args.remove_checkpoints else 0
    except OSError as error:
        print(f"megatron_rest.eval.keep: {error}", file=sys.stderr)
        return 2
    print(f"{args.folder}: {len(files)} files, {sum(p.stat().st_size for p in files) / 1024:.0f} KiB")
    if gone:
        print(f"{args.run_dir}: checkpoints taken away, {gone / 1e9:.1f} GB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
