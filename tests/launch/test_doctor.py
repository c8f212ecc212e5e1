"""``megatron-rest`` and its doctor."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_rest import cli, doctor, doctor_device

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
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL, timeout=300)


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
        (folder / name).mkdir(exist_ok=True)
        (folder / name / "__init__.py").write_text("")
    done = subprocess.run(
        [sys.executable, "-m", "megatron_rest.doctor", "--fast", "--json"],
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": f"{folder}:{ROOT}"}, capture_output=True, text=True, check=False,
        timeout=300,
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
        ((("torch", "2.13.0+cpu"), ("torchvision", "0.28.0")), (), "torchvision etc.", "pip uninstall torchvision"),
        ((("transformer-engine", "2.20.2"),), (), "Transformer Engine", "this package alone cannot be imported"),
        (
            (("transformer-engine", "2.20.2"), ("transformer-engine-cu13", "2.19.0")),
            (),
            "Transformer Engine",
            "its parts must have one version",
        ),
        ((), ("apex", "apex/normalization"), "Apex", "build it with its CUDA extensions"),
    ],
)
def test_known_traps_are_found(
    distributions: tuple[tuple[str, str], ...], modules: tuple[str, ...], name: str, mend: str, tmp_path: Path
) -> None:
    broken = environment_with(tmp_path, *distributions, modules=modules)
    assert list(broken) == [name]
    assert mend in broken[name]


def test_nvidia_apex_with_its_kernels_is_accepted(tmp_path: Path) -> None:
    assert environment_with(tmp_path, modules=("apex", "apex/normalization", "amp_C", "fused_layer_norm_cuda")) == {}


def test_an_empty_transformer_engine_takes_the_real_megatron_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Megatron guards its import against ImportError only, and Transformer Engine raises RuntimeError."""
    (tmp_path / "transformer_engine").mkdir()
    message = "Found empty `transformer-engine` meta package installed"
    (tmp_path / "transformer_engine" / "__init__.py").write_text(f"raise RuntimeError({message!r})\n")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    results = {key: doctor._try(doctor._PROBES[key]) for key in ("megatron", "precision")}
    megatron = doctor._megatron(results)
    assert megatron.state == doctor.BROKEN
    assert message in megatron.detail
    assert "pip uninstall transformer-engine" in megatron.mend
    recipes = doctor_device.recipes(doctor._json(results, "precision"))
    assert {finding.state for finding in recipes} == {doctor.OFF}
    assert all(f"does not import ({message})" in finding.detail for finding in recipes)


@pytest.mark.slow
def test_what_the_trainer_finds_is_what_is_printed() -> None:
    """The probes' own words, from real processes of this environment."""
    results = {key: doctor._try(doctor._PROBES[key]) for key in ("torch", "megatron", "precision")}
    assert all(worked for worked, _ in results.values()), results
    found = [
        *doctor_device.accelerations(doctor._json(results, "megatron")),
        *doctor_device.recipes(doctor._json(results, "precision")),
        *doctor_device.transports(doctor._json(results, "torch")),
    ]
    by_name = {finding.name: finding for finding in found}
    assert {"fused Adam", "fused layers and norms", "fused weight gradients", "NCCL"} <= by_name.keys()
    assert {f"FP8 {recipe}" for recipe in ("delayed", "tensorwise", "blockwise", "mxfp8")} <= by_name.keys()
    assert all(finding.mend for finding in found if finding.state != doctor.OK)
    assert by_name["weight transfer gloo"].state == by_name["weight transfer local"].state == doctor.OK
    assert "megatron-core 0.16.1" in doctor._megatron(results).detail
    torch = doctor._json(results, "torch")
    assert torch is not None
    if not torch["gpus"]:  # whichever build it is
        assert by_name["fused Adam"].detail == "torch AdamW"
        gpu_only = [n for n in by_name if n.startswith(("fused", "FP8", "NCCL"))] + ["weight transfer nccl"]
        assert {by_name[name].state for name in gpu_only} == {doctor.OFF}


