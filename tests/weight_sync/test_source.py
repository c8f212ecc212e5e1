"""Shards of every layout become the same full tensors on every rank, bit for bit, and faults are named."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_rest.model_map import ModelShape, hf_shapes, parameter_map, to_megatron
from megatron_rest.weight_sync.layouts import TrainingLayout, training_shards
from megatron_rest.weight_sync.source import MegatronWeightSource
from tests.helpers.distributed import run_distributed
from tests.weight_sync.test_plan import shards_of

CONFIG = {
    "model_type": "qwen3",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 6,
    "vocab_size": 101,
}


def full_state(shape: ModelShape, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {
        name: torch.randn(size, generator=generator).to(dtype)
        for spec in parameter_map(shape)
        for name, size in zip(spec.hf_names, hf_shapes(spec, shape), strict=True)
    }


def stage_of(name: str, shape: ModelShape, chunks: list[int]) -> int:
    """Owner of a parameter; ``chunks[c]`` is the stage of the c-th run of layers (virtual stages come round again)."""
    if name.startswith("embedding"):
        return chunks[0]
    if name.startswith("decoder.layers."):
        return chunks[int(name.split(".")[2]) * len(chunks) // shape.num_layers]
    return chunks[-1]


def local_shards(
    shape: ModelShape, state: dict[str, torch.Tensor], tp: tuple[int, int], pp_rank: int, chunks: list[int]
) -> dict[str, torch.Tensor]:
    """What rank (tp, pp_rank) of Megatron holds, Transformer Engine's names on odd layers, tied copy included."""
    shards = {}
    for spec in parameter_map(shape):
        shard = to_megatron(spec, state, tp_rank=tp[0], tp_size=tp[1], shape=shape).clone()
        if stage_of(spec.megatron_name, shape, chunks) == pp_rank:
            is_odd = spec.megatron_name.startswith("decoder.layers.") and int(spec.megatron_name.split(".")[2]) % 2
            shards[spec.alternatives[0] if is_odd and spec.alternatives else spec.megatron_name] = shard
        if spec.tied_copies and chunks[-1] == pp_rank and len(set(chunks)) > 1:
            shards[spec.tied_copies[0]] = shard.clone()
    return shards


def groups(rank: int, tp_size: int, pp_size: int) -> tuple[Any, Any, int, int]:
    """(tp_group, pp_group, tp_rank, pp_rank) in Megatron's order (TP runs fastest); None where the size is 1."""
    tp_group = pp_group = None
    for stage in range(pp_size if tp_size > 1 else 0):
        group = dist.new_group(range(stage * tp_size, (stage + 1) * tp_size))
        tp_group = group if rank // tp_size == stage else tp_group
    for column in range(tp_size if pp_size > 1 else 0):
        group = dist.new_group(range(column, tp_size * pp_size, tp_size))
        pp_group = group if rank % tp_size == column else pp_group
    return tp_group, pp_group, rank % tp_size, rank // tp_size


