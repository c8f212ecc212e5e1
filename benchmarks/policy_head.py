"""Policy head side by side with its peers on CPU: time, extra memory, counted traffic, collectives.

    python -m benchmarks.policy_head [--quick | --gpu] [--json FILE] [--only SECTION] [--peers FOLDER]
    python -m benchmarks.policy_head --report FILE

Peers run from their released packages: megatron-core's cross-entropy, verl's Megatron entropy and fused linear, Liger's
chunked GRPO, naive torch.  ``--peers`` names a folder of packages installed without their dependencies (``pip install
--no-deps --target FOLDER verl==0.9.1 liger-kernel triton``); a peer that cannot be imported is a line that says so.

Rules.  Every case runs in a fresh process on one thread, and its results on a few rows must agree with float64 before
it is timed.  Times are CPU time (best and median), because other work may share the machine.  Extra memory is the
high-water mark over the region minus what was resident before it; logits, weights and main_grad exist beforehand for
everyone.  Traffic counts the bytes that operators read from or write to buffers of the size of the logits, not scratch
that stays in the cache.  A peer without entropy or its gradient does less work and is marked "log-prob only".

The full sizes take a quarter of an hour on a quiet core.  ``--only`` runs a part, ``--json`` adds its rows to those
that the file holds, if they come from the same processor since the same boot, and ``--report`` prints all of them with
the load of the machine while each was measured.  Ratios are always taken within one section, which runs in one go.

``--gpu`` runs on one CUDA device instead: copy bandwidth and the bare matrix products first, then the heads, each
checked against float64 on a few rows before it is timed (events, caches flushed, cases in turn), with peak memory; no
new row starts after seven minutes.  GPU numbers come from a GPU only: nothing here is derived by arithmetic.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_rest.ops import (
    ClippedTokenLoss,
    linear_log_probs_and_entropy,
    policy_step,
    vocab_parallel_log_probs_and_entropy,
)

_CLIP_LOW, _CLIP_HIGH, _ENTROPY_COEF = 0.2, 0.28, 0.01
_CHECKED_ROWS = 16
_SMALL_BLOCK = 256  # rows: the low-memory form of the fused heads on a GPU
# Against float64 of the same operands: absolute for results, relative for gradients.  Loose enough for entropies that
# are not centred (1e-4 at V=152k) and for bf16 gradients; a wrong formula is off by far more.
_LIMITS = {"fp32": 1e-3, "bf16": 3e-2}
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class Task:
    """One case on one size; what a worker process is told."""

    case: str
    num_tokens: int
    vocab: int
    hidden: int = 0  # 0 = from logits
    dtype: str = "fp32"
    tp: int = 1
    active: float = 1.0  # share of rows that carry loss
    repeats: int = 3
    warm_ups: int = 1
    peers: str = ""


# ------------------------------------------------------------------------------------------------ peers
def _load_file(package: str, path: str) -> Any:
    """Import one file of an installed package without its ``__init__`` (verl's needs ray, which nothing here uses)."""
    for folder in sys.path:
        file = Path(folder or ".") / package / path
        if file.exists():
            spec = importlib.util.spec_from_file_location(f"peer_{file.stem}", file)
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            return module
    raise ModuleNotFoundError(f"{package} is not installed")


def _verl_kernels() -> Any:
    """verl's Triton projection; its packages enter as bare folders, because their ``__init__`` needs ray."""
    for name in ("verl", "verl.utils"):
        if name not in sys.modules:
            folders = [str(Path(folder or ".") / name.replace(".", "/")) for folder in sys.path]
            module = types.ModuleType(name)
            module.__path__ = [folder for folder in folders if Path(folder).is_dir()]
            sys.modules[name] = module
    return importlib.import_module("verl.utils.kernel.linear_cross_entropy")


def _megatron_tensor_parallel(tp: int) -> Any:
    from megatron.core import parallel_state, tensor_parallel

    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(tensor_model_parallel_size=tp)
    return tensor_parallel


LogitsHead = Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]]


