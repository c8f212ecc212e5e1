"""Weights from TP2 x PP2 training ranks into one vLLM engine of TP 2: ours beside two usual ways, in the same run.

    python -m benchmarks.weight_sync [--hidden 1024 --layers 8 --vocab 32768 --repeats 5] [--json FILE]

* slices: each worker gets its own slices from the ranks that hold them, every byte's digest compared on both sides;
* (a) gather and broadcast: every tensor gathered over TP, broadcast to all training ranks, then from rank 0 to all
  workers in packed buckets; nothing verified;
* (b) through disk: the tensors gathered likewise, rank 0 writes a checkpoint, every worker reads it back (page cache).

Three times each: the first sync (of slices: with planning and connecting), pause to resume (start, transfer, load,
finish, verify, prefix cache), and the transfer alone (into the workers' memory, nothing loaded).  The ways take turns,
so that a busy machine slows all of them alike; a time is the slowest rank's, the median of the repeats.  CPU time is
that of the four training ranks.

The limit beside a time is the bytes that the way moves between processes over the line rate, which is measured in the
same run: 64 MiB messages over a plain TCP socket on the loopback, one pair of processes at a time, which keeps two
cores busy.  (All processes share this one loopback; on a network every GPU has its own, see
megatron_rest/weight_sync/limits.py.)  A second measure is the transport itself without anything of ours: the very
messages of the slices between the same processes, packed beforehand, sent and received by plain gloo into buffers
that are used again, nothing looked at.  Random weights; no GPU path is measured here.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_rest.rollout.process import prepare_process

prepare_process()

import torch  # noqa: E402  the settings above must come first
import torch.distributed as dist  # noqa: E402
import torch.multiprocessing as mp  # noqa: E402

from megatron_rest.config import RolloutConfig, WeightSyncConfig  # noqa: E402
from megatron_rest.model_map import ModelShape, hf_shapes, parameter_map, shard_shape, to_hf  # noqa: E402
from megatron_rest.weight_sync.links import join_group  # noqa: E402
from megatron_rest.weight_sync.plan import Message, SyncPlan  # noqa: E402
from megatron_rest.weight_sync.slices import pack  # noqa: E402
from megatron_rest.weight_sync.source import MegatronWeightSource  # noqa: E402
from megatron_rest.weight_sync.staging import Staging  # noqa: E402
from megatron_rest.weight_sync.sync import WeightSync  # noqa: E402

TP, PP, WORKERS = 2, 2, 2
WORLD = TP * PP
PROBE_BYTES, PROBES = 64 << 20, 8
MIB = 1 << 20
WAYS = ("slices", "gather and broadcast", "through disk")
PLAIN = "plain gloo, same messages"  # transfer only
IN_FLIGHT = 2  # messages at a plain sender; a receiver asks for one more, as with slices


def model_config(hidden: int, layers: int, vocab: int) -> dict[str, Any]:
    return {
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "hidden_size": hidden,
        "intermediate_size": 3 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": hidden // 8,
        "vocab_size": vocab,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }


def bucket_ranges(sizes: Sequence[int], limit: int) -> Iterator[range]:
    """Ranges of consecutive tensors, closed once they reach ``limit`` bytes; both ends cut alike."""
    start, total = 0, 0
    for index, size in enumerate(sizes):
        total += size
        if total >= limit:
            yield range(start, index + 1)
            start, total = index + 1, 0
    if start < len(sizes):
        yield range(start, len(sizes))


def worker_extension() -> type:
    """The workers' side: our own engine, and one that takes broadcast buckets without looking at them."""
    from megatron_rest.weight_sync import vllm_plugin

    class Extension(vllm_plugin.WorkerExtension):
        loads: bool = True

        def drop_what_arrives(self) -> None:
            """From now on nothing goes into the model: the transfer alone."""
            self.loads = False
            engine: Any = self.weight_transfer_engine
            engine._receiver.put = lambda *_: None
            self._weight_update_active = True  # no reload is started for it

        def take_plain(self) -> None:
            """The messages of the slices into buffers that are used again; nothing is looked at."""
            engine: Any = self.weight_transfer_engine
            link, schedule = engine._receiver.link, engine._receiver.schedule
            if not hasattr(self, "buffers"):
                largest = max(m.num_bytes for m in schedule.messages)
                self.buffers = [torch.ones(largest, dtype=torch.uint8) for _ in range(IN_FLIGHT + 1)]
            under_way: deque[Any] = deque()
            for i, message in enumerate(schedule.messages):
                if len(under_way) > IN_FLIGHT:
                    under_way.popleft().wait()
                buffer = self.buffers[i % len(self.buffers)][: message.num_bytes]
                under_way.append(link.receive(buffer, message.source))
            for work in under_way:
                work.wait()

        def join_broadcast(self, port: int) -> None:
            rank: int = self.rank  # type: ignore[attr-defined]
            self.group = join_group("127.0.0.1", port, 1 + rank, 1 + WORKERS, 300)

        def start_broadcast(self) -> None:
            vllm_plugin._ReloadEngine.start_weight_update(self.weight_transfer_engine)

        def take_broadcast(self, names: list[str], dtype: str, shapes: list[list[int]], bucket_bytes: int) -> None:
            kind = getattr(torch, dtype)
            sizes = [kind.itemsize * torch.Size(shape).numel() for shape in shapes]
            model: Any = self.weight_transfer_engine.model
            for indices in bucket_ranges(sizes, bucket_bytes):
                buffer = torch.empty(sum(sizes[i] for i in indices), dtype=torch.uint8)
                self.group.broadcast(buffer, 0).wait()
                parts = buffer.split([sizes[i] for i in indices])
                if self.loads:
                    model.load_weights(
                        (names[i], part.view(kind).view(shapes[i])) for i, part in zip(indices, parts, strict=True)
                    )

        def load_file(self, path: str) -> None:
            from safetensors import safe_open

            self.start_broadcast()
            model: Any = self.weight_transfer_engine.model
            with safe_open(path, framework="pt") as file:
                model.load_weights((name, file.get_tensor(name)) for name in file.keys())  # noqa: SIM118  no mapping
            self.finish_broadcast()

        def finish_broadcast(self) -> None:
            vllm_plugin._ReloadEngine.finish_weight_update(self.weight_transfer_engine)

    return Extension


