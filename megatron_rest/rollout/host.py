"""Engines on nodes of their own: ``python -m megatron_rest.rollout.host FOLDER``, one process a rollout node.

    host                                            rank that owns an engine (megatron_rest.rollout.remote)
    listens on one address of this node             reached over the job's network
    announces address and key in FOLDER             reads them there: whoever may read the run's folder may ask
    accepts a connection  <--------------------     {"kind": "engine", "key": ..., "devices": "0,1,2,3"}
    starts a worker with that very socket           talks to the worker; this process never reads what passes
    ends the worker when the connection ends,
    and the connection when the worker ends

The key is made anew by every host that starts and stands in a file that only its owner may read.  It keeps strangers
out, not listeners: it crosses the network as it is, like the rollouts after it.

SIGTERM is ignored: a scheduler warns all nodes of a job before its time limit, and the ranks still need their engines
for the step they finish.  The job's end ends this process.
"""

from __future__ import annotations

import argparse
import hmac
import json
import os
import secrets
import select
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from megatron_rest.config import ConfigError
from megatron_rest.network import INTERFACE, is_loopback, listen, own_address
from megatron_rest.preflight import GPUS_PER_NODE, JOB_LOG, check_gpus, say_in_job_log
from megatron_rest.rollout.devices import visible_devices, without_expandable_segments
from megatron_rest.rollout.keeper import EngineProcesses, new_engine_folder
from megatron_rest.rollout.wire import Connection, ConnectionLostError

__all__ = [
    "EngineHost",
    "announced",
    "ask_for_engine",
    "main",
    "start_worker",
    "worker_environment",
]

_POLL_MILLISECONDS = 200  # how late a hang-up or an exit may be noticed
_HELLO_SECONDS = 10.0
_HELLO_BYTES = 4096  # all that is read from somebody who has not shown the key
# The owner's own rank in its job is none of the engine's business.
_OF_THE_OWNER = ("RANK", "LOCAL_", "GROUP_", "ROLE_", "WORLD_SIZE", "MASTER_", "TORCHELASTIC_", JOB_LOG)


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineHost:
    """Where a host listens, and what it wants to see."""

    address: str
    port: int
    key: str
    num_gpus: int
    machine: str
    """Its name: processes there need no network to reach each other."""


def announced(folder: str | Path, silent: list[str] | None = None) -> list[EngineHost]:
    """Hosts that have announced themselves in ``folder`` and accept connections, ordered by name.

    What an earlier job left there does not answer, and is left out; ``silent`` gets a line for each.
    """
    hosts = []
    for path in sorted(Path(folder).glob("*.json")):
        try:
            host = _read(path)
        except FileNotFoundError:  # it has just gone
            continue
        try:
            with ask_for_engine(host, devices=None, is_probe=True) as sock:
                Connection(sock).receive(_HELLO_SECONDS)
        except (OSError, ConnectionLostError) as error:
            if silent is not None:
                where = f"{host.machine} at {host.address} port {host.port}"
                silent.append(f"{where} does not answer: {error or type(error).__name__}")
            continue
        hosts.append(host)
    return hosts


def _read(path: Path) -> EngineHost:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        host = EngineHost(**values)
        kinds = {name: type(getattr(host, name)).__name__ for name in EngineHost.__annotations__}
        if kinds != EngineHost.__annotations__ or not 0 < host.port < 1 << 16:
            raise ValueError(f"expected {EngineHost.__annotations__}, got {kinds}")
    except (ValueError, TypeError, RecursionError) as error:
        raise ConfigError(f"{path} is not what an engine host leaves there: {error}; remove it") from error
    return host


def ask_for_engine(host: EngineHost, *, devices: str | None, is_probe: bool = False) -> socket.socket:
    """A socket whose other end is a new worker's on ``host``, with the GPUs ``devices`` (None: all it sees)."""
    sock = socket.create_connection((host.address, host.port), timeout=_HELLO_SECONDS)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.settimeout(None)
    Connection(sock).send("probe" if is_probe else "engine", key=host.key, devices=devices)
    return sock


