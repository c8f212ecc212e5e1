"""The plan executed on tensors: every worker ends with what vLLM's own loader would cut, and each byte moves once."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from megatron_rest.model_map import ModelShape, hf_shapes, parameter_map, to_megatron
from megatron_rest.weight_sync import plan as plan_module
from megatron_rest.weight_sync.layouts import (
    EngineLayout,
    Shard,
    TrainingLayout,
    WorkerLayout,
    engine_tensors,
    engine_workers,
    training_shards,
    whole_tensors,
)
from megatron_rest.weight_sync.plan import SyncPlan, make_plan, make_plans, region

State = dict[str, torch.Tensor]


def full_state(shape: ModelShape) -> State:
    """HF tensors in which every element of the model has a value of its own."""
    state, at = {}, 0
    for spec in parameter_map(shape):
        for name, size in zip(spec.hf_names, hf_shapes(spec, shape), strict=True):
            numel = torch.Size(size).numel()
            state[name] = torch.arange(at, at + numel, dtype=torch.int32).view(size)
            at += numel
    return state


def shards_of(shape: ModelShape, state: State, held: dict[str, Shard]) -> State:
    specs = {spec.megatron_name: spec for spec in parameter_map(shape)}
    return {
        name: to_megatron(specs[name], state, tp_rank=shard.tp_rank, tp_size=shard.tp_size, shape=shape)
        for name, shard in held.items()
    }


def execute(plan: SyncPlan, sources: list[State]) -> list[State]:
    """Workers' tensors after the plan, -1 where nothing was written twice; a second write is an error."""
    result = [{t.name: torch.full(t.shape, -1, dtype=torch.int32) for t in tensors} for tensors in plan.tensors]
    for message in plan.messages:
        tensors = plan.tensors[message.worker]
        assert message.num_bytes == sum(
            torch.Size(c.size).numel() * tensors[c.tensor].dtype.itemsize for c in message.copies
        )
        for copy in message.copies:
            value = region(sources[message.source][copy.parameter], copy.source_start, copy.size)
            target = region(
                result[message.worker][plan.tensors[message.worker][copy.tensor].name], copy.start, copy.size
            )
            assert (target == -1).all(), "an element was sent twice"
            target.copy_(value)
    return result


