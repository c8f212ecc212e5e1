"""The wheel and the source archive: what is in them, and that the wheel's commands work where there is no checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TREE = ("megatron_rest", "launch", "data_tools", "tests", "docs", "examples", "benchmarks", "requirements")
FILES = ("setup.py", "setup.cfg", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "Makefile")


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Wheel and source archive of a copy of this tree, by the build back end itself."""
    tree = tmp_path_factory.mktemp("tree")
    for name in TREE:
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in FILES:
        shutil.copy(ROOT / name, tree)
    build = "from setuptools import build_meta as b; print(b.build_{}('out'))"
    for kind in ("sdist", "wheel"):
        subprocess.run(
            [sys.executable, "-c", build.format(kind)], cwd=tree, check=True, capture_output=True, timeout=120
        )
    return {"wheel": next((tree / "out").glob("*.whl")), "sdist": next((tree / "out").glob("*.tar.gz"))}


def test_the_wheel_takes_one_name_and_the_source_archive_has_everything(archives: dict[str, Path]) -> None:
    names = zipfile.ZipFile(archives["wheel"]).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"megatron_rest"}
    for needed in (
        "megatron_rest/py.typed",
        "megatron_rest/bundled/launch/rest_70b.py",
        "megatron_rest/bundled/launch/image/Dockerfile",
        "megatron_rest/bundled/data_tools/samples/rlla_sft.json",
    ):
        assert needed in names, needed
    assert len(names) == len(set(names)) and not [n for n in names if n.startswith("megatron_rest/launch")]
    with tarfile.open(archives["sdist"]) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    for needed in (
        "setup.py",
        "launch/cli.py",
        "data_tools/cli.py",
        "tests/conftest.py",
        "docs/data.md",
        "examples/ops_only.py",
    ):
        assert needed in inside, needed


@pytest.fixture(scope="module")
def installed(archives: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel; the packages that it depends on are this environment's, our checkout is not."""
    folder = tmp_path_factory.mktemp("installed")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True, timeout=120)
    python = folder / "venv/bin/python"
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*pip, archives["wheel"]], check=True, timeout=120)
    [site] = (folder / "venv").glob("lib/python*/site-packages")
    # A line in a .pth file adds the folder, but not what the .pth files in that folder would add: no editable checkout.
    (site / "others.pth").write_text(sysconfig.get_paths()["purelib"])
    return folder


def call(installed: Path, *words: str) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")} | {"COLUMNS": "120"}
    command, *arguments = words
    return subprocess.run(
        [installed / "venv/bin" / command, *arguments],
        cwd=installed, env=env, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip


@pytest.mark.slow
def test_an_installed_wheel_converts_plans_and_starts_recipes_by_name(installed: Path) -> None:
    where = call(installed, "python", "-c", "import megatron_rest; print(megatron_rest.__file__)").stdout
    assert str(installed) in where, "not the checkout"
    hidden = call(installed, "python", "-c", "import launch")
    assert "No module named 'launch'" in hidden.stderr, "nobody else's launch is hidden"
    assert "convert" in call(installed, "megatron-rest-data", "--help").stdout
    plan = call(installed, "megatron-rest", "plan", "rest_70b")
    assert plan.returncode == 0 and "fits:" in plan.stdout, plan.stderr
    dry = call(
        installed, "nemo-run", "rest_70b", "--dryrun", "model.path=/models/m", "data.train=/data/d",
        "run.executor.account=a", "run.executor.partition=p",
    )  # fmt: skip
    assert dry.returncode == 0, dry.stdout[-3000:] + dry.stderr[-3000:]
    assert "torchrun" in dry.stdout or "srun" in dry.stdout
    unknown = call(installed, "nemo-run", "launch/rest_7b.py")
    assert unknown.returncode == 2 and "no launch file" in unknown.stderr
