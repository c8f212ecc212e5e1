"""The image for GPUs, which cannot be built here: its pins are checked as CI does, its Dockerfile for what matters.

The package index is scripted; CI asks the real one (requirements/gpu.py).
"""

from __future__ import annotations

import importlib.util
import re
import shlex
from types import ModuleType

import pytest

from .conftest import ROOT

DOCKERFILE = ROOT / "launch/image/Dockerfile"


@pytest.fixture(scope="module")
def gpu() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_pins", ROOT / "requirements/gpu.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def instructions() -> list[tuple[str, str]]:
    text = re.sub(r"\\\n", " ", re.sub(r"^#.*\n", "", DOCKERFILE.read_text(), flags=re.MULTILINE))
    return [tuple(line.split(maxsplit=1)) for line in text.splitlines() if line.strip()]  # type: ignore[misc]


def test_the_image_starts_from_a_named_release_and_installs_what_is_pinned() -> None:
    steps = instructions()
    [base] = [value for name, value in steps if name == "FROM"]
    assert re.fullmatch(r"nvidia/cuda:\d+\.\d+\.\d+-cudnn-devel-ubuntu24\.04(@sha256:[0-9a-f]{64})?", base)
    assert any(name == "SHELL" and "pipefail" in value for name, value in steps)
    for name, value in steps:
        if name == "COPY":
            *sources, _ = shlex.split(value)
            assert all((ROOT / source).is_file() for source in sources), value
        if name == "RUN":
            words = shlex.split(value)
            if "apt-get" in words:
                assert "--no-install-recommends" in words and "rm -rf /var/lib/apt/lists/*" in value
            if "pip" in words:
                assert {"--no-deps", "--require-hashes"} <= set(words), value
            assert not {"sudo", "curl", "wget", "latest"} & set(words)


def test_what_the_image_must_hold_is_pinned_with_hashes(gpu: ModuleType) -> None:
    found = {
        name.lower(): (version, hashes)
        for name, version, hashes in gpu.pins((ROOT / "requirements/gpu.txt").read_text())
    }
    assert all(hashes for _, hashes in found.values())
    versions = {name: found[name][0] for name in ("vllm", "torch", "megatron-core", "transformer-engine-cu13")}
    assert versions["vllm"] == "0.32.0" and versions["torch"].startswith("2.13.") and "psutil" in found
    [(name, version, hashes)] = gpu.pins((ROOT / "requirements/gpu-source.txt").read_text())
    assert (name, version) == ("transformer-engine-torch", versions["transformer-engine-cu13"]) and hashes


def test_a_pin_that_cannot_be_installed_is_named(gpu: ModuleType) -> None:
    here = {"a_b-1.0-cp312-cp312-manylinux_2_28_x86_64.whl": "f" * 64, "a_b-1.0.tar.gz": "e" * 64}
    fine = ("a-b", "1.0", {"f" * 64})
    assert gpu.problem(fine, source=False, files=here) == ""
    assert gpu.problem(("a-b", "1.0", {"e" * 64}), source=True, files=here) == ""
    assert "no wheel for the image" in gpu.problem(("a-b", "1.1", {"f" * 64}), source=False, files=here)
    assert "none of its hashes" in gpu.problem(("a-b", "1.0", {"0" * 64}), source=False, files=here)
    assert "has no hash" in gpu.problem(("a-b", "1.0", set()), source=False, files=here)


@pytest.mark.parametrize(
    ("wheel", "expected"),
    [
        ("x-1-py3-none-any.whl", True),
        ("x-1-py37-none-any.whl", True),
        ("x-1-cp38-abi3-manylinux_2_28_x86_64.whl", True),
        ("x-1-cp312-cp312-manylinux_2_17_x86_64.manylinux2014_x86_64.whl", True),
        ("x-1-cp311-cp311-manylinux_2_28_x86_64.whl", False),
        ("x-1-cp312-cp312-manylinux_2_28_aarch64.whl", False),
        ("x-1-cp312-cp312-manylinux_2_40_x86_64.whl", False),
        ("x-1-cp313-abi3-manylinux_2_28_x86_64.whl", False),
        ("x-1-py2-none-any.whl", False),
    ],
)
def test_wheels_are_those_of_the_images_python(gpu: ModuleType, wheel: str, expected: bool) -> None:
    assert gpu.fits(wheel) is expected


def test_an_index_that_does_not_answer_is_not_a_success(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setattr("sys.argv", ["gpu.py"])
    assert gpu.main() == 3
