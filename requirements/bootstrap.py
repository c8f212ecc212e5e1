"""Build `.venv` from the frozen lists: what `make setup` runs.  Standard library only, any Python from 3.6 starts it.

    python3 requirements/bootstrap.py [--venv .venv] [--python python3.12]

Checks come first (platform, Python, disk), each failure is one line that says how to mend it.  torch is PyTorch's CPU
build where pip finds it, else the plain build of the same version with the CUDA libraries that it is linked against:
pip is asked, nobody else is.  The stamp file is written last, so an interrupted installation is taken up again by the
next `make setup`.  No compiler is asked for: every pin is a wheel, and vLLM runs without torch.compile.
"""

import argparse
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
LISTS = ROOT / "requirements"
PINS = LISTS / "cpu.txt"
SUPPORTED = ("3.11", "3.12", "3.13")
STAMP = ".megatron_rest_setup"
GLIBC = (2, 34)  # the newest that a wheel of the lists asks for


class Torch(NamedTuple):
    """A build of torch: its list, and what it and requirements/cpu.txt take together."""

    pins: Path
    what: str
    fetched_gb: float  # wheels
    installed_gb: float  # .venv


CPU = Torch(LISTS / "torch-cpu.txt", "PyTorch's CPU build", fetched_gb=0.7, installed_gb=2.7)
CUDA = Torch(LISTS / "torch-cuda.txt", "built for CUDA, runs on a CPU as well", fetched_gb=3.2, installed_gb=7.1)
INPUTS = (PINS, CPU.pins, CUDA.pins, ROOT / "setup.cfg", ROOT / "pyproject.toml", Path(__file__).resolve())


class SetupError(Exception):
    """What stands in the way, where, and how to mend it."""


def check_platform():
    """The lists hold wheels for Linux x86-64 with glibc alone."""
    here = f"{platform.system()} {platform.machine()}"
    if here != "Linux x86_64":
        raise SetupError(
            f"the frozen lists hold wheels for Linux x86_64, this is {here}: use such a machine or container"
        )
    try:
        libc = os.confstr("CS_GNU_LIBC_VERSION") or ""  # "glibc 2.36"
    except ValueError:
        libc = ""
    version = tuple(map(int, re.findall(r"\d+", libc)))
    if version < GLIBC:
        raise SetupError(
            "the frozen lists hold wheels for glibc {}.{} and newer, here is {}: use a newer system or container "
            "(Debian 12, Ubuntu 22.04, RHEL 9 and newer have it)".format(*GLIBC, libc or "another libc")
        )


def find_python(wanted):
    """Path of a usable interpreter: `wanted`, else the first of python3.11, 3.12, 3.13, python3 and this one."""
    candidates = [wanted] if wanted else [*(f"python{version}" for version in SUPPORTED), "python3", sys.executable]
    seen, without_venv = [], None
    for name in candidates:
        path = shutil.which(name)
        version = python_version(path) if path else None
        if version in SUPPORTED:
            if makes_environments(path):
                return path
            without_venv = without_venv or path
        seen.append(f"{name} " + (f"is Python {version}" if version else "does not run" if path else "not found"))
    if without_venv:
        raise SetupError(
            f"{without_venv} cannot make virtual environments (no venv/ensurepip): "
            f"apt install python{python_version(without_venv)}-venv, or name another interpreter: make setup PYTHON=..."
        )
    raise SetupError(
        "no Python {} ({}): install one (Debian, Ubuntu: apt install python3 python3-venv) "
        "or name it: make setup PYTHON=/path/to/python3.12".format(" or ".join(SUPPORTED), ", ".join(seen))
    )


