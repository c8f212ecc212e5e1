"""``megatron-rest`` and its doctor."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_rest import cli, doctor

from .conftest import ROOT


def test_every_command_listed_exists(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    for name, (module, _) in cli.commands().items():
        assert f"  {name} " in text
        assert (ROOT / (module.replace(".", "/") + ".py")).is_file()
    assert {"doctor", "train", "report", "compare"} <= cli.commands().keys()


def test_help_imports_no_command() -> None:
    code = "import sys; from megatron_rest.cli import main; main(['--help']); assert not {'torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL, timeout=60)


def test_an_unknown_command_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["reprot"]) == 2
    assert "did you mean report?" in capsys.readouterr().err


def test_this_environment_is_healthy() -> None:
    findings = {finding.name: finding for finding in doctor.examine(imports=False)}
    assert not [finding for finding in findings.values() if finding.state == doctor.BROKEN]
    assert "2.13.0" in findings["torch"].detail


def environment_with(folder: Path, *distributions: tuple[str, str], modules: tuple[str, ...] = ()) -> dict[str, str]:
    """Findings of a process that also sees these distributions and (empty) modules."""
    for name, version in distributions:
        info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    for name in modules:
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text("")
    done = subprocess.run(
        [sys.executable, "-m", "megatron_rest.doctor", "--fast", "--json"],
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": f"{folder}:{ROOT}"}, capture_output=True, text=True, check=False,
        timeout=60,
    )  # fmt: skip
    findings = {f["name"]: f for f in json.loads(done.stdout)}
    broken = [name for name, finding in findings.items() if finding["state"] == "broken"]
    assert done.returncode == bool(broken)
    return {name: findings[name]["detail"] + " -> " + findings[name]["mend"] for name in broken}


@pytest.mark.parametrize(
    ("distributions", "modules", "name", "mend"),
    [
        ((("apex", "0.9.10.dev0"),), ("apex",), "Apex", "not NVIDIA Apex"),
        ((("vllm", "0.32.0"),), (), "vLLM", "one of them"),
        ((("torchvision", "0.28.0"),), (), "torchvision etc.", "pip uninstall torchvision"),
    ],
)
def test_known_traps_are_found(
    distributions: tuple[tuple[str, str], ...], modules: tuple[str, ...], name: str, mend: str, tmp_path: Path
) -> None:
    broken = environment_with(tmp_path, *distributions, modules=modules)
    assert list(broken) == [name]
    assert mend in broken[name]


def test_a_package_that_does_not_import_is_broken_and_its_error_shown(tmp_path: Path) -> None:
    worked, text = doctor._try("raise RuntimeError('cudnn shared object not found')")
    assert not worked
    finding = doctor._megatron({"megatron": (worked, text)})
    assert finding.state == doctor.BROKEN
    assert "cudnn shared object not found" in finding.detail
    assert "pip uninstall transformer-engine" in finding.mend