def start_worker(sock: socket.socket, devices: str | None, *, output: int | None = None) -> EngineProcesses:
    """A worker of this process that serves ``sock``, with the GPUs ``devices``: indices with commas among those that
    this process sees, None: all of them.  ``output`` as for Popen."""
    return EngineProcesses(
        [sys.executable, "-m", "megatron_rest.rollout.worker", str(sock.fileno()), str(os.getpid())],
        folder=new_engine_folder(),
        environment=worker_environment(devices),
        descriptors=[sock.fileno()],
        output=output,
    )


def worker_environment(devices: str | None) -> dict[str, str]:
    """Of a worker with the GPUs ``devices``; caches stay where they are, though its temporary folder is its own."""
    environment = without_expandable_segments(os.environ)
    environment = {k: v for k, v in environment.items() if not k.startswith(_OF_THE_OWNER)}
    if devices is not None:
        environment["CUDA_VISIBLE_DEVICES"] = visible_devices(devices)
    compiled = str(Path(tempfile.gettempdir(), f"torchinductor_{os.getuid()}"))
    environment.setdefault("TORCHINDUCTOR_CACHE_DIR", compiled)
    return environment


def serve(folder: Path, *, num_gpus: int, address: str = "") -> None:
    """Announce, then answer until the process is ended.

    Listens on ``address`` alone; default: :func:`megatron_rest.network.own_address`.
    """
    is_group = int(os.environ.get("SLURM_HET_SIZE", "1")) > 1  # the ranks are on other nodes
    address = address or own_address(several_machines=is_group)
    with listen(address) as server:
        host = EngineHost(
            address=address,
            port=server.getsockname()[1],
            key=secrets.token_hex(16),
            num_gpus=num_gpus,
            machine=socket.gethostname(),
        )
        with _announcement(folder, host):
            print(f"engines for {folder} at {host.address} port {host.port}, {num_gpus} GPUs", flush=True)
            if is_loopback(address):
                print(f"  ranks on other machines cannot reach {address}: --address or {INTERFACE}=NAME", flush=True)
            while True:
                sock, _ = server.accept()
                threading.Thread(target=_answer, args=(sock, host.key), daemon=True).start()


@contextmanager
def _announcement(folder: Path, host: EngineHost) -> Iterator[None]:
    """A file that only its owner may read, whole or not there at all, as long as the block runs."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{socket.gethostname()}-{host.port}.json"
    partial = path.with_suffix(".partial")
    with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        json.dump({f: getattr(host, f) for f in EngineHost.__dataclass_fields__}, file)
    partial.rename(path)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def _answer(sock: socket.socket, key: str) -> None:
    with sock:
        connection = Connection(sock)
        try:
            hello = connection.receive(_HELLO_SECONDS, max_header=_HELLO_BYTES, max_payload=0)
            if not hmac.compare_digest(str(hello.get("key", "")), key):
                return
            if hello["kind"] == "probe":
                connection.send("here")
                return
            devices = hello["devices"]
            if not (devices is None or isinstance(devices, str)):
                return
        except (ConnectionLostError, TimeoutError, KeyError):
            return
        sock.settimeout(None)
        _run_worker(sock, devices)


def _run_worker(sock: socket.socket, devices: str | None) -> None:
    worker = start_worker(sock, devices)
    hang_up = select.poll()
    hang_up.register(sock, select.POLLRDHUP | select.POLLHUP | select.POLLERR)
    while worker.poll() is None and not hang_up.poll(_POLL_MILLISECONDS):
        pass
    worker.end()


def main(argv: list[str] | None = None) -> int:
    """Serve until ended."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where ranks look for hosts: RUN_DIR/engines")
    parser.add_argument(
        "--gpus", type=int, default=0, help="GPUs of this node; 0 on CPU (REST_GPUS_PER_NODE counts more)"
    )
    parser.add_argument(
        "--address", default="", help="listen on this one (default: of REST_INTERFACE, or towards MASTER_ADDR)"
    )
    args = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        gpus = int(os.environ.get(GPUS_PER_NODE, args.gpus))
        check_gpus(gpus)
        serve(args.folder, num_gpus=gpus, address=args.address)
    except (ConfigError, PermissionError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        say_in_job_log(f"engines on {socket.gethostname()}: error: {error}")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