def python_version(path):
    """'3.11' for the interpreter at `path`, '3.13t' if it is free-threaded; None if it does not run (a pyenv shim)."""
    code = (
        "import sys, sysconfig; "
        "print('%d.%d' % sys.version_info[:2] + ('t' if sysconfig.get_config_var('Py_GIL_DISABLED') else ''))"
    )
    done = subprocess.run([path, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=False)
    return done.stdout.decode().strip() if done.returncode == 0 else None


def makes_environments(python):
    code = "import venv, ensurepip"
    return subprocess.run([python, "-c", code], stderr=subprocess.DEVNULL, check=False).returncode == 0


def check_disk(venv, torch):
    """Room for what is not installed yet, its wheels while they are unpacked, and the copies that pip keeps of them."""
    files = (os.path.join(folder, name) for folder, _, names in os.walk(str(venv)) for name in names)
    there = sum(os.lstat(file).st_size for file in files) / 1e9
    share = max(0.0, 1 - there / torch.installed_gb)  # of it that is to come
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    cache = Path(os.environ.get("PIP_CACHE_DIR") or cache / "pip")
    needed = {}  # file system: [folder, GB]
    for folder, gigabytes in ((venv, torch.installed_gb + torch.fetched_gb), (cache, torch.fetched_gb)):
        while not folder.exists():
            folder = folder.parent
        needed.setdefault(folder.stat().st_dev, [folder, 0.0])[1] += gigabytes * share
    for folder, gigabytes in needed.values():
        free = shutil.disk_usage(str(folder)).free / 1e9
        if free < gigabytes:
            raise SetupError(
                f"{folder} has {free:.1f} GB free, the installation needs {gigabytes:.1f} GB (torch: {torch.what}): "
                "free some, or put .venv elsewhere (ln -s /path/with/space/venv .venv; pip's copies: PIP_CACHE_DIR)"
            )


def fingerprint(python):
    digest = hashlib.sha256(python_version(python).encode())
    for path in INPUTS:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def pip(venv, command, arguments, watch=lambda line: None):
    """Run the environment's pip: (exit status, lines); the whole output goes into a log, `watch` sees every line."""
    scratch = venv / "tmp"  # not /tmp, which may be a small one in memory
    scratch.mkdir(exist_ok=True)
    environment = dict(
        os.environ, PIP_DISABLE_PIP_VERSION_CHECK="1", PIP_USER="0", PYTHONNOUSERSITE="1", TMPDIR=str(scratch)
    )
    lines = []
    with open(str(venv / "pip.log"), "a", encoding="utf-8") as out:
        process = subprocess.Popen(
            [str(venv / "bin" / "python"), "-m", "pip", command, "--no-input", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment,
            cwd=str(ROOT),
            universal_newlines=True,
            errors="replace",
        )
        for line in process.stdout:
            out.write(line)
            lines.append(line.rstrip())
            watch(line)
        status = process.wait()
    shutil.rmtree(str(scratch), ignore_errors=True)
    return status, lines


def install(venv, arguments, total=0):
    """`pip install` without dependencies, with one moving line; Python compiles a module when it is first imported."""
    seen = 0

    def watch(line):
        nonlocal seen
        if line.startswith(("Collecting ", "Processing ")):
            seen += 1
            progress(f"fetching {seen}/{max(total, seen)} {line.split()[1]}")
        elif line.startswith("Installing collected") and total:
            progress(f"unpacking {seen} packages (the longest part)")

    status, lines = pip(venv, "install", ["--no-deps", "--no-compile", *arguments], watch)
    progress("")
    if status:
        raise SetupError(explain(lines, venv / "pip.log"))


def compile_modules(python):
    """For PYTHONDONTWRITEBYTECODE, with which every process would compile torch and vLLM again: 6 seconds instead of 3.

    Some files are no Python (templates of code), so the status says nothing.
    """
    print(
        "PYTHONDONTWRITEBYTECODE is set: compiling all modules now, since no import may keep what it compiles",
        flush=True,
    )
    folders = [str(folder) for folder in python.parent.parent.glob("lib/python*/site-packages")]
    command = [str(python), "-m", "compileall", "-q", "-j", "0", *folders]
    subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)


def pins(path):
    """{name: version} of a list."""
    return dict(re.findall(r"^([A-Za-z0-9._-]+)==([^\s;\\]+)", path.read_text(encoding="utf-8"), re.MULTILINE))


def choose_torch(venv):
    """The CPU build if pip finds it, the plain one if pip finds that one alone; an index that fails is no answer.

    What an earlier run has installed stays: pip takes the CPU build for a plain one of the same version.
    """
    log = venv / "pip.log"
    for torch in (CPU, CUDA):
        if list(venv.glob(f"lib/python*/site-packages/torch-{pins(torch.pins)['torch']}.dist-info/RECORD")):
            return torch
    _, lines = pip(venv, "index", ["versions", "torch", "--only-binary=:all:"])
    text = "\n".join(lines)
    found = re.search(r"^Available versions: (.*)$", text, re.MULTILINE)
    versions = found.group(1).split(", ") if found else []
    if pins(CPU.pins)["torch"] in versions:
        return CPU
    if unreachable(text):  # the index that has the CPU build may be the one that is down
        raise SetupError(explain(lines, log))
    if pins(CUDA.pins)["torch"] in versions:
        return CUDA
    raise SetupError(
        f"pip finds neither torch=={pins(CPU.pins)['torch']} nor torch=={pins(CUDA.pins)['torch']} "
        f"(it finds {', '.join(versions[:3]) or 'none'}): which indexes does it ask (pip config list)? "
        f"(whole output: {log})"
    )


def unreachable(text):
    """What pip could not reach, as it says it; '' if it reached all."""
    signs = (
        r"Retry\(total=0,|NewConnectionError|ConnectTimeout|ReadTimeout|ProxyError|SSLError|"
        r"confirming the ssl certificate|Temporary failure in name|is not a trusted or secure host"
    )
    found = [line for line in text.splitlines() if re.search(signs, line)]
    hosts = re.findall(r"(?:host='|located at )([^'\s]+)", "\n".join(found))
    return (hosts or ["the package index"])[0] if found else ""


def explain(lines, log):
    """The line of pip's output that matters, and what to do about it."""
    text = "\n".join(lines)
    # "Cannot install": pip knows wheels of that version, but none for this Python or platform
    missing = re.findall(r"(?:No matching distribution found for|Cannot install) (\S+==\S+)", text)
    if "DO NOT MATCH THE HASHES" in text:
        files = re.findall(r"^ +(\S+==\S+).* from ", text, re.MULTILINE) or ["a package"]
        what = (
            f"the package index serves another file of {', '.join(files)} than the one that requirements/*.txt know by "
            "its hash: damaged on the way, or not the published one; use another index (pip config list), or, if you "
            "trust builds of its own, add their hashes to that list (pip hash FILE)"
        )
    elif unreachable(text):
        what = (
            f"pip cannot reach {unreachable(text)}: check the network, the proxy (HTTPS_PROXY) "
            "and pip's settings (pip config list)"
        )
    elif missing:
        what = (
            f"pip does not find {missing[0]}: is the package index complete, and does a constraint forbid it "
            "(pip config list)?"
        )
    elif "No space left on device" in text:
        what = "the disk is full: free some space and run make setup again"
    else:
        errors = [line for line in lines if line.startswith("ERROR")] or lines[-3:]
        what = "pip failed: " + " | ".join(errors[:3])
    return f"{what} (whole output: {log})"


def progress(text):
    if sys.stdout.isatty():
        sys.stdout.write("\r\033[K" + text[: shutil.get_terminal_size().columns - 1])
        sys.stdout.flush()
    elif text and text.startswith("unpacking"):
        print(text, flush=True)


def build(venv, wanted):
    check_platform()
    python = find_python(wanted)
    stamp = venv / STAMP
    mark = fingerprint(python)
    if stamp.is_file() and stamp.read_text().strip() == mark and (venv / "bin" / "python").exists():
        stamp.touch()  # make compares times
        return
    venv.mkdir(parents=True, exist_ok=True)
    check_disk(venv, CPU)
    if stamp.exists():
        stamp.unlink()
    inside = venv / "bin" / "python"
    if not inside.exists() or python_version(str(inside)) != python_version(python):
        subprocess.run([python, "-m", "venv", "--clear", str(venv)], check=True)
    torch = choose_torch(venv)
    name = f"torch {pins(torch.pins)['torch']} ({torch.what})"
    if torch is CUDA:
        check_disk(venv, CUDA)
        print(
            f"{name}: pip finds no CPU build here; with the libraries it is linked against, {CUDA.fetched_gb} GB are "
            f"fetched and .venv takes {CUDA.installed_gb} GB (CPU build: {CPU.fetched_gb} and {CPU.installed_gb} GB)",
            flush=True,
        )
    for path in (torch.pins, PINS):
        total = len(pins(path))
        print(f"installing {total} packages of {path.relative_to(ROOT)} into {venv}", flush=True)
        install(venv, ["--only-binary=:all:", "-r", str(path)], total)
    install(venv, ["--no-build-isolation", "-e", str(ROOT)])
    if sys.dont_write_bytecode:
        compile_modules(inside)
    partial = stamp.with_suffix(".part")
    partial.write_text(mark + "\n")
    partial.replace(stamp)
    print(f"ready: {venv}, Python {python_version(python)}, {name}", flush=True)


def main():
    parser = argparse.ArgumentParser(description="Build the virtual environment from the frozen lists.")
    parser.add_argument("--venv", default=str(ROOT / ".venv"), help="where (default: .venv in the project)")
    parser.add_argument(
        "--python",
        default=os.environ.get("PYTHON", ""),
        help=f"interpreter to use (default: the first of {', '.join(SUPPORTED)} that there is)",
    )
    arguments = parser.parse_args()
    try:
        build(Path(arguments.venv).absolute(), arguments.python)
    except (SetupError, OSError, subprocess.CalledProcessError) as error:
        sys.exit(f"setup: {error}")
    except KeyboardInterrupt:
        sys.stdout.write("\n")
        sys.exit("setup: interrupted; run make setup again to go on")


if __name__ == "__main__":
    main()
