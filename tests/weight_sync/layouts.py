"""Real Megatron policies at several layouts into real vLLM engines at several layouts, in one set of processes.

    python -m tests.weight_sync.layouts              # the whole matrix, minutes on two cores

Every training layout of a model uses the same engines: a TP 2 engine and a TP 1 engine as two replicas.  For every
layout each rank loads the same weights into Megatron, all ranks push slices into both engines, and then

* both engines' greedy tokens and log-probs are compared with transformers on those weights (in the parent);
* a byte flipped once is sent again, one flipped every time stops the transfer on every rank and names the tensor;
* bytes moved equal bytes needed, counted at the links;
* what the source exports equals the folder's tensors, bit for bit;
* the slices that an engine put together equal what vLLM's own loader makes of the whole tensors, bit for bit; those of
  an engine in FP8 what it makes of a checkpoint in FP8.
"""

from __future__ import annotations

import dataclasses
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from megatron_rest.config import RolloutQuantization
from megatron_rest.weight_sync.vllm_plugin import WorkerExtension
from tests.helpers.distributed import run_distributed
from tests.helpers.fp8 import form_of, fp8_reference, write_fp8_checkpoint
from tests.helpers.tiny_model import build_tiny_model, perturb

PROMPT = np.arange(60, 130)
NEW_TOKENS = 8
FP32_BAND = 1e-4
FP8_BAND = 0.5  # a TP 2 engine rounds halves of what transformers rounds whole


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training:
    """A layout of Megatron; what is left of the world is data parallel."""

    tp: int = 1
    pp: int = 1
    vpp: int = 1
    ep: int = 1

    def __str__(self) -> str:
        return f"TP{self.tp} PP{self.pp}" + f" VPP{self.vpp}" * (self.vpp > 1) + f" EP{self.ep}" * (self.ep > 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checked:
    """What a rank saw at one layout; engines' answers on the ranks that own one."""

    layout: Training
    tokens: list[int] | None
    log_probs: np.ndarray | None
    bytes_moved: int
    bytes_needed: int
    attempts: tuple[int, int]
    checksums: tuple[str, str]
    refused: str
    is_exported_exactly: bool
    loader_differences: list[str]


class RecordingExtension(WorkerExtension):
    """Compares slices with vLLM's own loader, inside the worker."""

    def record_slices(self) -> None:
        """Keep what the next pass hands to the model."""
        engine: Any = self.weight_transfer_engine
        self.slices: dict[str, torch.Tensor] = {}
        put = engine._receiver.put

        def kept(name: str, tensor: torch.Tensor, is_whole: bool) -> None:
            self.slices[name] = tensor.clone()
            put(name, tensor, is_whole)

        engine._receiver.put = kept

    def differences_from_loader(self, weights: str) -> list[str]:
        """Parameters whose slices are not what a fresh model holds after vLLM's own ``load_weights``."""
        from vllm.config import set_current_vllm_config
        from vllm.model_executor.model_loader.utils import initialize_model
        from vllm.utils.torch_utils import set_default_torch_dtype

        config = self.vllm_config  # type: ignore[attr-defined]
        context = config.compilation_config.static_forward_context
        before = dict(context)
        context.clear()  # a second model of the same names
        with set_default_torch_dtype(config.model_config.dtype), set_current_vllm_config(config):
            fresh: Any = initialize_model(vllm_config=config)
        context.clear()
        context.update(before)
        fresh.load_weights(iter(load_file(weights).items()))
        held = {n: p for n, p in fresh.named_parameters() if ".attn." not in n}  # scales of a KV cache in FP8
        wanted = {n: p for n, p in held.items() if n != "lm_head.weight" or n in self.slices}
        names = sorted(wanted.keys() ^ self.slices.keys())
        same = {n for n, t in self.slices.items() if n in wanted and _is_same(t, wanted[n].data)}
        return names + sorted(self.slices.keys() - same)


def _is_same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype is b.dtype and torch.equal(a.view(torch.uint8), b.contiguous().view(torch.uint8))


def run_rank(
    rank: int, world: int, folder: str, layouts: list[Training], quantization: RolloutQuantization
) -> list[Checked]:
    """All layouts of one model; rank 0 owns a TP 2 engine and the last rank a TP 1 engine."""
    from megatron_rest.rollout.process import prepare_process

    prepare_process(allow_late=True)
    import logging

    logging.getLogger("megatron_rest.weight_sync.sync").setLevel(logging.ERROR)  # resends are wanted here
    engine = _engine(folder, {0: 2, world - 1: 1}.get(rank), quantization)
    try:
        return [_check(rank, layout, engine, folder, i, layouts) for i, layout in enumerate(layouts)]
    finally:
        if engine is not None:
            engine.close()


def _engine(folder: str, tp: int | None, quantization: RolloutQuantization) -> Any:
    if tp is None:
        return None
    from megatron_rest.config import RolloutConfig
    from megatron_rest.rollout import vllm_engine

    vllm_engine._WORKER_EXTENSION = "tests.weight_sync.layouts.RecordingExtension"
    config = RolloutConfig(kv_cache_bytes=16 << 20, tensor_parallel=tp, quantization=quantization)
    base = f"{folder}/0"
    return vllm_engine.VllmEngine(base, config, seed=0, max_model_len=128, transport="gloo", random_weights=True)


def _check(rank: int, layout: Training, engine: Any, folder: str, index: int, layouts: list[Training]) -> Checked:
    from megatron.core import parallel_state

    from megatron_rest.config import WeightSyncConfig
    from megatron_rest.trainer.setup import weight_source
    from megatron_rest.weight_sync.sync import WeightSync, WeightSyncError
    from tests.helpers.policies import layout_config, make_policy

    path = f"{folder}/{index}"
    overrides = (f"parallel.expert_parallel={layout.ep}",)
    parts = make_policy(
        layout_config(path, tp=layout.tp, pp=layout.pp, vpp=layout.vpp, sp=layout.tp > 1, overrides=overrides)
    )
    source = weight_source(parts, bucket_bytes=1 << 16)
    sync = WeightSync(engine, source, WeightSyncConfig(transport="gloo", bucket_bytes=1 << 15))
    if engine is not None:
        engine._open().collective_rpc("record_slices")
    first = sync.push(1)
    plans = sync.transport.plans  # type: ignore[attr-defined]
    differences: list[str] = []
    if engine is not None:
        for worker in engine._open().collective_rpc("differences_from_loader", args=(_loaded_file(path),)):
            differences += worker
    tokens, log_probs = (None, None) if engine is None else engine.greedy(PROMPT, NEW_TOKENS)
    name = "model.layers.1.self_attn.o_proj.weight"
    sync._tamper = _flip(name, times=1)
    resent = sync.push(2)
    sync._tamper = _flip(name, times=10**6)
    try:
        sync.push(3)
        refused = "nothing"
    except WeightSyncError as error:
        refused = str(error)
    sync._tamper = None
    state = load_file(f"{path}/model.safetensors")
    exported = dict(source)
    is_exact = exported.keys() == state.keys() and all(torch.equal(exported[n], state[n]) for n in state)
    parallel_state.destroy_model_parallel()
    return Checked(
        layout=layout,
        tokens=None if tokens is None else [int(t) for t in tokens],
        log_probs=log_probs,
        bytes_moved=first.num_bytes,
        bytes_needed=sum(plan.needed_bytes for plan in plans),
        attempts=(first.attempts, resent.attempts),
        checksums=(first.checksum, resent.checksum),
        refused=refused,
        is_exported_exactly=is_exact,
        loader_differences=differences,
    )


def _loaded_file(path: str) -> str:
    fp8 = Path(path) / "fp8" / "model.safetensors"
    return str(fp8 if fp8.exists() else Path(path) / "model.safetensors")


def _flip(name: str, times: int) -> Any:
    """One bit of the named tensor changes on its way, in the first ``times`` copies of it that this rank sends."""
    left = [times]

    def tamper(tensor_name: str, part: torch.Tensor) -> torch.Tensor:
        if tensor_name != name or not left[0]:
            return part
        left[0] -= 1
        broken = part.clone()
        broken.view(-1).view(torch.uint8)[5] ^= 0x20
        return broken

    return tamper


def check_model(
    folder: Path,
    layouts: list[Training],
    world: int,
    *,
    quantization: RolloutQuantization = RolloutQuantization.NONE,
    **model: Any,
) -> list[str]:
    """Run all layouts of one model and compare; returns a line for every layout, raises on the first difference."""
    is_exact = quantization is RolloutQuantization.NONE
    for index in range(len(layouts)):
        path = build_tiny_model(folder / str(index), with_tokenizer=False, **model)
        if index:
            state = perturb(load_file(path / "model.safetensors"), seed=index)
            save_file(state, path / "model.safetensors", metadata={"format": "pt"})
        if not is_exact:
            write_fp8_checkpoint(path, path / "fp8", load_file(path / "model.safetensors"), quantization)
    results = run_distributed(run_rank, world, str(folder), layouts, quantization, timeout=500)
    lines = []
    for index, layout in enumerate(layouts):
        checked: list[Checked] = [of_rank[index] for of_rank in results]
        gaps = []
        for owner in (0, world - 1):
            result = checked[owner]
            assert result.tokens is not None and result.log_probs is not None
            wanted_tokens, reference = _reference(folder / str(index), result.tokens, quantization)
            assert result.tokens == wanted_tokens or not is_exact, (layout, owner, result.tokens, wanted_tokens)
            gaps.append(float(np.abs(reference - result.log_probs).max()))
        assert max(gaps) < (FP32_BAND if is_exact else FP8_BAND), (layout, gaps)
        for result in checked:
            assert result.bytes_moved == result.bytes_needed
            assert result.attempts == (1, 2)
            assert {*result.checksums} == {checked[0].checksums[0]}
            assert "model.layers.1.self_attn.o_proj.weight" in result.refused and "attempt 2 of 2" in result.refused
            assert "," not in result.refused, result.refused  # that tensor and no other
            assert result.is_exported_exactly
            assert result.loader_differences == []
        moved = checked[0].bytes_moved
        what = f"{model} {quantization} {layout} world {world}"
        lines.append(f"{what}: |log-prob gap| {max(gaps):.1e}, {moved} bytes moved = needed")
    return lines


def _reference(path: Path, tokens: list[int], quantization: RolloutQuantization) -> tuple[list[int], np.ndarray]:
    """transformers' greedy continuation given the engine's tokens, and its log-probs of them."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    if quantization is not RolloutQuantization.NONE:
        fp8_reference(model, form_of(quantization, model.state_dict()), quantise_inputs=True)
    full = torch.tensor([*PROMPT.tolist(), *tokens])
    with torch.no_grad():
        table = model(full[None]).logits[0, len(PROMPT) - 1 : -1].log_softmax(-1)
    return table.argmax(-1).tolist(), table.gather(-1, full[len(PROMPT) :, None])[:, 0].numpy()


MATRIX: list[tuple[dict[str, Any], int, list[Training]]] = [
    (
        {"arch": arch, "tied": tied, "layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4},
        8,
        [Training(tp=tp, pp=pp) for tp in (1, 2, 4) for pp in (1, 2)] + [Training(tp=2, pp=2, vpp=2)],
    )
    for arch, tied in (("qwen3", True), ("qwen3", False), ("llama", False), ("llama", True))
]
MATRIX.append(
    (
        {"arch": "qwen3_moe", "tied": False, "layers": 4},
        4,
        [Training(), Training(ep=2), Training(tp=2, ep=2), Training(tp=2, pp=2, ep=2), Training(pp=2, ep=2)],
    )
)
MATRIX.append(({**MATRIX[1][0], "quantization": RolloutQuantization.FP8_CHANNEL}, *MATRIX[1][1:]))


def main(selected: list[str]) -> None:
    """The whole matrix, or the models whose number is given."""
    for number, (model, world, layouts) in enumerate(MATRIX):
        if selected and str(number) not in selected:
            continue
        started = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            for line in check_model(Path(folder), layouts, world, **model):
                print(line, flush=True)
        print(f"  {time.perf_counter() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