def _logits_head(task: Task) -> LogitsHead:
    """(vocab-parallel logits, labels) -> (log_probs, entropy or None where the peer has no entropy)."""
    if task.case in ("ours", "ours, input kept"):
        group = dist.group.WORLD if task.tp > 1 else None

        def ours(z: Tensor, y: Tensor) -> tuple[Tensor, Tensor | None]:
            return vocab_parallel_log_probs_and_entropy(z, y, tp_group=group, consume=task.case == "ours")[:2]

        return ours
    if task.case == "naive torch":

        def naive(z: Tensor, y: Tensor) -> tuple[Tensor, Tensor | None]:
            log_p = torch.log_softmax(z.float(), -1)
            return log_p.gather(1, y[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)

        return naive
    if task.case == "transformer-engine CE, log-prob only":
        engine = importlib.import_module("transformer_engine.pytorch.cross_entropy")
        group = dist.group.WORLD if task.tp > 1 else None
        return lambda z, y: (-engine.parallel_cross_entropy(z[None], y[None], 0.0, False, group)[0], None)
    tensor_parallel = _megatron_tensor_parallel(task.tp)
    if task.case == "megatron-core CE, log-prob only":
        return lambda z, y: (-tensor_parallel.vocab_parallel_cross_entropy(z.float(), y), None)
    assert task.case == "verl", task.case
    verl = _load_file("verl", "utils/megatron/tensor_parallel.py")

    def through_verl(z: Tensor, y: Tensor) -> tuple[Tensor, Tensor | None]:
        z = z.float().div_(
            1.0
        )  # Megatron's half-precision wrapper returns fp32 logits; the engine divides by temperature
        kept = z.clone()
        entropy = verl.vocab_parallel_entropy(z)
        return verl.vocab_parallel_log_probs_from_logits(kept, y), entropy

    return through_verl


# ------------------------------------------------------------------------------------------------ measuring
def _memory(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {key} in /proc/self/status")


class Meter:
    """CPU seconds and peak extra memory of a region."""

    def __enter__(self) -> Meter:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # else the region may grow into memory that an earlier one left resident
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
        self._resident = _memory("VmRSS")
        self._begin = time.process_time()
        return self

    def lap(self) -> float:
        return time.process_time() - self._begin

    def __exit__(self, *exc: object) -> None:
        self.seconds = self.lap()
        self.extra = max(0, _memory("VmHWM") - self._resident)


class CountCollectives:
    """Calls of torch.distributed by anyone in the region."""

    _NAMES = ("all_reduce", "all_gather", "all_gather_into_tensor", "all_gather_single", "broadcast")

    def __enter__(self) -> CountCollectives:
        self.calls = 0
        self._originals = {name: getattr(dist, name) for name in self._NAMES if hasattr(dist, name)}
        for name, original in self._originals.items():
            setattr(dist, name, self._counted(original))
        return self

    def _counted(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            return original(*args, **kwargs)

        return call

    def __exit__(self, *exc: object) -> None:
        for name, original in self._originals.items():
            setattr(dist, name, original)


class CountTraffic(TorchDispatchMode):
    """Bytes read from and written to vocabulary-sized buffers, operator by operator."""

    _FREE = frozenset(
        {"detach", "view", "t", "transpose", "unsqueeze", "squeeze", "expand", "slice", "select", "alias", "as_strided"}
        | {"split", "permute", "_unsafe_view", "empty", "empty_like", "empty_strided", "new_empty", "unbind"}
        | {"_reshape_alias", "lift_fresh", "resize_", "set_"}
    )
    _WRITE_ONLY = frozenset(["copy_", "fill_", "zero_"])
    _SPARSE = frozenset(["gather", "index", "index_put_", "_index_put_impl_", "scatter_add_", "scatter_"])

    def __init__(self, large: int) -> None:
        super().__init__()
        self.large, self.bytes = large, 0

    def _size(self, value: Any) -> int:
        is_large = isinstance(value, Tensor) and value.untyped_storage().nbytes() >= self.large
        return value.numel() * value.element_size() if is_large else 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func._schema.name.split("::")[1]
        if name in self._FREE:
            return result
        in_place = name.endswith("_") and not name.startswith("__")
        inputs = [a for arg in args for a in (arg if isinstance(arg, (list, tuple)) else [arg])]
        if name in self._SPARSE:  # touch one element a row of their first operand
            inputs = inputs[1:]
            in_place = False
        for place, value in enumerate(inputs):
            is_target = in_place and place == 0
            self.bytes += 0 if is_target and name in self._WRITE_ONLY else self._size(value)
            self.bytes += self._size(value) if is_target else 0
        if not in_place and name not in self._SPARSE:
            outputs = result if isinstance(result, (list, tuple)) else [result]
            self.bytes += sum(self._size(out) for out in outputs)
        return result


# ------------------------------------------------------------------------------------------------ from logits
class _Source(torch.autograd.Function):
    """Stands for the projection: lends a buffer that exists beforehand, and takes its gradient."""

    @staticmethod
    def forward(ctx: Any, leaf: Tensor, buffer: Tensor, sink: list[Tensor]) -> Tensor:
        ctx.sink = sink
        lent = torch.empty(0, dtype=buffer.dtype, device=buffer.device)
        lent.set_(buffer.untyped_storage(), buffer.storage_offset(), buffer.shape, buffer.stride())
        return lent

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        ctx.sink.append(grad)
        return torch.zeros(1), None, None


@dataclass
class _LogitsProblem:
    logits: Tensor  # this rank's columns
    labels: Tensor
    g: Tensor
    h: Tensor

    @classmethod
    def create(cls, task: Task, rank: int) -> _LogitsProblem:
        local = task.vocab // task.tp
        gen = torch.Generator().manual_seed(7 + rank)
        logits = torch.empty(task.num_tokens, local, dtype=_DTYPES[task.dtype])
        for begin in range(0, task.num_tokens, 256):
            rows = logits[begin : begin + 256]
            rows.copy_(torch.randn(rows.shape, generator=gen) * 3)
        gen = torch.Generator().manual_seed(3)
        return cls(
            logits=logits,
            labels=torch.randint(0, task.vocab, (task.num_tokens,), generator=gen),
            g=torch.randn(task.num_tokens, generator=gen),
            h=torch.randn(task.num_tokens, generator=gen) * 0.1,
        )

    def head(self, num_rows: int) -> _LogitsProblem:
        return _LogitsProblem(self.logits[:num_rows], self.labels[:num_rows], self.g[:num_rows], self.h[:num_rows])

    def run(self, head: LogitsHead, buffer: Tensor, meter: Meter | None = None) -> tuple[Any, ...]:
        sink: list[Tensor] = []
        z = _Source.apply(torch.zeros(1, requires_grad=True), buffer, sink)
        log_probs, entropy = head(z, self.labels)
        forward = meter.lap() if meter else 0.0
        loss = (self.g * log_probs).sum() + (0.0 if entropy is None else (self.h * entropy).sum())
        del z
        loss.backward()
        return log_probs.detach(), None if entropy is None else entropy.detach(), sink[0], forward

    def errors(self, results: tuple[Any, ...], tp: int, rank: int) -> dict[str, float]:
        """Against dense float64 of the whole vocabulary."""
        x = self.logits.double()
        if tp > 1:
            parts = [torch.empty_like(x) for _ in range(tp)]
            dist.all_gather(parts, x)
            x = torch.cat(parts, 1)
        x.requires_grad_()
        log_p = torch.log_softmax(x, -1)
        log_probs, entropy = log_p.gather(1, self.labels[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)
        has_entropy = results[1] is not None
        loss = (self.g * log_probs).sum() + ((self.h * entropy).sum() if has_entropy else 0.0)
        (grad,) = torch.autograd.grad(loss, x)
        grad = grad.chunk(tp, 1)[rank]
        errors = {
            "log_probs": (results[0] - log_probs).abs().max().item(),
            "gradient": ((results[2].double() - grad).norm() / grad.norm()).item(),
        }
        return errors | ({"entropy": (results[1] - entropy).abs().max().item()} if has_entropy else {})


def _measure_logits(task: Task, rank: int) -> dict[str, Any]:
    problem = _LogitsProblem.create(task, rank)
    head = _logits_head(task)
    small = problem.head(_CHECKED_ROWS)
    errors = small.errors(small.run(head, small.logits.clone()), task.tp, rank)
    _refuse_wrong(task, errors)
    buffer = torch.empty_like(problem.logits)
    samples = []
    for _ in range(task.warm_ups + task.repeats):
        buffer.copy_(problem.logits)  # some heads destroy their input
        if task.tp > 1:
            dist.barrier()
        with CountCollectives() as collectives, Meter() as meter:
            forward = problem.run(head, buffer, meter)[-1]
        samples.append((forward, meter.seconds - forward, meter.extra))
    samples = samples[task.warm_ups :]
    logits_bytes = problem.logits.numel() * problem.logits.element_size()
    return {
        "forward_s": [s[0] for s in samples],
        "backward_s": [s[1] for s in samples],
        "extra_over_logits": max(s[2] for s in samples) / logits_bytes,
        "collectives": collectives.calls,
        "bytes_per_logit": _count_traffic(task, head, rank),
        "errors": errors,
    }


def _count_traffic(task: Task, head: LogitsHead, rank: int) -> float | None:
    if task.tp > 1 or task.case == "verl":  # verl compiles one reduction: operators inside are not visible
        return None
    small = _LogitsProblem.create(replace(task, num_tokens=512, vocab=min(task.vocab, 8192)), rank)
    with CountTraffic(small.logits.numel() * small.logits.element_size() // 2) as traffic:
        small.run(head, small.logits)
    return traffic.bytes / small.logits.numel()


def _refuse_wrong(task: Task, errors: dict[str, float]) -> None:
    wrong = {name: error for name, error in errors.items() if not error <= _LIMITS[task.dtype]}
    if wrong:
        raise ArithmeticError(f"{task.case} disagrees with float64, not timed: {wrong}")


# ------------------------------------------------------------------------------------------------ from hidden states
@dataclass
class _LinearProblem:
    """Weighted clipped loss with entropy bonus on ``[N, H]`` hidden states; four sequences with one advantage each."""

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    loss: ClippedTokenLoss
    active_rows: Tensor

    @classmethod
    def create(cls, task: Task) -> _LinearProblem:
        gen = torch.Generator().manual_seed(5)
        n, dtype = task.num_tokens, _DTYPES[task.dtype]
        mask = torch.zeros(n)
        mask[torch.randperm(n, generator=gen)[: max(1, int(n * task.active))]] = 1.0
        share = mask / mask.sum()
        has_entropy = "log-prob only" not in task.case
        return cls(
            hidden=torch.randn(n, task.hidden, generator=gen).to(dtype),
            weight=(torch.randn(task.vocab, task.hidden, generator=gen) * 0.05).to(dtype),
            labels=torch.randint(0, task.vocab, (n,), generator=gen),
            loss=ClippedTokenLoss(
                old_log_probs=-10.0 + torch.randn(n, generator=gen),
                advantages=torch.randn(4, generator=gen).repeat_interleave(n // 4),
                weights=share,
                entropy_weights=_ENTROPY_COEF * share if has_entropy else None,
                clip_low=_CLIP_LOW,
                clip_high=_CLIP_HIGH,
            ),
            active_rows=mask.nonzero()[:, 0],
        )

    def total(self, log_probs: Tensor, entropy: Tensor | None) -> Tensor:
        """The loss as a peer's pipeline computes it, from per-token results."""
        entropy = log_probs.detach() * 0 if entropy is None else entropy
        return self.loss(log_probs.float(), entropy.float(), slice(None)).sum()

    def leaves(self) -> tuple[Tensor, Tensor]:
        return self.hidden.detach().requires_grad_(), self.weight.detach().requires_grad_()

    def errors(self, results: tuple[Tensor, Tensor, Tensor]) -> dict[str, float]:
        """Against float64, on the rows that carry loss."""
        x, w = self.hidden.double().requires_grad_(), self.weight.double().requires_grad_()
        log_p = torch.log_softmax(x @ w.t(), -1)
        entropy = -(log_p.exp() * log_p).sum(-1)
        loss = self.loss(log_p.gather(1, self.labels[:, None])[:, 0], entropy, slice(None)).sum()
        expected = torch.autograd.grad(loss, (x, w))
        names = ("d_hidden", "d_weight")
        errors = {
            name: ((actual.double() - grad).norm() / grad.norm()).item()
            for name, actual, grad in zip(names, results[1:], expected, strict=True)
        }
        return errors | {"loss": abs(results[0].item() - loss.item())}


LinearHead = Callable[[_LinearProblem, Tensor], tuple[Tensor, Tensor, Tensor]]


def _by_autograd(tokens: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor | None]]) -> LinearHead:
    def run(problem: _LinearProblem, main_grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        hidden, weight = problem.leaves()
        loss = problem.total(*tokens(hidden, weight, problem.labels))
        loss.backward()
        assert hidden.grad is not None and weight.grad is not None
        return loss.detach(), hidden.grad, weight.grad

    return run


def _ours(task: Task) -> LinearHead:
    def run(problem: _LinearProblem, main_grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        hidden, weight = problem.leaves()
        weight.main_grad = main_grad.zero_()  # type: ignore[attr-defined]
        rows = problem.active_rows if "active rows" in task.case else None
        if "recompute" in task.case:
            tokens = linear_log_probs_and_entropy(
                hidden, weight, problem.labels, active_rows=rows, gradient_accumulation_fusion=True
            )
            loss = problem.total(tokens.log_probs, tokens.entropy)
        else:
            loss = policy_step(
                hidden, weight, problem.labels, problem.loss, active_rows=rows, main_grad_scale=1.0,
                fp8_gradients="fp8" in task.case, block_size=_SMALL_BLOCK if "small blocks" in task.case else None,
            ).loss_sum  # fmt: skip
        loss.backward()
        assert hidden.grad is not None
        return loss.detach(), hidden.grad, main_grad

    return run


def _liger() -> LinearHead:
    module = importlib.import_module("liger_kernel.chunked_loss")
    grpo = module.LigerFusedLinearGRPOLoss(
        beta=0.0,
        compiled=False,
        use_ref_model=False,
        epsilon_low=_CLIP_LOW,
        epsilon_high=_CLIP_HIGH,
        loss_type="bnpo",
    )

    def run(problem: _LinearProblem, main_grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        hidden, weight = problem.leaves()
        by_sequence = (4, len(hidden) // 4)
        loss, _ = grpo(
            hidden.view(*by_sequence, -1),
            weight,
            problem.labels.view(by_sequence),
            (problem.loss.weights > 0).float().view(by_sequence),
            problem.loss.advantages.view(by_sequence)[:, 0],
            old_per_token_logps=problem.loss.old_log_probs.view(by_sequence),
        )
        loss.backward()
        assert hidden.grad is not None and weight.grad is not None
        return loss.detach(), hidden.grad, weight.grad

    return run


def _linear_head(task: Task) -> LinearHead:
    if task.case.startswith("ours"):
        return _ours(task)
    if task.case.startswith("liger"):
        return _liger()
    if task.case.startswith("naive"):

        def naive(x: Tensor, w: Tensor, y: Tensor) -> tuple[Tensor, Tensor | None]:
            log_p = torch.log_softmax((x @ w.t()).float(), -1)
            return log_p.gather(1, y[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)

        return _by_autograd(naive)
    if task.case == "verl fused triton":
        kernels = _verl_kernels()
        return _by_autograd(lambda x, w, y: kernels.linear_cross_entropy(x, w, y, 1.0, "none"))
    assert task.case == "verl fused torch", task.case
    verl = _load_file("verl", "utils/experimental/torch_functional.py")
    return _by_autograd(lambda x, w, y: verl.FusedLinearForPPOFunction.apply(x, w, y, 1.0, 512))


def _measure_linear(task: Task) -> dict[str, Any]:
    head = _linear_head(task)
    small = _LinearProblem.create(replace(task, num_tokens=4 * _CHECKED_ROWS))
    errors = small.errors(head(small, torch.zeros(small.weight.shape)))
    _refuse_wrong(task, errors)
    problem = _LinearProblem.create(task)
    main_grad = torch.empty(problem.weight.shape).zero_()  # its pages exist
    samples = []
    for _ in range(task.warm_ups + task.repeats):
        with Meter() as meter:
            results = head(problem, main_grad)
        samples.append((meter.seconds, meter.extra))
        del results
    samples = samples[task.warm_ups :]
    logits_bytes = task.num_tokens * task.vocab * problem.hidden.element_size()
    return {
        "forward_s": [s[0] for s in samples],
        "backward_s": [0.0 for _ in samples],  # one region: some heads differentiate in their forward pass
        "extra_over_logits": max(s[1] for s in samples) / logits_bytes,
        "collectives": 0,
        "bytes_per_logit": None,
        "errors": errors,
    }


# ------------------------------------------------------------------------------------------------ processes and report
def _worker(task: Task, rank: int, store: str) -> dict[str, Any]:
    torch.set_num_threads(1)
    if task.peers:
        sys.path.append(task.peers)  # behind the environment's own packages
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=task.tp)
    try:
        return _measure_linear(task) if task.hidden else _measure_logits(task, rank)
    except (ImportError, ArithmeticError) as error:
        return {"error": f"{type(error).__name__}: {error}"}
    finally:
        dist.destroy_process_group()


def _run(task: Task) -> dict[str, Any]:
    """Measure a task in fresh processes, one a rank; rank 0 speaks."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false"}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--worker", json.dumps(asdict(task)), "--store", f"{folder}/store"]
        workers = [
            subprocess.Popen(
                [*command, "--rank", str(rank)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env
            )
            for rank in range(task.tp)
        ]
        outputs = [worker.communicate() for worker in workers]
    lines = [line[7:] for line in outputs[0][0].splitlines() if line.startswith("RESULT ")]
    measured = json.loads(lines[-1]) if lines else {"error": outputs[0][1].strip().splitlines()[-1:]}
    return {**asdict(task), **measured, "load": os.getloadavg()[0], "ended": time.strftime("%Y-%m-%d %H:%M:%S")}


@dataclass(frozen=True)
class Section:
    title: str
    reference: str  # the case that ratios refer to
    tasks: tuple[Task, ...]


_FROM_LOGITS = ("naive torch", "verl", "megatron-core CE, log-prob only", "ours, input kept", "ours")
_FROM_HIDDEN = (
    "naive torch",
    "verl fused torch",
    "liger chunked GRPO, log-prob only",
    "ours recompute",
    "ours policy_step",
)


_FROM_SPARSE_ROWS = ("verl fused torch", "ours policy_step", "ours policy_step, active rows")


def _sections(quick: bool, peers: str) -> list[Section]:
    tokens, vocabularies, hidden = (256, (32768,), 256) if quick else (2048, (32768, 151936), 1024)
    sections = []
    for vocab in vocabularies:
        is_long = vocab > 100_000  # heads take up to a minute a run: one, whose libraries the check has warmed up
        base = Task(case="", num_tokens=tokens, vocab=vocab, repeats=2 if is_long else 5, peers=peers)
        linear = replace(base, hidden=hidden, repeats=1, warm_ups=0 if is_long else 1)
        size = f"N={tokens} V={vocab}"
        cases = _FROM_LOGITS[1:] if is_long else _FROM_LOGITS  # naive torch: 6 to 12 GB at the full vocabulary
        sections += [Section(f"logits {size} {dt}", "verl", _tasks(base, cases, dtype=dt)) for dt in _DTYPES]
        sections += [
            Section(f"logits {size} fp32 gloo TP={tp}", "verl", _tasks(base, _FROM_LOGITS[1:], tp=tp)) for tp in (2, 4)
        ]
        title = f"linear {size} H={hidden} fp32"
        cases = ("verl fused torch", "ours recompute", "ours policy_step") if is_long else _FROM_HIDDEN
        sections.append(Section(title, "verl fused torch", _tasks(linear, cases)))
        title, reference = f"{title}, 20 % of the rows carry loss", "ours policy_step"
        sections.append(Section(title, reference, _tasks(linear, _FROM_SPARSE_ROWS, active=0.2)))
    return sections


def _tasks(base: Task, cases: tuple[str, ...], **changes: Any) -> tuple[Task, ...]:
    return tuple(replace(base, case=case, **changes) for case in cases)


def _total(row: dict[str, Any], pick: Callable[[list[float]], float]) -> float:
    return pick([f + b for f, b in zip(row["forward_s"], row["backward_s"], strict=True)])


def _print(rows: list[dict[str, Any]]) -> None:
    title, against = rows[0]["section"], rows[0]["reference"]
    loads = [row["load"] for row in rows]
    print(f"\n== {title}   (times against {against}; load average {min(loads):.1f} to {max(loads):.1f})")
    print(f"   {'case':34s} {'fwd ms':>8s} {'bwd ms':>8s} {'best':>8s} {'median':>8s} {'ratio':>6s} "
          f"{'extra x logits':>14s} {'B/logit':>8s} {'coll':>5s}  worst error")  # fmt: skip
    reference = next((r for r in rows if r["case"] == against and "error" not in r), None)
    for row in rows:
        if "error" in row:
            print(f"   {row['case']:34s} not measured: {row['error']}")
            continue
        best = _total(row, min)
        ratio = f"{best / _total(reference, min):6.2f}" if reference else "     -"
        traffic = "-" if row["bytes_per_logit"] is None else f"{row['bytes_per_logit']:.1f}"
        halves = [f"{min(row[key]) * 1e3:8.1f}" for key in ("forward_s", "backward_s")]
        forward, backward = halves if any(row["backward_s"]) else ["       -", "       -"]
        median, error = _total(row, statistics.median) * 1e3, max(row["errors"].values())
        print(
            f"   {row['case']:34s} {forward} {backward} {best * 1e3:8.1f} {median:8.1f} {ratio} "
            f"{row['extra_over_logits']:14.2f} {traffic:>8s} {row['collectives']:5d}  {error:.1e}",
            flush=True,
        )


# ------------------------------------------------------------------------------------------------ on one GPU
_GPU_SECONDS = 420.0  # no row starts later


class _DeviceClock:
    """Milliseconds of a call on the device, with the caches flushed before it; on CPU, for dry runs, wall time."""

    def __init__(self, device: torch.device) -> None:
        self.is_cuda = device.type == "cuda"
        self._flush = torch.empty(1 << 27 if self.is_cuda else 1, dtype=torch.int8, device=device)

    def __call__(self, call: Callable[[], Any]) -> float:
        self._flush.zero_()
        if not self.is_cuda:
            begin = time.perf_counter()
            call()
            return (time.perf_counter() - begin) * 1e3
        torch.cuda.synchronize()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        return float(begin.elapsed_time(end))

    def peak(self, call: Callable[[], Any]) -> int | None:
        """Bytes allocated by the call at its peak, beyond what existed."""
        if not self.is_cuda:
            return None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def waits(self, call: Callable[[], Any]) -> bool | None:
        """Whether the call makes the host wait for the device."""
        if not self.is_cuda:
            return None
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            call()
        except RuntimeError as error:
            if "synchroniz" not in str(error):
                raise
            return True
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return False


@dataclass
class _GpuCases:
    """Calls to time, each after its check; what the check found; and what could not be run."""

    calls: dict[str, Callable[[], Any]]
    errors: dict[str, dict[str, float]]
    missing: list[str]


def _gpu_logits(num_tokens: int, vocab: int, device: torch.device) -> _GpuCases:
    """The heads on bf16 logits."""
    gen = torch.Generator(device).manual_seed(0)
    logits = (torch.randn(num_tokens, vocab, generator=gen, device=device, dtype=torch.float32) * 3).bfloat16()
    g, h = (torch.randn(num_tokens, generator=gen, device=device) for _ in range(2))
    problem = _LogitsProblem(logits, torch.randint(0, vocab, (num_tokens,), generator=gen, device=device), g, h * 0.1)
    small = problem.head(_CHECKED_ROWS)
    cases = _GpuCases({}, {}, [])
    for case in ("ours", "verl", "megatron-core CE, log-prob only", "transformer-engine CE, log-prob only",
                 "naive torch"):  # fmt: skip
        task = Task(case=case, num_tokens=num_tokens, vocab=vocab, dtype="bf16")
        try:
            head = _logits_head(task)
            cases.errors[case] = small.errors(small.run(head, small.logits.clone()), 1, 0)
            _refuse_wrong(task, cases.errors[case])
        except Exception as error:  # noqa: BLE001  a peer that fails is a line of the table
            cases.missing.append(f"{case}: {type(error).__name__}: {error}")
            continue
        # these write their gradient over the logits: a copy of their own
        buffer = logits.clone() if case in ("ours", "transformer-engine CE, log-prob only") else logits
        cases.calls[case] = lambda head=head, buffer=buffer: problem.run(head, buffer)
    return cases


def _gpu_linear(num_tokens: int, hidden: int, vocab: int, device: torch.device) -> _GpuCases:
    """The heads on bf16 hidden states, beside the three bare products."""
    gen = torch.Generator(device).manual_seed(0)

    def problem(n: int, active: float = 1.0) -> _LinearProblem:
        made = _LinearProblem.create(
            Task(case="", num_tokens=n, vocab=16, hidden=16, dtype="bf16", active=active)
        )  # for the loss
        on_device = {
            name: getattr(made.loss, name).to(device)
            for name in ("old_log_probs", "advantages", "weights", "entropy_weights")
        }
        x = torch.randn(n, hidden, generator=gen, device=device).bfloat16()
        labels = torch.randint(0, vocab, (n,), generator=gen, device=device)
        return _LinearProblem(x, weight, labels, replace(made.loss, **on_device), made.active_rows)

    weight = (torch.randn(vocab, hidden, generator=gen, device=device) * hidden**-0.5 * 2).bfloat16()
    main_grad = torch.zeros(vocab, hidden, device=device)
    full, sparse, small = problem(num_tokens), problem(num_tokens, 0.2), problem(4 * _CHECKED_ROWS)
    block = torch.empty(num_tokens, vocab, dtype=torch.bfloat16, device=device)
    products: dict[str, Callable[[], Any]] = {
        "bare product, forward": lambda: torch.mm(full.hidden, weight.t(), out=block),
        "bare product, d_hidden": lambda: torch.mm(block, weight),
        "bare product, d_weight": lambda: torch.mm(block.t(), full.hidden),
    }
    cases = _GpuCases(products, {}, [])
    for case in ("ours policy_step", "ours policy_step, small blocks", "ours recompute",
                 "ours policy_step, active rows", "ours policy_step, fp8", "verl fused triton", "verl fused torch",
                 ):  # fmt: skip
        task = Task(case=case, num_tokens=num_tokens, vocab=vocab, hidden=hidden, dtype="bf16")
        try:
            head = _linear_head(task)
            limit = 6e-2 if "fp8" in case else _LIMITS["bf16"]
            cases.errors[case] = small.errors(head(small, main_grad))
            wrong = {k: e for k, e in cases.errors[case].items() if not e <= limit}
            if wrong:
                raise ArithmeticError(f"disagrees with float64, not timed: {wrong}")
        except Exception as error:  # noqa: BLE001  a peer that fails is a line of the table
            cases.missing.append(f"{case}: {type(error).__name__}: {error}")
            continue
        rows = sparse if "active rows" in case else full
        cases.calls[case] = lambda head=head, rows=rows: head(rows, main_grad)
    return cases


def _gpu_rows(
    device: torch.device, logits_sizes: list[tuple[int, int]], linear_sizes: list[tuple[int, int, int]], repeats: int
) -> list[dict[str, Any]]:
    """Check and time every case; prints as it goes."""
    clock, begin, results = _DeviceClock(device), time.monotonic(), []
    source = torch.ones(1 << 28 if clock.is_cuda else 1 << 16, device=device)
    target = torch.empty_like(source)
    copied = min(clock(lambda: target.copy_(source)) for _ in range(repeats))
    print(f"copy bandwidth {2 * source.nbytes / copied / 1e6:.0f} GB/s")
    results.append({"section": "copy", "case": "copy", "ms": [copied], "bytes": 2 * source.nbytes})
    source = target = torch.empty(0)
    plans: list[tuple[str, Callable[[], _GpuCases], float]] = []
    for n, vocab in logits_sizes:
        plans.append((f"logits bf16 N={n} V={vocab}", lambda n=n, v=vocab: _gpu_logits(n, v, device), 6.0 * n * vocab))
    for n, hidden, vocab in linear_sizes:
        title = f"linear bf16 N={n} H={hidden} V={vocab}"
        plans.append((title, lambda n=n, h=hidden, v=vocab: _gpu_linear(n, h, v, device), 0.0))
    for title, prepare, traffic in plans:
        if time.monotonic() - begin > _GPU_SECONDS:
            print(f"\n== {title}\n   not measured: out of time")
            continue
        cases = prepare()
        calls = cases.calls
        print(f"\n== {title}\n   {'case':36s} {'best ms':>9s} {'median':>9s} {'extra MiB':>10s} {'waits':>6s}  errors")
        peaks = {case: clock.peak(call) for case, call in calls.items()}  # also the warm-up
        waits = {case: clock.waits(call) for case, call in calls.items()}
        times: dict[str, list[float]] = {case: [] for case in calls}
        for _ in range(repeats):
            for case, call in calls.items():
                times[case].append(clock(call))
        for case, samples in times.items():
            peak = "-" if peaks[case] is None else f"{peaks[case] / 2**20:.0f}"
            speed = f"  {traffic / min(samples) / 1e6:.0f} GB/s of 6 B a logit" if traffic and case == "ours" else ""
            found = cases.errors.get(case, {})
            errors = "  ".join(f"{name} {error:.1e}" for name, error in found.items()) + speed
            waited = {True: "yes", False: "no", None: "-"}[waits[case]]
            timed = f"{min(samples):9.3f} {statistics.median(samples):9.3f}"
            print(f"   {case:36s} {timed} {peak:>10s} {waited:>6s}  {errors}", flush=True)
            results.append(
                {"section": title, "case": case, "ms": samples, "extra_bytes": peaks[case], "waits": waits[case]}
                | {"errors": found}
            )
        for line in cases.missing:
            print(f"   not measured: {line}")
            results.append({"section": title, "error": line})
        del calls, cases
        gc.collect()
        if clock.is_cuda:
            torch.cuda.empty_cache()
    return results


def _gpu_main(file: str, peers: str) -> None:
    if not torch.cuda.is_available():
        raise SystemExit("policy_head --gpu: no CUDA device here, nothing was measured")
    device = torch.device("cuda")
    if peers:
        sys.path.append(peers)
    machine = {"machine": torch.cuda.get_device_name(), "torch": torch.__version__}
    print(machine)
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("nccl", init_method=f"file://{folder}/store", rank=0, world_size=1)
        try:
            results = _gpu_rows(
                device, [(8192, 151936), (8192, 18992)], [(8192, 2560, 151936), (8192, 8192, 16032)], repeats=20
            )
        finally:
            dist.destroy_process_group()
    if file:
        Path(file).write_text(json.dumps({**machine, "results": results}, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description="Policy head side by side with its peers, on CPU.")
    parser.add_argument("--quick", action="store_true", help="small sizes: proves that it runs, not the ratios")
    parser.add_argument("--gpu", action="store_true", help="measure on one CUDA device instead, within 8 minutes")
    parser.add_argument("--json", default="", help="write every sample to this file, beside sections that it holds")
    parser.add_argument("--report", default="", help="print the tables of such a file, and measure nothing")
    parser.add_argument("--only", default="", help="run the section of this title, or all that contain it")
    parser.add_argument("--peers", default="", help="folder of peers installed with pip --no-deps --target")
    for hidden_option in ("--worker", "--store", "--rank"):
        parser.add_argument(hidden_option, default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        result = _worker(Task(**json.loads(args.worker)), int(args.rank), args.store)
        print("RESULT " + json.dumps(result), flush=True)
        return
    if args.gpu:
        _gpu_main(args.json, args.peers)
        return
    if args.report:
        _report(json.loads(Path(args.report).read_text()))
        return
    machine = _machine()
    kept = _rows_of(args.json, machine)
    print(f"CPU only, {machine}; GPU rows: not measured")
    sections = _sections(args.quick, args.peers)
    exact = [section for section in sections if section.title == args.only]
    for section in exact or sections:
        if args.only in section.title:
            kept = [row for row in kept if row["section"] != section.title]
            for task in section.tasks:
                kept.append({"section": section.title, "reference": section.reference, **_run(task)})
                if args.json:
                    _write({**machine, "results": kept}, Path(args.json))
            _print([row for row in kept if row["section"] == section.title])


def _machine() -> dict[str, Any]:
    """What rows of one file must share: processor, time of its boot, and torch."""
    cpu = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    boot = next(int(line.split()[1]) for line in Path("/proc/stat").read_text().splitlines() if "btime" in line)
    return {
        "machine": f"{len(cpu)} x {cpu[0] if cpu else platform.machine()}",
        "boot": time.strftime("%Y-%m-%d %H:%M", time.gmtime(boot)),
        "torch": torch.__version__,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": 1,
    }


def _rows_of(file: str, machine: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows that an earlier command left in the file."""
    if not file or not Path(file).exists():
        return []
    content = json.loads(Path(file).read_text())
    rows: list[dict[str, Any]] = content.pop("results")
    if content != machine:
        raise SystemExit(f"{file} holds rows of {content}, this is {machine}: name another file")
    return rows


def _write(content: dict[str, Any], file: Path) -> None:
    partial = file.with_suffix(".part")
    partial.write_text(json.dumps(content, indent=1))
    partial.replace(file)


def _report(content: dict[str, Any]) -> None:
    rows = content.pop("results")
    ended = [row["ended"] for row in rows]
    print(f"CPU only, {content}; rows ended {min(ended)} to {max(ended)}")
    for title in dict.fromkeys(row["section"] for row in rows):
        _print([row for row in rows if row["section"] == title])


if __name__ == "__main__":
    main()
