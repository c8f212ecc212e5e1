"""The receiving side of a transfer, inside vLLM's worker: its transfer engines, one for each transport of ours.

Importing this module registers them, and every process of vLLM imports it before it looks for one: it names the class
that extends vLLM's workers.  So the package need not be installed where it runs.  All load
through vLLM's layerwise reload, which quantises and packs, and keeps addresses:

* whole tensors under HF names go through the model's own ``load_weights``, which cuts them for TP;
* slices are a worker's parameters as its weight loaders would have left them, before packing.  For the time of an
  update such a parameter's loader is a plain copy; when a layer's parameters are complete vLLM processes it as ever.

Two repairs are needed on CPU and do nothing elsewhere:

* a tied ``lm_head`` owns a packed copy of the embedding that a reload leaves as it was: it is packed again;
* the MoE kernel packs its weights when it is first built only: it is dropped before a reload, and built anew.

Without them logits are silently those of the old head, or garbage.  Digests are computed here over the very bytes that
came; the sender fetches them (:class:`WorkerExtension`) and compares them with its own.

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

from megatron_rest.config import TRANSPORTS, vllm_backend
from megatron_rest.weight_sync.digest import digest
from megatron_rest.weight_sync.links import open_link
from megatron_rest.weight_sync.slices import MessageDigests, SliceReceiver, receive_schedule

__all__ = [
    "LocalWeightTransferEngine",
    "SliceWeightTransferEngine",
    "WorkerExtension",
    "register",
]


class _ReloadEngine(WeightTransferEngine):
    """Layerwise reload of full tensors, repairs, and a record of what came."""

    digests: dict[str, tuple[int, int]]
    loaded: set[str]

    def start_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        self.digests, self.loaded = {}, set()
        _drop_packed_experts(self.model)
        initialize_layerwise_reload(self.model)

    def report(self) -> dict[str, Any]:
        """What the last pass brought, and parameters that it left at their old values."""
        return {"digests": dict(self.digests), "missing": self.missing()}

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
        # What vLLM makes itself of a weight that came, such as scales of its own quantisation, nobody sends.
        names = {name for name, _ in self.model.named_parameters()} & {name for name, _, _ in _loadable(self.model)}
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
class SliceInitInfo(WeightTransferInitInfo):
    master_address: str
    master_port: int
    rank_offset: int  # ranks before the first worker: the training ranks that send to this engine
    world_size: int
    timeout_seconds: int
    backend: str
    token: str  # of this group alone


@dataclass
class SliceUpdateInfo(WeightTransferUpdateInfo):
    detailed: bool  # a digest of every copy instead of one of every message


class SliceWeightTransferEngine(_ReloadEngine):
    """Each worker's own slices, from all training ranks, by the plan that these made."""

    init_info_cls = SliceInitInfo
    update_info_cls = SliceUpdateInfo
    _receiver: SliceReceiver | None = None
    _received: MessageDigests
    _parameters: dict[str, Any]
    _loaders: list[tuple[Any, Any]]

    def init_transfer_engine(self, init_info: SliceInitInfo) -> None:
        device = torch.device(self.device)
        rank = init_info.rank_offset + _worker_index(self)
        link = open_link(
            init_info.backend,
            init_info.master_address,
            init_info.master_port,
            rank,
            init_info.world_size,
            init_info.timeout_seconds,
            device,
            init_info.token,
        )
        schedule = receive_schedule(link, _worker_index(self), init_info.rank_offset, device)
        self._receiver = SliceReceiver(link, schedule, device, self._put)

    def start_weight_update(self) -> None:
        super().start_weight_update()
        if self._receiver is None:
            raise RuntimeError("the engine has no schedule of slices: init_weight_transfer_engine comes first")
        self._received, self._loaders = [], []
        self._parameters = dict(self.model.named_parameters())
        sliced = {t.name for t in self._receiver.schedule.tensors if not t.is_whole}
        for prefix, module in self.model.named_modules():
            self._take_slices(module, [p for n, p in module._parameters.items() if f"{prefix}.{n}" in sliced])

    def receive_weights(self, update_info: SliceUpdateInfo) -> None:
        assert self._receiver is not None
        self._received = self._receiver.receive(detailed=update_info.detailed)

    def finish_weight_update(self) -> None:
        super().finish_weight_update()
        for parameter, loader in self._loaders:
            parameter.weight_loader = loader
        self._parameters, self._loaders = {}, []

    def report(self) -> dict[str, Any]:
        num_bytes = 0 if self._receiver is None else self._receiver.num_bytes
        return {"digests": self._received, "missing": self.missing(), "num_bytes": num_bytes}

    def shutdown(self) -> None:
        self._receiver = None

    def _put(self, name: str, tensor: Tensor, is_whole: bool) -> None:
        if is_whole:
            self.load([(name, tensor)])
            return
        parameter = self._parameters[name]
        parameter.weight_loader(parameter, tensor)
        self.loaded.add(name)

    def _take_slices(self, module: torch.nn.Module, parameters: list[Any]) -> None:
        """Let these parameters of ``module``, which wait for a reload, be loaded as they are."""
        from vllm.model_executor.model_loader.reload import layerwise

        if not parameters:
            return
        for parameter in parameters:
            self._loaders.append((parameter, layerwise._get_original_loader(parameter)))
            parameter.weight_loader = _copy_slice
        layerwise.initialize_online_processing(module)  # the reload watches the new loaders as it did the old ones


