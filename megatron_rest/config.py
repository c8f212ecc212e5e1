"""One configuration tree: frozen, keyword-only dataclasses, a sentence under every field, no torch import.

Files are YAML; overrides are ``section.key=value``.  An unknown key is an error that names the nearest known one.
Classes check what they can on construction; what needs two sections is checked by :func:`validate`.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import yaml

from megatron_rest.credit_traits import BUILT_IN as CREDITS
from megatron_rest.credit_traits import Normalisation, traits_of
from megatron_rest.help_topics import Topic, see
from megatron_rest.pass_through import OURS

__all__ = [
    "ADVANTAGE_NAMES",
    "DIALECT_NAMES",
    "LOGGERS",
    "LOSS_NAMES",
    "RESOLVED",
    "REWARD_FUNCTIONS",
    "TRANSPORTS",
    "AdvantageConfig",
    "AdvantageEstimator",
    "CheckpointConfig",
    "ConfigError",
    "DataConfig",
    "Fp8Recipe",
    "LoggerEntry",
    "LossAggregation",
    "LossConfig",
    "MegatronConfig",
    "ModelConfig",
    "OnUpdate",
    "OptimizerConfig",
    "ParallelConfig",
    "PrecisionConfig",
    "ProfileConfig",
    "RestConfig",
    "RewardConfig",
    "RewardTerm",
    "RolloutConfig",
    "RolloutQuantization",
    "TrainerConfig",
    "ValidationConfig",
    "WarmStartConfig",
    "WeightSource",
    "WeightSyncConfig",
    "WeightingConfig",
    "from_dict",
    "load",
    "to_dict",
    "validate",
]


DIALECT_NAMES = (
    "toolrl",
    "hermes",
    "llama3_json",
    "qwen3_coder",
    "harmony",
    "glm45",
    "mistral",
    "mistral_v11",
    "deepseek",
    "deepseek_v31",
    "pythonic",
)
"""Values of ``model.dialect`` beside ``auto``: the table of :mod:`megatron_rest.regions.dialects`."""


ADVANTAGE_NAMES = ("grpo", "dr_grpo", "rloo", "reinforce_pp", "reinforce_pp_baseline", "gdpo")
"""Values of ``advantage.estimator`` beside ``package.module:attribute`` (``algorithms/estimators.py``)."""

LOSS_NAMES = ("clipped", "gspo", "cispo", "sapo")
"""Values of ``loss.function`` beside ``package.module:attribute`` (``algorithms/ratio_losses.py``)."""


class ConfigError(ValueError):
    """A configuration that cannot be used; the message says which key, what came and how to mend it."""


class WeightSource(StrEnum):
    """Where ResT's token weights come from; the other rules of token credit are in ``credit_traits.BUILT_IN``."""

    UNIFORM = "uniform"  # plain GRPO
    CONSTANT = "constant"  # the paper's region constants with the curriculum
    REFERENCE_CODE = "reference_code"  # the published code's: nothing on glue, end of turn and response text
    ENTROPY_OFFLINE = "entropy_offline"  # region entropies measured once, fixed
    ENTROPY_EMA = "entropy_ema"  # region entropies measured in every scoring pass
    VARIANCE_OPTIMAL = "variance_optimal"  # 1/beta from the exact last-layer score norm


class LossAggregation(StrEnum):
    """How token losses become one number (see docs/algorithm.md)."""

    SEQUENCE_MEAN = "sequence_mean"  # paper: mean over sequences of the mean over their tokens
    TOKEN_MEAN = "token_mean"  # one weighted mean over all tokens of the global batch
    REFERENCE_CODE = "reference_code"  # published code: weighted mean of each microbatch; for parity tests only


class OnUpdate(StrEnum):
    """What becomes of rollouts of later steps that run when new weights are there (rollout.max_staleness >= 2)."""

    WAIT = "wait"  # they end first: every rollout is of one version
    KEEP = "keep"  # they are cut, and go on from there with the new weights: a version for every token


class RolloutQuantization(StrEnum):
    """How engines hold the matrices of the layers (see docs/weight_sync.md); sender-side, e4m3, float32 scales."""

    NONE = "none"  # as rollout.dtype
    FP8_CHANNEL = "fp8_channel"  # one scale an output channel
    FP8_BLOCK = "fp8_block"  # one scale a block of 128 x 128


class Fp8Recipe(StrEnum):
    """How Transformer Engine scales FP8 tensors (see docs/fp8.md)."""

    NONE = "none"  # no FP8: everything in model.dtype
    DELAYED = "delayed"  # one scale a tensor, from the maxima of earlier steps
    TENSORWISE = "tensorwise"  # one scale a tensor, from its own maximum
    BLOCKWISE = "blockwise"  # one scale a block of 128
    MXFP8 = "mxfp8"  # one power-of-two scale a block of 32


class AdvantageEstimator(StrEnum):
    """Advantage of a rollout within its group alone; ``ADVANTAGE_NAMES`` has those of the whole step, too."""

    GRPO = "grpo"  # (R - mean) / (std + eps)
    DR_GRPO = "dr_grpo"  # R - mean
    RLOO = "rloo"  # R - mean of the others


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Which model, and its shape if it starts from random weights."""

    path: str = ""
    """HF folder (config.json, tokenizer; weights unless they start at random)."""
    shape: str = ""
    """Published model whose numbers the plan takes where path is not visible (llama-70b, qwen3-8b); nothing else."""
    max_sequence_length: int = 2048
    """Longest prompt + response in tokens; longer ones are refused, never cut."""
    dtype: str = "float32"
    """Training precision: float32 or bfloat16."""
    dialect: str = "auto"
    """How turns are written: toolrl, hermes, llama3_json, qwen3_coder, harmony, glm45, mistral, mistral_v11, deepseek,
    deepseek_v31 or pythonic, or package.module:DIALECT of your own; auto = as the prompts were prepared (their manifest
    says it)."""
    chat_template: str = "stock"
    """stock: the folder's own; append_only: one that never rewrites what was said, for environments (shipped for the
    families whose own drops earlier thoughts); the name of a shipped one (qwen3_no_think: Qwen3 with thinking off); or
    a path."""
    head: str = "fused"
    """fused: log-probs from hidden states, rows without loss are not projected; logits: through logits of every row."""

    def __post_init__(self) -> None:
        _one_of("model.dtype", self.dtype, ("float32", "bfloat16"))
        _one_of("model.head", self.head, ("fused", "logits"))
        if ":" not in self.dialect:
            _one_of("model.dialect", self.dialect, ("auto", *DIALECT_NAMES))
        if not self.chat_template:
            raise ConfigError("model.chat_template is empty: stock, append_only, the name of a shipped one or a path")
        _at_least("model.max_sequence_length", self.max_sequence_length, 2)


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelConfig:
    """Megatron's layout.  Data parallelism is what is left of the world size."""

    tensor_parallel: int = 1
    """Ranks that share every layer (TP)."""
    pipeline_parallel: int = 1
    """Pipeline stages (PP)."""
    virtual_pipeline: int = 1
    """Model chunks per stage (VPP); 1 = plain 1F1B."""
    context_parallel: int = 1
    """Ranks that share every sequence (CP)."""
    expert_parallel: int = 1
    """Ranks that share the experts (EP)."""
    sequence_parallel: bool = False
    """Shard norms and dropout along the sequence inside a TP group."""
    distributed_optimizer: bool = False
    """Shard the optimiser state over data-parallel ranks."""
    recompute: str = "none"
    """Activations computed again in the backward pass: none, mlp (of every layer) or full (all but layers' inputs)."""

    def __post_init__(self) -> None:
        for name in ("tensor_parallel", "pipeline_parallel", "virtual_pipeline", "context_parallel", "expert_parallel"):
            _at_least(f"parallel.{name}", getattr(self, name), 1)
        _one_of("parallel.recompute", self.recompute, ("none", "mlp", "full"))
        if self.virtual_pipeline > 1 and self.pipeline_parallel == 1:
            raise ConfigError("parallel.virtual_pipeline > 1 needs parallel.pipeline_parallel > 1")

    @property
    def replica_size(self) -> int:
        """Ranks of one data-parallel replica: TP x PP x CP."""
        return self.tensor_parallel * self.pipeline_parallel * self.context_parallel

    def data_parallel(self, world_size: int) -> int:
        """Data-parallel size for ``world_size`` ranks; raises if the layout does not fit."""
        model = self.replica_size
        if world_size % model:
            raise ConfigError(
                f"world size {world_size} does not fit tensor_parallel {self.tensor_parallel} x pipeline_parallel "
                f"{self.pipeline_parallel} x context_parallel {self.context_parallel} = {model}: "
                f"start a multiple of {model} ranks or change the parallel section{see(Topic.NO_START)}"
            )
        return world_size // model