def check_layout(
    rank: int, world: int, *, tp_size: int, chunks: list[int], tied: bool, dtype: torch.dtype, wire: torch.dtype
) -> None:
    shape = ModelShape.from_hf_config({**CONFIG, "tie_word_embeddings": tied}, vocab_multiple=16)
    state = full_state(shape, dtype)
    tp_group, pp_group, tp_rank, pp_rank = groups(rank, tp_size, world // tp_size)
    shards = local_shards(shape, state, (tp_rank, tp_size), pp_rank, chunks)
    for bucket_bytes in (1, 8000, 1 << 30):
        source = MegatronWeightSource(
            lambda: shards,
            parameter_map(shape),
            shape,
            tp_group=tp_group,
            pp_group=pp_group,
            bucket_bytes=bucket_bytes,
            dtype=None if wire is dtype else wire,
        )
        for _ in range(2):  # re-iterable
            got = list(source)
            assert [name for name, _ in got] == list(state)
            assert all(tensor.dtype is wire and torch.equal(tensor, state[name].to(wire)) for name, tensor in got)
            described = [(m.name, m.dtype, m.shape) for m in source.metadata()]
            assert described == [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in got]
            assert source.faults == [] and source.drifted == []
        assert sum(m.num_bytes for m in source.metadata()) == sum(t.numel() * t.element_size() for _, t in got)
    assert source.worst_of_ranks(3 * (rank == world - 1)) == 3
    # Nothing handed out is a view of the live parameters: training goes on while an engine still reads.
    for shard in shards.values():
        shard.add_(1)
    assert all(torch.equal(tensor, state[name].to(wire)) for name, tensor in got)


def check_faults(rank: int) -> None:
    shape = ModelShape.from_hf_config({**CONFIG, "tie_word_embeddings": True})
    tp_group, pp_group, tp_rank, pp_rank = groups(rank, 2, 2)
    shards = local_shards(shape, full_state(shape, torch.float32), (tp_rank, 2), pp_rank, [0, 1])
    # A replica that drifted on one TP rank, and a tied head that was not updated on the last stage.
    norm = "decoder.layers.0.self_attention.q_layernorm.weight"
    if rank == 1:
        shards[norm][0] += 1e-6
    if pp_rank == 1:
        shards["output_layer.weight"][0, 0] += 1
    source = MegatronWeightSource(
        lambda: shards, parameter_map(shape), shape, tp_group=tp_group, pp_group=pp_group, bucket_bytes=4000
    )
    gather = source._gather

    def damaged(bucket: Any, local: Any) -> torch.Tensor:
        """One byte changes on the way to rank 3, after the owner has taken its digest."""
        gathered = gather(bucket, local)
        for piece in bucket.pieces:
            if piece.spec.megatron_name == "decoder.layers.0.mlp.linear_fc2.weight" and rank == 3:
                gathered[1, piece.offset + 5] ^= 0x10
        return gathered

    source._gather = damaged  # type: ignore[method-assign]
    for _ in source:
        pass
    assert source.faults == (["model.layers.0.mlp.down_proj.weight"] if rank == 3 else [])
    assert source.drifted == [*(["embedding.word_embeddings.weight"] if pp_rank == 1 else []), norm]
    del shards[next(iter(shards))]  # every rank of a pipeline hears that a parameter is missing on one
    with pytest.raises(ValueError, match=r"embedding.word_embeddings.weight is held by 0 pipeline stages"):
        MegatronWeightSource(lambda: shards, parameter_map(shape), shape, tp_group=tp_group, pp_group=pp_group)


def check_traffic(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Collectives carry tensors to the ranks that do not hold them, and little besides: digests, alignment, padding."""
    shape = ModelShape.from_hf_config({**CONFIG, "tie_word_embeddings": True, "hidden_size": 256, "vocab_size": 512})
    tp_group, pp_group, tp_rank, pp_rank = groups(rank, 2, 2)
    shards = local_shards(shape, full_state(shape, torch.float32), (tp_rank, 2), pp_rank, [0, 1])
    source = MegatronWeightSource(lambda: shards, parameter_map(shape), shape, tp_group=tp_group, pp_group=pp_group)
    received = torch.zeros(1, dtype=torch.int64)
    gather, broadcast = dist.all_gather_into_tensor, dist.broadcast

    def counted_gather(out: torch.Tensor, own: torch.Tensor, **kw: Any) -> None:
        received.add_(out.numel() - own.numel())
        gather(out, own, **kw)

    def counted_broadcast(tensor: torch.Tensor, *, group: Any, group_src: int) -> None:
        received.add_(tensor.numel() if group.rank() != group_src else 0)
        broadcast(tensor, group=group, group_src=group_src)

    with monkeypatch.context() as patch:
        patch.setattr(dist, "all_gather_into_tensor", counted_gather)
        patch.setattr(dist, "broadcast", counted_broadcast)
        for _ in source:
            pass
    dist.all_reduce(received)
    whole = {meta.name: meta.num_bytes for meta in source.metadata()}
    replicated = sum(size for name, size in whole.items() if "norm" in name)  # a stage's ranks hold these alike
    needed = (2 * 2 - 1) * sum(whole.values()) - replicated
    assert needed <= int(received) <= 1.02 * needed


def check_experts(rank: int, *, tp_size: int, pp_size: int, ep_size: int) -> None:
    """Experts lie whole on one rank of every EP group, which may span TP and data-parallel ranks."""
    shape = ModelShape.from_hf_config(
        {**CONFIG, "model_type": "qwen3_moe", "num_experts": 4, "moe_intermediate_size": 10, "num_experts_per_tok": 2}
    )
    layout = TrainingLayout(
        tensor_parallel=tp_size,
        pipeline_parallel=pp_size,
        data_parallel=4 // tp_size // pp_size,
        expert_parallel=ep_size,
    )
    stage_ranks = 4 // pp_size
    ep_group = None
    for begin in range(0, 4, ep_size):  # consecutive ranks of a stage
        group = dist.new_group(range(begin, begin + ep_size))
        ep_group = group if begin <= rank < begin + ep_size else ep_group
    tp_group = pp_group = None
    for begin in range(0, 4, tp_size):
        group = dist.new_group(range(begin, begin + tp_size))
        tp_group = group if begin <= rank < begin + tp_size and tp_size > 1 else tp_group
    for column in range(stage_ranks if pp_size > 1 else 0):
        group = dist.new_group(range(column, 4, stage_ranks))
        pp_group = group if rank % stage_ranks == column else pp_group
    state = full_state(shape, torch.float32)
    shards = shards_of(shape, state, training_shards(shape, layout)[rank])
    source = MegatronWeightSource(
        lambda: shards,
        parameter_map(shape),
        shape,
        tp_group=tp_group,
        pp_group=pp_group,
        ep_group=ep_group,
        all_ranks=dist.group.WORLD,
        bucket_bytes=2000,
    )
    got = dict(source)
    assert got.keys() == state.keys() and all(torch.equal(got[name], state[name]) for name in state)
    assert source.faults == [] and source.drifted == []
    assert source.rank == rank and source.all_gather(rank) == [0, 1, 2, 3]
    held = source.all_gather(source.holdings())
    assert held == training_shards(shape, layout)
    source.note_drift(source.all_gather(source.replica_digests(shards)))
    assert source.drifted == []
    if rank == 3:
        shards[next(name for name in shards if name.endswith("router.weight"))][0] += 1
    source.note_drift(source.all_gather(source.replica_digests(shards)))
    assert len(source.drifted) == 1 and source.drifted[0].endswith("router.weight")


def four_ranks(rank: int, world: int) -> str:
    """All layouts in one set of processes: starting them costs more than what they do."""
    check_traffic(rank, pytest.MonkeyPatch())
    f32, bf16 = torch.float32, torch.bfloat16
    check_layout(rank, world, tp_size=2, chunks=[0, 1], tied=True, dtype=f32, wire=f32)
    check_layout(rank, world, tp_size=2, chunks=[0, 1, 0, 1], tied=False, dtype=bf16, wire=bf16)  # virtual stages
    check_layout(rank, world, tp_size=4, chunks=[0], tied=False, dtype=f32, wire=bf16)
    check_layout(rank, world, tp_size=1, chunks=[0, 1, 2, 3], tied=True, dtype=f32, wire=f32)
    check_experts(rank, tp_size=2, pp_size=2, ep_size=2)
    check_experts(rank, tp_size=2, pp_size=1, ep_size=4)
    check_experts(rank, tp_size=1, pp_size=2, ep_size=2)
    check_faults(rank)
    return "exact"


def test_layouts_and_faults_on_four_ranks() -> None:
    assert run_distributed(four_ranks, 4) == ["exact"] * 4


@pytest.mark.parametrize("tied", [True, False])
def test_one_process(tied: bool) -> None:
    check_layout(0, 1, tp_size=1, chunks=[0], tied=tied, dtype=torch.float32, wire=torch.float32)


def test_wrong_shape_is_refused_by_name() -> None:
    shape = ModelShape.from_hf_config({**CONFIG, "tie_word_embeddings": True})
    shards = local_shards(shape, full_state(shape, torch.float32), (0, 1), 0, [0])
    shards["decoder.final_layernorm.weight"] = torch.ones(31)
    with pytest.raises(ValueError, match=r"decoder.final_layernorm.weight has shape \(31,\), the table says \(32,\)"):
        MegatronWeightSource(lambda: shards, parameter_map(shape), shape)
