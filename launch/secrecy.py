"""Values that must not reach a script, a log or ``run.yaml``: found by the names of the variables that hold them.

A script lies on storage that others read, for as long as the run does.  Slurm passes the environment of the shell on
to the job and Kubernetes keeps Secrets, so a secret needs no place in it.
"""

import os
import re
from collections.abc import Mapping

from launch.recipe import stop

__all__ = ["looks_secret", "refuse_secrets"]

_NAME = re.compile(r"TOKEN(?!IZERS)|SECRET|PASSW|CREDENTIAL|API_?KEY|ACCESS_?KEY|PRIVATE", re.IGNORECASE)
_VALUE = re.compile(r"\b(hf_\w{16,}|sk-[\w-]{16,}|nvapi-[\w-]{16,}|gh[pousr]_\w{16,}|glpat-[\w-]{16,}|AKIA\w{12,})")
"""Keys of Hugging Face, OpenAI and its likes, NVIDIA, GitHub, GitLab and AWS as they look by themselves."""
_ON_SLURM = "(export it in the shell you submit from: Slurm passes it on to the job)"
_SHORTEST = 6  # a shorter value is part of too many words


def looks_secret(name: str) -> bool:
    """Whether a variable of this name holds something to keep."""
    return _NAME.search(name) is not None


def refuse_secrets(
    text: str, where: str, environ: Mapping[str, str] | None = None, *, instead: str = _ON_SLURM
) -> None:
    """End with status 2 if ``text`` holds the value of a secret variable, or something that looks like a key.

    The message names the variable, never the value, and how it reaches the job ``instead``.
    """
    for name, value in (os.environ if environ is None else environ).items():
        if looks_secret(name) and len(value) >= _SHORTEST and value in text:
            stop(f"{where} holds the value of {name}: leave it out {instead}")
    if _VALUE.search(text):
        stop(f"{where} holds what looks like an access key: leave it out {instead}")
