"""Code of the user's own that a configuration names as ``package.module:attribute``: where it lies, its digest, and the
thing itself.

A job ships the package (launch/shipping.py) and says its digest; where it runs the digest is taken again of what Python
finds there, so that a version that happens to be installed cannot take its place unnoticed.  What is recorded is what
is imported: :func:`load_object` refuses a module that comes from elsewhere.  Only there is anything imported; before
that the source is read, so that a login node can refuse a call that cannot work.
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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_rest.config import ConfigError, RestConfig

__all__ = [
    "DIGESTS",
    "CodeReference",
    "NamedCode",
    "check_shipped",
    "digest",
    "examine",
    "files",
    "is_reference",
    "load_named",
    "load_object",
    "locate",
    "make",
    "named_code",
    "package_digests",
    "recorded",
]

DIGESTS = "REST_USER_CODE"
"""Environment variable of a job: ``package=digest`` words, of what was shipped."""

CodeReference = str
"""``package.module:attribute``"""

_FORM = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
_LEFT_OUT = ("__pycache__", "node_modules")
_DIGITS = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class NamedCode:
    """One thing that a configuration names, and how it will be called."""

    key: str
    reference: CodeReference
    called_with: tuple[str, ...] | None = None
    """What it is given, in order; None: it is a value and is not called."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Keyword arguments of the configuration."""


def is_reference(text: str) -> bool:
    """Whether ``text`` names code of the user's: neither a built-in name nor an address."""
    return ":" in text and "://" not in text


def named_code(config: RestConfig) -> list[NamedCode]:
    """Everything in ``config`` that names code of the user's own."""
    found = [
        NamedCode(key="model.dialect", reference=config.model.dialect),
        NamedCode(
            key="rollout.environment",
            reference=config.rollout.environment,
            called_with=("prompt",),
            arguments=config.rollout.environment_arguments,
        ),
    ]
    found += [
        NamedCode(key=key, reference=str(reference), called_with=(), arguments=options)
        for key, reference, options in (
            ("advantage.estimator", config.advantage.estimator, config.advantage.options),
            ("weighting.source", config.weighting.source, config.weighting.options),
            ("loss.function", config.loss.function, config.loss.options),
        )
    ]
    found += [
        NamedCode(key=term.key, reference=term.function, called_with=("answer",), arguments=term.arguments)
        for term in config.reward.as_terms()
    ]
    found += [
        NamedCode(key="trainer.loggers", reference=logger.name, called_with=("run",), arguments=logger.arguments)
        for logger in config.trainer.as_loggers()
    ]
    return [named for named in found if is_reference(named.reference)]


def examine(named: NamedCode) -> Path:
    """:func:`locate`, and ConfigError if the source says that it cannot be called as it will be."""
    top = locate(named.key, named.reference)
    module, _, attribute = named.reference.partition(":")
    file = _module_file(top, module.split(".")[1:])
    if named.called_with is not None and file is not None and file.suffix == ".py":
        signature = _written_signature(file, attribute)
        if signature is not None:
            _check_call(named, signature)
    return top


def load_named(named: NamedCode) -> Any:
    """:func:`load_object`, and ConfigError if it cannot be called as it will be."""
    found = load_object(named.key, named.reference)
    if named.called_with is None:
        return found
    if not callable(found):
        raise ConfigError(f"{named.key} {named.reference!r} is {type(found).__name__}, expected something to call")
    try:
        signature = inspect.signature(found)
    except (ValueError, TypeError):  # some callables of C say nothing
        return found
    _check_call(named, signature)
    return found


def load_object(key: str, reference: CodeReference) -> Any:
    """The object itself, imported from where :func:`locate` finds it.

    Raises ConfigError as :func:`locate`, if the import fails, and if Python has the module from elsewhere already: the
    digest on record would be that of other code.
    """
    top = locate(key, reference)
    module, _, attribute = reference.partition(":")
    name = module.partition(".")[0]
    if name == __name__.partition(".")[0]:
        top = Path(__file__).parent  # this project's own, whatever else of its name lies about
    elif name not in sys.modules and _spec(name, sys.path) != _spec(name, [str(top.parent)]):
        sys.path.insert(0, str(top.parent))
        importlib.invalidate_caches()
    try:
        found: Any = importlib.import_module(module)
    except Exception as error:
        raise ConfigError(f"{key} {reference!r} cannot be imported: {type(error).__name__}: {error}") from error
    file = getattr(found, "__file__", None)
    if file is not None and not Path(file).resolve().is_relative_to(top.resolve()):
        raise ConfigError(
            f"{key} {reference!r}: Python has {name} from {Path(file).parent} already, and what is recorded is {top}: "
            "take one of them off Python's path"
        )
    try:
        for part in attribute.split("."):
            found = getattr(found, part)
    except AttributeError as error:
        raise ConfigError(f"{key} {reference!r}: {file} defines no {attribute}") from error
    return found


