"""Megatron-Core on a machine without CUDA.

Megatron-Core writes ``torch.cuda.current_device()`` and ``device="cuda"`` in its hot paths (rotary embedding,
tensor-parallel mappings, schedules, optimisers).  Nothing of that is about arithmetic: on gloo ranks the same code
computes the same numbers once such requests land on the CPU.  Instead of changing the global ``torch`` module for
everybody, the *name* ``torch`` inside ``megatron.*`` modules is bound to a thin proxy; user code, transformers, vLLM
and pytest keep the real one.  Two attributes of ``torch.Tensor`` (``type``, ``cuda``) are wrapped, and act only when
the calling frame belongs to ``megatron.*``.

:func:`enable` does nothing where CUDA is available.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Iterator
from typing import Any

import torch

__all__ = ["CpuRNGStatesTracker", "enable", "seed_model_parallel"]

_PREFIX = "megatron."
_CPU = torch.device("cpu")
_FACTORIES = (
    "arange",
    "as_tensor",
    "empty",
    "empty_like",
    "full",
    "full_like",
    "ones",
    "ones_like",
    "rand",
    "randn",
    "tensor",
    "zeros",
    "zeros_like",
)
_enabled = False


def enable() -> bool:
    """Make Megatron-Core run on CPU tensors.  Call before a model is built; idempotent.

    Returns True if the CPU layer is active, False where CUDA is available and nothing was touched.
    """
    global _enabled
    if torch.cuda.is_available():
        return False
    if _enabled:
        return True
    torch.compiler.set_stance("force_eager")  # Megatron's @jit_fuser is torch.compile, which wants a C++ compiler
    import megatron.core.tensor_parallel.random as megatron_random

    proxy = _TorchProxy()
    for name, module in list(sys.modules.items()):
        if name.startswith(_PREFIX):
            _bind(module, proxy)
    sys.meta_path.insert(0, _BindOnImport(proxy))
    _wrap_tensor_methods()
    # Activation recompute stores "the CUDA state" beside the CPU state.
    megatron_random._get_cuda_rng_state = lambda *a, **k: torch.empty(0, dtype=torch.uint8)
    megatron_random._set_cuda_rng_state = lambda *a, **k: None
    _repair_experts()
    _enabled = True
    return True


def _repair_experts() -> None:
    """What the mixture-of-experts code of Megatron-Core 0.16 takes for granted: Transformer Engine and GPU tensors."""
    import megatron.core.transformer.moe.moe_utils as moe_utils
    import megatron.core.transformer.moe.token_dispatcher as token_dispatcher

    if not hasattr(moe_utils, "te_general_gemm"):  # asked for "is not None", defined only with Transformer Engine
        moe_utils.te_general_gemm = None
    token_dispatcher.maybe_move_tensor_to_cpu = _host_numbers


def _host_numbers(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """Megatron turns the split sizes of an all-to-all into host numbers only where they come from a GPU."""
    return tensor.numpy() if as_numpy and isinstance(tensor, torch.Tensor) else tensor


def seed_model_parallel(seed: int, *, tp_rank: int, ep_rank: int = 0) -> None:
    """``model_parallel_cuda_manual_seed`` on either device: the same named streams, on the CPU generator if need be."""
    import megatron.core.tensor_parallel.random as megatron_random

    if torch.cuda.is_available():
        megatron_random.model_parallel_cuda_manual_seed(seed)
        return
    tracker = CpuRNGStatesTracker()
    megatron_random._CUDA_RNG_STATE_TRACKER = tracker
    megatron_random._CUDA_RNG_STATE_TRACKER_INITIALIZED = True
    torch.manual_seed(seed)
    # The offsets are Megatron's own (random.py), so that streams differ between tensor-parallel ranks as they do on a
    # GPU.
    tracker.add(megatron_random._DATA_PARALLEL_RNG_TRACKER_NAME, seed)
    tracker.add(megatron_random._MODEL_PARALLEL_RNG_TRACKER_NAME, seed + 2718 + tp_rank)
    tracker.add(megatron_random._EXPERT_PARALLEL_RNG_TRACKER_NAME, seed + 1024 + 100 * ep_rank + tp_rank)


class CpuRNGStatesTracker:
    """Named random streams on the CPU generator, with the interface of Megatron's ``CudaRNGStatesTracker``."""

    def __init__(self) -> None:
        self.use_cudagraphable_rng = False
        self.is_inference_rng_tracker = False
        self.reset()

    def is_initialized(self) -> bool:
        return self._is_initialized

    def reset(self) -> None:
        self._is_initialized = False
        self.states_: dict[str, torch.Tensor] = {}
        self.seeds_: set[int] = set()

    def get_states(self) -> dict[str, torch.Tensor]:
        return dict(self.states_)

    def set_states(self, states: dict[str, torch.Tensor]) -> None:
        self._is_initialized = True
        self.states_ = states

    def add(self, name: str, seed: int) -> None:
        if seed in self.seeds_ or name in self.states_:
            raise RuntimeError(f"random stream {name!r} or seed {seed} exists already")
        self._is_initialized = True
        self.seeds_.add(seed)
        self.states_[name] = torch.Generator().manual_seed(seed).get_state()

    @contextlib.contextmanager
    def fork(self, name: str = "model-parallel-rng") -> Iterator[None]:
        if name not in self.states_:
            raise RuntimeError(f"random stream {name!r} was not added")
        outside = torch.get_rng_state()
        torch.set_rng_state(self.states_[name])
        try:
            yield
        finally:
            self.states_[name] = torch.get_rng_state()
            torch.set_rng_state(outside)


