"""Weights from TP2 x PP2 training ranks into one vLLM engine a rank: ours beside two usual ways, in the same run.

    python benchmarks/weight_sync.py [--hidden 512 --layers 8 --vocab 8192 --repeats 5] [--json FILE]

* ours: bucketed gather, pulled by the engine in process, every tensor's digest compared on both sides;
* (a) every tensor gathered over TP, then broadcast to all ranks, loaded in process, nothing verified;
* (b) rank 0 writes a checkpoint, every engine reads it back.

The ways take turns, so that a busy machine slows all of them alike; a time is the slowest rank's, the median of the
repeats; CPU time is that of all ranks together and does not depend on what else the machine does.  Buckets of 4 MiB
are the fastest here: larger ones leave the cache.  The limit is bytes needed by a rank over the rate of a plain 64
MiB gloo broadcast measured beside it.  Random weights; no GPU path is measured here.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_rest.rollout.process import prepare_process

prepare_process()

import torch  # noqa: E402  the settings above must come first
import torch.distributed as dist  # noqa: E402
import torch.multiprocessing as mp  # noqa: E402

from megatron_rest.config import RolloutConfig, WeightSyncConfig  # noqa: E402
from megatron_rest.model_map import ModelShape, hf_shapes, parameter_map, resolve_name, shard_shape, to_hf  # noqa: E402
from megatron_rest.rollout.vllm_engine import VllmEngine  # noqa: E402
from megatron_rest.weight_sync.source import MegatronWeightSource  # noqa: E402
from megatron_rest.weight_sync.sync import WeightSync  # noqa: E402

TP, PP = 2, 2
WORLD = TP * PP
PROBE_BYTES = 64 << 20


def model_config(hidden: int, layers: int, vocab: int) -> dict[str, Any]:
    return {
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "hidden_size": hidden,
        "intermediate_size": 3 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "vocab_size": vocab,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
    }


class Rank:
    """One rank's shards, engine and the three ways to bring them together."""

    def __init__(self, rank: int, folder: Path, bucket_bytes: int) -> None:
        self.folder = folder
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
            spec.megatron_name: 0.02 * torch.randn(shard_shape(spec, self.shape, TP), generator=generator)
            for spec in self.specs
            if self.owner[spec.megatron_name] == self.stage
        }
        for spec in self.specs:  # replicas are equal, as training keeps them
            if spec.shard_dim is None and spec.megatron_name in self.shards:
                dist.broadcast(self.shards[spec.megatron_name], group=self.tp_group, group_src=0)
        self.source = MegatronWeightSource(
            lambda: self.shards,
            self.specs,
            self.shape,
            tp_group=self.tp_group,
            pp_group=self.pp_group,
            bucket_bytes=bucket_bytes,
        )
        self._save()
        self.engine = VllmEngine(folder, RolloutConfig(kv_cache_bytes=64 << 20), seed=0, max_model_len=512)
        self.sync = WeightSync(self.engine, self.source, WeightSyncConfig())

    def ours(self) -> None:
        self.sync.push(1)

    def gather_and_broadcast(self) -> None:
        self.engine.start_weight_update()
        self.engine.update_weights({"weights": self._gathered()})
        self.engine.finish_weight_update()
        self.engine.reset_prefix_cache()

    def _gathered(self) -> Any:
        for spec in self.specs:
            owner = self.owner[spec.megatron_name]
            shapes = hf_shapes(spec, self.shape)
            if owner == self.stage:
                own = self.shards[resolve_name(spec, self.shards) or ""]
                parts = [torch.empty_like(own) for _ in range(TP)]
                dist.all_gather(parts, own, group=self.tp_group)
                full = to_hf(spec, parts, shape=self.shape)
            else:
                full = {name: torch.empty(size) for name, size in zip(spec.hf_names, shapes, strict=True)}
            for name, tensor in full.items():
                dist.broadcast(tensor, src=owner * TP)
                yield name, tensor

    def through_disk(self) -> None:
        self._save()
        self.engine._open().collective_rpc("reload_weights", kwargs={"weights_path": str(self.folder)})
        self.engine.reset_prefix_cache()

    def _save(self) -> None:
        from safetensors.torch import save_file

        tensors = dict(self.source)
        if dist.get_rank() == 0:
            save_file(tensors, self.folder / "model.safetensors", metadata={"format": "pt"})
        dist.barrier()


