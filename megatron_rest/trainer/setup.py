"""Configuration in, trainer out: builds every part of a run and hands the parts to each other."""

from __future__ import annotations

import hashlib
import logging
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_rest.config import ConfigError, OptimizerConfig, RestConfig, WeightSource
from megatron_rest.data.alignment import PackingAlignment, packing_alignment
from megatron_rest.data.batching import make_train_batch
from megatron_rest.data.chat_template import STOCK, ChatTemplate
from megatron_rest.data.packing import RowCost
from megatron_rest.data.prompt_files import read_manifest
from megatron_rest.data.prompts import PromptDataset
from megatron_rest.data.references import without_hopeless_references
from megatron_rest.hf_folder import load_tokenizer, stop_token_ids
from megatron_rest.mcore import build, precision
from megatron_rest.mcore.hf import load_hf_weights, read_shape
from megatron_rest.mcore.policy import MegatronPolicy
from megatron_rest.mcore.specs import is_sharing_prompts
from megatron_rest.model_fit import check_model
from megatron_rest.model_map import ModelShape, parameter_map
from megatron_rest.passes import least_microbatches, microbatches_multiple
from megatron_rest.regions import TOOLRL, TOOLRL_TAGS_ONLY, Dialect, TokenRegion, answer_prefix, find_dialect
from megatron_rest.rollout.certify import serving_notes
from megatron_rest.rollout.chat import ChatSettings, dialect_name
from megatron_rest.rollout.process import cpu_share
from megatron_rest.types import BatchTotals, TrainBatch, TrainSample
from megatron_rest.weight_sync.source import MegatronWeightSource

__all__ = [
    "PolicyParts",
    "Stopwatch",
    "build_bare_policy",
    "build_policy",
    "chat_lines",
    "chat_settings",
    "eos_token_id",
    "judged_dialect",
    "make_batch",
    "open_dataset",
    "open_prompts",
    "peak_memory_bytes",
    "set_threads",
    "turn_ends",
    "weight_source",
]


_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class PolicyParts:
    """A policy with what is needed to describe it to others."""

    policy: MegatronPolicy
    shape: ModelShape
    context: build.ParallelContext
    alignment: PackingAlignment  # what sequences and microbatches are padded to
    num_microbatches_multiple: int
    min_microbatches: int  # fewer would leave pipeline stages idle
    is_sharing: bool  # whether the prompt of a group is computed once for all its answers


def build_policy(config: RestConfig, *, optimizer: OptimizerConfig, num_updates: int) -> PolicyParts:
    """Process groups, model with the weights of ``model.path``, DDP and optimiser.  Collective over all ranks."""
    bare = build_bare_policy(config)
    context = bare.context
    # Weights go in before DDP and the optimiser look at them: replicas and master copies start right.
    _load_weights(bare.policy, config, bare.shape)
    megatron_config = bare.policy.modules[0].config
    wrapped = build.wrap(bare.policy.chunks, megatron_config, config, context)
    adam, scheduler = build.build_optimizer(
        wrapped, megatron_config, config, optimizer=optimizer, num_updates=num_updates
    )
    policy = MegatronPolicy(chunks=wrapped, optimizer=adam, scheduler=scheduler, context=context)
    return replace(bare, policy=policy)


def build_bare_policy(config: RestConfig) -> PolicyParts:
    """Process groups and a model with random weights, without DDP and optimiser.  Collective over all ranks."""
    shape = read_shape(config.model.path)
    check_model(shape, config)
    context = build.initialize(config)
    chunks = build.build_chunks(shape, config, context, build.transformer_config(shape, config))
    return PolicyParts(
        policy=MegatronPolicy(chunks=chunks, optimizer=None, scheduler=None, context=context),
        shape=shape,
        context=context,
        alignment=packing_alignment(config.precision.recipe, config.parallel),
        num_microbatches_multiple=microbatches_multiple(config.parallel),
        min_microbatches=least_microbatches(config.parallel),
        is_sharing=is_sharing_prompts(config),
    )


def _load_weights(policy: MegatronPolicy, config: RestConfig, shape: ModelShape) -> None:
    """``model.path`` into the parameters, and into what the optimiser will make the masters of FP8 ones of."""
    context = policy.context
    load = partial(
        load_hf_weights, folder=config.model.path, shape=shape, tp_rank=context.tp_rank, tp_size=context.tp_size
    )
    parameters: dict[str, torch.Tensor] = dict(policy.named_parameters())
    masters = precision.master_values(parameters)
    if masters:
        load(masters)
        precision.fit_weight_scales(parameters, masters, margin=config.precision.margin)
    load(parameters)


def make_batch(
    parts: PolicyParts, samples: Sequence[TrainSample], *, max_tokens: int, totals: BatchTotals | None = None
) -> TrainBatch:
    """Packed microbatches of this rank's replica, as its layout wants them; ``totals`` of the step where samples of it
    are left out.
    """
    return make_train_batch(
        samples,
        max_tokens=max_tokens,
        dp_rank=parts.context.dp_rank,
        dp_size=parts.context.dp_size,
        alignment=parts.alignment,
        num_microbatches_multiple=parts.num_microbatches_multiple,
        min_microbatches=parts.min_microbatches,
        is_sharing=parts.is_sharing,
        cost=RowCost.of_shape(parts.shape),
        totals=totals,
    )


