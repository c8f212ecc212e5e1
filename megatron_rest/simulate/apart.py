"""A function in a process of its own: what changes Megatron and torch.distributed for good ends with it."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from typing import Any, TypeVar

from megatron_rest.errors import RunError

__all__ = ["run_apart"]

T = TypeVar("T")


def run_apart(function: Callable[..., T], *args: Any, **options: Any) -> T:
    """The result of ``function``, which is forked off.  Raises RunError with what it raised."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)

    def run() -> None:
        try:
            theirs.send((True, function(*args, **options)))
        except BaseException as error:  # noqa: BLE001  told to the parent
            theirs.send((False, f"{type(error).__name__}: {error}"))

    process = context.Process(target=run, daemon=True)
    process.start()
    theirs.close()
    try:
        is_done, value = ours.recv()
    except EOFError:
        process.join()
        raise RunError(f"the process of {function.__name__} ended with status {process.exitcode}") from None
    process.join()
    if not is_done:
        raise RunError(f"{function.__name__}: {value}")
    return value
