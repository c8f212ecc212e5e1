"""What a node of a cluster has: the code as a job ships it, and an environment in which this project is not installed.

The environment holds every package of the running one, by links, but this project's own metadata and import hook:
whatever is found through them here would not be found there.
"""

from __future__ import annotations

import os
import subprocess
import sysconfig
import tarfile
import venv
from pathlib import Path

from launch.shipping import CodePackager, user_packages
from megatron_rest.config import RestConfig

__all__ = ["bare_python", "ship"]

_OURS = ("megatron_rest", "__editable__.megatron_rest", "__editable___megatron_rest")


def bare_python(folder: Path) -> Path:
    """An interpreter in ``folder`` that has all packages of this one except this project."""
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    theirs = Path(sysconfig.get_paths()["purelib"])
    mine = folder / "lib" / f"python{sysconfig.get_python_version()}" / "site-packages"
    for path in theirs.iterdir():
        if not path.name.startswith(_OURS) and not (mine / path.name).exists():
            (mine / path.name).symlink_to(path)
    seen = "import importlib.metadata as m, importlib.util as u; print(u.find_spec('megatron_rest'), "
    seen += "[d.name for d in m.distributions() if 'megatron_rest' in d.name.replace('-', '_')])"
    bare = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    told = subprocess.run([python, "-c", seen], cwd=folder, capture_output=True, text=True, check=True, env=bare)
    assert told.stdout.split() == ["None", "[]"], f"this project is still visible: {told.stdout}"
    return python


def ship(folder: Path, config: RestConfig) -> Path:
    """The code as a Slurm job finds it: packed by the recipes' own packager, unpacked in ``folder``."""
    packager = CodePackager()
    packager.tops += map(str, user_packages(config))
    with tarfile.open(packager.package(folder, str(folder), "code")) as tar:
        tar.extractall(folder / "code", filter="data")
    return folder / "code"
