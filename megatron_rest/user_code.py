"""Code of the user's own that a configuration names as ``package.module:attribute``: where it lies, and its digest.

A job ships the package (launch/shipping.py) and says its digest; where it runs the digest is taken again of what Python
finds there, so that a version that happens to be installed cannot take its place unnoticed.  Only :func:`make` imports
anything.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.machinery
import inspect
import os
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_rest.config import ConfigError, RestConfig

__all__ = [
    "DIGESTS",
    "CodeReference",
    "check_shipped",
    "digest",
    "files",
    "locate",
    "make",
    "package_digests",
    "references",
]

DIGESTS = "REST_USER_CODE"
"""Environment variable of a job: ``package=digest`` words, of what was shipped."""

CodeReference = str
"""``package.module:attribute``"""

_FORM = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
_LEFT_OUT = ("__pycache__", "node_modules")
_DIGITS = 16


def references(config: RestConfig) -> dict[str, CodeReference]:
    """Configuration key and code of everything in ``config`` that names some."""
    named = {
        "rollout.environment": config.rollout.environment,
        "advantage.estimator": config.advantage.estimator,
        "weighting.source": config.weighting.source,
        "loss.function": config.loss.function,
    }
    return {key: text for key, text in named.items() if ":" in text}


def locate(key: str, reference: CodeReference) -> Path:
    """The top-level package (a folder) or module (a file) of ``reference``, in the current folder or on Python's path.

    Raises ConfigError if it, its module or its attribute is not there.
    """
    if not _FORM.fullmatch(reference):
        raise ConfigError(f"{key} is {reference!r}, expected package.module:attribute")
    module, _, attribute = reference.partition(":")
    top, *rest = module.split(".")
    spec = importlib.machinery.PathFinder.find_spec(top, [os.getcwd(), *sys.path])
    if spec is None or (spec.origin is None and not spec.submodule_search_locations):
        raise ConfigError(
            f"{key} {reference!r}: there is no package {top} in {os.getcwd()} nor on Python's path: start in the "
            "folder that holds it, or add this to PYTHONPATH"
        )
    found = Path(next(iter(spec.submodule_search_locations or [spec.origin or ""])))
    file = _module_file(found, rest)
    if file is None:
        raise ConfigError(f"{key} {reference!r}: {found} holds no module {'.'.join(rest) or '__init__'}")
    if file.suffix == ".py" and not _binds(file, attribute.partition(".")[0], key):
        raise ConfigError(f"{key} {reference!r}: {file} defines no {attribute}")
    return found


def make(key: str, reference: CodeReference, options: Mapping[str, Any], options_key: str) -> Any:
    """Import what ``reference`` names and call it with ``options``.

    Raises ConfigError: it is not there, its import fails, it is no factory, or it does not take these options.
    """
    module, _, attribute = reference.partition(":")
    try:
        factory = importlib.import_module(module)
        for name in attribute.split("."):
            factory = getattr(factory, name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"{key} {reference!r} cannot be imported: {error}") from error
    if not callable(factory):
        raise ConfigError(f"{key} {reference!r} is a {type(factory).__name__}, expected a class or a factory")
    try:
        inspect.signature(factory).bind(**options)
    except TypeError as error:
        raise ConfigError(
            f"{options_key} {dict(options)}: {reference} takes {inspect.signature(factory)}: {error}"
        ) from error
    try:
        return factory(**options)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{options_key} {dict(options)}: {reference}: {error}") from error


def _module_file(top: Path, rest: list[str]) -> Path | None:
    if top.is_file():
        return None if rest else top
    path = top.joinpath(*rest)
    candidates = [path / "__init__.py"] + ([path.with_suffix(".py")] if rest else [])
    candidates += sorted(path.parent.glob(f"{path.name}.*.so")) if rest else []
    return next((c for c in candidates if c.is_file()), None)


def _binds(file: Path, name: str, key: str) -> bool:
    """Whether the module may have this name; what it imports with ``*`` or makes at run time is not known here."""
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError) as error:
        raise ConfigError(f"{key}: {file} is not valid Python: {error}") from error
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef(name=bound) | ast.AsyncFunctionDef(name=bound) | ast.ClassDef(name=bound):
                if bound in (name, "__getattr__"):
                    return True
            case ast.Name(id=bound, ctx=ast.Store()) if bound == name:
                return True
            case ast.alias(name=bound, asname=alias) if name in (alias, bound.partition(".")[0]) or bound == "*":
                return True
    return False


def files(top: Path) -> Iterator[tuple[str, Path]]:
    """Name in an archive and path of every file of a package or module, in order; hidden ones and caches left out."""
    if top.is_file():
        yield top.name, top
        return
    for folder, subfolders, names in os.walk(top, followlinks=True):
        subfolders[:] = sorted(s for s in subfolders if s not in _LEFT_OUT and not s.startswith("."))
        for name in sorted(names):
            path = Path(folder, name)
            if not name.startswith(".") and not name.endswith((".pyc", ".pyo")) and path.is_file():
                yield str(Path(top.name) / path.relative_to(top)), path


def digest(top: Path) -> str:
    """Of names and contents of all its files: the same wherever the package lies."""
    total = hashlib.sha256()
    for name, path in files(top):
        total.update(f"{name}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return total.hexdigest()[:_DIGITS]


def package_digests(config: RestConfig) -> dict[str, str]:
    """Package and digest of what Python would import here for ``config``.  Raises ConfigError as :func:`locate`."""
    tops = {locate(key, reference) for key, reference in references(config).items()}
    return {top.stem if top.is_file() else top.name: digest(top) for top in sorted(tops)}


def check_shipped(config: RestConfig, environ: Mapping[str, str] = os.environ) -> None:
    """Raises ConfigError if the job shipped a package (:data:`DIGESTS`) and another version of it is found here."""
    shipped = dict(word.split("=", 1) for word in environ.get(DIGESTS, "").split() if "=" in word)
    if not shipped:
        return
    for package, here in package_digests(config).items():
        if shipped.get(package, here) != here:
            raise ConfigError(
                f"{package} was shipped with digest {shipped[package]}, and Python finds one with {here} here: "
                "start the job's command in the folder of the shipped code, or take the other one out of the image"
            )
