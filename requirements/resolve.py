"""Whether the public package index has every pin of every list, for each Python that the list is for: `make resolve`.

The lists of .venv are for every supported Python on this machine's platform, those of the image (gpu*.txt,
launch/image/Dockerfile) for its Python and its glibc.

    .venv/bin/python requirements/resolve.py                  # every list
    .venv/bin/python requirements/resolve.py tqdm==4.70.1     # the lines of a new pin, with its hashes

What pip is configured with on this machine (find-links, further indexes, constraints) is not looked at, only the index
that pip asks by default: so a pin that this machine alone knows is found.  `pip install --dry-run --require-hashes`
would fetch 10 GB of wheels to say the same; here the index's pages are read (their JSON form, PEP 691) and pip's rules
applied: a wheel of that version for this platform and Python, not meant for other Pythons, of a hash that the list has.

Exit status 0: every pin is there; 1: some are not, they are named; 3: not done, the index does not answer.
"""

import argparse
import functools
import json
import os
import re
import ssl
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import bootstrap
from packaging.specifiers import SpecifierSet
from packaging.tags import compatible_tags, cpython_tags
from packaging.utils import canonicalize_name, parse_wheel_filename
from packaging.version import Version
from pip._internal.models.index import PyPI  # the index that pip asks by default

PYTHONS = bootstrap.SUPPORTED
ELSEWHERE = {"torch-cpu.txt": "PyTorch's own index has it, and set-up does without it"}
IMAGE_PYTHON, IMAGE_GLIBC = "3.12", 39  # of launch/image/Dockerfile: Ubuntu 24.04, glibc 2.39
IMAGE_PYTHONS = {"gpu.txt": (IMAGE_PYTHON,), "gpu-source.txt": (IMAGE_PYTHON,)}
SOURCES = {"gpu-source.txt"}  # built where it is installed
ANY_PYTHON = {"host.txt"}  # installed with --ignore-requires-python
NOT_DONE = 3
PIN = re.compile(r"([A-Za-z0-9._-]+)==(\S+)((?: \\\n    --hash=sha256:[0-9a-f]{64})*)\n")


class Pin(NamedTuple):
    name: str
    version: str
    hashes: frozenset


class Unreachable(Exception):
    """The index gave no answer, which is not the answer that it has no such package."""


