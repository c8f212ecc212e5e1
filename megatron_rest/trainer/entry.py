"""Command line shared by the worker entries: configuration, exit status, one clear line for what the user can mend."""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import signal
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

import psutil

from megatron_rest.config import ConfigError, RestConfig, load
from megatron_rest.errors import RunError

__all__ = ["STOPPED_STATUS", "StoppedEarly", "worker_main"]

_INTERRUPTED = 130  # what a shell reports for Ctrl-C
_TERMINATED = 143  # and for SIGTERM, which torchrun sends when a peer has failed
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
STOPPED_STATUS = os.EX_TEMPFAIL
"""Exit status 75 of a run that was asked to stop and has saved: not a success, since steps are left, and not a fault.
What may only follow a finished run (``afterok``) does not start, the next link of a chain (``afterany``) does."""


class StoppedEarly(Exception):
    """The run stopped at a saved step before its last one; the message says which and how to go on."""


def worker_main(run: Callable[[RestConfig], None], description: str | None, argv: list[str] | None) -> int:
    """Load the configuration and call ``run``; errors of the user are one line from rank 0, others a traceback."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", help="YAML file with the sections of megatron_rest.config.RestConfig")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="change single values")
    args = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: _leave(_TERMINATED))
    try:
        run(load(args.config, args.overrides))
        return 0
    except ConfigError as error:
        _say(f"error: {error}")
        status = 2
    except (FileNotFoundError, PermissionError) as error:
        _say_from_here(f"error: {error}")
        status = 2
    except StoppedEarly as outcome:
        _say(str(outcome))
        status = STOPPED_STATUS
    except RunError as error:
        text = "\n".join([f"error: {error}", *getattr(error, "__notes__", ())])
        (_say if error.is_on_every_rank else _say_from_here)(text)
        status = 1
    except KeyboardInterrupt:
        _say("interrupted; the last complete checkpoint is kept")
        status = _INTERRUPTED
    except Exception as error:  # noqa: BLE001  the end of the process: everything that is left is reported
        if isinstance(error, OSError) and error.errno in _NO_ROOM:
            _say_from_here(f"error: {error}: nothing can be written there; make room and start again")
        else:
            print(f"rank {_rank()} failed:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
        status = 1
    _leave(status)


def _leave(status: int) -> NoReturn:
    """End this process and what it started.  Peers may wait in a collective: no destructor may join them."""
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _say_from_here(text: str) -> None:
    """What this rank alone may know."""
    print(text if _rank() == "0" else f"rank {_rank()} {text}", file=sys.stderr, flush=True)


def _say(text: str) -> None:
    """What all ranks know."""
    if _rank() == "0":
        print(text, file=sys.stderr, flush=True)


def _rank() -> str:
    return os.environ.get("RANK", "0")
