"""Build `.venv` from the frozen list: what `make setup` runs.  Standard library only, any Python from 3.6 can start it.

    python3 requirements/bootstrap.py [--venv .venv] [--python python3.11]

Checks come first (Python, disk), each failure is one line that says how to mend it.  The stamp file is written last, so
an interrupted installation is taken up again by the next `make setup`.  No compiler is asked for: every pin is a wheel,
and vLLM runs without torch.compile.
"""

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PINS = ROOT / "requirements" / "cpu.txt"
PINS_312 = ROOT / "requirements" / "cpu-3.12.txt"
INPUTS = (PINS, PINS_312, ROOT / "setup.cfg", ROOT / "pyproject.toml", Path(__file__).resolve())
SUPPORTED = ("3.11", "3.12")
# 2.6 GB installed + wheels while they are unpacked (torch's is the largest) + the demo's checkpoints
NEEDED_GB = 6
STAMP = ".megatron_rest_setup"


class SetupError(Exception):
    """What stands in the way, where, and how to mend it."""


def find_python(wanted):
    """Path of a usable interpreter: `wanted`, else python3.11, python3.12, python3, else this one."""
    candidates = [wanted] if wanted else ["python3.11", "python3.12", "python3", sys.executable]
    seen = []
    for name in candidates:
        path = shutil.which(name)
        version = python_version(path) if path else None
        if version in SUPPORTED:
            return path
        seen.append(f"{name} " + (f"is Python {version}" if version else "does not run" if path else "not found"))
    raise SetupError(
        "no Python 3.11 or 3.12 ({}): install one (Debian, Ubuntu: apt install python3.11 python3.11-venv) "
        "or name it: make setup PYTHON=/path/to/python3.11".format(", ".join(seen))
    )


def python_version(path):
    """'3.11' for the interpreter at `path`; None if it does not run (a pyenv shim of a version not switched on)."""
    code = "import sys; print('%d.%d' % sys.version_info[:2])"
    done = subprocess.run([path, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=False)
    return done.stdout.decode().strip() if done.returncode == 0 else None


def check_venv_module(python):
    code = "import venv, ensurepip"
    if subprocess.run([python, "-c", code], stderr=subprocess.DEVNULL, check=False).returncode:
        raise SetupError(
            f"{python} cannot make virtual environments (no venv/ensurepip): "
            f"apt install python{python_version(python)}-venv, or name another interpreter: make setup PYTHON=..."
        )


def check_disk(folder):
    free = shutil.disk_usage(str(folder)).free / 1e9
    if free < NEEDED_GB:
        raise SetupError(
            f"{folder} has {free:.1f} GB free, the installation needs {NEEDED_GB} GB: free some space, "
            "or put .venv elsewhere (ln -s /path/with/space/venv .venv)"
        )


def fingerprint(python):
    digest = hashlib.sha256(python_version(python).encode())
    for path in INPUTS:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def install(venv, arguments, total=0):
    """Run the environment's pip; show one moving line, keep the whole output in a log."""
    log = venv / "pip.log"
    command = [str(venv / "bin" / "python"), "-m", "pip", "install", "--no-input", *arguments]
    environment = dict(os.environ, PIP_DISABLE_PIP_VERSION_CHECK="1", PYTHONNOUSERSITE="1")
    seen, lines = 0, []
    with open(str(log), "a", encoding="utf-8") as out:
        process = subprocess.Popen(
            command,
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
            if line.startswith(("Collecting ", "Processing ")):
                seen += 1
                progress(f"fetching {seen}/{max(total, seen)} {line.split()[1]}")
            elif line.startswith("Installing collected") and total:
                progress(f"unpacking {seen} packages (the longest part)")
        code = process.wait()
    progress("")
    if code:
        raise SetupError(explain(lines, log))


def lists(version):
    """What to install into a Python of this version, in order."""
    return [PINS, PINS_312] if version == "3.12" else [PINS]


def explain(lines, log):
    """The line of pip's output that matters, and what to do about it."""
    text = "\n".join(lines)
    # "Cannot install": pip knows wheels of that version, but none for this Python or platform
    missing = re.findall(r"(?:No matching distribution found for|Cannot install) (\S+==\S+)", text)
    unreachable = re.search(
        r"NewConnectionError|ConnectTimeout|ReadTimeout|ProxyError|SSLError|Temporary failure in name", text
    )
    if "DO NOT MATCH THE HASHES" in text:
        files = re.findall(r"^ +(\S+==\S+).* from ", text, re.MULTILINE) or ["a package"]
        what = (
            f"the package index serves another file of {', '.join(files)} than the one requirements/cpu.txt knows by "
            "its hash: damaged on the way, or not the published one; use another index (pip config list), or, if you "
            "trust builds of its own, add their hashes to that list (pip hash FILE)"
        )
    elif unreachable:
        what = (
            "pip cannot reach the package index: check the network, the proxy (HTTPS_PROXY) "
            "and pip's settings (pip config list)"
        )
    elif missing and missing[0].startswith("torch=="):
        what = (
            f"pip does not find {missing[0]}, PyTorch's CPU build: set PIP_EXTRA_INDEX_URL to PyTorch's own CPU wheel "
            "index (PyTorch's 'Get Started' page names it under pip, CPU) and run make setup again"
        )
    elif missing:
        what = f"pip does not find {missing[0]}: is the package index complete, and this machine Linux x86-64?"
    elif "No space left on device" in text:
        what = f"the disk is full: free {NEEDED_GB} GB and run make setup again"
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
    python = find_python(wanted)
    stamp = venv / STAMP
    mark = fingerprint(python)
    if stamp.is_file() and stamp.read_text().strip() == mark and (venv / "bin" / "python").exists():
        stamp.touch()  # make compares times
        return
    check_venv_module(python)
    venv.mkdir(parents=True, exist_ok=True)
    check_disk(venv)
    if stamp.exists():
        stamp.unlink()
    inside = venv / "bin" / "python"
    if not inside.exists() or python_version(str(inside)) != python_version(python):
        subprocess.run([python, "-m", "venv", "--clear", str(venv)], check=True)
    pins = sum(1 for line in PINS.read_text().splitlines() if line and line[0] not in "# ")
    print(f"installing {pins} packages into {venv} (2 to 5 minutes)", flush=True)
    for path in lists(python_version(str(inside))):
        install(venv, ["--no-deps", "-r", str(path)], pins if path == PINS else 0)
    install(venv, ["--no-deps", "--no-build-isolation", "-e", str(ROOT)])
    partial = stamp.with_suffix(".part")
    partial.write_text(mark + "\n")
    partial.replace(stamp)
    print(f"ready: {venv}", flush=True)


def main():
    parser = argparse.ArgumentParser(description="Build the virtual environment from the frozen list.")
    parser.add_argument("--venv", default=str(ROOT / ".venv"), help="where (default: .venv in the project)")
    parser.add_argument(
        "--python", default=os.environ.get("PYTHON", ""), help="interpreter to use (default: 3.11, then 3.12)"
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