def read(path):
    """The pins of a list; ValueError for a line that is none."""
    text = re.sub(r"^\s*#.*\n", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    rest = PIN.sub("", text).strip()
    if rest:
        raise ValueError(f"{path.name}: not a pin with hashes: {rest.splitlines()[0]!r}")
    return [Pin(name, version, frozenset(re.findall(r"[0-9a-f]{64}", h))) for name, version, h in PIN.findall(text)]


def page(name):
    """What the index says of a project: its files; none if it does not know the project."""
    url = f"{PyPI.simple_url}/{canonicalize_name(name)}/"
    request = urllib.request.Request(url, headers={"Accept": "application/vnd.pypi.simple.v1+json"})
    for pause in (1, 3, None):
        try:
            with urllib.request.urlopen(request, timeout=30, context=trusted()) as answer:
                return json.load(answer)["files"]
        except urllib.error.HTTPError as error:
            if error.code == 404:
                return []
            reason = error
        except (OSError, ValueError, KeyError) as error:
            reason = error
        if pause:
            time.sleep(pause)
    raise Unreachable(f"{canonicalize_name(name)}: {reason}")


@functools.cache
def trusted():
    return ssl.create_default_context(cafile=os.environ.get("PIP_CERT"))


def wheels(files, version):
    """(file, tags) of the wheels of a version."""
    found = []
    for file in files:
        name = file["filename"]
        if name.endswith(".whl") and same_version(name.split("-")[1], version):
            found.append((file, parse_wheel_filename(name)[3]))
    return found


def sources(files, version):
    """The source archives of a version, which fit every Python."""
    archives = [file for file in files if file["filename"].endswith(".tar.gz")]
    return [f for f in archives if same_version(f["filename"].removesuffix(".tar.gz").rpartition("-")[2], version)]


def same_version(text, version):
    return text == version or (text[:1] == version[:1] and Version(text.replace("_", "-")) == Version(version))


def order(python, platforms=None):
    """{tag: rank} on this platform or those named, best first, as pip ranks them."""
    version = tuple(map(int, python.split(".")))
    tags = [
        *cpython_tags(version, platforms=platforms),
        *compatible_tags(version, f"cp{version[0]}{version[1]}", platforms),
    ]
    return {tag: rank for rank, tag in reversed(list(enumerate(tags)))}


def image_platforms():
    """Tags of Linux on x86-64 with the image's glibc, the newest first."""
    old = {17: "manylinux2014_x86_64", 12: "manylinux2010_x86_64", 5: "manylinux1_x86_64"}
    tags = []
    for minor in range(IMAGE_GLIBC, 4, -1):
        tags += [f"manylinux_2_{minor}_x86_64", *([old[minor]] if minor in old else [])]
    return [*tags, "linux_x86_64"]


def candidates(found, python, ranks, any_python=False):
    """The files that pip may take on this Python, the one it prefers first."""
    ranked = []
    for file, tags in found:
        rank = min((ranks[tag] for tag in tags if tag in ranks), default=None)
        allowed = any_python or SpecifierSet(file.get("requires-python") or "").contains(python + ".99")
        if rank is not None and allowed:
            ranked.append((rank, file["filename"], file))
    return [file for _, _, file in sorted(ranked, key=lambda entry: entry[:2])]


def examine(pin, python, taken, files, kind="wheel"):
    """What is wrong with a pin on a Python ('' if nothing); `taken`: its :func:`candidates` or :func:`sources`."""
    where = f"{pin.name}=={pin.version} on Python {python}"
    if not files:
        return f"{where}: the index has no such project"
    if not taken:
        return f"{where}: the index has no {kind} of that version for it"
    if not any(file["hashes"]["sha256"] in pin.hashes for file in taken):
        return f"{where}: the list has another hash than {taken[0]['filename']} sha256:{taken[0]['hashes']['sha256']}"
    return ""


def resolve(lists, pages):
    """(lines that name what is missing, {(list, Python): bytes to fetch}); `pages`: {name: files of the index}."""
    missing, sizes = [], {}
    here = {python: order(python) for python in PYTHONS}
    image = {IMAGE_PYTHON: order(IMAGE_PYTHON, image_platforms())}
    for path, pins in lists.items():
        kind = "source" if path in SOURCES else "wheel"
        ranks = image if path in IMAGE_PYTHONS else here
        for pin in pins:
            files = pages[pin.name]
            found = wheels(files, pin.version)
            for python in pythons_of(path):
                taken = (
                    sources(files, pin.version)
                    if path in SOURCES
                    else candidates(found, python, ranks[python], path in ANY_PYTHON)
                )
                wrong = examine(pin, python, taken, files, kind)
                if wrong:
                    missing.append(f"{path}: {wrong}")
                else:
                    file = next(file for file in taken if file["hashes"]["sha256"] in pin.hashes)
                    sizes[path, python] = sizes.get((path, python), 0) + file.get("size", 0)
    return missing, sizes


def pythons_of(path):
    return IMAGE_PYTHONS.get(path, PYTHONS)


def fetch(names):
    with ThreadPoolExecutor(8) as pool:
        return dict(zip(names, pool.map(page, names), strict=True))


def entry(name, version, files):
    """The lines of a pin: its wheels for every supported Python."""
    hashes = []
    for python in PYTHONS:
        taken = candidates(wheels(files, version), python, order(python))
        if not taken:
            raise ValueError(f"the index has no wheel of {name}=={version} for Python {python} on this platform")
        hashes.append(taken[0]["hashes"]["sha256"])
    return f"{name}=={version}" + "".join(f" \\\n    --hash=sha256:{h}" for h in dict.fromkeys(hashes))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "pins", nargs="*", metavar="NAME==VERSION", help="say the lines of these (default: ask for all)"
    )
    wanted = [pin.split("==") for pin in parser.parse_args().pins]
    try:
        if wanted:
            pages = fetch([name for name, _ in wanted])
            print("\n".join(entry(name, version, pages[name]) for name, version in wanted))
            return 0
        paths = sorted(path for path in bootstrap.LISTS.glob("*.txt") if path.name not in ELSEWHERE)
        lists = {path.name: read(path) for path in paths}
        pages = fetch(sorted({pin.name for pins in lists.values() for pin in pins}))
    except Unreachable as error:
        print(f"resolve NOT DONE: the index does not answer: {error}", file=sys.stderr)
        return NOT_DONE
    except ValueError as error:
        print(f"resolve: {error}", file=sys.stderr)
        return 1
    missing, sizes = resolve(lists, pages)
    to_fetch = max(sizes.get(("cpu.txt", python), 0) + sizes.get(("torch-cuda.txt", python), 0) for python in PYTHONS)
    if not missing and abs(to_fetch / 1e9 - bootstrap.CUDA.fetched_gb) > 0.1:
        missing.append(
            f"bootstrap.py says {bootstrap.CUDA.fetched_gb} GB to fetch with torch-cuda.txt, it is {to_fetch / 1e9:.1f}"
        )
    for path, pins in lists.items():
        each = ", ".join(f"{python}: {sizes.get((path, python), 0) / 1e6:,.0f} MB" for python in pythons_of(path))
        print(f"{path}: {len(pins)} pins; to fetch on Python {each}")
    for name, reason in ELSEWHERE.items():
        print(f"{name}: not asked for: {reason}")
    print("\n".join(missing) if missing else "every pin is on the public index, with its hash")
    return int(bool(missing))


if __name__ == "__main__":
    sys.exit(main())
