"""Published runs on H100s that the planner's times are compared with, as they are fitted to (``hardware.Efficiency``).

Pre-training: tokens a second and GPU of NVIDIA's Megatron-Bridge (its performance summaries, the container's release
beside each point).  RL: seconds of a GRPO step of NVIDIA's NeMo-RL (its performance summary), on policy, in BF16, with
engines on the training GPUs, and a reference policy; prompts are taken to have 120 tokens.  Depths that do not divide
into equal stages here are the next that do: 405B has 128 layers instead of 126, 235B has 96 instead of 94.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from megatron_rest.config import load
from megatron_rest.model_map import ModelShape
from megatron_rest.planner.hardware import EFFICIENCY, HARDWARE, Efficiency
from megatron_rest.planner.lengths import Lengths
from megatron_rest.planner.shapes import PUBLISHED
from megatron_rest.planner.steptime import step_time
from megatron_rest.planner.work import Assumptions, step_work

__all__ = ["POINTS", "Point"]

_BRIDGE = "docs.nvidia.com/nemo/megatron-bridge performance-summary-archive"
_NEMO_RL = "docs.nvidia.com/nemo/rl about/performance-summary"


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """One published run."""

    name: str
    source: str
    model: str  # of ``shapes.PUBLISHED``
    gpus: int
    value: float  # pre-training: tokens a second and GPU; RL: seconds a step
    tokens: int  # of the longest sequence
    sequences: int  # of a global batch, or rollouts a step
    layers: int = 0  # other than the model's
    fp8: bool = False
    tp: int = 1
    pp: int = 1
    vpp: int = 1
    cp: int = 1
    ep: int = 1
    micro: int = 1  # sequences of a microbatch
    mean: int = 0  # RL: tokens of a prompt and its response, on average; 0: pre-training
    engine_tp: int = 1

    @property
    def shape(self) -> ModelShape:
        numbers = PUBLISHED[self.model]
        return ModelShape.from_hf_config(numbers | ({"num_hidden_layers": self.layers} if self.layers else {}))

    def ratio(self, efficiency: Efficiency = EFFICIENCY) -> float:
        """Planned time over published time."""
        config = load(overrides=self._overrides())
        prompt = 120 if self.mean else self.tokens / 2
        response = (self.mean or self.tokens) - prompt
        lengths = Lengths.of(config, prompt=prompt, response=response)
        hardware, shape = HARDWARE["h100"], self.shape
        work = step_work(
            config, shape, world_size=self.gpus, lengths=lengths, assumed=Assumptions(shares_prompts=False)
        )
        if not self.mean:
            efficiency = replace(efficiency, tp_exposed=0.0)  # these runs overlap it
        time = step_time(config, shape, hardware, work, world_size=self.gpus, lengths=lengths, efficiency=efficiency)
        assert time is not None
        if self.mean:
            return time.total / self.value
        return time.update / (self.sequences * self.tokens / self.gpus / self.value)

    def _overrides(self) -> list[str]:
        half = 512 if self.mean else self.tokens // 2
        group = 32 if self.mean else 1
        settings = {
            "model.path": f"/published/{self.model}",
            "model.max_sequence_length": self.tokens,
            "model.dtype": "bfloat16",
            "rollout.dtype": "bfloat16",
            "data.max_prompt_tokens": half,
            "rollout.max_response_tokens": self.tokens - half,
            "rollout.rollouts_per_prompt": group,
            "data.prompts_per_step": self.sequences // group,
            "optimizer.updates_per_step": self.sequences // 512 if self.mean else 1,
            "trainer.max_tokens_per_microbatch": self.tokens * self.micro,
            "parallel.tensor_parallel": self.tp,
            "parallel.pipeline_parallel": self.pp,
            "parallel.virtual_pipeline": self.vpp,
            "parallel.context_parallel": self.cp,
            "parallel.expert_parallel": self.ep,
            "parallel.sequence_parallel": str(self.tp > 1).lower(),
            "parallel.distributed_optimizer": "true",
            "rollout.tensor_parallel": self.engine_tp,
        }
        if self.fp8:
            settings["precision.recipe"] = "tensorwise"
        if self.mean:
            settings |= {
                "parallel.recompute": "full",
                "rollout.gpu_memory_utilization": 0.6,
                "rollout.max_concurrent": 1024,
                "loss.kl_coef": 0.01,
            }
        else:  # what they hide behind the computation
            settings |= {
                "megatron.ddp.overlap_grad_reduce": "true",
                "megatron.ddp.overlap_param_gather": "true",
            }
        return [f"{key}={value}" for key, value in settings.items()]


POINTS = (
    Point(name="Llama3 8B FP8, 8 GPUs", source=f"{_BRIDGE}, 25.11", model="Llama-3.1-8B", gpus=8, value=14451,
          tokens=8192, sequences=128, fp8=True),
    Point(name="Llama3 70B FP8, 64", source=f"{_BRIDGE}, 26.04.01", model="Llama-3.3-70B", gpus=64, value=1664,
          tokens=8192, sequences=256, fp8=True, tp=4, pp=8, vpp=5),
    Point(name="Llama3 70B SFT FP8, 32", source=f"{_BRIDGE}, 26.06", model="Llama-3.3-70B", gpus=32, value=1638,
          tokens=4096, sequences=32, fp8=True, tp=4, pp=4, vpp=5),
    Point(name="Llama3.1 405B FP8, 1,024", source=f"{_BRIDGE}, 26.06", model="Llama-3.1-405B", gpus=1024, value=326,
          tokens=8192, sequences=1536, layers=128, fp8=True, tp=8, pp=8, vpp=8, cp=2),
    Point(name="Qwen3 30B-A3B FP8, 16", source=f"{_BRIDGE}, 25.11", model="Qwen3-30B-A3B", gpus=16, value=5275,
          tokens=4096, sequences=512, fp8=True, pp=2, vpp=24, ep=8, micro=2),
    Point(name="Qwen3 30B-A3B FP8, 16, EP 16", source=f"{_BRIDGE}, 26.06", model="Qwen3-30B-A3B", gpus=16, value=8826,
          tokens=4096, sequences=1024, fp8=True, ep=16),
    Point(name="Qwen3 235B-A22B FP8, 256", source=f"{_BRIDGE}, 25.11", model="Qwen3-235B-A22B", gpus=256, value=1575,
          tokens=4096, sequences=2048, layers=96, fp8=True, tp=2, pp=8, vpp=4, ep=32),
    Point(name="Qwen3 235B-A22B FP8, 256", source=f"{_BRIDGE}, 26.04.01", model="Qwen3-235B-A22B", gpus=256, value=1712,
          tokens=4096, sequences=8192, layers=96, fp8=True, tp=2, pp=8, vpp=4, ep=32),
    Point(name="GRPO Llama3.1 8B, 16", source=f"{_NEMO_RL}, v0.4", model="Llama-3.1-8B", gpus=16, value=97.7,
          tokens=4096, sequences=2048, pp=2, mean=1060),
    Point(name="GRPO Qwen3 32B, 32", source=f"{_NEMO_RL}, v0.4", model="Qwen3-32B", gpus=32, value=393,
          tokens=4096, sequences=2048, tp=4, pp=4, mean=3206, engine_tp=4),
    Point(name="GRPO Qwen3 30B-A3B, 32", source=f"{_NEMO_RL}, v0.4", model="Qwen3-30B-A3B", gpus=32, value=225,
          tokens=4096, sequences=2048, tp=2, ep=8, mean=3154, engine_tp=4),
    Point(name="GRPO Qwen3 30B-A3B, 32", source=f"{_NEMO_RL}, v0.6", model="Qwen3-30B-A3B", gpus=32, value=192,
          tokens=4096, sequences=2048, ep=8, mean=3203, engine_tp=2),
    Point(name="GRPO Qwen3 235B-A22B, 128", source=f"{_NEMO_RL}, v0.4", model="Qwen3-235B-A22B", gpus=128, value=506,
          tokens=8192, sequences=512, layers=96, tp=2, pp=8, cp=2, ep=16, mean=5671, engine_tp=16),
    Point(name="GRPO Qwen3 235B-A22B, 128", source=f"{_NEMO_RL}, v0.6", model="Qwen3-235B-A22B", gpus=128, value=395,
          tokens=8192, sequences=512, layers=96, tp=2, pp=8, cp=2, ep=16, mean=5698, engine_tp=16),
)  # fmt: skip
