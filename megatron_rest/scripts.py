"""Console scripts, and where the folders ``launch`` and ``data_tools`` are found.

In a checkout they lie beside ``megatron_rest``.  An installed wheel has them in ``megatron_rest/bundled``, out of the
way of other people's packages of these names; the scripts put that folder on the path of this process and its children.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
from pathlib import Path

__all__ = ["TOP", "recipe_file"]

_BUNDLED = Path(__file__).parent / "bundled"

TOP = _BUNDLED if _BUNDLED.is_dir() else Path(__file__).parents[1]
"""The folder that holds ``launch`` and ``data_tools``."""


def recipe_file(given: str) -> Path | None:
    """The launch file meant by a path, or by the name of one that came with the installation (``rest_70b``,
    ``launch/rest_70b.py``); None if there is no such file."""
    path = Path(given)
    if path.is_file():
        return path
    if str(path.parent) not in (".", "launch") or not re.fullmatch(r"rest_\w+(\.py)?", path.name):
        return None
    installed = TOP / "launch" / f"{path.stem}.py"
    return installed if installed.is_file() else None


def nemo_run() -> None:
    """``nemo-run``"""
    _reach_bundled()
    importlib.import_module("launch.cli").main()


def data_tools() -> int:
    """``megatron-rest-data``"""
    _reach_bundled()
    return int(importlib.import_module("data_tools.cli").main() or 0)


def main() -> int:
    """``megatron-rest``"""
    _reach_bundled()
    return importlib.import_module("megatron_rest.cli").main()


def _reach_bundled() -> None:
    if TOP != _BUNDLED:
        return  # a checkout: an editable installation knows them
    sys.path.insert(0, str(TOP))
    others = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = f"{TOP}{os.pathsep}{others}" if others else str(TOP)
