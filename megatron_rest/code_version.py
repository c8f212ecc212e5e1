"""Which code runs or is shipped: the commit, and a digest of what differs from it."""

import hashlib
import os
import subprocess
from pathlib import Path

__all__ = ["code_version", "running_code"]


def running_code() -> str:
    """As the job that shipped it says, else :func:`code_version` of the checkout that this file is in."""
    return os.environ.get("REST_CODE") or code_version(Path(__file__).resolve().parents[1])


def code_version(root: Path) -> str:
    """``commit`` or ``commit+digest`` if tracked files differ from it; ``unknown`` outside a git checkout."""
    commit = _git(root, "rev-parse", "--short=12", "HEAD")
    if commit is None:
        return "unknown (not a git checkout)"
    changes = _git(root, "diff", "HEAD")
    return commit.strip() + (f"+{hashlib.sha256(changes.encode()).hexdigest()[:8]}" if changes else "")


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout
