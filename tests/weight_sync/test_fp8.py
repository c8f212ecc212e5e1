"""Quantisation on the sender: nearest numbers, the same bytes however TP cuts, scales beside their matrices."""

from __future__ import annotations

import dataclasses
import math
import random
from typing import Any, ClassVar

import pytest
import torch
import torch.distributed as dist

from megatron_rest.config import ConfigError, RolloutConfig, RolloutQuantization
from megatron_rest.model_map import ModelShape, parameter_map
from megatron_rest.weight_sync import sliced
from megatron_rest.weight_sync.engine_side import worker_tensors
from megatron_rest.weight_sync.fp8 import QuantisedShards, quantise
from megatron_rest.weight_sync.layouts import (
    EngineLayout,
    Fp8Form,
    TrainingLayout,
    engine_tensors,
    engine_workers,
    training_shards,
    whole_tensors,
)
from megatron_rest.weight_sync.plan import make_plan
from megatron_rest.weight_sync.sliced import SliceTransport
from megatron_rest.weight_sync.slices import pack
from megatron_rest.weight_sync.source import MegatronWeightSource
from megatron_rest.weight_sync.staging import Staging
from tests.helpers.distributed import run_distributed
from tests.helpers.fp8 import dequantised, form_of
from tests.weight_sync.test_plan import State, _dense, execute, full_state, loaded_by_vllm, random_case, shards_of

FP8 = torch.float8_e4m3fn
BLOCKS: list[tuple[int, int | None]] = [(128, 128), (1, None), (16, 48)]


def form(block: tuple[int, int | None], names: Any = ()) -> Fp8Form:
    return Fp8Form(names=frozenset(names), scale_suffix="_scale", block=block)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("shape", [(256, 384), (130, 77), (1, 1), (384, 129)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_element_is_the_nearest_number(
    shape: tuple[int, int], block: tuple[int, int | None], dtype: torch.dtype
) -> None:
    """Against all 253 finite numbers of e4m3 in float64."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.exp(3 * torch.randn(shape, generator=generator))  # over five orders of magnitude
    matrix = (sizes * torch.randn(shape, generator=generator)).to(dtype)
    matrix[0, 0] = 0
    quantised, scale = quantise(matrix, form(block))
    assert quantised.dtype is FP8 and quantised.shape == shape and scale.dtype is torch.float32
    rows, columns = block[0], block[1] or shape[1]
    assert scale.shape == (math.ceil(shape[0] / rows), math.ceil(shape[1] / columns))
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            part = matrix[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns].double()
            largest = float(part.abs().max())
            assert float(scale[i, j]) == pytest.approx(largest / 448, rel=1e-6) or largest == 0
    numbers = torch.arange(256, dtype=torch.uint8).view(FP8).double()
    numbers = numbers[numbers.isfinite()].sort().values
    ones = torch.ones(shape, dtype=torch.uint8).view(FP8)
    exact = matrix.double() / (dequantised(ones, scale, block) / float(ones.double()[0, 0]))
    middle = (numbers[1:] + numbers[:-1]) / 2
    nearest = numbers[torch.bucketize(exact, middle)]
    # Where float32's quotient rounds onto the middle between two numbers either is as near.
    is_near = (exact - quantised.double()).abs() <= (exact - nearest).abs() * (1 + 1e-5) + 1e-9
    assert bool(is_near.all())


def test_vllm_quantises_to_the_same_numbers() -> None:
    from vllm.utils.deep_gemm import per_block_cast_to_fp8

    matrix = torch.randn(384, 640, generator=torch.Generator().manual_seed(1)).bfloat16()
    quantised, scale = quantise(matrix, form((128, 128)))
    theirs, their_scale = per_block_cast_to_fp8(matrix, [128, 128])
    assert torch.equal(scale, their_scale)
    ours, others = quantised.view(torch.uint8).int(), theirs.view(torch.uint8).int()
    # They multiply by 1 / scale: some of those next to the middle between two numbers fall to the other side.
    assert int((ours - others).abs().max()) <= 1 and float((ours != others).float().mean()) < 1e-3


@pytest.mark.parametrize("power_of_two", [False, True])
def test_vllm_rounds_a_second_time_only_scales_that_are_no_powers_of_two(power_of_two: bool) -> None:
    """What its DeepGEMM kernels do to a loaded matrix, by vLLM's own function."""
    from vllm.model_executor.layers.quantization.utils.fp8_utils import requant_weight_ue8m0_inplace
    from vllm.utils.deep_gemm import per_block_cast_to_fp8

    matrix = torch.randn(512, 384, generator=torch.Generator().manual_seed(2)).bfloat16()
    matrix[0, 0], matrix[130, 0] = 448, 447.9  # a scale of 1, and of just below
    fp8 = dataclasses.replace(form((128, 128)), power_of_two=power_of_two)
    quantised, scale = quantise(matrix, fp8)
    before = dequantised(quantised, scale, (128, 128))
    kept = quantised.clone(), scale.clone()
    requant_weight_ue8m0_inplace(*kept, (128, 128))
    assert torch.equal(dequantised(*kept, (128, 128)), before) == power_of_two
    if power_of_two:
        assert torch.equal(scale, torch.exp2(torch.log2(scale).round()))
        theirs, their_scale = per_block_cast_to_fp8(matrix, [128, 128], use_ue8m0=True)
        assert torch.equal(scale, their_scale) and torch.equal(quantised.view(torch.uint8), theirs.view(torch.uint8))


@pytest.mark.parametrize("power_of_two", [False, True])
def test_zeros_tiny_numbers_and_none(power_of_two: bool) -> None:
    fp8 = dataclasses.replace(form((128, 128)), power_of_two=power_of_two)
    matrix = torch.zeros(256, 256)
    matrix[200, 200] = 1e-43
    quantised, scale = quantise(matrix, fp8)
    assert bool(scale.isfinite().all()) and bool((quantised.double() == 0).all())
    for value in (torch.nan, torch.inf, -torch.inf):
        matrix[3, 200] = value
        assert quantise(matrix, fp8)[1].isfinite().tolist() == [[True, False], [True, True]]


def cut_over_ranks(rank: int, world: int) -> str:
    """TP 4, then TP 2: shards in FP8 are the shards of the whole matrix in FP8, also where TP cuts through blocks."""
    halves = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    for tp, group in ((4, dist.group.WORLD), (2, halves[rank // 2])):
        for block in ((128, 128), (1, None), (10, 7)):
            shape = _dense(hidden_size=140, ffn_hidden_size=48)
            generator = torch.Generator().manual_seed(5)
            state = {n: torch.randn(t.shape, generator=generator).bfloat16() for n, t in full_state(shape).items()}
            fp8 = form_of(RolloutQuantization.FP8_CHANNEL, state)
            fp8 = dataclasses.replace(fp8, block=block)
            held = training_shards(shape, TrainingLayout(tensor_parallel=tp))[rank % tp]
            shards = shards_of(shape, state, held)
            source = MegatronWeightSource(lambda s=shards: s, parameter_map(shape), shape, tp_group=group)  # type: ignore[misc]
            got = QuantisedShards(source, shards, fp8)
            assert got.non_finite == []
            pairs = {name: quantise(state[name], fp8) for name in fp8.names}
            wanted = shards_of(shape, state | {n: q.view(torch.uint8) for n, (q, _) in pairs.items()}, held)
            for name in held:
                mine = got[name]
                assert torch.equal(mine.view(torch.uint8) if mine.dtype is FP8 else mine, wanted[name]), (name, block)
            for name, (_, scale) in pairs.items():
                assert torch.equal(got[fp8.scale_name(name)], scale), (name, block)
            assert len(got) == len(list(got)) == len(held) + len(pairs)
            shards["decoder.layers.0.mlp.linear_fc1.weight"][0, 0] = float("inf") if rank % tp == 1 else 1.0
            assert QuantisedShards(source, shards, fp8).non_finite == ["model.layers.0.mlp.gate_proj.weight"]
    return "the same bytes"


def test_every_cut_gives_the_same_bytes() -> None:
    assert run_distributed(cut_over_ranks, 4) == ["the same bytes"] * 4


@pytest.mark.parametrize("seed", range(40))
def test_scales_arrive_beside_their_matrices(seed: int) -> None:
    """Elements hold the number of their block: what a worker's slice shows is what its scales must be."""
    rng = random.Random(seed)
    shape, training, engine = random_case(rng)
    state = full_state(shape)
    names = [n for n in state if n.endswith("_proj.weight")]
    block = rng.choice([(1, None), (1, 1), (2, 2), (1, 4)])
    fp8 = form(block, names)
    blocks, scales, at = dict(state), {}, 0
    for name in names:
        rows, columns = state[name].shape
        _, grid = fp8.grid((0, 0), (rows, columns))
        scales[fp8.scale_name(name)] = torch.arange(at, at + math.prod(grid), dtype=torch.int32).view(grid)
        i, j = torch.arange(rows) // block[0], torch.arange(columns) // (block[1] or columns)
        blocks[name] = scales[fp8.scale_name(name)][i][:, j]
        at += math.prod(grid)
    held = training_shards(shape, training)
    workers = engine_workers(shape, engine)
    try:
        tables = [engine_tensors(shape, worker, torch.bfloat16, fp8) for worker in workers]
    except ValueError as error:
        assert "cuts through FP8 blocks" in str(error) and block not in ((1, None), (1, 1))
        return
    kinds = ("self_attn.qkv_proj.weight_scale", "mlp.experts.routed_experts.w13_weight_scale")
    refused = [f"model.layers.{n}.{kind}" for n in range(4) for kind in kinds] if seed % 4 == 0 else []
    plan = make_plan(
        shape,
        held,
        [whole_tensors(table, shape, refused, form=fp8) for table in tables],
        form=fp8,
        message_bytes=rng.choice([1, 97, 10**6]),
    )
    sources = [shards_of(shape, state, h) for h in held]
    for source, parameters in zip(sources, held, strict=True):
        source |= _scales_held(shape, scales, parameters)
    got = execute(plan, sources)
    for worker, table, mine in zip(workers, tables, got, strict=True):
        values, numbers = loaded_by_vllm(shape, state, worker), loaded_by_vllm(shape, blocks, worker)
        for name, tensor in values.items():
            assert torch.equal(mine.pop(name), tensor), name
            if f"{name}_scale" in mine:
                step = block[1] or numbers[name].shape[-1]
                assert torch.equal(mine.pop(f"{name}_scale"), numbers[name][..., :: block[0], ::step]), name
        assert all(torch.equal(tensor, scales[name]) for name, tensor in mine.items()) and bool(mine) == bool(refused)
        assert {t.dtype for t in table} == {torch.bfloat16, FP8, torch.float32}
    for message in plan.messages:  # everything is where its type may be read
        start = 0
        for copy in message.copies:
            size = plan.tensors[message.worker][copy.tensor].dtype.itemsize
            assert start % size == 0
            start += size * math.prod(copy.size)
        assert start == message.num_bytes
    assert plan.moved_bytes == plan.needed_bytes == sum(plan.received_by()) == sum(plan.sent_by)


def _scales_held(shape: ModelShape, scales: State, parameters: Any) -> State:
    names = {n for spec in parameter_map(shape) if spec.megatron_name in parameters for n in spec.hf_names}
    return {name: tensor for name, tensor in scales.items() if name.removesuffix("_scale") in names}


def test_half_of_the_bytes_of_a_large_model() -> None:
    """Qwen3-32B's layers at TP 4: a byte an element and 4 bytes in 16,384."""
    shape = ModelShape(
        model_type="qwen3", hidden_size=5120, ffn_hidden_size=25600, num_layers=2, num_attention_heads=64,
        num_query_groups=8, head_dim=128, vocab_size=1000, tied_embeddings=True, has_qkv_bias=False, has_qk_norm=True,
    )  # fmt: skip
    names = [n for spec in parameter_map(shape) for n in spec.hf_names if n.endswith("_proj.weight")]
    held = training_shards(shape, TrainingLayout(tensor_parallel=8))
    moved = []
    for fp8 in (None, form((128, 128), names)):
        tensors = [
            engine_tensors(shape, w, torch.bfloat16, fp8)
            for w in engine_workers(shape, EngineLayout(tensor_parallel=4))
        ]
        moved.append(make_plan(shape, held, tensors, form=fp8).moved_bytes)
    matrices = sum(math.prod(s) for s in ((8192 + 2 * 1024, 5120), (5120, 8192), (3 * 25600, 5120))) * 2
    assert moved[0] - moved[1] == matrices - matrices // 128**2 * 4


def _reported(shape: ModelShape, fp8: Fp8Form, block: list[int] | None) -> list[dict[str, Any]]:
    return [
        {
            "layout": dataclasses.asdict(worker),
            "parameters": [
                [t.name, list(t.shape), str(t.dtype).removeprefix("torch.")]
                for t in engine_tensors(shape, worker, torch.bfloat16, fp8)
            ],
            "weight_block": block,
        }
        for worker in engine_workers(shape, EngineLayout(tensor_parallel=2))
    ]


def test_an_engine_says_itself_what_is_in_fp8() -> None:
    shape = _dense()
    names = [n for n in full_state(shape) if n.endswith("_proj.weight")]
    for block, suffix in (((1, None), "_scale"), ((4, 4), "_scale_inv"), ((4, 4), "_scale")):
        if block == (4, 4):
            shape = _dense(num_attention_heads=4, num_query_groups=2, head_dim=8)
        wanted = Fp8Form(names=frozenset(names), scale_suffix=suffix, block=block)
        layout = _reported(shape, wanted, None if block[1] is None else list(block))
        layout[0]["power_of_two_scales"] = power_of_two = suffix == "_scale_inv"
        tensors, got = worker_tensors(shape, layout)
        assert got == dataclasses.replace(wanted, power_of_two=power_of_two)
        assert not any(t.is_whole for worker in tensors for t in worker)
        assert {t.dtype for worker in tensors for t in worker} == {torch.bfloat16, torch.float32, FP8}


def test_quantisations_that_the_sender_does_not_know_are_refused_by_name() -> None:
    shape = _dense()
    names = [n for n in full_state(shape) if n.endswith("_proj.weight")]
    name = "model.layers.0.self_attn.qkv_proj.weight"

    def changed(**parameters: tuple[list[int], str]) -> list[dict[str, Any]]:
        layout = _reported(shape, form((1, None), names), None)
        for entry in layout:
            known = {n: [n, size, dtype] for n, size, dtype in entry["parameters"]}
            known |= {n: [n, *value] for n, value in parameters.items()}
            entry["parameters"] = list(known.values())
        return layout

    with pytest.raises(ValueError, match=r"qkv_proj.weight \(torch.int8\), a quantisation that the sender does not"):
        worker_tensors(shape, changed(**{name: ([1, 1], "int8")}))
    with pytest.raises(ValueError, match=r"qkv_proj.weight in FP8 with scales \(3,\), and the sender makes one for"):
        worker_tensors(shape, changed(**{f"{name}_scale": ([3], "float32")}))
    without = [p for p in changed()[1]["parameters"] if p[0] != f"{name}_scale"]
    with pytest.raises(ValueError, match=r"in FP8 with scales nowhere, and the sender makes one for"):
        worker_tensors(shape, [changed()[0], {**changed()[1], "parameters": without}])
    with pytest.raises(ValueError, match=r"holds model.vision.weight in FP8, which is no matrix of this model's table"):
        worker_tensors(shape, changed(**{"model.vision.weight": ([4, 4], "float8_e4m3fn")}))
    with pytest.raises(ValueError, match=r"cuts through FP8 blocks of \(128, 128\): choose another engine parallelism"):
        engine_tensors(shape, engine_workers(shape, EngineLayout(tensor_parallel=2))[1], FP8, form((128, 128), names))


def test_matrices_are_quantised_once_for_all_replicas(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[QuantisedShards] = []
    monkeypatch.setattr(sliced, "QuantisedShards", lambda *a: made.append(QuantisedShards(*a)) or made[-1])
    shape = _dense()
    held = training_shards(shape, TrainingLayout())
    fp8 = form((1, None), [n for n in full_state(shape) if n.endswith("_proj.weight")])
    shards = {n: t.float() for n, t in shards_of(shape, full_state(shape), held[0]).items()}
    tensors = [engine_tensors(shape, engine_workers(shape, EngineLayout())[0], torch.bfloat16, fp8)]
    transport = SliceTransport(MegatronWeightSource(lambda: shards, parameter_map(shape), shape), message_bytes=1000)
    transport.plans = [make_plan(shape, held, tensors, form=dataclasses.replace(fp8)) for _ in range(3)]
    sent: list[Any] = []

    class Sender:
        broken: ClassVar[dict[int, Exception]] = {0: ConnectionError("gone")}  # nothing is compared then
        num_bytes = 0

        def send(self, views: list[Any], **_: Any) -> dict[Any, Any]:
            sent.extend(views)
            return {}

    transport._sender = Sender()  # type: ignore[assignment]
    outcome = transport.attempt(None, detailed=False, tamper=None)
    assert outcome.is_broken and "engine 0 broke: gone" in outcome.lost_peers[0]
    assert len(made) == 1 and len(sent) == 3 and all(view is made[0] for view in sent)


def test_nothing_is_cast_to_fp8_without_a_scale() -> None:
    shape = _dense()
    held = training_shards(shape, TrainingLayout())
    names = [n for n in full_state(shape) if n.endswith("_proj.weight")]
    fp8 = form((1, None), names)
    plan = make_plan(shape, held, [engine_tensors(shape, engine_workers(shape, EngineLayout())[0], FP8, fp8)], form=fp8)
    shards = {n: t.float() for n, t in shards_of(shape, full_state(shape), held[0]).items()}
    [copy] = [c for m in plan.messages for c in m.copies if c.parameter.endswith("layers.1.mlp.linear_fc2.weight")]
    with pytest.raises(TypeError, match=r"linear_fc2.weight is torch.float32 and must be quantised before it is sent"):
        pack([copy], shards, [FP8], Staging(torch.device("cpu")))


def test_configuration() -> None:
    with pytest.raises(ConfigError, match="fp8_block multiplies 16-bit activations"):
        RolloutConfig(quantization=RolloutQuantization.FP8_BLOCK)
