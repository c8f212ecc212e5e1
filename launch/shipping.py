"""The code that a job takes along: this project's packages and the user's own, as they lie here, committed or not."""

import base64
import io
import os
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import megatron_rest
from launch.compat import ensure_nemo_run_importable
from launch.recipe import ROOT, stop
from megatron_rest.config import ConfigError, RestConfig
from megatron_rest.user_code import digest, examine, files, named_code

ensure_nemo_run_importable()
import nemo_run as run  # noqa: E402

__all__ = ["CodePackager", "as_script", "digests", "user_packages"]

PACKAGES = ("megatron_rest", "launch", "data_tools")
_BUNDLED = "megatron_rest/bundled/"
_LARGEST = 64 << 20  # of a user's package: more is data, which belongs on shared storage
_LARGEST_INLINE = 90_000  # of a script: Linux takes 128 KiB as one argument, and the configuration is in there, too


def _top(name: str) -> Path:
    """Where a package of ours lies: all at the top of a checkout; a wheel has two of them below the third."""
    return Path(megatron_rest.__file__).resolve().parent if name == "megatron_rest" else ROOT / name


@dataclass(kw_only=True)
class CodePackager(run.Packager):
    """Ships whole packages.  NeMo-Run's own packagers ship what is committed, or go through an unquoted shell command.

    ``tops`` are folders and files; each lies in the top of the archive under its own name.
    """

    tops: list[str] = field(default_factory=lambda: [str(_top(name)) for name in PACKAGES])

    def package(self, path: Path, job_dir: str, name: str) -> str:
        """Write ``<job_dir>/<name>.tar.gz`` if it is not there."""
        archive = os.path.join(job_dir, f"{name}.tar.gz")
        if not os.path.exists(archive):
            partial = f"{archive}.part"
            Path(partial).write_bytes(_tar(Path(top) for top in self.tops))
            os.replace(partial, archive)
        return archive


def user_packages(config: RestConfig) -> list[Path]:
    """Packages and modules of the user's own that ``config`` names; what cannot be shipped ends the program."""
    tops: dict[str, Path] = {}
    try:
        for named in named_code(config):
            key, reference = named.key, named.reference
            top = examine(named)
            if top.name in PACKAGES and top.resolve() == _top(top.name):
                continue  # is shipped anyway
            if top.name in (*PACKAGES, *(f"{name}.py" for name in PACKAGES)):
                stop(f"{key} {reference!r}: {top} has the name of a package of this project: rename it")
            size = sum(path.stat().st_size for _, path in files(top))
            if size > _LARGEST:
                stop(
                    f"{key} {reference!r}: {top} holds {size / 1e6:.0f} MB, and {_LARGEST / 1e6:.0f} are shipped: keep "
                    "data elsewhere"
                )
            tops[top.name] = top
    except ConfigError as error:
        stop(str(error))
    return [tops[name] for name in sorted(tops)]


def digests(tops: Iterable[Path]) -> str:
    """``package=digest`` words (megatron_rest.user_code.DIGESTS)."""
    return " ".join(f"{top.stem if top.is_file() else top.name}={digest(top)}" for top in tops)


def as_script(tops: Iterable[Path]) -> str:
    """Shell that unpacks ``tops`` into a new folder and puts it first on Python's path; empty for none.

    For jobs whose only way to take files along is their own command line.
    """
    tops = list(tops)
    if not tops:
        return ""
    text = base64.encodebytes(_tar(tops)).decode()
    if len(text) > _LARGEST_INLINE:
        stop(
            f"{', '.join(map(str, tops))}: {len(text) // 1000} kB packed, and {_LARGEST_INLINE // 1000} fit a job's "
            "manifest: put it into the image or on a claim and name its folder in REST_ENV='PYTHONPATH=...'"
        )
    return f"""code=$(mktemp -d)
base64 -d <<'END_OF_CODE' | tar -xz -C "$code"
{text}END_OF_CODE
export PYTHONPATH="$code${{PYTHONPATH:+:$PYTHONPATH}}"
"""


def _tar(tops: Iterable[Path]) -> bytes:
    """The same bytes for the same files, whoever packs them and when."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", compresslevel=6) as tar:
        for top in tops:
            for name, path in files(top):
                if name.startswith(_BUNDLED):
                    continue  # an installed wheel's launch and data_tools, which lie in the top of the archive
                info = tarfile.TarInfo(name)
                data = path.read_bytes()
                info.size, info.mode = len(data), 0o755 if os.access(path, os.X_OK) else 0o644
                tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()