H100 = {"transformer_engine": "2.20.2", "transformer_engine_fault": "", "gpu": "H100", "cuda": "13.0"}


def test_recipes_of_other_machines() -> None:
    def states(capability: list[int], **changes: str) -> dict[str, str]:
        found = doctor_device.recipes({**H100, "capability": capability, **changes})
        return {finding.name.removeprefix("FP8 "): finding.state for finding in found}

    ok, off = doctor.OK, doctor.OFF
    assert states([9, 0]) == {"delayed": ok, "tensorwise": ok, "blockwise": ok, "mxfp8": off}
    assert states([10, 0]) == dict.fromkeys(("delayed", "tensorwise", "blockwise", "mxfp8"), ok)
    assert states([9, 0], cuda="12.8")["blockwise"] == off
    assert set(states([9, 0], transformer_engine="").values()) == {off}
    assert doctor_device.recipes(None) == []


def test_transports_of_other_machines() -> None:
    from megatron_rest.config import TRANSPORTS

    def states(**found: object) -> dict[str, str]:
        findings = doctor_device.transports({**found, "transports": TRANSPORTS})
        assert [f.name for f in findings[: len(TRANSPORTS)]] == [f"weight transfer {name}" for name in TRANSPORTS]
        return {finding.name.removeprefix("weight transfer "): finding.state for finding in findings}

    ok, off = doctor.OK, doctor.OFF
    gpus = states(gloo=True, nccl=True, gpus=["H100"] * 8)
    assert (gpus["NCCL"], gpus["nccl"], gpus["gloo"], gpus["local"]) == (ok, ok, ok, ok)
    cpu = states(gloo=True, nccl=True, gpus=[])
    assert (cpu["NCCL"], cpu["nccl"], cpu["gloo"], cpu["local"]) == (off, off, ok, ok)
    bare = states(gloo=False, nccl=False, gpus=[])
    assert (bare["gloo"], bare["local"]) == (off, ok)


def test_megatron_without_psutil_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"megatron-core": "0.16.1", "psutil": ""}
    monkeypatch.setattr(doctor, "_version", lambda dist: versions.get(dist, ""))
    finding = doctor._checkpoint_writer()
    assert (finding.state, finding.mend) == (doctor.BROKEN, "pip install psutil")
    versions["megatron-core"] = ""
    assert doctor._checkpoint_writer().state == doctor.OK


def test_newer_megatron_without_triton_says_so() -> None:
    finding = doctor._megatron({"megatron": (False, "ModuleNotFoundError: No module named 'triton'")})
    assert finding.state == doctor.BROKEN
    assert "pip install triton" in finding.mend


def test_a_package_that_does_not_import_is_broken_and_its_error_shown(tmp_path: Path) -> None:
    worked, text = doctor._try("raise RuntimeError('cudnn shared object not found')")
    assert not worked
    finding = doctor._megatron({"megatron": (worked, text)})
    assert finding.state == doctor.BROKEN
    assert "cudnn shared object not found" in finding.detail
    assert "pip uninstall transformer-engine" in finding.mend


@pytest.mark.parametrize(
    ("version", "cuda", "gpus", "said"),
    [
        ("2.13.0+cpu", None, [], "torch 2.13.0+cpu | CPU build | no GPU"),
        ("2.13.0", "13.0", [], "torch 2.13.0 | built for CUDA 13.0 | no GPU, so it computes on the CPU"),
        ("2.13.0", "13.0", ["H100"], "torch 2.13.0 | built for CUDA 13.0 | H100"),
    ],
)
def test_the_build_of_torch_is_said(
    version: str, cuda: str | None, gpus: list[str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "_version", lambda dist: version)
    finding = doctor._torch({"torch": (True, json.dumps({"cuda": cuda, "gpus": gpus}))})
    assert finding.state == doctor.OK
    assert said in finding.detail
