"""The image for GPUs, which cannot be built here: its pins are checked as CI does, its Dockerfile for what matters.

The package index is scripted; CI asks the real one (requirements/resolve.py), and hadolint.
"""

from __future__ import annotations

import re
import shlex
from types import ModuleType

import pytest

from .conftest import ROOT, load_script

DOCKERFILE = ROOT / "launch/image/Dockerfile"


@pytest.fixture
def resolve(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load_script("resolve", monkeypatch)


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


def test_what_the_image_must_hold_is_pinned_with_hashes(resolve: ModuleType) -> None:
    folder = ROOT / "requirements"
    found = {pin.name.lower(): pin for pin in resolve.read(folder / "gpu.txt")}
    assert all(pin.hashes for pin in found.values())
    versions = {name: found[name].version for name in ("vllm", "torch", "megatron-core", "transformer-engine-cu13")}
    assert versions["vllm"] == "0.32.0" and versions["torch"].startswith("2.13.") and "psutil" in found
    [built] = resolve.read(folder / "gpu-source.txt")
    assert (built.name, built.version) == ("transformer-engine-torch", versions["transformer-engine-cu13"])
    assert built.hashes
    wanted = re.findall(r"^([\w.-]+)==(\S+)", (folder / "gpu.in").read_text(), flags=re.MULTILINE)
    assert len(wanted) > 3
    assert {name: found[name].version for name, _ in wanted} == dict(wanted), "gpu.txt is gpu.in, resolved"


def file(name: str) -> dict[str, object]:
    return {"filename": name, "hashes": {"sha256": "f" * 64}, "size": 10}


@pytest.mark.parametrize(
    ("path", "name", "wrong"),
    [
        ("gpu.txt", "a_b-1.0-py3-none-any.whl", ""),
        ("gpu.txt", "a_b-1.0-py37-none-any.whl", ""),
        ("gpu.txt", "a_b-1.0-cp38-abi3-manylinux_2_28_x86_64.whl", ""),
        ("gpu.txt", "a_b-1.0-cp312-cp312-manylinux_2_17_x86_64.manylinux2014_x86_64.whl", ""),
        ("gpu.txt", "a_b-1.0-cp312-cp312-manylinux_2_39_x86_64.whl", ""),
        ("gpu.txt", "a_b-1.0-cp312-cp312-manylinux_2_40_x86_64.whl", "no wheel of that version"),
        ("gpu.txt", "a_b-1.0-cp312-cp312-manylinux_2_28_aarch64.whl", "no wheel of that version"),
        ("gpu.txt", "a_b-1.0-cp311-cp311-manylinux_2_28_x86_64.whl", "no wheel of that version"),
        ("gpu.txt", "a_b-1.0-cp313-abi3-manylinux_2_28_x86_64.whl", "no wheel of that version"),
        ("gpu.txt", "a_b-1.0-py2-none-any.whl", "no wheel of that version"),
        ("gpu.txt", "a_b-1.0.tar.gz", "no wheel of that version"),
        ("gpu-source.txt", "a_b-1.0.tar.gz", ""),
        ("gpu-source.txt", "a_b-1.1.tar.gz", "no source of that version"),
        ("gpu-source.txt", "a_b-1.0-py3-none-any.whl", "no source of that version"),
    ],
)
def test_pins_are_asked_for_as_the_images_python_would(resolve: ModuleType, path: str, name: str, wrong: str) -> None:
    pin = resolve.Pin("a-b", "1.0", frozenset({"f" * 64}))
    missing, sizes = resolve.resolve({path: [pin]}, {"a-b": [file(name)]})
    if wrong:
        [line] = missing
        assert line.startswith(f"{path}: a-b==1.0 on Python 3.12: ") and wrong in line
    else:
        assert missing == [] and sizes == {(path, "3.12"): 10}


def test_a_pin_with_another_hash_is_named(resolve: ModuleType) -> None:
    pin = resolve.Pin("a-b", "1.0", frozenset({"0" * 64}))
    missing, _ = resolve.resolve({"gpu-source.txt": [pin]}, {"a-b": [file("a_b-1.0.tar.gz")]})
    assert "another hash than a_b-1.0.tar.gz" in missing[0]
