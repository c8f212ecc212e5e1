"""Commands are run as a user runs them: in a process, in an empty folder, with NeMo-Run's home in it."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from .forked import Server

ROOT = Path(__file__).resolve().parents[2]


def load_script(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A script of requirements/, which is no package."""
    monkeypatch.syspath_prepend(str(ROOT / "requirements"))
    spec = importlib.util.spec_from_file_location(name, ROOT / f"requirements/{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    env = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "REST_"))}
    home = tmp_path_factory.mktemp("nemo")
    return env | {"NEMORUN_HOME": str(home), "PYTHONPATH": str(ROOT), "COLUMNS": "100"}


@pytest.fixture(scope="session")
def server(environment: dict[str, str]) -> Iterator[Server]:
    """Where ``nemo-run`` commands are forked from."""
    one = Server(environment)
    yield one
    one.close()
