"""Whether the image can be built: every pin of requirements/gpu*.txt exists, has its hash and fits its Python.

    python3 requirements/gpu.py [--resolve]

Reads the index's pages (names, hashes, tags), downloads no package.  ``--resolve`` also lets uv, where it is installed,
resolve requirements/gpu.in and compare.  Status 0: all is well; 1: something is not; 3: not done, the index did not
answer.  Needs nothing but pip.
"""

import argparse
import html.parser
import os
import re
import shutil
import subprocess
import sys
import urllib.error
import urllib.parse
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pip._internal.models.index import PyPI  # the index that pip asks by default

HERE = Path(__file__).resolve().parent
PYTHON, GLIBC = (3, 12), (2, 39)  # of launch/image/Dockerfile: Ubuntu 24.04
_PIN = re.compile(r"^([A-Za-z0-9][\w.-]*)==(\S+)")
_HASH = re.compile(r"--hash=sha256:([0-9a-f]{64})")
_NOT_DONE = 3


def pins(text):
    """(name, version, hashes) of a requirements file."""
    found = []
    for line in text.splitlines():
        pin = _PIN.match(line)
        if pin:
            found.append((pin[1], pin[2].rstrip("\\").strip(), set()))
        if found:
            found[-1][2].update(_HASH.findall(line))
    return found


def fits(wheel):
    """Whether a wheel's tags are those of CPython 3.12 on Linux, x86-64."""
    pythons, abis, platforms = (part.split(".") for part in wheel[: -len(".whl")].split("-")[-3:])
    return any(_python_fits(p, abis) for p in pythons) and any(_platform_fits(p) for p in platforms)


def _python_fits(python, abis):
    own = f"cp{PYTHON[0]}{PYTHON[1]}"
    pure = re.fullmatch(r"py3(\d*)", python)
    if (pure and int(pure[1] or 0) <= PYTHON[1]) or (python == own and {own, "abi3", "none"} & set(abis)):
        return True
    old = re.fullmatch(r"cp3(\d+)", python)
    return bool(old) and "abi3" in abis and int(old[1]) <= PYTHON[1]


def _platform_fits(platform):
    if platform in ("any", "linux_x86_64", "manylinux1_x86_64", "manylinux2010_x86_64", "manylinux2014_x86_64"):
        return True
    many = re.fullmatch(r"manylinux_(\d+)_(\d+)_x86_64", platform)
    return bool(many) and (int(many[1]), int(many[2])) <= GLIBC


class _Links(html.parser.HTMLParser):
    """File name and hash of every link of a package's page."""

    def __init__(self):
        super().__init__()
        self.files = {}

    def handle_starttag(self, tag, attrs):
        if tag == "a":
            address = dict(attrs).get("href") or ""
            place, _, fragment = address.partition("#")
            name = urllib.parse.unquote(place.rpartition("/")[2])
            self.files[name] = fragment[len("sha256=") :] if fragment.startswith("sha256=") else ""


def page(name):
    """The index's files of a package: {name: sha256}."""
    normal = re.sub(r"[-_.]+", "-", name).lower()
    index = os.environ.get("PIP_INDEX_URL") or os.environ.get("UV_DEFAULT_INDEX") or PyPI.simple_url
    request = urllib.request.Request(f"{index.rstrip('/')}/{normal}/", headers={"Accept": "text/html"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        links = _Links()
        links.feed(answer.read().decode("utf-8", "replace"))
        return links.files


def problem(pin, *, source, files):
    """What is wrong with one pin; empty if nothing is."""
    name, version, hashes = pin
    start = re.compile(
        "^" + re.sub(r"[-_.]+", "[-_.]+", re.escape(name).replace("\\", "")) + "-" + re.escape(version), re.IGNORECASE
    )
    own = [f for f in files if start.match(f) and (f.endswith(".tar.gz") if source else f.endswith(".whl") and fits(f))]
    if not own:
        return f"{name}=={version}: the index has no {'source' if source else 'wheel for the image'}"
    if not hashes:
        return f"{name}=={version} has no hash"
    if not any(files[f] in hashes or not files[f] for f in own):
        return f"{name}=={version}: none of its hashes is that of {', '.join(own)}"
    return ""


def check(get=page):
    """Problems of both files."""
    problems = []
    work = [
        (pin, source)
        for file, source in (("gpu.txt", False), ("gpu-source.txt", True))
        for pin in pins((HERE / file).read_text(encoding="utf-8"))
    ]
    with ThreadPoolExecutor(8) as pool:
        pages = list(pool.map(lambda item: get(item[0][0]), work))
    for i, (pin, source) in enumerate(work):
        problems.append(problem(pin, source=source, files=pages[i]))
    names = {pin[0].lower() for pin, _ in work}
    wanted = [pin for pin in pins((HERE / "gpu.in").read_text(encoding="utf-8")) if pin[0].lower() in names]
    have = {pin[0].lower(): pin[1] for pin, _ in work}
    problems += [f"gpu.in wants {n}=={v}, gpu.txt has {have[n.lower()]}" for n, v, _ in wanted if have[n.lower()] != v]
    return len(work), [text for text in problems if text]


def resolve():
    """Let uv resolve gpu.in with the versions of gpu.txt as constraints: they go together, or it says why not."""
    uv = shutil.which("uv")
    if uv is None:
        return "resolving is not done: uv is not installed", 0
    command = [uv, "pip", "compile", str(HERE / "gpu.in"), "-c", str(HERE / "gpu.txt"), "-q", "--no-build"]
    command += ["--python-version", f"{PYTHON[0]}.{PYTHON[1]}", "--python-platform", "x86_64-manylinux_2_34"]
    command += ["-o", os.devnull]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return (done.stderr.strip() or "the pins go together"), int(bool(done.returncode))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--resolve", action="store_true", help="also let uv resolve requirements/gpu.in")
    args = parser.parse_args()
    try:
        count, problems = check()
    except (OSError, urllib.error.URLError) as error:
        print(f"image: NOT DONE: the package index does not answer ({type(error).__name__})", file=sys.stderr)
        return _NOT_DONE
    status = int(bool(problems))
    for text in problems:
        print(f"image: {text}", file=sys.stderr)
    if args.resolve:
        text, failed = resolve()
        print(f"image: {text}", file=sys.stderr if failed else sys.stdout)
        status = status or failed
    if not status:
        print(f"image: {count} pins exist for Linux x86-64 and CPython {PYTHON[0]}.{PYTHON[1]}, with their hashes")
    return status


if __name__ == "__main__":
    sys.exit(main())
