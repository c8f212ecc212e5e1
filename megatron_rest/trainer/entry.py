"""Command line shared by the worker entries: configuration, exit status, one clear line for what the user can mend."""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import NoReturn

import psutil

from megatron_rest.config import ConfigError, RestConfig, load, validate
from megatron_rest.errors import RunError
from megatron_rest.help_topics import Topic, see
from megatron_rest.preflight import MachineError, check_machine, say_in_job_log
from megatron_rest.processes import when_gone
from megatron_rest.rollout.keeper import end_all
from megatron_rest.run_folder import STALE_SECONDS, claim, hold, job_name, wait_for_owner

__all__ = ["STOPPED_STATUS", "StoppedEarly", "worker_main"]

_VISIBLE_SECONDS = 15.0  # until others see a file that is new on the storage

_INTERRUPTED = 130  # what a shell reports for Ctrl-C
_TERMINATED = 143  # and for SIGTERM, which torchrun sends when a peer has failed
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
STOPPED_STATUS = os.EX_TEMPFAIL
"""Exit status 75 of a run that was asked to stop and has saved: not a success, since steps are left, and not a fault.
What may only follow a finished run (``afterok``) does not start, the next link of a chain (``afterany``) does."""


class StoppedEarly(Exception):
    """The run stopped at a saved step before its last one; the message says which and how to go on."""


def worker_main(
    run: Callable[[RestConfig], None],
    description: str | None,
    argv: list[str] | None,
    *,
    prog: str | None = None,
    keeps_folder: bool = True,
) -> int:
    """Load the configuration and call ``run``; errors of the user are one line from rank 0, others a traceback.

    Before it the machine is looked at (megatron_rest/preflight.py), and with ``keeps_folder`` rank 0 takes
    ``trainer.run_dir`` for this run alone and leaves the configuration there (megatron_rest/run_folder.py).  Started
    without a launcher this process is the only rank.
    """
    parser = argparse.ArgumentParser(
        prog=prog, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", help="YAML file with the sections of megatron_rest.config.RestConfig")
    parser.add_argument(
        "overrides", nargs="*", metavar="CONFIG or section.key=value",
        help="the file again, without --config; changes of single values",
    )  # fmt: skip
    args = parser.parse_intermixed_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: _leave(_TERMINATED))
    try:
        config = _configuration(args.config, args.overrides)
        _be_a_rank()
        _go_with_the_launcher()
        if keeps_folder:
            validate(config, world_size=int(os.environ["WORLD_SIZE"]))
        check_machine(config, trains=keeps_folder)
        with _run_folder(config) if keeps_folder else contextlib.nullcontext():
            run(config)
        return 0
    except MachineError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            _say_from_here(f"error: {error}")
        status = 2
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
            _say_from_here(
                f"error: {error}: nothing can be written there; make room and start again{see(Topic.DISK_FULL)}"
            )
        else:
            text = f"rank {_rank()} failed:\n{traceback.format_exc()}"
            if type(error).__name__ == "OutOfMemoryError":  # torch's, which may not be imported by now
                text += f"out of memory{see(Topic.OUT_OF_MEMORY)}"
            print(text, file=sys.stderr, flush=True)
        status = 1
    _leave(status)


def _configuration(file: str | None, words: list[str]) -> RestConfig:
    if file is None and words and "=" not in words[0]:
        file, *words = words
    return load(file, words)


def _be_a_rank() -> None:
    """Without torchrun or Slurm's scripts: the only one."""
    if "RANK" not in os.environ:
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}


def _go_with_the_launcher() -> None:
    """End this rank when torchrun is gone: one that was killed ends none of its ranks, and they would train on, or wait
    for each other, with nobody to report to.  Slurm ends its tasks itself."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    launcher = os.getppid()

    def end() -> None:
        _say_from_here(f"error: the launcher (process {launcher}) is gone, and so this rank ends")
        _leave(_TERMINATED)

    when_gone(launcher, end)


@contextlib.contextmanager
def _run_folder(config: RestConfig) -> Iterator[None]:
    """Rank 0 takes the folder.  On every other machine one rank looks whether it is the same folder there."""
    folder, job = config.trainer.run_dir, job_name()
    if _rank() == "0":
        with hold(folder, say=_say):
            claim(config)
            yield
        return
    is_elsewhere = int(_rank()) >= int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))
    looks = bool(job) and is_elsewhere and os.environ.get("LOCAL_RANK") == "0"
    if looks and not wait_for_owner(folder, job, seconds=STALE_SECONDS + _VISIBLE_SECONDS):
        raise MachineError(
            f"trainer.run_dir={folder} on {socket.gethostname()} is not the folder that rank 0 writes to: it has to be "
            "on storage that all nodes see (in a container: REST_MOUNTS)"
        )
    yield


def _leave(status: int) -> NoReturn:
    """End this process and what it started.  Peers may wait in a collective: no destructor may join them."""
    end_all()  # engines first: their keepers, which would clean up behind them, are among the children
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _say_from_here(text: str) -> None:
    """What this rank alone may know; also in the job's own log, where a launcher has given it to this rank."""
    text = text if _rank() == "0" else f"rank {_rank()} {text}"
    print(text, file=sys.stderr, flush=True)
    say_in_job_log(text)


def _say(text: str) -> None:
    """What all ranks know."""
    if _rank() == "0":
        print(text, file=sys.stderr, flush=True)


def _rank() -> str:
    return os.environ.get("RANK", "0")