@dataclass(frozen=True, kw_only=True, slots=True)
class MegatronConfig:
    """Further settings of Megatron-Core, as its own classes name them; what another key or correctness decides is
    refused."""

    transformer: dict[str, Any] = field(default_factory=dict)
    """Fields of TransformerConfig (megatron.transformer.attention_backend=flash)."""
    ddp: dict[str, Any] = field(default_factory=dict)
    """Fields of DistributedDataParallelConfig (megatron.ddp.overlap_grad_reduce=true)."""
    optimizer: dict[str, Any] = field(default_factory=dict)
    """Fields of Megatron's OptimizerConfig (megatron.optimizer.use_precision_aware_optimizer=true)."""

    def __post_init__(self) -> None:
        for name in ("transformer", "ddp", "optimizer"):
            _not_ours(f"megatron.{name}", getattr(self, name))


@dataclass(frozen=True, kw_only=True, slots=True)
class PrecisionConfig:
    """FP8 products of the transformer layers, through Transformer Engine.  The output layer never is FP8."""

    recipe: Fp8Recipe = Fp8Recipe.NONE
    """none, delayed, tensorwise, blockwise or mxfp8."""
    format: str = "hybrid"
    """hybrid: e4m3 forward, e5m2 gradients; e4m3: everywhere."""
    parameters: bool = False
    """Keep weights in FP8 and gather them in FP8 (needs parallel.distributed_optimizer, which holds the masters)."""
    bf16_layers_start: int = 0
    """First layers that stay in BF16; not with delayed."""
    bf16_layers_end: int = 0
    """Last layers that stay in BF16; not with delayed."""
    margin: int = 0
    """delayed: powers of two left free above the largest value seen."""
    amax_history: int = 1024
    """delayed: forward passes whose maxima are remembered."""
    amax_algorithm: str = "max"
    """delayed: max or most_recent of the history."""
    max_mismatch: float = 0.1
    """Largest mean |log-prob FP8 - log-prob BF16| of any region on the canary batch at start, nats; above it the run
    ends."""

    def __post_init__(self) -> None:
        _one_of("precision.format", self.format, ("hybrid", "e4m3"))
        _one_of("precision.amax_algorithm", self.amax_algorithm, ("max", "most_recent"))
        for name, least in (("bf16_layers_start", 0), ("bf16_layers_end", 0), ("margin", 0), ("amax_history", 1)):
            _at_least(f"precision.{name}", getattr(self, name), least)
        if not 0 < self.max_mismatch < math.inf:
            raise ConfigError(f"precision.max_mismatch is {self.max_mismatch}, expected a finite number > 0 (nats)")
        if self.recipe is Fp8Recipe.NONE and (self.parameters or self.bf16_layers_start or self.bf16_layers_end):
            raise ConfigError(
                "precision.parameters and precision.bf16_layers_* speak of FP8, and precision.recipe is none: "
                "choose a recipe or drop them"
            )
        if self.recipe is Fp8Recipe.DELAYED and (self.bf16_layers_start or self.bf16_layers_end):
            raise ConfigError(
                "precision.bf16_layers_start/end do not go with the delayed recipe (it reduces maxima once a pass over "
                "all layers): set them to 0, or precision.recipe to tensorwise, blockwise or mxfp8"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Prompts to train on: what ``make preprocess`` wrote."""

    train: str = ""
    """Folder written by megatron-rest-data convert."""
    prompts_per_step: int = 16
    """Prompts per RL step, over all data-parallel ranks."""
    max_prompt_tokens: int = 1024
    """Longer prompts are left out (and counted), never cut."""
    max_prompts: int = 0
    """Use only the first so many usable prompts; 0 = all."""
    require_reachable: bool = False
    """Leave out prompts whose reference answer is longer than rollout.max_response_tokens."""
    resample_zero_groups: int = 0
    """Dynamic sampling: most extra draws of prompts_per_step prompts a step, while fewer groups than that have
    rewards that differ; 0 = none."""

    def __post_init__(self) -> None:
        _at_least("data.prompts_per_step", self.prompts_per_step, 1)
        _at_least("data.max_prompt_tokens", self.max_prompt_tokens, 1)
        _at_least("data.max_prompts", self.max_prompts, 0)
        _at_least("data.resample_zero_groups", self.resample_zero_groups, 0)


_MOST_STALE = 64  # versions; the age of a token travels as a byte


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutConfig:
    """How the engine samples."""

    rollouts_per_prompt: int = 8
    """Group size G of the group-relative advantage."""
    max_response_tokens: int = 256
    """Longest response."""
    temperature: float = 1.0
    """Sampling temperature; the scoring pass uses the same."""
    top_p: float = 1.0
    """Nucleus sampling; below 1 the sampling distribution differs from the policy."""
    top_k: int = 0
    """Top-k sampling; 0 = off."""
    dtype: str = "float32"
    """Engine precision: float32, bfloat16 or float16."""
    quantization: RolloutQuantization = RolloutQuantization.NONE
    """Matrices of the layers in engines and on their way there: none, fp8_channel or fp8_block (needs loss.tis_cap)."""
    tensor_parallel: int = 1
    """Ranks of one engine: with replicas vLLM's own workers, colocated so many training ranks in a row."""
    kv_cache_bytes: int = 64 << 20
    """KV cache of one engine on CPU, bytes (GPU engines take gpu_memory_utilization instead)."""
    gpu_memory_utilization: float = 0.5
    """Share of a GPU's memory an engine may take."""
    max_concurrent: int = 64
    """Sequences one engine decodes at the same time."""
    replicas: int = 0
    """Engines in processes of their own, each started by one rank and given weights by gloo; 0 = one engine in every
    rank's process (colocated, weights by reference)."""
    nodes: int = 0
    """Nodes that hold nothing but the replicas and announce themselves in run_dir/engines (megatron_rest.rollout.host;
    a heterogeneous Slurm job starts them); 0 = replicas take GPUs of their owners' nodes."""
    max_staleness: int = 0
    """Optimised policy versions that rollouts may lag behind; 0 = each step waits for its rollouts, n = engines are up
    to n steps ahead of the one that trains (needs replicas and loss.tis_cap); 1 hides sampling behind training, more
    hides long rollouts as well."""
    on_update: OnUpdate = OnUpdate.WAIT
    """Rollouts of later steps that run when new weights are there: wait = they end first; keep = they are cut, and the
    new weights go on with them (needs max_staleness of 2 or more, and no environment)."""
    engine_timeout_seconds: float = 600.0
    """An engine process that gives no sign of life for so long is taken for hung, ended and started again."""
    max_restarts: int = 3
    """Times the engines may be started again within one step before the run gives up."""
    sleep_level: int = 0
    """Colocated on GPU: what engines give back while the policy trains; 0 = nothing, 1 = KV cache (weights move to
    host memory), 2 = KV cache and weights."""
    environment: str = ""
    """Multi-turn environment: bfcl, or package.module:factory of your own; empty = one answer a rollout."""
    environment_arguments: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the environment's factory (rollout.environment_arguments.steps=4)."""
    environment_workers: int = 0
    """Processes of each engine that hold its environments, for such as compute a lot; 0 = threads of the engine's own
    process."""
    max_turns: int = 8
    """Answers of one rollout in an environment."""
    tool_timeout_seconds: float = 30.0
    """A call to an environment that takes longer ends its rollout."""
    engine_args: dict[str, Any] = field(default_factory=dict)
    """Further arguments of vLLM's engine, as vLLM names them (rollout.engine_args.enforce_eager=true); what another key
    or correctness decides is refused."""

    def __post_init__(self) -> None:
        _not_ours("rollout.engine_args", self.engine_args)
        if self.environment_arguments and ":" not in self.environment:
            raise ConfigError(
                "rollout.environment_arguments are for a factory of your own, and rollout.environment is "
                f"{self.environment or 'empty'}: name package.module:factory there"
            )
        _at_least("rollout.rollouts_per_prompt", self.rollouts_per_prompt, 1)
        _at_least("rollout.max_response_tokens", self.max_response_tokens, 1)
        _one_of("rollout.dtype", self.dtype, ("float32", "bfloat16", "float16"))
        if self.quantization is RolloutQuantization.FP8_BLOCK and self.dtype == "float32":
            raise ConfigError(
                "rollout.quantization=fp8_block multiplies 16-bit activations, and rollout.dtype is float32: set "
                "rollout.dtype=bfloat16"
            )
        if self.temperature <= 0:
            raise ConfigError(f"rollout.temperature is {self.temperature}: RL samples from the policy, it must be > 0")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"rollout.top_p is {self.top_p}, expected a number in (0, 1]")
        for name, least in (
            ("tensor_parallel", 1),
            ("replicas", 0),
            ("nodes", 0),
            ("max_restarts", 0),
            ("environment_workers", 0),
            ("max_turns", 1),
            ("top_k", 0),
            ("kv_cache_bytes", 1),
            ("max_concurrent", 1),
        ):
            _at_least(f"rollout.{name}", getattr(self, name), least)
        for name in ("engine_timeout_seconds", "tool_timeout_seconds"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"rollout.{name} is {getattr(self, name)}, expected a finite number > 0 (seconds)")
        _within("rollout.gpu_memory_utilization", self.gpu_memory_utilization, 0, 1, open_ends="least")
        _within("rollout.max_staleness", self.max_staleness, 0, _MOST_STALE)
        if self.on_update is OnUpdate.KEEP and self.max_staleness < 2:
            raise ConfigError(
                f"rollout.on_update=keep goes on with rollouts of later steps, and with rollout.max_staleness "
                f"{self.max_staleness} none runs when new weights are there: set max_staleness to 2 or more, or "
                "on_update=wait"
            )
        if self.on_update is OnUpdate.KEEP and self.environment:
            raise ConfigError(
                f"rollout.on_update=keep cuts rollouts, and rollout.environment {self.environment} cannot be cut with "
                "them: set on_update=wait"
            )
        if self.sleep_level not in (0, 1, 2):
            raise ConfigError(f"rollout.sleep_level is {self.sleep_level}: vLLM has 1 and 2; 0 = engines stay awake")
        if self.nodes and (not self.replicas or self.replicas % self.nodes):
            raise ConfigError(
                f"rollout.replicas {self.replicas} do not spread evenly over rollout.nodes {self.nodes}: set replicas "
                "to a multiple of nodes, or nodes to 0"
            )
        if self.replicas and self.sleep_level:
            raise ConfigError(
                "rollout.sleep_level is for engines that share the trainer's GPUs, and rollout.replicas gives them "
                "GPUs of their own: set one of them to 0"
            )