class _Null:
    """Stands for a CUDA stream or event: there is one queue on a CPU, and it is always done."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def _nothing(self, *args: Any, **kwargs: Any) -> None:
        return None

    wait_stream = wait_event = synchronize = record = wait = _nothing

    def record_event(self, *args: Any, **kwargs: Any) -> _Null:
        return self

    def query(self) -> bool:
        return True


_STREAM = _Null()


class _CudaProxy(types.ModuleType):
    """``torch.cuda`` as megatron.* modules see it; what is not named here is the real one."""

    def __init__(self) -> None:
        super().__init__("megatron_rest_torch_cuda_proxy")

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cuda, name)

    def current_device(self) -> torch.device:
        return _CPU

    def _nothing(self, *args: Any) -> None:
        return None

    synchronize = empty_cache = set_device = _nothing

    def device_count(self) -> int:
        return 1

    def current_stream(self, *args: Any) -> _Null:
        return _STREAM

    default_stream = current_stream

    def Stream(self, *args: Any, **kwargs: Any) -> _Null:
        return _STREAM

    Event = Stream

    def stream(self, stream: Any) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)


class _TorchProxy(types.ModuleType):
    """``torch`` as megatron.* modules see it: constructors asked for "cuda" make CPU tensors."""

    def __init__(self) -> None:
        super().__init__("megatron_rest_torch_proxy")
        self.cuda = _CudaProxy()
        for name in _FACTORIES:
            setattr(self, name, _on_cpu(getattr(torch, name)))

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def _on_cpu(factory: Any) -> Any:
    @functools.wraps(factory)
    def make(*args: Any, **kwargs: Any) -> Any:
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == "cuda":
            kwargs["device"] = _CPU
        kwargs.pop("pin_memory", None)  # there is no pinned allocator without an accelerator
        return factory(*args, **kwargs)

    return make


def _bind(module: types.ModuleType, proxy: _TorchProxy) -> None:
    if getattr(module, "__dict__", {}).get("torch") is torch:
        module.torch = proxy  # type: ignore[attr-defined]


class _BindOnImport(importlib.abc.MetaPathFinder):
    """Bind the proxy in megatron.* modules that are imported later."""

    def __init__(self, proxy: _TorchProxy) -> None:
        self.proxy = proxy

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if not name.startswith(_PREFIX):
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None or not hasattr(spec.loader, "exec_module"):
            return spec
        execute = spec.loader.exec_module

        def execute_and_bind(module: types.ModuleType) -> None:
            execute(module)
            _bind(module, self.proxy)

        spec.loader.exec_module = execute_and_bind  # type: ignore[method-assign]
        return spec


def _called_from_megatron() -> bool:
    return sys._getframe(2).f_globals.get("__name__", "").startswith(_PREFIX)


def _wrap_tensor_methods() -> None:
    real_type, real_cuda = torch.Tensor.type, torch.Tensor.cuda

    @functools.wraps(real_type)
    def type_(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        out = real_type(self, *args, **kwargs)
        if not args and not kwargs and self.device.type == "cpu" and _called_from_megatron():
            return out.replace("torch.", "torch.cuda.", 1)  # optimisers compare with 'torch.cuda.FloatTensor'
        return out

    @functools.wraps(real_cuda)
    def cuda(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return self if _called_from_megatron() else real_cuda(self, *args, **kwargs)

    torch.Tensor.type = type_  # type: ignore[method-assign,assignment]
    torch.Tensor.cuda = cuda  # type: ignore[method-assign,assignment]
