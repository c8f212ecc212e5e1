"""Commands are run as a user runs them: in a process, in an empty folder, with NeMo-Run's home in it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    env = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "REST_"))}
    home = tmp_path_factory.mktemp("nemo")
    return env | {"NEMORUN_HOME": str(home), "PYTHONPATH": str(ROOT), "COLUMNS": "100"}