REWARD_FUNCTIONS = ("tool_call", "environment", "matched_turns")
_REWARD_CODE = {"matched_turns": "megatron_rest.rewards.matched_turns:matched_turns"}  # called as your own are
"""Built-in values of ``reward.function``."""
_REWARD_NAMES = frozenset(
    {"total", "static", "format", "correctness", "accuracy", "format_valid", "not_judged", "failed"}
)
_TERM_NAME = re.compile(r"[A-Za-z_][\w-]*")


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardTerm:
    """One of the rewards that are added up."""

    name: str
    """Its numbers are logged under ``reward/NAME``."""
    function: str
    """tool_call, environment, matched_turns, package.module:function or http(s)://HOST/PATH."""
    weight: float = 1.0
    """The total is the sum of weight x reward."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the function."""
    key: str = "reward.function"
    """Where the configuration names it."""

    def __post_init__(self) -> None:
        if not self.function:
            raise ConfigError(f"{self.key} is empty: {_reward_forms()}")
        if ":" not in self.function:
            _one_of(self.key, self.function, REWARD_FUNCTIONS)
        elif "://" in self.function and not self.function.startswith(("http://", "https://")):
            raise ConfigError(f"{self.key} is {self.function!r}: an address begins with http:// or https://")
        if self.arguments and not self.is_foreign:
            raise ConfigError(
                f"{self.key} {self.function} takes no arguments: its rules are keys of the section reward"
            )
        if not math.isfinite(self.weight) or self.weight == 0:
            raise ConfigError(f"weight of {self.key} is {self.weight}, expected a finite number other than 0")

    @property
    def is_foreign(self) -> bool:
        """Whether a function or a server gives it, which may fail."""
        return ":" in self.code

    @property
    def code(self) -> str:
        """package.module:function or address behind ``function``; tool_call and environment have none."""
        return _REWARD_CODE.get(self.function, self.function)


def _reward_forms() -> str:
    return f"{', '.join(REWARD_FUNCTIONS)}, package.module:function of your own, or http(s)://HOST/PATH of a server"


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardConfig:
    """What an answer is worth: the rule of the published code (format + correctness with its schedule), a function or
    a server of your own, or several of them added up (docs/own_code.md)."""

    function: str = "tool_call"
    """tool_call (the rule of this section; an environment's own reward where it gives one), matched_turns (a reward a
    turn, by calls of the reference), package.module:function of your own, or http(s)://HOST/PATH of a server."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the function (reward.arguments.target=40)."""
    terms: dict[str, Any] = field(default_factory=dict)
    """Several rewards in place of function, added up: NAME: {function, weight, arguments}; each is logged as
    reward/NAME.  Beside the forms of function there is environment, what the environment gave."""
    workers: int = 0
    """Processes of each rank that call functions of your own; 0 = the rank's own process."""
    call_timeout_seconds: float = 30.0
    """A function or server of your own may take so long for an answer (a server for a batch); a rollout that it fails
    or that takes longer is not judged: it carries no loss and is counted."""
    batch_size: int = 32
    """Answers that a server gets in one request."""
    retries: int = 3
    """Times a request to a server is sent again."""
    schedule: bool = True
    """Move weight from format to correctness over ``schedule_steps``; False = static ranges (0/1 and -3..3)."""
    schedule_steps: int = 150
    """Steps until the schedule is complete; the published code hard-codes 150."""
    strict_format: bool = False
    """ToolRL's rule (nothing but the sections, exact newlines) instead of ResT's relaxed one."""
    accept_arguments: bool = True
    """Read calls as serving engines do: "arguments" or "parameters", one block a call or several calls a block; False =
    the published reader (one block, a line a call, "parameters" only), in ToolRL's tags."""
    opaque_thought: bool = False
    """Ignore tags mentioned inside the thought; False = the first tag anywhere counts, as in the published reward (in
    ToolRL's tags; other dialects always ignore them)."""
    correctness_range: float = 3.0
    """Static correctness lies in [-range, range] (published variant CORRECTMAX1: 1.0)."""
    granularity: str = "fine"
    """fine, exact_sets (REFINEDREWARD), coarse (COARSEREWARD) or whole_calls (INTERMEDIATEREWARD)."""
    two_stage: bool = False
    """Correctness / 3 before step 30, format / 2 from then on (MAX1STEP30MAX3)."""
    length_bonus: bool = False
    """Add words in the thought / 512, at most 1, to the total (WITHLENGTH, as ToolRL adds it)."""
    length_schedule: bool = False
    """Lengthen the 512 from 384 to 640 words over 105 steps (SCHEDULELENGTH)."""
    timeout_seconds: float = 60.0
    """Judging one answer may take so long; one that takes longer ends the run and is named."""

    def __post_init__(self) -> None:
        _at_least("reward.schedule_steps", self.schedule_steps, 1)
        _at_least("reward.workers", self.workers, 0)
        _at_least("reward.batch_size", self.batch_size, 1)
        _at_least("reward.retries", self.retries, 0)
        if not 0 < self.call_timeout_seconds < math.inf:
            raise ConfigError(
                f"reward.call_timeout_seconds is {self.call_timeout_seconds}, expected a finite number > 0"
            )
        self.as_terms()
        _one_of("reward.granularity", self.granularity, ("fine", "exact_sets", "coarse", "whole_calls"))
        if not 0 < self.correctness_range < math.inf:
            raise ConfigError(f"reward.correctness_range is {self.correctness_range}, expected a number > 0")
        if not 0 < self.timeout_seconds < math.inf:
            raise ConfigError(f"reward.timeout_seconds is {self.timeout_seconds}, expected a finite number > 0")

    def as_terms(self) -> tuple[RewardTerm, ...]:
        """What is added up: ``terms``, or ``function`` alone, named as its attribute (a server: "server")."""
        if not self.terms:
            name = "server" if "://" in self.function else self.function.rpartition(":")[2].replace(".", "_")
            name = f"{name}_reward" if name in _REWARD_NAMES else name
            return (RewardTerm(name=name, function=self.function, arguments=self.arguments),)
        if self.function != "tool_call" or self.arguments:
            raise ConfigError("reward.terms are in place of reward.function and reward.arguments: leave those two out")
        return tuple(_reward_term(name, values) for name, values in self.terms.items())

    @property
    def is_rule_alone(self) -> bool:
        """Whether the built-in rule judges, and nothing else."""
        return [term.function for term in self.as_terms()] == ["tool_call"] and not self.terms


