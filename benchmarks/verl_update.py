"""The same rows through verl's FSDP engine: scoring pass and update, for `benchmarks.shared_prompts --verl PYTHON`.

    PYTHON benchmarks/verl_update.py --model HF_FOLDER --rows rows.npz --repeats 3 --output out.json

Runs in an environment of its own, since verl's pins are others than this project's (`pip install verl==0.9.1` with a
CPU build of torch); nothing of this project is imported.  One rank over gloo, FSDP2, float32, sdpa, no recomputation,
entropy off, verl's own GRPO loss.  verl has no platform of its own for a CPU (one is given to it here, in its plugin's
form) and registers the engine for CUDA and NPU only: its class is made by hand.
The rows of a case are of one length, so that what verl pads on a CPU, where it cannot pack, is nothing.

``rows.npz``: ``tokens`` [G, P + R] int64, ``advantages`` [G] float32, ``prompt`` P, ``max_tokens`` of a microbatch.
``out.json``: ``seconds`` [[score, update], ...] (CPU seconds of the process, one a repeat, after one to warm up),
``log_probs`` [G, R] of the scoring pass before any update.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import os
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import numpy as np
import torch
from tensordict import TensorDict
from verl.plugin.platform.platform_cuda import PlatformCUDA
from verl.plugin.platform.platform_manager import set_platform


class PlatformCPU(PlatformCUDA):
    """What the engine asks of a platform, answered for a machine without an accelerator."""

    device_name = "cpu"
    vendor_name = "cpu"
    device_module = torch.cpu

    def is_available(self) -> bool:
        return True

    def current_device(self) -> torch.device:
        return torch.device("cpu")

    def device_count(self) -> int:
        return 1

    def set_device(self, device_index: int) -> None:
        pass

    def synchronize(self, device_index: int | None = None) -> None:
        pass

    def empty_cache(self) -> None:
        pass

    def communication_backend_name(self) -> str:
        return "gloo"


set_platform(PlatformCPU())  # before any of its modules asks

from verl.trainer.config import CheckpointConfig  # noqa: E402
from verl.utils import tensordict_utils as tu  # noqa: E402
from verl.workers.config import ActorConfig, FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig  # noqa: E402
from verl.workers.engine.fsdp import transformer_impl  # noqa: E402
from verl.workers.utils.losses import ppo_loss  # noqa: E402


def jagged(rows: list[torch.Tensor]) -> torch.Tensor:
    return torch.nested.as_nested_tensor(rows, layout=torch.jagged)


def batch_of(tokens: torch.Tensor, advantages: torch.Tensor, prompt: int, settings: dict[str, object]) -> TensorDict:
    """What verl's actor worker gets: sequences without padding, the answer's columns apart."""
    size, length = tokens.shape
    answer = length - prompt
    mask = torch.ones(size, answer, dtype=torch.long)
    fields = {
        "input_ids": jagged(list(tokens)),
        "position_ids": jagged([torch.arange(length) for _ in range(size)]),
        "loss_mask": jagged(list(torch.cat([torch.zeros(size, prompt, dtype=torch.long), mask], dim=1))),
        "prompts": jagged(list(tokens[:, :prompt])),
        "responses": jagged(list(tokens[:, prompt:])),
        "response_mask": jagged(list(mask)),
        "advantages": jagged(list(advantages[:, None].expand(size, answer).clone())),
    }
    return tu.get_tensordict(fields, non_tensor_dict={**settings, "temperature": 1.0, "global_batch_size": size})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = np.load(args.rows)
    tokens, advantages = torch.from_numpy(rows["tokens"]), torch.from_numpy(rows["advantages"])
    prompt, length = int(rows["prompt"]), tokens.shape[1]
    rendezvous = args.output.with_suffix(".rendezvous")
    torch.distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=0, world_size=1)
    per_microbatch = max(1, int(rows["max_tokens"]) // length)
    while len(tokens) % per_microbatch:
        per_microbatch -= 1  # verl's fixed batches divide the whole
    model = HFModelConfig(path=args.model, use_remove_padding=False, enable_gradient_checkpointing=False)
    model.hf_config._attn_implementation = "sdpa"
    transformer_impl.log_gpu_memory_usage = lambda *_, **__: None  # asks CUDA
    engine = transformer_impl.FSDPEngineWithLMHead(
        model,
        FSDPEngineConfig(
            strategy="fsdp2", dtype="float32", model_dtype="fp32", use_torch_compile=False, use_remove_padding=False,
            use_dynamic_bsz=False, micro_batch_size_per_gpu=per_microbatch,
            infer_micro_batch_size_per_gpu=per_microbatch,
            mixed_precision={"param_dtype": "fp32", "reduce_dtype": "fp32", "buffer_dtype": "fp32"},
        ),
        FSDPOptimizerConfig(lr=1e-6, total_training_steps=100),
        CheckpointConfig(),
    )  # fmt: skip
    engine.initialize()
    settings = {
        "use_dynamic_bsz": False,
        "micro_batch_size_per_gpu": per_microbatch,
        "use_remove_padding": False,
        "calculate_entropy": False,
    }
    loss = functools.partial(
        ppo_loss, ActorConfig(strategy="fsdp2", rollout_n=len(tokens), ppo_micro_batch_size_per_gpu=per_microbatch)
    )
    seconds, first = [], None
    for turn in range(args.repeats + 1):
        batch = batch_of(tokens, advantages, prompt, settings)
        gc.collect()
        begin = time.process_time()
        with engine.eval_mode():
            scored = engine.infer_batch(batch.copy())["model_output"]["log_probs"]
        middle = time.process_time()
        whole = torch.stack(list(scored.unbind()))  # [G, P + R]; the last column predicts nothing
        old = whole[:, prompt - 1 : -1].detach()
        first = old if first is None else first
        batch["old_log_probs"] = jagged(list(old))
        gc.collect()
        resumed = time.process_time()
        with engine.train_mode():
            engine.train_batch(batch, loss)
        if turn:
            seconds.append([middle - begin, time.process_time() - resumed])
    assert first is not None
    args.output.write_text(json.dumps({"seconds": seconds, "log_probs": first.tolist()}))


if __name__ == "__main__":
    main()
