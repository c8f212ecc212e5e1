"""One rank of many without memory: the real build, schedule, update and checkpoint on tensors of the meta device.

Torch's fake process group stands for the other ranks, and what a CPU cannot do for them is replaced by a stand-in, each
named below: collectives and messages move nothing, attention keeps what a flash kernel keeps, and every expert gets as
many tokens.  What is run is the code of training: ``build``, ``MegatronPolicy._schedule`` with Megatron's own schedule,
DistributedDataParallel, the optimiser, packing, head and loss.

It changes Megatron and torch.distributed for the whole process: call it in a process of its own.
"""

from __future__ import annotations

import contextlib
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rest.config import RestConfig
from megatron_rest.errors import RunError
from megatron_rest.mcore import cpu
from megatron_rest.mcore.tensor_memory import TensorMemory
from megatron_rest.model_fit import check_model
from megatron_rest.model_map import ModelShape
from megatron_rest.types import BatchTotals, MicroBatch, TokenRegion, TrainSample

__all__ = ["DryRank", "as_rank", "dry_rank"]

_META = torch.device("meta")


@dataclass(frozen=True, kw_only=True, slots=True)
class DryRank:
    """What one rank holds; bytes."""

    stage: int
    parameters: int
    weights: int
    gradients: int
    optimizer: int  # masters and moments
    update: int  # more at the peak of an update's passes
    saving: int  # more at the peak of describing a checkpoint that is written as it lies
    waits: dict[str, float]  # of the host for a value of the device, a microbatch, by "file:line" of who looks


