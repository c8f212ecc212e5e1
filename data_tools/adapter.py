"""``--adapter FILE.py:FUNCTION``: the user's own code, named on the command line, that turns a row into others.

The function gets a row as a dictionary and returns one in any layout of the table, a list of such, or None to leave the
row out.  It is the one place where the data tools run code that is not theirs; the manifest holds the file's hash.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

from data_tools.errors import DataError, RowError

Adapter = Callable[[dict[str, Any]], Any]


def load_adapter(name: str) -> Adapter:
    """The function of ``FILE.py:FUNCTION``."""
    path, colon, function = name.rpartition(":")
    if not colon or not function.isidentifier():
        raise DataError(f"--adapter {name!r} is not of the form FILE.py:FUNCTION, for example rows.py:convert")
    if not Path(path).is_file():
        raise DataError(f"--adapter: {path} does not exist")
    file = Path(path).resolve()
    return _load(file, file.stat().st_mtime_ns, function)


@lru_cache(maxsize=4)
def _load(path: Path, _changed: int, function: str) -> Adapter:
    spec = importlib.util.spec_from_file_location("data_tools_adapter", path)
    if spec is None or spec.loader is None:
        raise DataError(f"--adapter: {path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever the user's file raises
        raise DataError(f"--adapter: {path} does not load: {type(error).__name__}: {error}") from error
    found = getattr(module, function, None)
    if not callable(found):
        raise DataError(f"--adapter: {path} has no function {function}")
    return found


def adapted(row: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """The rows that the adapter makes of one; none where it leaves it out."""
    try:
        made = load_adapter(name)(row)
    except DataError:
        raise
    except Exception as error:  # the user's code: its row is refused, not the conversion
        raise RowError(f"the adapter raised {type(error).__name__}: {error}") from error
    made = [] if made is None else made if isinstance(made, list) else [made]
    if not all(isinstance(item, dict) for item in made):
        raise RowError("the adapter must return a row (a dict), a list of rows or None")
    return made


def describe_adapter(name: str) -> dict[str, str]:
    """What the manifest says of it."""
    path, _, function = name.rpartition(":")
    return {
        "file": Path(path).name,
        "function": function,
        "sha256": hashlib.sha256(Path(path).read_bytes()).hexdigest(),
    }