def _stage(name: str, half: int) -> int:
    if name.startswith("decoder.layers."):
        return int(int(name.split(".")[2]) >= half)
    return 0 if name.startswith("embedding") else 1


def slowest(action: Callable[[], None]) -> tuple[float, float]:
    """(seconds of the slowest rank, CPU seconds of all ranks together)."""
    dist.barrier()
    started, cpu_started = time.perf_counter(), time.process_time()
    action()
    seconds = torch.tensor([time.perf_counter() - started])
    cpu_seconds = torch.tensor([time.process_time() - cpu_started])
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
    dist.all_reduce(cpu_seconds)
    return float(seconds), float(cpu_seconds)


def measure(rank: int, folder: str, repeats: int, bucket_bytes: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115  four engines' start-up chatter
    me = Rank(rank, Path(folder), bucket_bytes)
    ways = {"ours": me.ours, "gather_and_broadcast": me.gather_and_broadcast, "through_disk": me.through_disk}
    probe = torch.zeros(PROBE_BYTES, dtype=torch.uint8)
    first = {name: slowest(way)[0] for name, way in ways.items()}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in (*ways, "probe")}
    for _ in range(repeats):
        for name, way in ways.items():
            times[name].append(slowest(way))
        times["probe"].append(slowest(lambda: dist.broadcast(probe, group=me.pp_group, group_src=0)))
    if rank == 0:
        full = sum(meta.num_bytes for meta in me.source.metadata())
        traffic = me.source.traffic()
        naive = full * (TP - 1) + full * (WORLD - 1)  # every stage's gather, then a copy to every other rank
        result = {
            "parameters_bytes": full,
            "moved_bytes": {"ours": traffic.moved, "gather_and_broadcast": naive},
            "needed_bytes": traffic.needed,
            "seconds": {name: statistics.median(s for s, _ in times[name]) for name in ways},
            "cpu_seconds": {name: statistics.median(cpu for _, cpu in times[name]) for name in ways},
            "first_seconds": first,
            "gloo_bytes_per_second": PROBE_BYTES / statistics.median(s for s, _ in times["probe"]),
            "layout": f"TP{TP} x PP{PP} -> {WORLD} engines",
        }
        (Path(folder) / "result.json").write_text(json.dumps(result))
    me.engine.close()
    dist.destroy_process_group()


def show(result: dict[str, Any]) -> None:
    mib = 1 << 20
    limit = result["needed_bytes"] / WORLD / result["gloo_bytes_per_second"]
    print(f"{result['layout']}, model of {result['parameters_bytes'] / mib:.1f} MiB, float32, CPU, gloo")
    print(f"needed {result['needed_bytes'] / mib:.1f} MiB over all ranks; limit {limit * 1e3:.0f} ms at "
          f"{result['gloo_bytes_per_second'] / 2**30:.2f} GiB/s")  # fmt: skip
    print(f"{'way':24}{'moved MiB':>12}{'median ms':>12}{'first ms':>12}{'CPU ms':>10}{'x ours':>9}")
    ours = result["seconds"]["ours"]
    for name, seconds in result["seconds"].items():
        moved = result["moved_bytes"].get(name)
        column = f"{moved / mib:.1f}" if moved else "-"
        first, cpu = result["first_seconds"][name], 1e3 * result["cpu_seconds"][name]
        print(f"{name:24}{column:>12}{seconds * 1e3:>12.0f}{first * 1e3:>12.0f}{cpu:>10.0f}{seconds / ours:>9.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocab", type=int, default=8192)
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
    main()