def as_rank(rank: int, world_size: int) -> None:
    """This process as rank ``rank`` of ``world_size``, the others not there: collectives return at once."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        raise RunError("simulate: this process is a rank of a job already; a simulation wants one of its own")
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())


def dry_rank(config: RestConfig, shape: ModelShape, *, rank: int, world_size: int, microbatches: int = 2) -> DryRank:
    """Build, one update's passes and a checkpoint's description of ``rank``; FP8 must be off (its GPU is not here).

    ``microbatches`` times the pipeline's stages go through, full.
    """
    from megatron_rest.algorithms import RestPolicyLoss
    from megatron_rest.data.alignment import packing_alignment
    from megatron_rest.data.batching import make_microbatch
    from megatron_rest.mcore import build, checkpoint
    from megatron_rest.mcore.forward_step import forward_step
    from megatron_rest.mcore.optimizer_state import prepare_for_loading
    from megatron_rest.mcore.policy import MegatronPolicy

    check_model(shape, config)
    as_rank(rank, world_size)
    _stand_in(shape)
    with _megatron_on_meta():
        context = replace(build.initialize(config), device=_META)
        settings = build.transformer_config(shape, config)
        settings.use_cpu_initialization, settings.perform_initialization = False, False
        memory = TensorMemory("meta")
        with memory:
            with _META:
                chunks = build.build_chunks(shape, config, context, settings)
                weights = memory.alive
                wrapped = build.wrap(chunks, settings, config, context)
                gradients = memory.alive - weights
                adam, scheduler = build.build_optimizer(
                    wrapped, settings, config, optimizer=config.optimizer, num_updates=100
                )
            prepare_for_loading(adam)  # moments; the count of steps is the host's
            optimizer = memory.alive - weights - gradients
            settings.finalize_model_grads_func = _nothing  # its coalesced reduction has no meta kernel
            policy = MegatronPolicy(chunks=wrapped, optimizer=adam, scheduler=scheduler, context=context)
            alignment = packing_alignment(config.precision.recipe, config.parallel)
            one = make_microbatch(_samples(config), alignment=alignment)
            rows = len(one.token_ids)
            one = one.with_scores(old_log_probs=one.rollout_log_probs, token_weights=torch.ones(rows))
            totals = BatchTotals(num_tokens=1.0, num_sequences=1.0, weight_sum=1.0)
            before = memory.mark()
            for chunk in policy.chunks:
                chunk.train()
                chunk.zero_grad_buffer()
            step = partial(forward_step, loss=RestPolicyLoss(config.loss), totals=totals)
            through = [one] * (microbatches * context.pp_size)
            policy._schedule(step, through, forward_only=False)
            update = memory.peak - before
            before = memory.mark()
            checkpoint._sharded_state(policy, is_loading=False, form=checkpoint.AS_IT_LIES)
            saving = memory.peak - before
        count = sum(p.numel() for chunk in wrapped for p in chunk.parameters())
    return DryRank(
        stage=context.pp_rank,
        parameters=count,
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        update=update,
        saving=saving,
        waits={place: count / len(through) for place, count in _WAITS.items()},
    )


def _samples(config: RestConfig) -> list[TrainSample]:
    """Sequences of one length, at most the largest, half of them prompt, that fill a microbatch."""
    tokens = config.trainer.max_tokens_per_microbatch
    count = -(-tokens // config.model.max_sequence_length)
    length = tokens // count
    mask = np.arange(length + 1) > length // 2
    return [
        TrainSample(
            token_ids=np.ones(length + 1, np.int32),
            loss_mask=mask,
            region_ids=np.where(mask, int(TokenRegion.THINK), int(TokenRegion.CONTEXT)).astype(np.int8),
            rollout_log_probs=np.zeros(length + 1, np.float32),
            advantage=1.0,
            sequence_id=i,
        )
        for i in range(count)
    ]


# Stand-ins ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _megatron_on_meta() -> Iterator[None]:
    """What Megatron asks of "cuda" lands on the meta device."""
    cpu.enable()
    before, cpu._CPU = cpu._CPU, _META
    try:
        yield
    finally:
        cpu._CPU = before


def _stand_in(shape: ModelShape) -> None:
    """Everything that needs data or another rank, for the rest of this process."""
    cpu.enable()
    warnings.simplefilter("ignore", FutureWarning)  # names of collectives that Megatron knows by their older ones
    _collectives()
    _host_bounds()
    _tensor_types()
    _flash_attention()
    if shape.num_experts:
        _even_routing(shape.num_experts_per_token)


class _Done:
    def wait(self, *args: Any, **kwargs: Any) -> bool:
        return True

    def is_completed(self) -> bool:
        return True


_DONE = _Done()


def _nothing(*args: Any, **kwargs: Any) -> Any:
    return _DONE


def _collectives() -> None:
    import torch.distributed.distributed_c10d as c10d
    from megatron.core.distributed import param_and_grad_buffer as buffers

    names = (
        "all_gather", "all_gather_into_tensor", "all_reduce", "all_to_all", "all_to_all_single", "barrier", "broadcast",
        "irecv", "isend", "recv", "reduce", "reduce_scatter", "reduce_scatter_tensor", "send", "_all_gather_base",
        "_reduce_scatter_base",
    )  # fmt: skip
    for module in (dist, c10d):
        for name in names:
            if hasattr(module, name):
                setattr(module, name, _nothing)
        module.batch_isend_irecv = lambda operations: [_DONE]  # type: ignore[attr-defined]
        module.all_gather_object = _all_alike  # type: ignore[attr-defined]
        module.broadcast_object_list = _nothing  # type: ignore[attr-defined]
        module._coalescing_manager = _coalescing  # type: ignore[attr-defined]
    # What travels beside the computation, under names that it has by now.
    buffers.dist_all_gather_func = buffers.dist_reduce_scatter_func = _nothing
    buffers._coalescing_manager = _coalescing


def _all_alike(values: list[Any], value: Any, group: Any = None) -> None:
    """This rank stands for all."""
    values[:] = [value] * len(values)


@contextlib.contextmanager
def _coalescing(*args: Any, **kwargs: Any) -> Iterator[Any]:
    yield _DONE


_WAITS: Counter[str] = Counter()
_LOOKS = frozenset(
    {Tensor.tolist, Tensor.item, Tensor.__bool__, Tensor.__int__, Tensor.__index__, Tensor.__float__, Tensor.cpu}
)
_OF_CPU = "mcore/attention.py"  # attention of a CPU; the kernel that it stands for reads bounds where they lie


def _note_wait() -> None:
    """By whom: the innermost caller that is neither this module nor torch's."""
    for frame in reversed(traceback.extract_stack()):
        if frame.filename != __file__ and "/torch/" not in frame.filename:
            if not frame.filename.endswith(_OF_CPU):
                _WAITS[f"{'/'.join(frame.filename.split('/')[-2:])}:{frame.lineno}"] += 1
            return