class WorkerExtension:
    """Methods that vLLM's worker gains as RPCs (``worker_extension_cls``); no name may clash with a worker's own."""

    weight_transfer_engine: _ReloadEngine

    def received_weights(self) -> dict[str, Any]:
        """Digests of what the last pass brought, and parameters that it left as they were."""
        return self.weight_transfer_engine.report()

    def place(self) -> tuple[int, str]:
        """Rank on its machine that this worker was given, and the device that it took."""
        return self.local_rank, str(self.device)  # type: ignore[attr-defined]

    def weight_layout(self) -> dict[str, Any]:
        """How this worker cuts the model, and name, shape and data type of the parameters that its loaders fill.

        ``weight_block`` is how many rows and columns of a matrix in FP8 share a scale, None where a row does;
        ``power_of_two_scales`` whether the kernels for blocks round scales up to powers of two.
        """
        from vllm.utils.deep_gemm import is_deep_gemm_e8m0_used

        model: torch.nn.Module = self.get_model()  # type: ignore[attr-defined]
        blocks = (getattr(module, "weight_block_size", None) for module in model.modules())
        return {
            "layout": _layout(model),
            "parameters": list(_loadable(model)),
            "weight_block": next((list(block) for block in blocks if block is not None), None),
            "power_of_two_scales": is_deep_gemm_e8m0_used(),
        }


def register() -> None:
    """Let vLLM know our backends by name.  Called when this module is imported; again, it does nothing."""
    known = WeightTransferEngineFactory._registry
    for transport in TRANSPORTS:
        name = vllm_backend(transport)
        if name not in known:
            engine = LocalWeightTransferEngine if transport == "local" else SliceWeightTransferEngine
            WeightTransferEngineFactory.register_engine(name, engine)


def _worker_index(engine: WeightTransferEngine) -> int:
    parallel = engine.parallel_config
    return int(parallel.data_parallel_index * parallel.world_size + parallel.rank)


def _copy_slice(param: Tensor, loaded_weight: Tensor) -> None:
    """Weight loader of a parameter whose slice comes ready to be used."""
    param.data.copy_(loaded_weight)


def _layout(model: torch.nn.Module) -> dict[str, Any]:
    from vllm.distributed import parallel_state

    tp_rank = parallel_state.get_tensor_model_parallel_rank()
    tp_size = parallel_state.get_tensor_model_parallel_world_size()
    layout: dict[str, Any] = {"tp_rank": tp_rank, "tp_size": tp_size, "experts": []}
    for module in model.modules():
        experts: Any = getattr(module, "moe_config", None)
        if experts is None or not hasattr(module, "w13_weight"):
            continue
        parallel, global_to_local = experts.moe_parallel_config, getattr(module, "_expert_map", None)
        ids = range(experts.num_experts) if global_to_local is None else global_to_local.tolist()
        mine = {int(local): expert for expert, local in enumerate(ids) if local >= 0}
        layout |= {
            "expert_tp_rank": parallel.tp_rank,
            "expert_tp_size": parallel.tp_size,
            "experts": [mine[i] for i in sorted(mine)],
        }
        break
    return layout


def _loadable(model: torch.nn.Module) -> Iterator[tuple[str, list[int], str]]:
    """Parameters as vLLM's weight loaders see them: what is packed or freed after loading is described as it was."""
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

    for prefix, module in model.named_modules():
        before = get_layerwise_info(module).restore_metadata[0]
        names = [n for n, p in module._parameters.items() if p is not None and (not before or n == "bias")]
        for name, parameter in [*before.items(), *((n, module._parameters[n]) for n in names if n not in before)]:
            yield f"{prefix}.{name}", list(parameter.shape), str(parameter.dtype).removeprefix("torch.")


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


register()