def _reward_term(name: str, values: Any) -> RewardTerm:
    where = f"reward.terms.{name}"
    if not _TERM_NAME.fullmatch(name) or name in _REWARD_NAMES:
        raise ConfigError(
            f"{where}: a name of letters, digits, - and _, and none of {', '.join(sorted(_REWARD_NAMES))}"
        )
    if isinstance(values, str):
        values = {"function": values}
    if not isinstance(values, dict):
        raise ConfigError(f"{where} is {values!r}: a mapping of function, weight and arguments")
    known = ("function", "weight", "arguments")
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
            raise ConfigError(f"unknown configuration key {where}.{key}: {hint}{see(Topic.NO_START)}")
    function = values.get("function", name if name in REWARD_FUNCTIONS else "")
    return RewardTerm(
        name=name,
        function=_convert(str, function, f"{where}.function"),
        weight=_convert(float, values.get("weight", 1.0), f"{where}.weight"),
        arguments=_settings(values.get("arguments"), f"{where}.arguments"),
        key=f"{where}.function",
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class AdvantageConfig:
    """From rewards to one advantage a rollout."""

    estimator: str = AdvantageEstimator.GRPO
    """grpo, dr_grpo, rloo, reinforce_pp, reinforce_pp_baseline, gdpo (reward parts normalised apart), or
    package.module:attribute."""
    epsilon: float = 1e-6
    """Added to standard deviations."""
    options: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the estimator (gdpo: advantage.options.weights.correctness=2.0)."""
    overlong_buffer: int = 0
    """DAPO's soft overlong punishment: over the last so many tokens of rollout.max_response_tokens the reward falls
    linearly by overlong_penalty; 0 = off."""
    overlong_penalty: float = 1.0
    """What an answer of full length loses."""
    mask_truncated: bool = False
    """Answers that were cut at the length limit carry no loss (they still count for their siblings)."""

    def __post_init__(self) -> None:
        _name("advantage.estimator", self.estimator, ADVANTAGE_NAMES)
        if self.estimator in list(AdvantageEstimator):
            object.__setattr__(self, "estimator", AdvantageEstimator(self.estimator))
        if self.epsilon <= 0:
            raise ConfigError(f"advantage.epsilon is {self.epsilon}, expected a number > 0")
        _at_least("advantage.overlong_buffer", self.overlong_buffer, 0)
        _within("advantage.overlong_penalty", self.overlong_penalty, 0, open_ends="least")


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightingConfig:
    """Token credit: ResT's weights by region (curriculum, mean 1 per sequence over its valid tokens), or another
    rule."""

    source: str = WeightSource.CONSTANT
    """ResT: uniform (plain GRPO), constant, reference_code, entropy_offline, entropy_ema or variance_optimal; others:
    entropy_mask, hicra, message_penalty, egpo, aem, empg, gtpo, otb, otb_turns (docs/algorithm.md), or
    package.module:attribute."""
    options: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the rule (weighting.options.share=0.2); ResT's sources have the keys below instead."""
    gamma_format: float = 1.0
    """Weight of tags, JSON glue and end of turn at progress 0."""
    gamma_name: float = 1.2
    """Weight of tool names, constant."""
    gamma_args: float = 0.6
    """Weight of tool arguments at progress 0."""
    gamma_think: float = 0.6
    """Weight of reasoning at progress 0."""
    gamma_response: float = 0.6
    """Weight of response text at progress 0 (a choice of ours: the published code gives it 0)."""
    alpha_format: float = 0.0
    """Decay of gamma_format over the whole run (paper: > 0, published code: 0)."""
    alpha_args: float = 0.21
    """Growth of gamma_args over the whole run (published: 0.002 a step over 105 steps)."""
    alpha_think: float = 0.21
    """Growth of gamma_think over the whole run."""
    alpha_response: float = 0.21
    """Growth of gamma_response over the whole run."""
    max_args: float = 1.2
    """Cap of gamma_args."""
    max_think: float = 1.0
    """Cap of gamma_think and gamma_response."""
    min_weight: float = 0.001
    """Floor of a raw weight before normalisation."""
    max_weight: float = 8.0
    """Cap of a raw weight before normalisation."""
    entropy_floor: float = 0.01
    """Region entropies below this (nats) count as this: the rule sends weights to infinity at zero entropy."""
    entropy_decay: float = 0.9
    """Decay of the moving average of region entropies (entropy_ema) or score norms (variance_optimal)."""
    entropy_rule: str = "score_bound"
    """score_bound: 1 / (1 - exp(-H)); inverse: 1 / H (both in the paper, Eq. 9)."""

    def __post_init__(self) -> None:
        _name("weighting.source", self.source, tuple(CREDITS))
        if self.source in list(WeightSource):
            object.__setattr__(self, "source", WeightSource(self.source))
            if self.options:
                raise ConfigError(
                    f"weighting.options {', '.join(self.options)}: weighting.source={self.source} takes its numbers "
                    "from the keys of the weighting section itself (weighting.gamma_think=...)"
                )
        _one_of("weighting.entropy_rule", self.entropy_rule, ("score_bound", "inverse"))
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            is_slope = f.name.startswith("alpha_")  # a curriculum that runs backwards turns its sign
            if isinstance(value, float) and not (math.isfinite(value) and (is_slope or value >= 0)):
                wanted = "a finite number" if is_slope else "a finite number >= 0"
                raise ConfigError(f"weighting.{f.name} is {value}, expected {wanted}")
        if not 0 < self.min_weight <= self.max_weight:
            raise ConfigError(
                f"weighting.min_weight {self.min_weight} and max_weight {self.max_weight}: expected 0 < min <= max"
            )
        if self.entropy_floor <= 0 or self.entropy_decay >= 1:
            raise ConfigError(
                f"weighting.entropy_floor is {self.entropy_floor} (expected > 0), "
                f"entropy_decay {self.entropy_decay} (expected < 1)"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class LossConfig:
    """Policy loss."""

    aggregation: LossAggregation = LossAggregation.SEQUENCE_MEAN
    """sequence_mean (paper), token_mean or reference_code."""
    clip_low: float = 0.2
    """Lower clip: ratio >= 1 - clip_low."""
    clip_high: float = 0.2
    """Upper clip: ratio <= 1 + clip_high."""
    dual_clip: float | None = None
    """Bound of the loss for negative advantages (published code: 3.0); None = off (paper)."""
    kl_coef: float = 0.0
    """Weight of KL(policy || reference); the paper removes it.  The reference is model.path, kept in host memory."""
    kl_estimator: str = "k3"
    """k1, k2 or k3."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus."""
    tis_cap: float | None = None
    """Truncated importance sampling between rollout and training log-probs, cap; None = off."""
    tis_level: str = "token"
    """token or sequence."""
    max_log_ratio: float = 20.0
    """Log-ratios are clamped to +- this before exp."""
    old_log_probs: str = "policy"
    """What ratios start from: policy (as it was when the step began) or engine (as sampled; nothing is scored)."""
    function: str = "clipped"
    """What a token's ratio and advantage make: clipped (PPO), gspo (ratio of the whole answer), cispo, sapo, or
    package.module:attribute."""
    options: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the function (sapo: loss.options.tau_negative=1.05)."""

    def __post_init__(self) -> None:
        _name("loss.function", self.function, LOSS_NAMES)
        if self.dual_clip is not None and self.function in ("cispo", "sapo"):
            raise ConfigError(
                f"loss.dual_clip bounds a clipped loss, and loss.function={self.function} has no such bound: set "
                "loss.dual_clip=null"
            )
        _one_of("loss.kl_estimator", self.kl_estimator, ("k1", "k2", "k3"))
        _one_of("loss.tis_level", self.tis_level, ("token", "sequence"))
        _one_of("loss.old_log_probs", self.old_log_probs, ("policy", "engine"))
        if self.dual_clip is not None and self.dual_clip <= 1:
            raise ConfigError(f"loss.dual_clip is {self.dual_clip}: it bounds -c*A for c > 1, or is null")
        _within("loss.clip_low", self.clip_low, 0, 1)
        _within("loss.clip_high", self.clip_high, 0)
        _within("loss.kl_coef", self.kl_coef, 0)
        _within("loss.max_log_ratio", self.max_log_ratio, 0, 80, open_ends="least")  # exp(89) is infinite in float32
        if self.tis_cap is not None:
            _within("loss.tis_cap", self.tis_cap, 0, open_ends="least")


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig:
    """Adam as Megatron runs it."""

    lr: float = 1e-6
    """Learning rate."""
    weight_decay: float = 0.01
    """Decoupled weight decay."""
    clip_grad: float = 1.0
    """Global gradient norm."""
    adam_beta1: float = 0.9
    """Adam beta1."""
    adam_beta2: float = 0.999
    """Adam beta2."""
    warmup_steps: int = 0
    """Linear warm-up, optimiser steps: the first has the learning rate lr / warmup_steps."""
    decay: str = "constant"
    """constant or linear (to a tenth of lr at the last step).  A continued run is on the schedule configured now."""
    updates_per_step: int = 1
    """Optimiser steps per RL step (the rollouts are split into so many mini-batches)."""
    max_skipped: int = 5
    """Updates in a row that may be skipped because the loss or a gradient is not finite; one more ends the run."""

    def __post_init__(self) -> None:
        _one_of("optimizer.decay", self.decay, ("constant", "linear"))
        _at_least("optimizer.updates_per_step", self.updates_per_step, 1)
        _at_least("optimizer.max_skipped", self.max_skipped, 0)
        if self.lr <= 0:
            raise ConfigError(f"optimizer.lr is {self.lr}, expected a number > 0")
        _within("optimizer.weight_decay", self.weight_decay, 0)
        _within("optimizer.clip_grad", self.clip_grad, 0)
        _within("optimizer.adam_beta1", self.adam_beta1, 0, 1, open_ends="most")
        _within("optimizer.adam_beta2", self.adam_beta2, 0, 1, open_ends="most")
        _at_least("optimizer.warmup_steps", self.warmup_steps, 0)


TRANSPORTS = ("local", "gloo", "nccl")
"""Values of ``weight_sync.transport``."""


def vllm_backend(transport: str) -> str:
    """Name by which vLLM knows a transport of ours: it has backends of its own, one of them called nccl."""
    return f"rest_{transport}"


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightSyncConfig:
    """Training shards into the engine."""

    transport: str = "local"
    """local (engine in the trainer's process); gloo (engine processes, each worker gets its slices over TCP); nccl (the
    same over NCCL, between GPUs)."""
    bucket_bytes: int = 64 << 20
    """Tensors travel in buckets or messages of about this size."""
    canary_tolerance: float | None = None
    """|log-prob difference| between engine and trainer that the middle one of the canary's tokens may have after a
    sync, nats; null = 1e-4 if both compute in float32, 0.05 if not, 0.3 with rollout.quantization."""
    canary_tokens: int = 16
    """Tokens sampled from the canary prompt after every sync."""

    def __post_init__(self) -> None:
        _one_of("weight_sync.transport", self.transport, TRANSPORTS)
        _at_least("weight_sync.bucket_bytes", self.bucket_bytes, 1)
        _at_least("weight_sync.canary_tokens", self.canary_tokens, 1)
        if self.canary_tolerance is not None:
            _within("weight_sync.canary_tolerance", self.canary_tolerance, 0)


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointConfig:
    """Megatron distributed checkpoints and the HF export."""

    load: str = ""
    """Checkpoint folder to start from (any layout)."""
    save_every: int = 10
    """RL steps between checkpoints; 0 = only at the end."""
    keep_last: int = 2
    """Older checkpoints are removed."""
    keep_best: int = 0
    """Besides the last ones the so many best by best_metric are kept."""
    best_metric: str = "reward/static"
    """Metric of the step that keep_best goes by: larger is better; with a leading "-" smaller is."""
    asynchronous: bool = False
    """Write checkpoints in processes of their own while training goes on, from a snapshot of the moment."""
    any_layout: str = "last"
    """Which checkpoints load at any layout: the last one, or every one (gathers optimiser state in host memory)."""
    export_hf: bool = True
    """Write an HF folder at the end."""

    def __post_init__(self) -> None:
        _one_of("checkpoint.any_layout", self.any_layout, ("last", "every"))
        _at_least("checkpoint.save_every", self.save_every, 0)
        _at_least("checkpoint.keep_last", self.keep_last, 1)
        _at_least("checkpoint.keep_best", self.keep_best, 0)


LOGGERS = ("tensorboard", "wandb", "mlflow", "swanlab", "trackio")
"""Built-in values of ``trainer.loggers``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoggerEntry:
    """One logger of ``trainer.loggers``."""

    name: str
    """Built-in name or package.module:factory."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the factory."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainerConfig:
    """The loop."""

    run_dir: str = "runs/rest"
    """Everything the run writes."""
    steps: int = 105
    """RL steps of the whole run; progress = (step - 1) / (steps - 1)."""
    seed: int = 1
    """Seed of model, data order and sampling."""
    max_tokens_per_microbatch: int = 4096
    """Packed tokens of one pipeline microbatch."""
    share_prompts: str = "auto"
    """Compute the prompt of a group once for all its answers: on, off, or auto (on where it is known to be exact)."""
    save_rollouts_every: int = 0
    """RL steps between files of rollouts in run_dir/rollouts; the first and the last step always leave one."""
    samples_per_step: int = 4
    """Rollouts of every step that are left to read in run_dir/rollouts/*.jsonl, best and worst among them; where the
    arrays are saved all of them are."""
    threads: int = 0
    """CPU threads of a rank, its engine's included; 0 = the machine's cores divided by its ranks."""
    offload: bool = False
    """Gradients leave the device, and the optimiser's state for the host, while colocated engines sample there; they
    come back for updates and checkpoints (needs rollout.replicas=0)."""
    replay_every: int = 0
    """RL steps between replay bundles in run_dir/replay, one for each optimiser update, weights included; 0 = none."""
    timeout_minutes: int = 30
    """A collective that takes longer ends the run, and the rank that was waited for is named."""
    loggers: str = "tensorboard"
    """Who is told of a run besides metrics.jsonl, with commas: tensorboard, wandb, mlflow, swanlab, trackio,
    package.module:factory of your own; empty = nobody."""
    logger_arguments: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of a logger by its name, of your own by its attribute's
    (trainer.logger_arguments.wandb.project=rest)."""

    def __post_init__(self) -> None:
        self.as_loggers()
        _at_least("trainer.steps", self.steps, 1)
        _one_of("trainer.share_prompts", self.share_prompts, ("auto", "on", "off"))
        _at_least("trainer.seed", self.seed, 0)
        _at_least("trainer.threads", self.threads, 0)
        _at_least("trainer.timeout_minutes", self.timeout_minutes, 1)
        _at_least("trainer.save_rollouts_every", self.save_rollouts_every, 0)
        _at_least("trainer.replay_every", self.replay_every, 0)
        _at_least("trainer.samples_per_step", self.samples_per_step, 0)
        _at_least("trainer.max_tokens_per_microbatch", self.max_tokens_per_microbatch, 1)
        _at_least("trainer.timeout_minutes", self.timeout_minutes, 1)

    def as_loggers(self) -> tuple[LoggerEntry, ...]:
        """Loggers in their order, with their arguments."""
        names = [name.strip() for name in self.loggers.split(",") if name.strip()]
        if len(set(names)) < len(names):
            raise ConfigError(f"trainer.loggers is {self.loggers!r}: each logger once")
        short = {name.rpartition(":")[2]: name for name in names}
        if len(short) < len(names):
            raise ConfigError(f"trainer.loggers is {self.loggers!r}: two have the same name behind the colon")
        for name in names:
            if ":" not in name:
                _one_of("trainer.loggers", name, LOGGERS)
        for name, values in self.logger_arguments.items():
            if name not in short:
                there = ", ".join(short) or "none"
                raise ConfigError(f"trainer.logger_arguments.{name}: trainer.loggers names no such logger ({there})")
            if not isinstance(values, dict):
                raise ConfigError(f"trainer.logger_arguments.{name} is {values!r}, expected names and values")
        return tuple(
            LoggerEntry(name=name, arguments=self.logger_arguments.get(key, {})) for key, name in short.items()
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class ProfileConfig:
    """Traces of some steps, one file a rank in run_dir/profile (docs/performance.md)."""

    steps: str = ""
    """Steps that are traced together: 3-5, or 4; empty = none."""
    shapes: bool = False
    """Record the shapes of operators' inputs."""
    stacks: bool = False
    """Record Python's stacks: slow, and large files."""
    memory: bool = False
    """Record allocations."""

    def __post_init__(self) -> None:
        if self.steps and not re.fullmatch(r"[1-9]\d{0,8}(-[1-9]\d{0,8})?", self.steps):
            raise ConfigError(f"profile.steps is {self.steps!r}: a step or two of them (4, 3-5), or empty")
        first, last = self.first_and_last
        if last < first:
            raise ConfigError(f"profile.steps is {self.steps}: it ends before it begins")

    @property
    def first_and_last(self) -> tuple[int, int]:
        """Steps; (0, 0) = none."""
        first, _, last = self.steps.partition("-")
        return int(first or 0), int(last or first or 0)


@dataclass(frozen=True, kw_only=True, slots=True)
class ValidationConfig:
    """Benchmarks that the policy answers while it trains, greedily, on the engines that sample (docs/evaluation.md)."""

    every: int = 0
    """RL steps between validations; one more before the first step and after the last.  0 = none."""
    categories: str = "api-bank"
    """Benchmarks (api-bank, bfcl) or categories of them (level-1, live_simple, multi_turn_base ...), with commas."""
    cases: int = 32
    """Cases of each category, drawn by seed among those whose prompts fit; 0 = all."""
    seed: int = 0
    """Seed of the draw."""
    prompt_style: str = ""
    """How cases are written: original, compact or slim; empty = as data.train."""
    max_response_tokens: int = 0
    """Longest answer (a conversation may fill model.max_sequence_length); 0 = rollout.max_response_tokens."""

    def __post_init__(self) -> None:
        for name in ("every", "cases", "max_response_tokens"):
            _at_least(f"validation.{name}", getattr(self, name), 0)
        _one_of("validation.prompt_style", self.prompt_style, ("", "original", "compact", "slim"))
        if self.every and not self.categories.strip(" ,"):
            raise ConfigError("validation.categories is empty: name a benchmark, or set validation.every to 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class WarmStartConfig:
    """Supervised warm start on reference answers."""

    epochs: int = 8
    """Passes over the reference answers."""
    batch_size: int = 16
    """Sequences per optimiser step."""
    lr: float = 1e-3
    """Peak learning rate, linear decay to 10 %."""
    target_loss: float = 0.0
    """Stop once the mean loss of a whole pass, nats per answer token, is at most this; 0 = run all epochs."""
    answers: str = ""
    """Folder with prompts and reference answers; empty = data.train."""

    def __post_init__(self) -> None:
        _at_least("warm_start.epochs", self.epochs, 1)
        _at_least("warm_start.batch_size", self.batch_size, 1)
        _within("warm_start.lr", self.lr, 0, open_ends="least")
        _within("warm_start.target_loss", self.target_loss, 0)


@dataclass(frozen=True, kw_only=True, slots=True)
class RestConfig:
    """The whole run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """Model."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """Layout."""
    megatron: MegatronConfig = field(default_factory=MegatronConfig)
    """Megatron-Core's own settings."""
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    """FP8."""
    data: DataConfig = field(default_factory=DataConfig)
    """Prompts."""
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    """Sampling."""
    reward: RewardConfig = field(default_factory=RewardConfig)
    """Reward."""
    advantage: AdvantageConfig = field(default_factory=AdvantageConfig)
    """Advantages."""
    weighting: WeightingConfig = field(default_factory=WeightingConfig)
    """Token weights."""
    loss: LossConfig = field(default_factory=LossConfig)
    """Policy loss."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Optimiser."""
    weight_sync: WeightSyncConfig = field(default_factory=WeightSyncConfig)
    """Training to engine."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """Checkpoints."""
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    """The loop."""
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    """Traces of some steps."""
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    """Benchmarks while training."""
    warm_start: WarmStartConfig = field(default_factory=WarmStartConfig)
    """Supervised warm start."""


def validate(config: RestConfig, *, world_size: int) -> None:
    """Check what needs two sections.  Raises :class:`ConfigError`."""
    dp = config.parallel.data_parallel(world_size)
    rollouts = config.data.prompts_per_step * config.rollout.rollouts_per_prompt
    per_update = rollouts // config.optimizer.updates_per_step
    if rollouts % config.optimizer.updates_per_step:
        raise ConfigError(
            f"{rollouts} rollouts a step do not split into "
            f"optimizer.updates_per_step={config.optimizer.updates_per_step}"
        )
    if per_update < dp:
        raise ConfigError(f"{per_update} rollouts per optimiser step are fewer than {dp} data-parallel ranks")
    longest = config.data.max_prompt_tokens + config.rollout.max_response_tokens
    if longest > config.model.max_sequence_length:
        raise ConfigError(
            f"data.max_prompt_tokens {config.data.max_prompt_tokens} + rollout.max_response_tokens "
            f"{config.rollout.max_response_tokens} = {longest} exceeds model.max_sequence_length "
            f"{config.model.max_sequence_length}: shorten one or raise the model's length"
        )
    if config.trainer.max_tokens_per_microbatch < longest:
        raise ConfigError(
            f"trainer.max_tokens_per_microbatch {config.trainer.max_tokens_per_microbatch} is smaller than one "
            f"sequence may be ({longest} tokens)"
        )
    _check_credit(config)
    is_positive = traits_of(config.weighting.source).normalisation is Normalisation.POSITIVE
    if is_positive and config.loss.aggregation is LossAggregation.TOKEN_MEAN:
        raise ConfigError(
            f"weighting.source={config.weighting.source} gives the tokens of positive weight, not all tokens, the mean "
            "1, and loss.aggregation=token_mean divides by the sum of weights, which is then not known before the "
            "first forward pass: set loss.aggregation to sequence_mean or reference_code"
        )
    if config.profile.first_and_last[1] > config.trainer.steps:
        raise ConfigError(
            f"profile.steps={config.profile.steps} lies behind the last step, trainer.steps={config.trainer.steps}"
        )
    if config.validation.max_response_tokens >= config.model.max_sequence_length:
        raise ConfigError(
            f"validation.max_response_tokens {config.validation.max_response_tokens} leaves no room for a prompt in "
            f"model.max_sequence_length {config.model.max_sequence_length}: lower it"
        )
    _check_layout(config, dp)
    _check_engines(config, world_size)
    _check_objective(config)
    if config.precision.recipe is not Fp8Recipe.NONE and config.model.dtype != "bfloat16":
        raise ConfigError(
            f"precision.recipe {config.precision.recipe} multiplies bfloat16 tensors in FP8, and model.dtype is "
            f"{config.model.dtype}: set model.dtype=bfloat16 or precision.recipe=none"
        )
    if config.precision.parameters and not config.parallel.distributed_optimizer:
        raise ConfigError(
            "precision.parameters=true needs parallel.distributed_optimizer=true: it holds the float32 weights that "
            "FP8 ones are made from"
        )


def _check_credit(config: RestConfig) -> None:
    """Token credit, advantages and losses that cannot work as the rest of the configuration is."""
    source, estimator, function = config.weighting.source, config.advantage.estimator, config.loss.function
    if config.parallel.context_parallel > 1 and function == "gspo":
        raise ConfigError(
            "loss.function=gspo takes the ratio of a whole answer, which context parallelism cuts: set "
            "parallel.context_parallel=1, or loss.function to clipped, cispo or sapo"
        )
    moves_zero = source in CREDITS and traits_of(source).moves_zero
    if config.data.resample_zero_groups and (estimator == "reinforce_pp" or moves_zero):
        what = "advantage.estimator" if estimator == "reinforce_pp" else "weighting.source"
        raise ConfigError(
            f"data.resample_zero_groups draws again where equal rewards teach nothing, and with {what}="
            f"{estimator if what.startswith('advantage') else source} they do: set data.resample_zero_groups=0"
        )
    others = {
        "weighting.source": "" if isinstance(source, WeightSource) else source,
        "advantage.estimator": "" if isinstance(estimator, AdvantageEstimator) else estimator,
        "loss.function": "" if function == "clipped" else function,
    }
    if config.trainer.replay_every and any(others.values()):
        named = ", ".join(f"{key}={value}" for key, value in others.items() if value)
        raise ConfigError(
            f"trainer.replay_every records one microbatch of an update, from which {named} cannot be computed again: "
            "set trainer.replay_every=0"
        )
    longest = config.rollout.max_response_tokens
    if config.advantage.overlong_buffer > longest:
        raise ConfigError(
            f"advantage.overlong_buffer {config.advantage.overlong_buffer} is longer than an answer may be "
            f"(rollout.max_response_tokens {longest}): lower it"
        )


def _is_corrected(loss: LossConfig) -> bool:
    """Whether the loss knows that the engine's policy is not the trainer's."""
    return loss.tis_cap is not None or loss.old_log_probs == "engine"


def _check_objective(config: RestConfig) -> None:
    """Objectives that cannot work, and those that are biased without a correction."""
    is_cut = config.rollout.top_p < 1.0 or config.rollout.top_k > 0
    if is_cut and config.loss.tis_cap is None:
        raise ConfigError(
            f"rollout.top_p={config.rollout.top_p:g} and rollout.top_k={config.rollout.top_k} sample from a cut "
            "distribution, the trainer scores the whole one, and nothing corrects for it: set loss.tis_cap=2.0, or "
            "rollout.top_p=1.0 and rollout.top_k=0"
        )
    if config.loss.old_log_probs == "engine" and config.loss.tis_cap is not None:
        raise ConfigError(
            "loss.old_log_probs=engine corrects for the engine in the ratio itself, and loss.tis_cap would do it a "
            "second time: set loss.tis_cap=null, or loss.old_log_probs=policy"
        )
    if config.data.resample_zero_groups and config.rollout.max_staleness:
        raise ConfigError(
            "data.resample_zero_groups draws again when a step's rewards are known, and with rollout.max_staleness="
            f"{config.rollout.max_staleness} the engines are at the next step's prompts by then: set one of them to 0"
        )
    if config.loss.kl_coef and config.precision.parameters:
        raise ConfigError(
            "loss.kl_coef keeps the reference policy's weights beside the trained ones, and FP8 parameters cannot "
            "change places with them: set precision.parameters=false or loss.kl_coef=0"
        )
    if config.loss.kl_coef and config.trainer.replay_every:
        raise ConfigError(
            "trainer.replay_every records updates without a reference policy, so one with loss.kl_coef could not be "
            "computed again: set one of them to 0"
        )


def _check_engines(config: RestConfig, world_size: int) -> None:
    """Where engines live, how far they may lag behind, how weights reach them."""
    if config.rollout.replicas > world_size:
        raise ConfigError(
            f"rollout.replicas is {config.rollout.replicas}, but each needs a rank that owns it, and there are "
            f"{world_size}: use fewer replicas, with more rollout.tensor_parallel or rollout.max_concurrent"
        )
    if config.rollout.replicas == 0 and world_size % config.rollout.tensor_parallel:
        raise ConfigError(
            f"rollout.tensor_parallel {config.rollout.tensor_parallel} does not divide the {world_size} ranks whose "
            "processes hold the engines: choose a divisor, or set rollout.replicas"
        )
    if config.rollout.replicas == 0 and config.rollout.tensor_parallel > 1 and config.rollout.environment:
        raise ConfigError(
            f"rollout.environment {config.rollout.environment!r} with colocated engines of "
            f"rollout.tensor_parallel {config.rollout.tensor_parallel}: their ranks must take the same steps, and "
            "tools answer at different times; set rollout.replicas, or rollout.tensor_parallel=1"
        )
    if config.rollout.replicas == 0 and config.rollout.max_staleness:
        raise ConfigError(
            f"rollout.max_staleness={config.rollout.max_staleness} samples while the policy trains, which needs "
            "engines in processes of their own: set rollout.replicas, or rollout.max_staleness to 0"
        )
    if config.rollout.max_staleness and not _is_corrected(config.loss):
        raise ConfigError(
            f"rollout.max_staleness={config.rollout.max_staleness} trains on rollouts of an older policy, which "
            "loss.tis_cap corrects: set it (2.0 is common), or rollout.max_staleness to 0"
        )
    cache = str(config.rollout.engine_args.get("kv_cache_dtype", "auto"))
    if cache.startswith(("fp8", "nvfp4", "int8", "turboquant")) and not _is_corrected(config.loss):
        raise ConfigError(
            f"rollout.engine_args.kv_cache_dtype={cache} samples from a rounded policy, which loss.tis_cap corrects: "
            "set it (2.0 is common), or leave the cache's type out"
        )
    if config.rollout.quantization is not RolloutQuantization.NONE and not _is_corrected(config.loss):
        raise ConfigError(
            f"rollout.quantization={config.rollout.quantization} samples from a rounded policy, which loss.tis_cap "
            "corrects: set it (2.0 is common), or rollout.quantization=none"
        )
    if config.trainer.offload and config.rollout.replicas:
        raise ConfigError(
            "trainer.offload makes room for engines on the trainer's own devices, and rollout.replicas="
            f"{config.rollout.replicas} gives them devices of their own: set trainer.offload=false"
        )
    if config.trainer.offload and config.megatron.optimizer.get("optimizer_cpu_offload", False):
        raise ConfigError(
            "megatron.optimizer.optimizer_cpu_offload leaves the optimiser's state on the host always, and "
            "trainer.offload takes it there for a while: set one of them to false"
        )
    if (config.weight_sync.transport == "local") == (config.rollout.replicas > 0):
        raise ConfigError(
            f"weight_sync.transport is {config.weight_sync.transport!r} with rollout.replicas "
            f"{config.rollout.replicas}: colocated engines (replicas 0) take weights by reference (local), engines in "
            f"processes of their own do not (gloo); set it to {'gloo' if config.rollout.replicas else 'local'}"
        )


def _check_layout(config: RestConfig, dp: int) -> None:
    p, loss, ddp = config.parallel, config.loss, config.megatron.ddp
    if p.sequence_parallel and p.tensor_parallel == 1:
        raise ConfigError(
            "parallel.sequence_parallel cuts between tensor-parallel ranks, and parallel.tensor_parallel is 1: set "
            "parallel.sequence_parallel=false"
        )
    if ddp.get("overlap_param_gather") and not (p.distributed_optimizer and ddp.get("overlap_grad_reduce")):
        raise ConfigError(
            "megatron.ddp.overlap_param_gather=true gathers what the distributed optimizer cut: it needs "
            "parallel.distributed_optimizer=true and megatron.ddp.overlap_grad_reduce=true; or set it to false"
        )
    sharing = p.tensor_parallel * p.context_parallel * dp
    if sharing % p.expert_parallel:
        raise ConfigError(
            f"parallel.expert_parallel {p.expert_parallel} does not divide the {sharing} ranks of a pipeline stage "
            f"(tensor_parallel {p.tensor_parallel} x context_parallel {p.context_parallel} x data parallel {dp})"
        )
    if p.context_parallel > 1 and loss.aggregation is LossAggregation.REFERENCE_CODE:
        raise ConfigError(
            "loss.aggregation=reference_code averages over what a microbatch holds, which context parallelism cuts: "
            "set parallel.context_parallel=1, or loss.aggregation to sequence_mean or token_mean"
        )
    if p.context_parallel > 1 and loss.tis_cap is not None and loss.tis_level == "sequence":
        raise ConfigError(
            "loss.tis_level=sequence multiplies over all tokens of a sequence, which context parallelism cuts: set "
            "parallel.context_parallel=1 or loss.tis_level=token"
        )


def from_dict(cls: type, values: dict[str, Any], *, where: str = "") -> Any:
    """Build dataclass ``cls`` from nested plain values.  Unknown keys and wrong types raise :class:`ConfigError`."""
    if not isinstance(values, dict):
        raise ConfigError(f"{where or cls.__name__} must be a mapping, got {type(values).__name__}")
    hints = get_type_hints(cls)
    known = [f.name for f in dataclasses.fields(cls)]
    kwargs = {}
    for key, value in values.items():
        path = f"{where}.{key}" if where else str(key)
        if key not in known:
            near = difflib.get_close_matches(str(key).partition(".")[0], known, n=1)
            hint = f"did you mean {where + '.' if where else ''}{near[0]}?" if near else _elsewhere(path)
            hint = hint or f"known keys: {', '.join(known)}"
            raise ConfigError(f"unknown configuration key {path}: {hint}{see(Topic.NO_START)}")
        kwargs[key] = _convert(hints[key], value, path)
    return cls(**kwargs)


def to_dict(config: Any) -> dict[str, Any]:
    """Plain values, ready for YAML."""
    return {f.name: _plain(getattr(config, f.name)) for f in dataclasses.fields(config)}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_dict(value)
    if isinstance(value, dict | list):
        return copy.deepcopy(value)
    return str(value) if isinstance(value, StrEnum) else value


def load(
    path: str | Path | None = None, overrides: typing.Sequence[str] = (), *, base: RestConfig | None = None
) -> RestConfig:
    """``base`` (a recipe; default: the defaults), over it a YAML file (optional), over it ``section.key=value``.

    A file's section :data:`RESOLVED`, the record of a run that is finished, is not read.
    """
    values: dict[str, Any] = to_dict(base) if base is not None else {}
    given = _read(path) if path is not None else {}
    given.pop(RESOLVED, None)
    _lay_over(values, given)
    for item in overrides:
        key, sep, text = item.partition("=")
        section, dot, leaf = key.partition(".")
        if not sep or not dot:
            raise ConfigError(f"override {item!r} is not of the form section.key=value{_elsewhere(key, ', ')}")
        names = [section, *_names(section, leaf)]
        holder = values
        for depth, name in enumerate(names[:-1], 1):
            if holder.get(name) is None:
                holder[name] = {}
            if not isinstance(holder[name], dict):
                what = "a section" if depth == 1 else "a mapping"
                raise ConfigError(f"override {item!r}: {'.'.join(names[:depth])} is not {what}")
            holder = holder[name]
        holder[names[-1]] = _override_value(key, text)
    return from_dict(RestConfig, values)


def _names(section: str, leaf: str) -> list[str]:
    """Names below ``section``: where a field is a mapping, what follows its name leads into it."""
    holder = get_type_hints(RestConfig).get(section)
    field_name, dot, _ = leaf.partition(".")
    is_mapping = holder is not None and get_origin(get_type_hints(holder).get(field_name)) is dict
    return leaf.split(".", _DEEPEST + 1) if dot and is_mapping else [leaf]


def _lay_over(values: dict[str, Any], given: dict[str, Any]) -> None:
    """Mappings are merged, all else is replaced; a section with nothing under it changes nothing."""
    for key, value in given.items():
        if isinstance(value, dict) and isinstance(values.get(key), dict):
            _lay_over(values[key], value)
        elif value is not None or key not in values or not isinstance(values[key], dict):
            values[key] = value


RESOLVED = "resolved"
"""Section of a finished run's config.yaml that records what libraries were made with; see :func:`load`."""

_LARGEST_INTEGER = 1 << 63
_DEEPEST = 8  # mappings and lists in settings of vLLM and Megatron
_EXPONENT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")  # a number that YAML 1.1 reads as text

# What PyYAML raises besides its own: nesting too deep, keys that cannot be hashed, tags of the wrong kind.
_OF_PYYAML = (RecursionError, TypeError, AttributeError, KeyError, IndexError)


def _read(path: str | Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read configuration {path}: {error.strerror}") from error
    except (yaml.YAMLError, ValueError, *_OF_PYYAML) as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if values is not None and not isinstance(values, dict):
        raise ConfigError(f"{path} must be a mapping of sections, got {type(values).__name__}")
    return values or {}


def _override_value(key: str, text: str) -> Any:
    """Text fields take the text as it is: YAML would read 2026-11-23 as a date and 007 as a number."""
    section, _, leaf = key.partition(".")
    holder = get_type_hints(RestConfig).get(section)
    if holder is not None and get_type_hints(holder).get(leaf) is str:
        return text
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, *_OF_PYYAML) as error:
        raise ConfigError(f"override {key}={text}: the value is not valid YAML") from error


def _elsewhere(key: str, lead: str = "") -> str:
    """Hint for a field named without its section, or under the wrong one."""
    name = key.rpartition(".")[2]
    places = [
        f"{section.name}.{name}"
        for section in dataclasses.fields(RestConfig)
        if name in {f.name for f in dataclasses.fields(get_type_hints(RestConfig)[section.name])}
    ]
    return f"{lead}did you mean {' or '.join(places)}?" if places else ""


def _convert(hint: Any, value: Any, path: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return from_dict(typing.cast(type, hint), {} if value is None else value, where=path)
    if get_origin(hint) is dict:
        return _settings(value, path)
    if get_origin(hint) in (types.UnionType, typing.Union):
        if value is None:
            return None
        return _convert(next(a for a in get_args(hint) if a is not type(None)), value, path)
    if isinstance(hint, type) and issubclass(hint, StrEnum):
        _one_of(path, str(value), [str(m) for m in hint])
        return hint(str(value))
    if hint is float and isinstance(value, str):  # YAML 1.1 reads 1e-6 as a string
        with contextlib.suppress(ValueError):
            value = float(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value) if abs(value) < _LARGEST_INTEGER else math.inf
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{path} is not a number (nan)" if value != value else f"{path} is {value}: must be finite")
    if hint is int and isinstance(value, int) and abs(value) >= _LARGEST_INTEGER:
        raise ConfigError(f"{path} has {len(str(abs(value)))} digits: the largest number is {_LARGEST_INTEGER - 1}")
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise ConfigError(f"{path} must be {hint.__name__}, got {value!r} ({type(value).__name__})")
    return value


def _settings(value: Any, path: str, depth: int = 0) -> dict[str, Any]:
    """A mapping of somebody else's names to plain values."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ConfigError(f"{path} must be a mapping of names to values, got {value!r} ({type(value).__name__})")
    for name in value:
        if not isinstance(name, str):
            raise ConfigError(f"{path}: {name!r} is not a name")
    return {name: _plain_setting(one, f"{path}.{name}", depth) for name, one in value.items()}


def _plain_setting(value: Any, path: str, depth: int) -> Any:
    if depth == _DEEPEST:
        raise ConfigError(f"{path[:100]} is nested deeper than {_DEEPEST} levels")
    if isinstance(value, dict):
        return _settings(value, path, depth + 1)
    if isinstance(value, list):
        return [_plain_setting(one, path, depth + 1) for one in value]
    if isinstance(value, str) and _EXPONENT.fullmatch(value):
        value = float(value)
    if not (value is None or isinstance(value, str | bool | int | float)):
        raise ConfigError(f"{path} is {value!r} ({type(value).__name__}): text, numbers, true, false and null only")
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{path} is {value}: must be finite")
    if isinstance(value, int) and abs(value) >= _LARGEST_INTEGER:
        raise ConfigError(f"{path} has too many digits: the largest number is {_LARGEST_INTEGER - 1}")
    return value


def _not_ours(path: str, given: Mapping[str, Any]) -> None:
    for name in given:
        if name in OURS[path]:
            raise ConfigError(f"{path}.{name} is decided elsewhere: {OURS[path][name]}")


def _one_of(path: str, value: str, allowed: typing.Sequence[str]) -> None:
    if value not in allowed:
        near = difflib.get_close_matches(value, allowed, n=1)
        hint = f"did you mean {near[0]}?" if near else f"allowed: {', '.join(allowed)}"
        raise ConfigError(f"{path} is {value!r}: {hint}")


_CODE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")


def _name(path: str, value: str, known: typing.Sequence[str]) -> None:
    """A built-in name, or the form of code of one's own."""
    if ":" not in value:
        if value not in known:
            near = difflib.get_close_matches(value, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
            raise ConfigError(f"{path} is {value!r}: {hint}; your own is package.module:attribute")
    elif not _CODE.fullmatch(value):
        raise ConfigError(f"{path} is {value!r}, expected package.module:attribute")


def _within(path: str, value: float, least: float, most: float = math.inf, *, open_ends: str = "") -> None:
    """``open_ends`` names the ends, "least" or "most", that the value may not take itself."""
    is_in = (value > least if "least" in open_ends else value >= least) and (
        value < most if "most" in open_ends else value <= most
    )
    if not is_in:
        low, high = "(" if "least" in open_ends else "[", ")" if "most" in open_ends or most == math.inf else "]"
        raise ConfigError(f"{path} is {value}, expected a number in {low}{least:g}, {most:g}{high}")


def _at_least(path: str, value: int, least: int) -> None:
    if value < least:
        raise ConfigError(f"{path} is {value}, expected at least {least}")