def loaded_by_vllm(shape: ModelShape, state: State, worker: WorkerLayout) -> State:
    """What vLLM's weight loaders make of full HF tensors, written down independently of the plan; padding is -1."""
    r, n = worker.tp_rank, worker.tp_size
    out: State = {}

    def vocab(name: str) -> torch.Tensor:
        rows = -(-shape.vocab_size // 64) * 64 // n
        full = torch.full((rows * n, shape.hidden_size), -1, dtype=torch.int32)
        full[: shape.vocab_size] = state[name]
        return full.chunk(n)[r]

    def key_value(name: str) -> torch.Tensor:
        if n <= shape.num_query_groups:
            return state[name].chunk(n)[r]
        heads = state[name].view(shape.num_query_groups, shape.head_dim, *state[name].shape[1:])
        return heads.repeat_interleave(n // shape.num_query_groups, 0)[r]

    out["model.embed_tokens.weight"] = vocab("model.embed_tokens.weight")
    for layer in range(shape.num_layers):
        p = f"model.layers.{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            out[f"{p}.{norm}.weight"] = state[f"{p}.{norm}.weight"]
        for kind in ("weight", "bias") if shape.has_qkv_bias else ("weight",):
            a = f"{p}.self_attn"
            out[f"{a}.qkv_proj.{kind}"] = torch.cat(
                [
                    state[f"{a}.q_proj.{kind}"].chunk(n)[r],
                    key_value(f"{a}.k_proj.{kind}"),
                    key_value(f"{a}.v_proj.{kind}"),
                ]
            )
        if shape.has_qk_norm:
            for part in "qk":
                out[f"{p}.self_attn.{part}_norm.weight"] = state[f"{p}.self_attn.{part}_norm.weight"]
        out[f"{p}.self_attn.o_proj.weight"] = state[f"{p}.self_attn.o_proj.weight"].chunk(n, 1)[r]
        if shape.num_experts and layer not in shape.dense_layers:
            out[f"{p}.mlp.gate.weight"] = state[f"{p}.mlp.gate.weight"]
            er, en = worker.expert_tp_rank, worker.expert_tp_size
            names = [f"{p}.mlp.experts.{e}" for e in worker.experts]
            out[f"{p}.mlp.experts.routed_experts.w13_weight"] = torch.stack(
                [torch.cat([state[f"{e}.{k}_proj.weight"].chunk(en)[er] for k in ("gate", "up")]) for e in names]
            )
            out[f"{p}.mlp.experts.routed_experts.w2_weight"] = torch.stack(
                [state[f"{e}.down_proj.weight"].chunk(en, 1)[er] for e in names]
            )
        else:
            m = f"{p}.mlp"
            out[f"{m}.gate_up_proj.weight"] = torch.cat(
                [state[f"{m}.{k}_proj.weight"].chunk(n)[r] for k in ("gate", "up")]
            )
            out[f"{m}.down_proj.weight"] = state[f"{m}.down_proj.weight"].chunk(n, 1)[r]
    out["model.norm.weight"] = state["model.norm.weight"]
    if not shape.tied_embeddings:
        out["lm_head.weight"] = vocab("lm_head.weight")
    return out


def random_case(rng: random.Random) -> tuple[ModelShape, TrainingLayout, EngineLayout]:
    """A model and two layouts that both sides accept."""
    groups = rng.choice([1, 2, 4, 8])
    tp = rng.choice([t for t in (1, 2, 4) if t <= groups])
    pp, vpp = rng.choice([(1, 1), (2, 1), (4, 1), (2, 2)])
    engine = EngineLayout(
        tensor_parallel=rng.choice([1, 2, 4, 8]),
        data_parallel=rng.choice([1, 1, 2]),
        expert_parallel=rng.random() < 0.5,
    )
    moe = rng.random() < 0.4
    experts = rng.choice([4, 8]) if moe else 0
    dp = rng.choice([1, 2])
    ep = rng.choice([e for e in (1, 2, 4) if tp * dp % e == 0]) if moe else 1
    shape = ModelShape(
        model_type=rng.choice(["qwen3_moe"] if moe else ["qwen3", "qwen2", "llama"]),
        hidden_size=rng.choice([6, 8]),
        ffn_hidden_size=16 * rng.choice([1, 3]),
        num_layers=4,
        num_attention_heads=8 * rng.choice([1, 2]),
        num_query_groups=groups,
        head_dim=rng.choice([2, 3]),
        vocab_size=rng.choice([50, 64, 101, 300]),
        tied_embeddings=rng.random() < 0.5,
        has_qkv_bias=rng.random() < 0.3,
        has_qk_norm=rng.random() < 0.5,
        vocab_multiple=rng.choice([1, 16]),
        num_experts=experts,
        moe_ffn_hidden_size=16 * moe,
        num_experts_per_token=2 * moe,
        dense_layers=(1,) if moe and rng.random() < 0.3 else (),
    )
    training = TrainingLayout(
        tensor_parallel=tp,
        pipeline_parallel=pp,
        virtual_pipeline=vpp,
        data_parallel=dp,
        expert_parallel=ep,
    )
    return shape, training, engine


@pytest.mark.parametrize("seed", range(40))
def test_plan_gives_every_worker_what_vllm_would_load(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_module, "_ALONE_BYTES", random.Random(seed).choice([200, 1 << 20]))
    shape, training, engine = random_case(random.Random(seed))
    state = full_state(shape)
    held = training_shards(shape, training)
    workers = engine_workers(shape, engine)
    tensors = [engine_tensors(shape, worker, torch.float32) for worker in workers]
    plan = make_plan(shape, held, tensors, message_bytes=4 * random.Random(seed).choice([1, 97, 10**6]))
    got = execute(plan, [shards_of(shape, state, h) for h in held])
    for worker, mine in zip(workers, got, strict=True):
        wanted = loaded_by_vllm(shape, state, worker)
        assert mine.keys() == wanted.keys()
        for name, tensor in wanted.items():
            assert torch.equal(mine[name], tensor), (name, worker)
    assert plan.moved_bytes == plan.needed_bytes == sum(plan.received_by()) == sum(plan.sent_by)
    assert plan.moved_bytes == 4 * sum(int((t >= 0).sum()) for mine in got for t in mine.values())
    assert plan.whole_bytes == 0


@pytest.mark.parametrize("seed", range(8))
def test_tensors_that_an_engine_takes_whole_arrive_whole_and_are_counted(seed: int) -> None:
    shape, training, engine = random_case(random.Random(1000 + seed))
    state = full_state(shape)
    held = training_shards(shape, training)
    refused = ("qkv_proj", "w13_weight", "embed_tokens")

    tables = [engine_tensors(shape, w, torch.float32) for w in engine_workers(shape, engine)]
    names = [t.name for t in tables[0] if any(part in t.name for part in refused)]
    plan = make_plan(shape, held, [whole_tensors(table, shape, names) for table in tables])
    got = execute(plan, [shards_of(shape, state, h) for h in held])
    whole = {t.name for t in plan.tensors[0] if t.is_whole}
    parts = (".q_proj", ".k_proj", ".v_proj", "embed_tokens")
    assert whole == {n for n in state if any(part in n for part in parts) or _is_up(n)}
    for mine in got:
        assert all(torch.equal(mine[name], state[name]) for name in whole)
    assert plan.whole_bytes == 4 * sum(state[n].numel() for n in whole) * engine.num_workers
    assert plan.moved_bytes == plan.needed_bytes


def _is_up(name: str) -> bool:
    return ".experts." in name and ("gate_proj" in name or "up_proj" in name)


def test_replicas_share_the_work() -> None:
    shape = _dense()
    held = training_shards(shape, TrainingLayout(tensor_parallel=2, data_parallel=4))
    tensors = [engine_tensors(shape, w, torch.bfloat16) for w in engine_workers(shape, EngineLayout(tensor_parallel=2))]
    plans = make_plans(shape, held, [(tensors, None)] * 4)
    load = [sum(of_rank) for of_rank in zip(*(plan.sent_by for plan in plans), strict=True)]
    assert max(load) < 1.1 * sum(load) / len(load)
    # Four copies of the model and four engines: one feeds each, so two ranks talk to an engine and six do not.
    assert [plan.sources for plan in plans] == [(0, 1), (2, 3), (4, 5), (6, 7)]
    assert all(plan.moved_bytes == plan.needed_bytes for plan in plans)


@pytest.mark.parametrize(
    ("replicas", "engines", "workers", "senders"),
    [
        (4, 1, 8, 8),  # eight cards take what two could send: all copies are needed
        (4, 1, 2, 2),
        (4, 2, 4, 4),  # two copies each
        (2, 5, 2, 4),  # five engines over two copies would burden one of them by half more: both feed all
    ],
)
def test_as_few_ranks_feed_an_engine_as_keep_up_with_it(
    replicas: int, engines: int, workers: int, senders: int
) -> None:
    shape = _dense(num_query_groups=8)
    held = training_shards(shape, TrainingLayout(tensor_parallel=2, data_parallel=replicas))
    side = [
        engine_tensors(shape, w, torch.bfloat16) for w in engine_workers(shape, EngineLayout(tensor_parallel=workers))
    ]
    plans = make_plans(shape, held, [(side, None)] * engines, message_bytes=500)
    assert {len(plan.sources) for plan in plans} == {senders}
    state = full_state(shape)
    for plan in plans:
        got = execute(plan, [shards_of(shape, state, h) for h in held])
        for worker, mine in zip(engine_workers(shape, EngineLayout(tensor_parallel=workers)), got, strict=True):
            assert all(torch.equal(mine[name], wanted) for name, wanted in loaded_by_vllm(shape, state, worker).items())


def test_what_is_small_shares_messages_though_large_pieces_lie_between(monkeypatch: pytest.MonkeyPatch) -> None:
    """A norm of every layer between matrices that travel alone: one message of norms, in the first round."""
    monkeypatch.setattr(plan_module, "_ALONE_BYTES", 200)
    shape = _dense(has_qk_norm=False)
    held = training_shards(shape, TrainingLayout())
    plan = make_plan(shape, held, [engine_tensors(shape, WorkerLayout(), torch.bfloat16)])
    small = [m for m in plan.messages if m.num_bytes < 200 or len(m.copies) > 1]
    assert [len(m.copies) for m in small] == [2 * shape.num_layers + 1]
    assert plan.messages.index(small[0]) <= 2


def test_sources_take_turns() -> None:
    shape = _dense()
    held = training_shards(shape, TrainingLayout(tensor_parallel=2, pipeline_parallel=2))
    tensors = [engine_tensors(shape, w, torch.bfloat16) for w in engine_workers(shape, EngineLayout(tensor_parallel=2))]
    plan = make_plan(shape, held, tensors, message_bytes=2000)
    pairs = len(plan.pairs())
    assert {m.source for m in plan.messages[:pairs]} == {0, 1, 2, 3}, "every pair has one message in a round"
    assert all(m.num_bytes < 2 * 2000 for m in plan.messages)


def test_what_cannot_be_planned_is_refused_by_name() -> None:
    shape = _dense()
    held = training_shards(shape, TrainingLayout(tensor_parallel=2))
    del held[1]["decoder.layers.1.mlp.linear_fc2.weight"]
    tensors = [engine_tensors(shape, w, torch.bfloat16) for w in engine_workers(shape, EngineLayout())]
    with pytest.raises(ValueError, match=r"layers.1.mlp.down_proj.weight: the training ranks hold 768 of the 1536"):
        make_plan(shape, held, tensors)
    with pytest.raises(ValueError, match="4 layers cannot be cut into 3 equal pipeline chunks"):
        training_shards(shape, TrainingLayout(pipeline_parallel=3))
    with pytest.raises(ValueError, match="8 attention heads cannot be divided by 3"):
        engine_workers_tensors = [
            engine_tensors(shape, w, torch.bfloat16) for w in engine_workers(shape, EngineLayout(tensor_parallel=3))
        ]
        assert engine_workers_tensors


def _dense(**changes: Any) -> ModelShape:
    return ModelShape(**{
        "model_type": "qwen3", "hidden_size": 32, "ffn_hidden_size": 48, "num_layers": 4, "num_attention_heads": 8,
        "num_query_groups": 4, "head_dim": 6, "vocab_size": 101, "tied_embeddings": False, "has_qkv_bias": False,
        "has_qk_norm": True, "vocab_multiple": 16, **changes})  # fmt: skip