def weight_source(
    parts: PolicyParts,
    *,
    bucket_bytes: int,
    dtype: torch.dtype | None = None,
    named_shards: Callable[[], Mapping[str, torch.Tensor]] | None = None,
) -> MegatronWeightSource:
    """This policy's shards, for whole HF tensors and for transfers by slices, in which all ranks take part.

    ``named_shards`` puts something else of the parameters' shapes in their place (gradients).
    """
    context = parts.context
    return MegatronWeightSource(
        named_shards or parts.policy.named_shards,
        parameter_map(parts.shape),
        parts.shape,
        tp_group=context.tp_group if context.tp_size > 1 else None,
        pp_group=context.pp_group if context.pp_size > 1 else None,
        ep_group=context.ep_group if context.ep_size > 1 else None,
        all_ranks=dist.group.WORLD,
        bucket_bytes=bucket_bytes,
        dtype=dtype,
    )


def open_dataset(path: str, config: RestConfig) -> PromptDataset:
    """Data that ``megatron-rest-data convert`` wrote for this model's tokenizer.

    :class:`ConfigError` if it is not that.
    """
    if not path:
        raise ConfigError("data.train is empty: name a folder written by megatron-rest-data convert")
    try:
        return PromptDataset.open(path, tokenizer_path=config.model.path)
    except ValueError as error:
        raise ConfigError(f"data.train: {error}") from error


def open_prompts(config: RestConfig, path: str = "") -> PromptDataset:
    """The usable prompts of ``path`` (default ``data.train``); those left out are counted in ``num_left_out``."""
    dataset = open_dataset(path or config.data.train, config)
    limit = config.rollout.max_response_tokens if config.data.require_reachable else None
    try:
        usable = dataset.select(max_prompt_tokens=config.data.max_prompt_tokens, max_answer_tokens=limit)
    except ValueError as error:
        raise ConfigError(f"data.train: {error}") from error
    # An environment judges by itself, and so does a reward of one's own: their references are what they like.
    if not config.rollout.environment and any(term.function == "tool_call" for term in config.reward.as_terms()):
        manifest = read_manifest(Path(path or config.data.train))
        reads = find_dialect(dialect_name("auto", path or config.data.train))
        usable, reasons = without_hopeless_references(usable, manifest, reward=config.reward, dialect=reads)
        if reasons:
            _log.warning(
                "%d of %d prompts are left out: their references do not earn full marks under reward.*; the first: %s",
                len(reasons), len(reasons) + len(usable), reasons[0],
            )  # fmt: skip
    if len(usable) == 0:
        raise ConfigError(
            f"data.train: of {len(dataset)} prompts none is left (data.max_prompt_tokens "
            f"{config.data.max_prompt_tokens}, data.require_reachable {config.data.require_reachable})"
        )
    return usable


def peak_memory_bytes() -> int:
    """Peak resident memory of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def eos_token_id(model_path: str | Path) -> int:
    """The token by which a model's own chat template ends a turn: the first of its stop tokens."""
    return stop_token_ids(model_path)[0]


def chat_settings(config: RestConfig) -> ChatSettings:
    """How the run talks with its model.  :class:`ConfigError` where configuration and prompts disagree."""
    name = dialect_name(config.model.dialect, config.data.train)
    chat = ChatSettings(dialect=name, chat_template=config.model.chat_template)
    made = read_manifest(Path(config.data.train)).get("tokenizer", {}) if config.data.train else {}
    choice = str(made.get("chat_template", STOCK))
    if choice != STOCK or chat.chat_template != STOCK:
        try:
            used = ChatTemplate.of_folder(config.model.path, chat.chat_template)
        except ValueError as error:
            raise ConfigError(f"model.chat_template: {error}") from error
        prompt = used.generation_prompt()  # with or without a thought, opened or empty
        differs = choice != STOCK and hashlib.sha256(used.text.encode()).hexdigest() != made.get("chat_template_sha256")
        if differs or made.get("generation_prompt", prompt) != prompt:
            raise ConfigError(
                f"model.chat_template is {chat.chat_template}, but the prompts of {config.data.train} were prepared "
                f"with --chat-template {choice}: set model.chat_template={choice}, or convert them again"
            )
    return chat


def turn_ends(config: RestConfig, chat: ChatSettings) -> list[int]:
    """Ids at which engines stop: the end of the prepared answers first, then those of template and folder."""
    made = read_manifest(Path(config.data.train)).get("tokenizer", {}) if config.data.train else {}
    return chat.stop_token_ids(config.model.path, end_of_turn=str(made.get("end_of_turn") or ""))


def chat_lines(config: RestConfig) -> list[str]:
    """What was decided about the conversation with the model, for people."""
    chat = chat_settings(config)
    tokenizer = load_tokenizer(config.model.path)
    ends = [f"{tokenizer.convert_ids_to_tokens(i)} ({i})" for i in turn_ends(config, chat)]
    opened = answer_prefix(chat.template(tokenizer).generation_prompt().encode(), chat.reads)
    told = f"dialect {chat.dialect}, turns end at {', '.join(ends)}"
    return [told + (f", prompts have written {opened!r}" if opened else ""), *serving_notes(tokenizer, chat)]


def judged_dialect(config: RestConfig, chat: ChatSettings) -> Dialect:
    """What regions are found by: the published code leaves glue and end of turn out of them, so out of its weights."""
    if config.weighting.source is not WeightSource.REFERENCE_CODE:
        return chat.reads
    if chat.reads is TOOLRL:
        return TOOLRL_TAGS_ONLY
    return replace(chat.reads, name=f"{chat.dialect}_tags_only", glue=TokenRegion.CONTEXT)


class Stopwatch:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    def __call__(self) -> float:
        return time.perf_counter() - self._start


def set_threads(config: RestConfig) -> int:
    """Give this rank ``trainer.threads`` CPU threads, else its share of the machine's cores; returns how many.

    The number stays the same from run to run on a machine, and with it the order of every reduction.
    """
    threads = config.trainer.threads or cpu_share()
    torch.set_num_threads(threads)
    return threads