class _Bounds(Tensor):
    """Bounds of sequences: on the host here, on the device in a run, where each look at a value waits for it."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _LOOKS:
            _note_wait()
        return super().__torch_function__(func, types, args, kwargs or {})


def _host_bounds() -> None:
    """Bounds of sequences are looked at by the host, so they stay there; the looks are counted.

    A look at any other tensor ends the run, since those of the meta device have no values.
    """

    def to(self: MicroBatch, device: Any) -> MicroBatch:
        stay = ("cu_seqlens", "active_rows", "parents")
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in stay}
        moved: dict[str, Any] = {name: v.to(_META) for name, v in values.items() if isinstance(v, Tensor)}
        there = replace(self, **moved)
        object.__setattr__(there, "cu_seqlens", self.cu_seqlens.as_subclass(_Bounds))
        return there

    MicroBatch.to = to  # type: ignore[method-assign]


def _tensor_types() -> None:
    """Megatron's optimiser compares with 'torch.cuda.FloatTensor'."""
    real = Tensor.type

    def type_(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        out = real(self, *args, **kwargs)
        is_asked = not args and not kwargs and self.device.type == "meta"
        return out.replace("torch.meta.", "torch.cuda.", 1) if is_asked else out

    Tensor.type = type_  # type: ignore[method-assign,assignment]


class _Flash(torch.autograd.Function):
    """What a flash kernel keeps: queries, keys, values, the output and a statistic a row and head."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out, statistics = torch.empty_like(query), query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, statistics)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        query, key, value, *_ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _flash_attention() -> None:
    import megatron_rest.mcore.attention as attention

    attention._causal_attention = lambda query, key, value, scale: _Flash.apply(query, key, value)


def _even_routing(top_k: int) -> None:
    """Split sizes and permutations depend on data that is not there."""
    import megatron.core.transformer.moe.token_dispatcher as dispatcher

    rows = 0

    def host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        if not isinstance(tensor, Tensor) or tensor.device.type != "meta":
            return tensor
        even = np.full(tuple(tensor.shape), rows // tensor.numel(), np.int64)
        return even if as_numpy else torch.from_numpy(even)

    real = dispatcher.MoEAlltoAllTokenDispatcher.preprocess

    def preprocess(self: Any, routing_map: Tensor) -> Any:
        nonlocal rows
        rows = routing_map.shape[0] * top_k
        return real(self, routing_map)

    synchronize = dispatcher.MoEAlltoAllTokenDispatcher._maybe_dtoh_and_synchronize

    def maybe_wait(self: Any, point: str, tokens_per_expert: Any = None) -> Any:
        if point == self.cuda_sync_point:  # one wait for all that was copied
            _note_wait()
        return synchronize(self, point, tokens_per_expert)

    def permute(tokens: Tensor, routing_map: Tensor, probs: Tensor | None = None, **options: Any) -> Sequence[Any]:
        count = tokens.shape[0] * top_k
        order = torch.empty(count, dtype=torch.int64, device=_META)
        chosen = None if probs is None else probs.T.contiguous().view(-1).index_select(0, order)
        return tokens.index_select(0, order), chosen, order

    dispatcher.maybe_move_tensor_to_cpu = host
    dispatcher.MoEAlltoAllTokenDispatcher.preprocess = preprocess
    dispatcher.MoEAlltoAllTokenDispatcher._maybe_dtoh_and_synchronize = maybe_wait
    dispatcher.permute = permute
