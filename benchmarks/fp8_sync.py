"""Weights into engines in FP8: quantised by the sender, or by vLLM when bfloat16 has arrived; in the same run.

    python -m benchmarks.fp8_sync [--hidden 1024 --layers 8 --vocab 32768 --repeats 5] [--json FILE]

TP2 x PP2 training ranks, three engines of TP 2 that take turns, each filled by slices with every byte verified:

* bfloat16: an engine that quantises nothing;
* vLLM quantises (the peer): the same bytes, and vLLM's own online quantisation (``fp8_per_channel``) in each reload;
* sender quantises: ``rollout.quantization=fp8_channel``; what leaves a training rank is e4m3 and a float32 scale a row.

Two times each: pause to resume, and the transfer alone (into the workers' memory, nothing loaded; quantising at the
sender counts).  A time is the slowest rank's, the median of the repeats; CPU time is that of the four training ranks.
Two shares of the bytes, since an embedding and an output layer stay in bfloat16 and weigh more in a small model: of
all, and of the matrices of the layers.  Random weights; no GPU path is measured here.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
from pathlib import Path
from typing import Any

from megatron_rest.rollout.process import prepare_process

prepare_process()

import torch  # noqa: E402  the settings above must come first
import torch.distributed as dist  # noqa: E402

from benchmarks.weight_sync import (  # noqa: E402
    MIB,
    WORKERS,
    WORLD,
    Rank,
    Times,
    _in_thread,
    command,
    line_rate,
)
from megatron_rest.config import RolloutConfig, RolloutQuantization, WeightSyncConfig  # noqa: E402
from megatron_rest.weight_sync.fp8 import QuantisedShards  # noqa: E402
from megatron_rest.weight_sync.sync import WeightSync  # noqa: E402

PLAIN, ONLINE, SENDER = "bfloat16", "vLLM quantises", "sender quantises"
WAYS = (PLAIN, ONLINE, SENDER)


class Way:
    """One engine, owned by one rank, and the transfer into it."""

    def __init__(self, me: Rank, name: str, is_mine: bool) -> None:
        self._me = me
        self.engine = _make_engine(me.folder, name) if is_mine else None
        config = WeightSyncConfig(transport="gloo", bucket_bytes=me.bucket_bytes)
        self.sync = WeightSync(self.engine, me.source, config)
        transport: Any = self.sync.transport
        self.plan, self._sender = transport.plans[0], transport._sender

    def push(self) -> None:
        self.sync.push(1)

    def transfer(self) -> None:
        engine = self.engine
        with _in_thread(engine and (lambda: engine.update_weights({"detailed": False}))):
            shards: Any = self._me.shards
            if self.plan.form is not None:
                shards = QuantisedShards(self._me.source, shards, self.plan.form)
            self._sender.send([shards])

    def drop_what_arrives(self) -> None:
        if self.engine is not None:
            self.engine._open().collective_rpc("drop_what_arrives")


def _make_engine(folder: Path, name: str) -> Any:
    import vllm

    from megatron_rest.rollout import vllm_engine

    vllm_engine._WORKER_EXTENSION = "benchmarks.weight_sync.BenchmarkExtension"
    quantization = RolloutQuantization.FP8_CHANNEL if name == SENDER else RolloutQuantization.NONE
    config = RolloutConfig(
        kv_cache_bytes=16 << 20, dtype="bfloat16", tensor_parallel=WORKERS, quantization=quantization
    )
    plain: Any = vllm.LLM
    if name == ONLINE:
        vllm.LLM = lambda **arguments: plain(**arguments, quantization="fp8_per_channel")  # type: ignore[misc,assignment]
    try:
        return vllm_engine.VllmEngine(folder, config, seed=0, max_model_len=512, transport="gloo", random_weights=True)
    finally:
        vllm.LLM = plain  # type: ignore[misc]


def measure(rank: int, folder: str, repeats: int, bucket_bytes: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115  the engines' start-up chatter
    me = Rank(rank, Path(folder), bucket_bytes, has_engine=False)
    ways = {name: Way(me, name, rank == owner) for owner, name in enumerate(WAYS)}
    resumed, moved = ({name: Times() for name in WAYS} for _ in range(2))
    rates = []
    for way in ways.values():
        way.push()
    for _ in range(repeats):
        rates.append(line_rate(rank))
        for name, way in ways.items():
            resumed[name].take(way.push)
    for way in ways.values():
        way.drop_what_arrives()
        way.transfer()  # allocates, which does not count
    for _ in range(repeats):
        rates.append(line_rate(rank))
        for name, way in ways.items():
            moved[name].take(way.transfer)
    if rank == 0:
        result = {
            "line_bytes_per_second": statistics.median(rates),
            "moved_bytes": {name: way.plan.moved_bytes for name, way in ways.items()},
            "needed_bytes": {name: way.plan.needed_bytes for name, way in ways.items()},
            "layer_bytes": {name: _layer_bytes(way.plan) for name, way in ways.items()},
            "resume_seconds": {name: times.median()[0] for name, times in resumed.items()},
            "transfer_seconds": {name: times.median()[0] for name, times in moved.items()},
            "transfer_cpu_seconds": {name: times.median()[1] for name, times in moved.items()},
        }
        (Path(folder) / "result.json").write_text(json.dumps(result))
    for way in ways.values():
        if way.engine is not None:
            way.engine.close()
    dist.barrier()
    os._exit(0)  # vLLM's finalizers have nothing to say here


def _layer_bytes(plan: Any) -> int:
    return sum(t.covered_bytes for tensors in plan.tensors for t in tensors if "_proj." in t.name)


def show(result: dict[str, Any]) -> None:
    print(f"CPU, loopback at {result['line_bytes_per_second'] / 2**30:.2f} GiB/s")
    columns = ("moved MiB", "of bf16", "of layers", "transfer ms", "CPU ms", "resume ms")
    print(f"{'way':18}" + "".join(f"{c:>13}" for c in columns))
    for name in WAYS:
        assert result["moved_bytes"][name] == result["needed_bytes"][name]
        values = (
            f"{result['moved_bytes'][name] / MIB:.1f}",
            f"{result['moved_bytes'][name] / result['moved_bytes'][PLAIN]:.3f}",
            f"{result['layer_bytes'][name] / result['layer_bytes'][PLAIN]:.4f}",
            f"{1e3 * result['transfer_seconds'][name]:.0f}",
            f"{1e3 * result['transfer_cpu_seconds'][name]:.0f}",
            f"{1e3 * result['resume_seconds'][name]:.0f}",
        )
        print(f"{name:18}" + "".join(f"{v:>13}" for v in values))


if __name__ == "__main__":
    command(__doc__, measure, show)