def __getattr__(name: str) -> Any:
    """vLLM's workers look the class up by name; the trainer's ranks never import vLLM for it."""
    if name == "BenchmarkExtension":
        return worker_extension()
    raise AttributeError(name)


class Rank:
    """One training rank's shards and the three ways to bring them into the engine, which rank 0 owns."""

    def __init__(self, rank: int, folder: Path, bucket_bytes: int, *, has_engine: bool = True) -> None:
        self.folder, self.bucket_bytes = folder, bucket_bytes
        self.shape = ModelShape.from_hf_config(json.loads((folder / "config.json").read_text()))
        self.specs = parameter_map(self.shape)
        columns = [dist.new_group([column, column + TP]) for column in range(TP)]
        stages = [dist.new_group([stage * TP, stage * TP + 1]) for stage in range(PP)]
        self.tp_group, self.pp_group = stages[rank // TP], columns[rank % TP]
        half = self.shape.num_layers // 2
        self.stage = rank // TP
        self.owner = {spec.megatron_name: _stage(spec.megatron_name, half) for spec in self.specs}
        generator = torch.Generator().manual_seed(rank)
        self.shards = {
            spec.megatron_name: (0.02 * torch.randn(shard_shape(spec, self.shape, TP), generator=generator)).bfloat16()
            for spec in self.specs
            if self.owner[spec.megatron_name] == self.stage
        }
        for spec in self.specs:  # replicas are equal, as training keeps them
            if spec.shard_dim is None and spec.megatron_name in self.shards:
                dist.broadcast(self.shards[spec.megatron_name], group=self.tp_group, group_src=0)
        self.source = MegatronWeightSource(
            lambda: self.shards, self.specs, self.shape, tp_group=self.tp_group, pp_group=self.pp_group
        )
        self.engine = self._make_engine() if rank == 0 and has_engine else None
        self.sync: WeightSync | None = None
        self.group: Any = None
        self.plain: list[tuple[torch.Tensor, int]] | None = None  # messages and their receivers

    def _make_engine(self) -> Any:
        from megatron_rest.rollout import vllm_engine

        vllm_engine._WORKER_EXTENSION = "benchmarks.weight_sync.BenchmarkExtension"
        config = RolloutConfig(kv_cache_bytes=16 << 20, dtype="bfloat16", tensor_parallel=WORKERS)
        return vllm_engine.VllmEngine(
            self.folder, config, seed=0, max_model_len=512, transport="gloo", random_weights=True
        )

    def rpc(self, name: str, *args: Any) -> None:
        if self.engine is not None:
            self.engine._open().collective_rpc(name, args=args)

    # slices

    def slices(self) -> None:
        if self.sync is None:  # the first time pays for plan and connection
            self.sync = WeightSync(
                self.engine, self.source, WeightSyncConfig(transport="gloo", bucket_bytes=self.bucket_bytes)
            )
        self.sync.push(1)

    def slices_transfer(self) -> None:
        assert self.sync is not None
        transport: Any = self.sync.transport
        with _in_thread(self.engine and (lambda: self.engine.update_weights({"detailed": False}))):
            transport._sender.send([self.shards])

    def plain_transfer(self) -> None:
        """What the transport carries when nothing is done with the bytes."""
        assert self.sync is not None
        transport: Any = self.sync.transport
        sender = transport._sender
        if self.plain is None:
            self.plain = [
                (self._packed(plan, message, sender._staging), WORLD + message.worker)
                for _, _, message, plan in sender._messages
            ]
            dist.barrier()
        with _in_thread(self.engine and (lambda: self.rpc("take_plain"))):
            under_way: deque[Any] = deque()
            for data, target in self.plain:
                if len(under_way) == IN_FLIGHT:
                    under_way.popleft().wait()
                under_way.append(sender._links[0].send(data, target))
            for work in under_way:
                work.wait()

    def _packed(self, plan: SyncPlan, message: Message, staging: Staging) -> torch.Tensor:
        return pack(message.copies, self.shards, [tensor.dtype for tensor in plan.targets(message)], staging)

    # (a)

    def gather_and_broadcast(self) -> None:
        self._connect_broadcast()
        self.rpc("start_broadcast")
        self.gather_and_broadcast_transfer()
        self.rpc("finish_broadcast")
        if self.engine is not None:
            self.engine.reset_prefix_cache()

    def gather_and_broadcast_transfer(self) -> None:
        metadata = self.source.metadata()
        names, shapes = [m.name for m in metadata], [list(m.shape) for m in metadata]
        arguments = (names, "bfloat16", shapes, self.bucket_bytes)
        with _in_thread(self.engine and (lambda: self.rpc("take_broadcast", *arguments))):
            stream = self._gathered()
            for indices in bucket_ranges([m.num_bytes for m in metadata], self.bucket_bytes):
                parts = [next(stream)[1].reshape(-1).view(torch.uint8) for _ in indices]
                if self.group is not None:
                    self.group.broadcast(torch.cat(parts), 0).wait()

    def _connect_broadcast(self) -> None:
        if self.engine is not None and self.group is None:
            listener = socket.create_server(("127.0.0.1", 0))
            port = listener.getsockname()[1]
            with _in_thread(lambda: self.rpc("join_broadcast", port)):
                self.group = join_group("127.0.0.1", port, 0, 1 + WORKERS, 300, listener=listener)

    def _gathered(self) -> Iterator[tuple[str, torch.Tensor]]:
        for spec in self.specs:
            owner = self.owner[spec.megatron_name]
            if owner == self.stage:
                own = self.shards[spec.megatron_name]
                parts = [torch.empty_like(own) for _ in range(TP)]
                dist.all_gather(parts, own, group=self.tp_group)
                full = to_hf(spec, parts, shape=self.shape)
            else:
                sizes = zip(spec.hf_names, hf_shapes(spec, self.shape), strict=True)
                full = {name: torch.empty(size, dtype=torch.bfloat16) for name, size in sizes}
            for name, tensor in full.items():
                dist.broadcast(tensor, src=owner * TP)
                yield name, tensor

    # (b)

    def through_disk(self) -> None:
        self.through_disk_transfer()
        self.rpc("load_file", str(self.folder / "model.safetensors"))
        if self.engine is not None:
            self.engine.reset_prefix_cache()

    def through_disk_transfer(self) -> None:
        """As far as the disk: what reads it back cannot do so without loading."""
        from safetensors.torch import save_file

        tensors = dict(self._gathered())
        if self.engine is not None:
            save_file(tensors, self.folder / "model.safetensors", metadata={"format": "pt"})
        dist.barrier()


class _in_thread:
    """Run an engine's call beside the block; raises what the call raised."""

    def __init__(self, call: Callable[[], None] | None) -> None:
        self._error: BaseException | None = None
        self._thread = None if not call else threading.Thread(target=self._run, args=(call,))

    def _run(self, call: Callable[[], None]) -> None:
        try:
            call()
        except BaseException as error:  # noqa: BLE001  raised on leaving the block
            self._error = error

    def __enter__(self) -> None:
        if self._thread is not None:
            self._thread.start()

    def __exit__(self, *_: object) -> None:
        if self._thread is not None:
            self._thread.join()
        if self._error is not None:
            raise self._error


def _stage(name: str, half: int) -> int:
    if name.startswith("decoder.layers."):
        return int(int(name.split(".")[2]) >= half)
    return 0 if name.startswith("embedding") else 1


@dataclass(slots=True)
class Times:
    """Seconds of the slowest rank and CPU seconds of all training ranks."""

    seconds: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def take(self, action: Callable[[], None]) -> None:
        dist.barrier()
        started, cpu_started = time.perf_counter(), time.process_time()
        action()
        values = torch.tensor([time.perf_counter() - started, time.process_time() - cpu_started], dtype=torch.float64)
        slowest = values.clone()
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
        dist.all_reduce(values)
        self.seconds.append(float(slowest[0]))
        self.cpu.append(float(values[1]))

    def median(self) -> tuple[float, float]:
        return statistics.median(self.seconds), statistics.median(self.cpu)


def line_rate(rank: int) -> float:
    """Bytes a second of one TCP connection on the loopback between ranks 0 and 1; 0 on the others."""
    seconds = torch.zeros(1, dtype=torch.float64)
    port = torch.zeros(1, dtype=torch.int64)
    listener = socket.create_server(("127.0.0.1", 0)) if rank == 0 else None
    if listener is not None:
        port[0] = listener.getsockname()[1]
    dist.broadcast(port, 0)
    data = memoryview(bytearray(PROBE_BYTES))
    if listener is not None:
        connection = listener.accept()[0]
        started = time.perf_counter()
        for _ in range(PROBES):
            connection.sendall(data)
        connection.recv(1)
        seconds[0] = time.perf_counter() - started
    elif rank == 1:
        with socket.create_connection(("127.0.0.1", int(port))) as connection:
            for _ in range(PROBES):
                left = data
                while left:
                    left = left[connection.recv_into(left) :]
            connection.send(b"1")
    dist.broadcast(seconds, 0)
    return PROBES * PROBE_BYTES / float(seconds)


def measure(rank: int, folder: str, repeats: int, bucket_bytes: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115  the engine's start-up chatter
    me = Rank(rank, Path(folder), bucket_bytes)
    whole = dict(zip(WAYS, (me.slices, me.gather_and_broadcast, me.through_disk), strict=True))
    alone = {
        PLAIN: me.plain_transfer,
        **dict(
            zip(WAYS, (me.slices_transfer, me.gather_and_broadcast_transfer, me.through_disk_transfer), strict=True)
        ),
    }
    first, resumed = ({way: Times() for way in WAYS} for _ in range(2))
    moved = {way: Times() for way in alone}
    rates = []
    for way in WAYS:
        first[way].take(whole[way])
    for _ in range(repeats):
        rates.append(line_rate(rank))
        for way in WAYS:
            resumed[way].take(whole[way])
    me.rpc("drop_what_arrives")
    me.plain_transfer()  # packs and allocates, which does not count
    for _ in range(repeats):
        rates.append(line_rate(rank))
        for way in alone:
            moved[way].take(alone[way])
    if rank == 0:
        assert me.sync is not None
        transport: Any = me.sync.transport
        plan, full = transport.plans[0], sum(meta.num_bytes for meta in me.source.metadata())
        result = {
            "layout": f"TP{TP} x PP{PP} -> one engine of TP {WORKERS}",
            "parameters_bytes": full,
            "needed_bytes": plan.needed_bytes,
            "moved_bytes": {
                PLAIN: plan.moved_bytes,
                "slices": plan.moved_bytes,
                # every stage's gather, a copy to every other rank, a copy to every worker
                "gather and broadcast": full * (TP - 1) + full * (WORLD - 1) + full * WORKERS,
                "through disk": full * (TP - 1) + full * (WORLD - 1) + full * (1 + WORKERS),
            },
            "loopback_bytes": {
                PLAIN: plan.moved_bytes,
                "slices": plan.moved_bytes,
                "gather and broadcast": full * (TP - 1) + full * (WORLD - 1) + full * WORKERS,
                "through disk": full * (TP - 1) + full * (WORLD - 1),  # the file comes on top
            },
            "num_messages": len(plan.messages),
            "first_seconds": {way: first[way].seconds[0] for way in WAYS},
            "resume_seconds": {way: resumed[way].median()[0] for way in WAYS},
            "resume_cpu_seconds": {way: resumed[way].median()[1] for way in WAYS},
            "transfer_seconds": {way: times.median()[0] for way, times in moved.items()},
            "transfer_cpu_seconds": {way: times.median()[1] for way, times in moved.items()},
            "line_bytes_per_second": statistics.median(rates),
        }
        (Path(folder) / "result.json").write_text(json.dumps(result))
    if me.engine is not None:
        me.engine.close()
    dist.barrier()
    os._exit(0)  # vLLM's finalizers have nothing to say here


def show(result: dict[str, Any]) -> None:
    rate = result["line_bytes_per_second"]
    print(
        f"{result['layout']}, model of {result['parameters_bytes'] / MIB:.0f} MiB in bfloat16, CPU, loopback at "
        f"{rate / 2**30:.2f} GiB/s; needed {result['needed_bytes'] / MIB:.1f} MiB"
    )
    columns = ("way", "moved MiB", "limit ms", "transfer ms", "CPU ms", "resume ms", "first ms", "transfer / (a)")
    print(f"{columns[0]:26}" + "".join(f"{c:>15}" for c in columns[1:]))
    base = result["transfer_seconds"]["gather and broadcast"]
    for way in (*WAYS, PLAIN):
        values = (
            f"{result['moved_bytes'][way] / MIB:.1f}",
            f"{1e3 * result['loopback_bytes'][way] / rate:.0f}",
            f"{1e3 * result['transfer_seconds'][way]:.0f}",
            f"{1e3 * result['transfer_cpu_seconds'][way]:.0f}",
            *(f"{1e3 * result[key][way]:.0f}" if way in WAYS else "-" for key in ("resume_seconds", "first_seconds")),
            f"{result['transfer_seconds'][way] / base:.2f}",
        )
        print(f"{way:26}" + "".join(f"{v:>15}" for v in values))
    share = result["needed_bytes"] / result["transfer_seconds"]["slices"] / rate
    of_plain = result["transfer_seconds"][PLAIN] / result["transfer_seconds"]["slices"]
    print(
        f"slices, all workers together, in {result['num_messages']} messages: {share:.0%} of the line rate, "
        f"{of_plain:.0%} of plain gloo with the same messages"
    )


def command(description: str | None, measure: Callable[..., None], show: Callable[[dict[str, Any]], None]) -> None:
    """Parse arguments, let four ranks ``measure(rank, folder, repeats, bucket_bytes)``, show what they found."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocab", type=int, default=32768)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--bucket-mib", type=int, default=4)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        config = model_config(arguments.hidden, arguments.layers, arguments.vocab)
        (Path(folder) / "config.json").write_text(json.dumps(config))
        mp.spawn(measure, args=(folder, arguments.repeats, arguments.bucket_mib << 20), nprocs=WORLD)
        result = json.loads((Path(folder) / "result.json").read_text())
    show(result)
    if arguments.json:
        arguments.json.write_text(json.dumps({**vars(arguments), "json": None, **result}, indent=2) + "\n")


if __name__ == "__main__":
    command(__doc__, measure, show)
