"""The receiving side of a transfer, inside vLLM's worker: the transfer engines ``local`` and ``gloo``.

vLLM finds :func:`register` through the ``vllm.general_plugins`` entry point, in every process it starts.  Both engines
take full tensors under HF names and load them through vLLM's layerwise reload (which cuts them for TP, quantises and
packs them, and keeps addresses), with two repairs that are needed on CPU and do nothing elsewhere:

* a tied ``lm_head`` owns a packed copy of the embedding that a reload leaves as it was: it is packed again;
* the MoE kernel packs its weights when it is first built only: it is dropped before a reload, and built anew.

Without them logits are silently those of the old head, or garbage.  Each tensor's digest is computed here over the
very bytes handed to ``load_weights``; the sender fetches the digests (:class:`WorkerExtension`) and compares them
with its own.

Only vLLM's worker-side base class is used; it has been the same since 0.25.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

from megatron_rest.weight_sync.digest import digest
from megatron_rest.weight_sync.gloo import bucket_ranges, join_group, num_bytes

__all__ = ["GlooWeightTransferEngine", "LocalWeightTransferEngine", "WorkerExtension", "register"]


class _ReloadEngine(WeightTransferEngine):
    """Layerwise reload of full tensors, repairs, and a record of what came."""

    digests: dict[str, tuple[int, int]]
    loaded: set[str]

    def start_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        self.digests, self.loaded = {}, set()
        _drop_packed_experts(self.model)
        initialize_layerwise_reload(self.model)

    def finish_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        finalize_layerwise_reload(self.model, self.model_config)
        _repack_tied_head(self.model)

    def load(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Hand tensors to the model, keeping the digest of each.  vLLM may keep views of them until the update ends."""
        model: Any = self.model
        loaded = model.load_weights(self._recorded(weights))
        self.loaded |= set(loaded or ())

    def missing(self) -> list[str]:
        """Parameters that the last pass left at their old values."""
        names = {name for name, _ in self.model.named_parameters()}
        if getattr(self.model.config, "tie_word_embeddings", False):
            names.discard("lm_head.weight")
        return sorted(names - self.loaded)

    def _recorded(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in weights:
            self.digests[name] = digest(tensor)
            yield name, tensor

    def shutdown(self) -> None:
        pass


@dataclass(kw_only=True)
class LocalInitInfo(WeightTransferInitInfo):
    """Nothing to connect."""


@dataclass
class LocalUpdateInfo(WeightTransferUpdateInfo):
    weights: Any  # iterable of (HF name, full tensor), by reference


class LocalWeightTransferEngine(_ReloadEngine):
    """For an engine in the sender's process: tensors by reference, pulled as the sender gathers them."""

    init_info_cls = LocalInitInfo
    update_info_cls = LocalUpdateInfo

    def init_transfer_engine(self, init_info: LocalInitInfo) -> None:
        pass

    def receive_weights(self, update_info: LocalUpdateInfo) -> None:
        self.load(update_info.weights)


@dataclass(kw_only=True)
class GlooInitInfo(WeightTransferInitInfo):
    master_address: str
    master_port: int
    rank_offset: int  # ranks before the first worker: the sender
    world_size: int
    bucket_bytes: int
    timeout_seconds: int


@dataclass
class GlooUpdateInfo(WeightTransferUpdateInfo):
    names: list[str]
    dtype_names: list[str]
    shapes: list[list[int]]


class GlooWeightTransferEngine(_ReloadEngine):
    """For engine processes without a common accelerator: buckets of bytes broadcast over a group of its own."""

    init_info_cls = GlooInitInfo
    update_info_cls = GlooUpdateInfo
    group: Any = None
    bucket_bytes = 0

    def init_transfer_engine(self, init_info: GlooInitInfo) -> None:
        parallel = self.parallel_config
        rank = init_info.rank_offset + parallel.data_parallel_index * parallel.world_size + parallel.rank
        self.bucket_bytes = init_info.bucket_bytes
        self.group = join_group(
            init_info.master_address, init_info.master_port, rank, init_info.world_size, init_info.timeout_seconds
        )

    def receive_weights(self, update_info: GlooUpdateInfo) -> None:
        if self.group is None:
            raise RuntimeError("the gloo transfer engine is not connected: init_weight_transfer_engine comes first")
        dtypes = [getattr(torch, name) for name in update_info.dtype_names]
        sizes = [num_bytes(shape, dtype) for shape, dtype in zip(update_info.shapes, dtypes, strict=True)]
        for indices in bucket_ranges(sizes, self.bucket_bytes):
            # Fresh memory every time: vLLM keeps views of it until a layer is complete.
            buffer = torch.empty(sum(sizes[i] for i in indices), dtype=torch.uint8)
            self.group.broadcast(buffer, 0).wait()
            parts = buffer.split([sizes[i] for i in indices])
            self.load(
                (update_info.names[i], _typed(part, dtypes[i], update_info.shapes[i]).to(self.device))
                for i, part in zip(indices, parts, strict=True)
            )

    def shutdown(self) -> None:
        self.group = None


class WorkerExtension:
    """Methods that vLLM's worker gains as RPCs (``worker_extension_cls``); no name may clash with a worker's own."""

    weight_transfer_engine: _ReloadEngine

    def received_weights(self) -> dict[str, Any]:
        """Digests of what the last pass handed to the model, and parameters that it left as they were."""
        engine = self.weight_transfer_engine
        return {"digests": dict(engine.digests), "missing": engine.missing()}


def register() -> None:
    """Entry point of vLLM's plugin loader; may be called several times in a process."""
    known = WeightTransferEngineFactory._registry
    for name, engine in (("local", LocalWeightTransferEngine), ("gloo", GlooWeightTransferEngine)):
        if name not in known:
            WeightTransferEngineFactory.register_engine(name, engine)


def _typed(part: Tensor, dtype: torch.dtype, shape: list[int]) -> Tensor:
    if part.storage_offset() % dtype.itemsize:
        part = part.clone()  # a float behind an odd number of half floats cannot be viewed in place
    return part.view(dtype).view(shape)


def _repack_tied_head(model: torch.nn.Module) -> None:
    """CPU linears hold a packed copy of their weight; that of a tied head was packed from the old embedding."""
    head: Any = getattr(model, "lm_head", None)
    embedding: Any = getattr(getattr(model, "model", None), "embed_tokens", None)
    is_tied = getattr(getattr(model, "config", None), "tie_word_embeddings", False)
    if head is None or embedding is None or not is_tied or not hasattr(head, "cpu_linear"):
        return
    if head.weight.data_ptr() != embedding.weight.data_ptr():
        head.weight.data.copy_(embedding.weight.data)
    head.quant_method.process_weights_after_loading(head)


def _drop_packed_experts(model: torch.nn.Module) -> None:
    """Let the CPU MoE kernel be built, and its weights packed, again after this reload."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    for module in model.modules():
        method: Any = getattr(module, "quant_method", None)
        if getattr(method, "moe_kernel", None) is not None:
            method.moe_kernel = None