def make(key: str, reference: CodeReference, options: Mapping[str, Any], options_key: str) -> Any:
    """Import what ``reference`` names and call it with ``options``.

    Raises ConfigError: it is not there, its import fails, it is no factory, or it does not take these options.
    """
    factory = load_object(key, reference)
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


def _spec(name: str, path: list[str]) -> str | None:
    spec = importlib.machinery.PathFinder.find_spec(name, path)
    if spec is None:
        return None
    return str(Path(spec.origin or next(iter(spec.submodule_search_locations or ()), "")).resolve())


def _check_call(named: NamedCode, signature: inspect.Signature) -> None:
    called_with = named.called_with or ()
    try:
        signature.bind(*called_with, **named.arguments)
    except TypeError as error:
        words = [*called_with, *(f"{name}={value!r}" for name, value in named.arguments.items())]
        attribute = named.reference.partition(":")[2]
        raise ConfigError(
            f"{named.key} {named.reference!r} is called as {attribute}({', '.join(words)}), and it is "
            f"{attribute}{signature}: {error}"
        ) from error


def _written_signature(file: Path, attribute: str) -> inspect.Signature | None:
    """Of a plain function, or of a plain class with ``__init__``, at the top of a module; None for all else."""
    for node in reversed(ast.parse(file.read_bytes()).body):  # the last definition counts
        match node:
            case ast.FunctionDef(name=name, decorator_list=[], args=arguments) if name == attribute:
                return _as_signature(arguments)
            case ast.ClassDef(name=name, decorator_list=[], keywords=[], body=body) if name == attribute:
                for inner in body:
                    match inner:
                        case ast.FunctionDef(name="__init__", decorator_list=[], args=arguments):
                            signature = _as_signature(arguments)
                            return signature.replace(parameters=list(signature.parameters.values())[1:])
                return None
    return None


def _as_signature(arguments: ast.arguments) -> inspect.Signature:
    kinds = inspect.Parameter
    plain = [*arguments.posonlyargs, *arguments.args]
    first_default = len(plain) - len(arguments.defaults)
    parameters = [
        kinds(
            argument.arg,
            kinds.POSITIONAL_ONLY if i < len(arguments.posonlyargs) else kinds.POSITIONAL_OR_KEYWORD,
            default=... if i >= first_default else kinds.empty,
        )
        for i, argument in enumerate(plain)
    ]
    if arguments.vararg:
        parameters.append(kinds(arguments.vararg.arg, kinds.VAR_POSITIONAL))
    parameters += [
        kinds(argument.arg, kinds.KEYWORD_ONLY, default=kinds.empty if default is None else ...)
        for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    ]
    if arguments.kwarg:
        parameters.append(kinds(arguments.kwarg.arg, kinds.VAR_KEYWORD))
    return inspect.Signature(parameters)


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
    tops = {locate(named.key, named.reference) for named in named_code(config)}
    return {top.stem if top.is_file() else top.name: digest(top) for top in sorted(tops)}


def recorded(config: RestConfig) -> dict[str, dict[str, str]]:
    """For the records of a run: of every key that names code, what it names, the file, its sha256, and the digest of
    the whole package.  Raises ConfigError as :func:`locate`."""
    found: dict[str, dict[str, str]] = {}
    for named in named_code(config):
        top = locate(named.key, named.reference)
        module = named.reference.partition(":")[0]
        file = _module_file(top, module.split(".")[1:])
        assert file is not None, "locate has found it"
        key = named.key if named.key not in found else f"{named.key} {named.reference}"
        found[key] = {
            "reference": named.reference,
            "file": str(file),
            "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
            "package_digest": digest(top),
        }
    return found


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
