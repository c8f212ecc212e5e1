"""The policy as the trainer sees it: score sequences, take an optimiser step, show its shards.

Everything runs through Megatron's own pipeline schedule, DistributedDataParallel and optimizer.  All methods are
collective: every rank of the model calls them with its own data-parallel share.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_rest.data.batching import pad_microbatch
from megatron_rest.mcore.build import ParallelContext
from megatron_rest.mcore.context_parallel import gather, shard
from megatron_rest.mcore.forward_step import SCORES, forward_step, score_step
from megatron_rest.mcore.offload import Offload
from megatron_rest.mcore.output import at_temperature, measuring_beta
from megatron_rest.mcore.precision import dequantised, settle_scales, untouched_scales, without_fp8
from megatron_rest.mcore.settings import resolved
from megatron_rest.mcore.step_loss import PolicyLoss
from megatron_rest.types import MicroBatch, TrainBatch

__all__ = ["MegatronPolicy", "Scores", "UpdateReport"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Scores:
    """Scoring pass of one microbatch, label-aligned; where loss_mask is False 0, unless the head projects all rows."""

    log_probs: Tensor  # float32 [T], nats
    entropy: Tensor  # float32 [T], nats
    beta: Tensor | None = None  # float32 [T], squared score norm of the output layer (mcore.output), if asked for
    sum_p2: Tensor | None = None  # float32 [T], sum of squared probabilities, beside beta


@dataclass(frozen=True, kw_only=True, slots=True)
class UpdateReport:
    """What one optimiser step did."""

    loss: float  # loss_sum / num_tokens over the global batch
    grad_norm: float
    lr: float
    is_skipped: bool  # the weights are unchanged
    metrics: Mapping[str, tuple[float, float]]  # (sum, count) over the global batch
    nonfinite: tuple[str, ...] = ()  # why it was skipped: the loss, or gradients by parameter and rank
    scores: tuple[Scores, ...] = ()  # of its microbatches before the step, if asked for


_NAMES_OF_A_RANK, _NAMES = 2, 6  # of what is not finite: enough to look at, and one NaN soon is everywhere
_LAYER = re.compile(r"^(decoder\.layers\.)(\d+)")
_EXPERT = re.compile(r"(\.mlp\.experts\.(?:local_experts\.|linear_fc[12]\.weight))(\d+)")


class MegatronPolicy:
    """Model chunks of this rank with their optimiser.

    Args:
        chunks: DDP-wrapped model chunks (one, or one per virtual pipeline stage).
        optimizer: Megatron optimiser; None for a policy that only scores.
        scheduler: Megatron ``OptimizerParamScheduler``; None with no optimiser.
        context: process groups and ranks.
    """

    def __init__(self, *, chunks: Sequence[Any], optimizer: Any, scheduler: Any, context: ParallelContext) -> None:
        self.chunks = list(chunks)
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.context = context
        self._offload = Offload(self.chunks, optimizer) if optimizer is not None else None

    @property
    def modules(self) -> list[Any]:
        """Unwrapped ``GPTModel`` chunks."""
        return [getattr(chunk, "module", chunk) for chunk in self.chunks]

    def settings(self) -> dict[str, Any]:
        """Megatron's own settings of model, DDP and optimiser, all fields, as plain values."""
        chunk = self.chunks[0]
        found = {"transformer": resolved(self.modules[0].config)}
        if hasattr(chunk, "ddp_config"):
            found["ddp"] = resolved(chunk.ddp_config)
        if self.optimizer is not None:
            found["optimizer"] = resolved(self.optimizer.config)
        return found

    def offload(self) -> int:
        """Gradients and optimiser state leave the device until :meth:`restore`; returns the bytes that it gave back.

        The gradients are forgotten.  What needs either calls ``restore`` itself.
        """
        return 0 if self._offload is None else self._offload.leave()

    def restore(self) -> None:
        """Gradients and optimiser state on the device, where :meth:`offload` has taken them away."""
        if self._offload is not None:
            self._offload.come_back()

    def score(
        self,
        microbatches: Sequence[MicroBatch],
        *,
        with_beta: bool = False,
        temperature: float | None = None,
        in_bf16: bool = False,
    ) -> list[Scores]:
        """Log-probs and entropy of every label, without gradients; the same list on every pipeline and tensor rank.

        ``with_beta`` adds the score norms that :func:`megatron_rest.mcore.output.measuring_beta` defines, and sum p^2;
        ``temperature`` replaces the sampling temperature; ``in_bf16`` leaves FP8 products out.  FP8 scales are used as
        training left them, and left as they are.

        Collectives: the pipeline's forward communication, one all-gather per microbatch over TP on the last stage (two
        with beta under sequence parallelism), one all-gather of ``[2, sum T / CP]`` float32 over CP and one broadcast
        of ``[2, sum T]`` over PP (``[4, ...]`` with beta).
        """
        for chunk in self.chunks:
            chunk.eval()
        with torch.no_grad(), untouched_scales(self.modules), ExitStack() as measuring:
            if in_bf16:
                measuring.enter_context(without_fp8(self.modules))
            for module in self.modules:
                if with_beta:
                    measuring.enter_context(measuring_beta(module))
                if temperature is not None:
                    measuring.enter_context(at_temperature(module, temperature))
            outputs = self._schedule(score_step, microbatches, forward_only=True)
        return self._scores(outputs, microbatches, rows=4 if with_beta else 2)

    def _scores(self, outputs: Sequence[Tensor], microbatches: Sequence[MicroBatch], *, rows: int) -> list[Scores]:
        """``[rows, T / CP]`` of each microbatch from the last stage -> scores of whole sequences on every rank."""
        context = self.context
        padded = self._of_one_length(microbatches)
        lengths = [len(m.token_ids) for m in padded]
        flat = torch.empty(rows, sum(lengths), dtype=torch.float32, device=context.device)
        if context.is_last_stage:
            sequences = torch.cat([m.cu_seqlens.diff() for m in padded])
            flat.copy_(gather(torch.cat(list(outputs), dim=1), sequences, context.cp_group))
        if context.pp_size > 1:
            dist.broadcast(flat, src=context.last_stage_rank, group=context.pp_group)
        parts = [part[:, : len(m.token_ids)] for part, m in zip(flat.split(lengths, dim=1), microbatches, strict=True)]
        names = ("log_probs", "entropy", "beta", "sum_p2")[:rows]
        return [Scores(**dict(zip(names, part, strict=True))) for part in parts]

    def settle_scales(self, microbatches: Sequence[MicroBatch]) -> None:
        """First scales of delayed FP8 scaling, from two forward passes (``mcore.precision.settle_scales``).

        Called once before anything is scored; harmless where scales have a history already.
        """
        for chunk in self.chunks:
            chunk.eval()
        settle_scales(self.modules, lambda: self._schedule(score_step, microbatches, forward_only=True))

    def update(self, batch: TrainBatch, loss: PolicyLoss, *, with_scores: bool = False) -> UpdateReport:
        """One optimiser step over the global batch of which ``batch`` is this replica's share.

        ``with_scores`` reports what :meth:`score` would have said before the step, from the step's own forward pass.

        Skipped on every rank if the loss or any gradient on any rank is not finite: neither weights nor the optimiser's
        state nor the learning rate's schedule move.  Collectives besides Megatron's: those of the metrics, and one MAX
        all-reduce of an integer over all ranks; names travel only if there are any.  Scores travel as those of
        :meth:`score`.
        """
        if self.optimizer is None:
            raise RuntimeError("this policy was built without an optimiser")
        self.restore()
        for chunk in self.chunks:
            chunk.train()
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        step = partial(forward_step, loss=loss, totals=batch.totals, with_scores=with_scores)
        results = self._schedule(step, batch.microbatches, forward_only=False)
        scores: list[Scores] = []
        if with_scores:
            scores = self._scores([result.pop(SCORES) for result in results], batch.microbatches, rows=2)
        metrics = self._reduce_metrics(results)
        loss_sum, count = metrics.pop("loss")
        nonfinite = self._nonfinite_gradients()
        if not math.isfinite(loss_sum):
            nonfinite = ("loss", *nonfinite)
        lr = self.optimizer.param_groups[0]["lr"]
        is_applied, grad_norm = False, math.nan
        if not nonfinite:
            is_applied, grad_norm, _ = self.optimizer.step()
        if is_applied:
            self.scheduler.step(increment=1)
        return UpdateReport(
            loss=loss_sum / max(count, 1.0),
            grad_norm=float(grad_norm or 0.0),
            lr=float(lr),
            is_skipped=not is_applied,
            metrics=metrics,
            nonfinite=nonfinite,
            scores=tuple(scores),
        )

    def _nonfinite_gradients(self) -> tuple[str, ...]:
        """Gradients that hold NaN or infinity, a few of each rank, the same on every rank."""
        context = self.context
        buffers = [b for chunk in self.chunks for b in (*chunk.buffers, *chunk.expert_parallel_buffers)]
        flag = torch.zeros(1, dtype=torch.int32, device=context.device)
        if not all(_is_finite(buffer.grad_data) for buffer in buffers):
            flag += 1
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        if not flag.item():
            return ()
        mine = []
        for name, parameter in self.named_parameters():
            gradient = getattr(parameter, "main_grad", None)
            if gradient is not None and not _is_finite(gradient):
                count = int((~gradient.isfinite()).sum())
                mine.append(f"{count} of {gradient.numel()} gradients of {name} on rank {context.rank}")
        found: list[Any] = [None] * context.world_size
        dist.all_gather_object(found, mine[:_NAMES_OF_A_RANK])
        return tuple(name for names in found for name in names)[:_NAMES]

    def gradients(
        self, batch: TrainBatch, loss: PolicyLoss
    ) -> tuple[Mapping[str, tuple[float, float]], Mapping[str, Tensor]]:
        """Metrics and gradient of ``batch`` as :meth:`update` would take it, without taking it.

        The gradient, divided by the loss tokens of ``batch`` over all ranks, under the names of
        :meth:`named_parameters`: live buffers, good until :meth:`forget_gradients`.  With a distributed optimiser a
        replica's buffer is whole only where the others contributed nothing (empty microbatches).
        """
        for chunk in self.chunks:
            chunk.train()
        self.restore()
        self.forget_gradients()
        step = partial(forward_step, loss=loss, totals=batch.totals)
        with untouched_scales(self.modules):
            results = self._schedule(step, batch.microbatches, forward_only=False)
        found = {name: parameter.main_grad for name, parameter in self.named_parameters()}  # type: ignore[attr-defined]
        return self._reduce_metrics(results), found

    def forget_gradients(self) -> None:
        """All gradients 0, as before a step."""
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        if self.optimizer is not None:
            self.optimizer.zero_grad()

    def named_shards(self) -> Mapping[str, Tensor]:
        """This rank's parameter shards by Megatron name, with GLOBAL layer and expert numbers.

        Live tensors, not copies; only FP8 parameters are dequantised, each when it is asked for.
        """
        return _Shards(dict(self.named_parameters()))

    def gather_parameters(self) -> None:
        """Let this rank's copy be that of the last update; needed before it is read other than by a forward pass.

        Only with ``megatron.ddp.overlap_param_gather`` is there anything to do, and then only after an update: an
        all-gather over data-parallel ranks, which all call this together.
        """
        for chunk in self.chunks:
            if getattr(getattr(chunk, "ddp_config", None), "overlap_param_gather", False):
                for group in chunk.bucket_groups + chunk.expert_parallel_bucket_groups:
                    if group.param_gather_handle is not None or not group.param_gather_dispatched:
                        group.start_param_sync(force_sync=True)

    def named_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """This rank's parameters under the names of ``model_map``; as :meth:`gather_parameters`."""
        self.gather_parameters()
        for module in self.modules:
            layers = _layer_offset(module)
            experts = (module.config.num_moe_experts or 0) // self.context.ep_size * self.context.ep_rank
            for name, parameter in module.named_parameters():
                yield _global_name(name, layer_offset=layers, expert_offset=experts), parameter

    def _schedule(
        self, step: Callable[..., Any], microbatches: Sequence[MicroBatch], *, forward_only: bool
    ) -> list[Any]:
        context = self.context
        whole = self._of_one_length(microbatches)
        on_device = [shard(m, cp_rank=context.cp_rank, cp_size=context.cp_size).to(context.device) for m in whole]
        iterators: list[Iterator[MicroBatch]] = [iter(on_device) for _ in self.chunks]
        interleaved = len(self.chunks) > 1
        return get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=iterators if interleaved else iterators[0],
            model=self.chunks if interleaved else self.chunks[0],
            num_microbatches=len(microbatches),
            seq_length=max(len(m.token_ids) for m in whole),  # what stages send each other is of this length
            micro_batch_size=1,
            forward_only=forward_only,
        )

    def _of_one_length(self, microbatches: Sequence[MicroBatch]) -> list[MicroBatch]:
        """Padded to the longest if pipeline stages exchange them: else every message would be preceded by its shape."""
        longest = max(len(m.token_ids) for m in microbatches)
        return [pad_microbatch(m, longest) if self.context.pp_size > 1 else m for m in microbatches]

    def _reduce_metrics(self, results: Iterable[Mapping[str, Tensor]]) -> dict[str, tuple[float, float]]:
        """Sum (sum, count) pairs over microbatches, DP and CP on the last stage, then tell the other stages."""
        context = self.context
        payload: list[Any] = [None]
        if context.is_last_stage:
            sums: dict[str, Tensor] = {}
            for result in results:
                for name, pair in result.items():
                    sums[name] = sums[name] + pair.double() if name in sums else pair.double()
            names = sorted(sums)
            table = torch.stack([sums[n] for n in names]).to(context.device)
            dist.all_reduce(table, group=context.dp_cp_group)
            payload = [{n: (float(a), float(b)) for n, (a, b) in zip(names, table.tolist(), strict=True)}]
        if context.pp_size > 1:
            dist.broadcast_object_list(payload, src=context.last_stage_rank, group=context.pp_group)
        return dict(payload[0])


class _Shards(Mapping[str, Tensor]):
    """Parameters as the plain tensors that others can pack, send and compare."""

    def __init__(self, parameters: Mapping[str, torch.nn.Parameter]) -> None:
        self._parameters = parameters

    def __getitem__(self, name: str) -> Tensor:
        return dequantised(self._parameters[name].data)

    def __iter__(self) -> Iterator[str]:
        return iter(self._parameters)

    def __len__(self) -> int:
        return len(self._parameters)


def _is_finite(values: Tensor) -> bool:
    """Without a temporary of its size."""
    return values.numel() == 0 or bool(torch.stack(torch.aminmax(values)).isfinite().all())


def _layer_offset(module: Any) -> int:
    """Global number of the first layer of this chunk (Megatron numbers layers from 1, globally)."""
    layers = module.decoder.layers
    return layers[0].layer_number - 1 if len(layers) else 0


def _global_name(name: str, *, layer_offset: int, expert_offset: int) -> str:
    name = _LAYER.sub(lambda found: f"{found[1]}{int(found[2]) + layer_offset}", name)
    return _EXPERT.sub(lambda found: f"{found[1]}{int(found[2]) + expert_offset}", name)
