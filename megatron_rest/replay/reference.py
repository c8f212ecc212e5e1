"""What a microbatch's numbers should be: float64, dense, transformers' own model, formulae written out once more.

Nothing here is shared with the code that trained: no fused head, no sharding, no common loss function.  Every term is
computed from what the bundle *recorded* of the terms before it, so a term that was computed wrongly is the first that
differs, and those that follow from it rightly do not.  The gradient alone is computed from the ground up.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise

import torch
from torch import Tensor

from megatron_rest.config import AdvantageEstimator, LossAggregation, LossConfig, WeightingConfig, WeightSource
from megatron_rest.replay.bundle import BundleError, ReplayBundle
from megatron_rest.token_region import TokenRegion

__all__ = ["Reference", "compute"]


class Reference:
    """Reference values of one bundle; ``[T]`` float64 each, meaningful where ``loss_mask`` is True."""

    def __init__(self, bundle: ReplayBundle) -> None:
        self.bundle = bundle
        self.mask = bundle.batch["loss_mask"]
        self.values: dict[str, Tensor] = {}
        self.gradient: dict[str, Tensor] = {}

    def batch(self, name: str) -> Tensor:
        return self.bundle.batch[name].double()

    def seen(self, name: str) -> Tensor:
        return self.bundle.seen[name].double()


def compute(bundle: ReplayBundle) -> Reference:
    """All terms and the gradient.  Memory: about five times the weights in float64, and one sequence's logits."""
    _check(bundle)
    reference = Reference(bundle)
    with _one_thread_order():
        reference.values |= {
            "labels": _labels(bundle),
            "sequence_lengths": _sequence_lengths(bundle),
            "advantages": _advantages(bundle),
            "token_weights": _token_weights(bundle),
        }
        log_probs, entropy = _model_terms(reference)
        reference.values |= {"log_probs": log_probs, "entropy": entropy}
        reference.values |= _loss_terms(reference)
    return reference


@contextmanager
def _one_thread_order() -> Iterator[None]:
    """Sums in one order, so that two replays print the same digits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


_BATCH = ("token_ids", "labels", "cu_seqlens", "loss_mask", "region_ids", "sequence_ids", "sequence_lengths",
          "advantages", "rollout_log_probs", "old_log_probs", "token_weights")  # fmt: skip
_SEEN = ("log_probs", "entropy", "ratio", "policy_loss", "token_losses")


def _check(bundle: ReplayBundle) -> None:
    missing = [f"batch.{n}" for n in _BATCH if n not in bundle.batch]
    missing += [f"seen.{n}" for n in _SEEN if n not in bundle.seen]
    missing += [f"step.{n}" for n in ("rewards", "group_ids") if n not in bundle.step]
    if missing:
        raise BundleError(f"the bundle lacks {', '.join(missing)}")
    size = len(bundle.batch["token_ids"])
    for part, names in (("batch", _BATCH), ("seen", _SEEN)):
        for name in names:
            shape = tuple(getattr(bundle, part)[name].shape)
            if name != "cu_seqlens" and shape != (size,):
                raise BundleError(f"{part}.{name} has shape {shape}, expected ({size},) like batch.token_ids")
    if not size:
        raise BundleError("the microbatch is empty")
    regions = bundle.batch["region_ids"]
    if not 0 <= int(regions.min()) <= int(regions.max()) < len(TokenRegion):
        raise BundleError("batch.region_ids holds numbers that are no regions")
    ids = torch.cat([bundle.batch["token_ids"], bundle.batch["labels"]])
    if not 0 <= int(ids.min()) <= int(ids.max()) < int(bundle.facts.model.get("vocab_size", 0)):
        raise BundleError("batch.token_ids or batch.labels holds ids that the model does not have")
    bounds = bundle.batch["cu_seqlens"]
    if bounds.ndim != 1 or int(bounds[0]) != 0 or int(bounds[-1]) != size or bool((bounds.diff() < 0).any()):
        raise BundleError("batch.cu_seqlens does not divide the tokens into sequences")
    parents = bundle.batch.get("parents", torch.full((len(bounds) - 1,), -1))
    if parents.shape != (len(bounds) - 1,) or bool(((parents < -1) | (parents >= torch.arange(len(parents)))).any()):
        raise BundleError("batch.parents does not name an earlier segment, or none, for each segment")
    owners = bundle.batch["sequence_ids"][bundle.batch["loss_mask"]]
    if len(owners) and not 0 <= int(owners.min()) <= int(owners.max()) < len(bundle.step["rewards"]):
        raise BundleError("batch.sequence_ids speaks of sequences that step.rewards does not have")


def _labels(bundle: ReplayBundle) -> Tensor:
    """Every label is the next token of its sequence; what follows the last one is not in the microbatch."""
    labels = bundle.batch["labels"].clone()
    tokens, owners = bundle.batch["token_ids"], bundle.batch["sequence_ids"]
    same = (owners[1:] == owners[:-1]) & (owners[1:] >= 0)
    labels[:-1] = torch.where(same, tokens[1:], labels[:-1])
    return labels.double()


def _sequence_lengths(bundle: ReplayBundle) -> Tensor:
    lengths = torch.ones(len(bundle.batch["labels"]), dtype=torch.float64)
    for sequence in bundle.batch["sequence_ids"].unique().tolist():
        mine = bundle.batch["sequence_ids"] == sequence
        if sequence >= 0:
            lengths[mine] = max(float((mine & bundle.batch["loss_mask"]).sum()), 1.0)
    return lengths


def _advantages(bundle: ReplayBundle) -> Tensor:
    config, groups = bundle.facts.advantage, bundle.step["group_ids"]
    rewards = bundle.step["rewards"].double()
    of_sequence = torch.zeros_like(rewards)
    for group in groups.unique().tolist():
        mine = groups == group
        siblings = rewards[mine]
        centred = siblings - siblings.sum() / len(siblings)
        if len(siblings) == 1:
            centred, deviation = siblings, 1.0
        else:
            deviation = math.sqrt(float(centred.square().sum()) / (len(siblings) - 1))
        if bool((siblings == siblings[0]).all()) and len(siblings) > 1:
            centred = torch.zeros_like(siblings)
        if config.estimator is AdvantageEstimator.GRPO:
            centred = centred / (deviation + config.epsilon)
        elif config.estimator is AdvantageEstimator.RLOO and len(siblings) > 1:
            centred = siblings - (siblings.sum() - siblings) / (len(siblings) - 1)
        of_sequence[mine] = centred
    owners = bundle.batch["sequence_ids"]
    return torch.where(owners >= 0, of_sequence[owners.clamp_min(0)], 0.0)


def _token_weights(bundle: ReplayBundle) -> Tensor:
    raw = torch.tensor(_region_weights(bundle.facts.weighting, bundle.facts.progress, bundle.facts.region_means))
    regions, owners = bundle.batch["region_ids"], bundle.batch["sequence_ids"]
    valid = bundle.batch["loss_mask"] & (regions != TokenRegion.CONTEXT) & (owners >= 0)
    weights = torch.where(valid, raw[regions], 0.0)
    for sequence in owners[valid].unique().tolist():
        mine = valid & (owners == sequence)
        mean = float(weights[mine].sum()) / int(mine.sum())
        weights[mine] = weights[mine] / mean if mean > 0 else 0.0
    return weights


def _region_weights(config: WeightingConfig, progress: float, means: list[float | None]) -> list[float]:
    """By TokenRegion: the curriculum's constants, or inverse to what was measured where something was."""
    if config.source is WeightSource.UNIFORM:
        return [0.0] + [1.0] * (len(TokenRegion) - 1)
    start = _constants(config, 0.0)
    now = _constants(config, progress)
    known = [r for r in TokenRegion if means[r] is not None and r != TokenRegion.CONTEXT]
    if config.source is not WeightSource.CONSTANT and known:
        anchor = TokenRegion.THINK if TokenRegion.THINK in known else known[0]
        is_beta = config.source is WeightSource.VARIANCE_OPTIMAL
        scale = start[anchor] / _inverse(config, means[anchor])
        moved = {
            TokenRegion.FORMAT: -config.alpha_format * progress,
            TokenRegion.TOOL_ARGS: config.alpha_args * progress,
            TokenRegion.THINK: config.alpha_think * progress,
            TokenRegion.RESPONSE: config.alpha_response * progress,
        }
        for region in known:
            base = min(max(scale * _inverse(config, means[region]), config.min_weight), config.max_weight)
            now[region] = max(base + (0.0 if is_beta else moved.get(region, 0.0)), config.min_weight)
    return [min(max(w, config.min_weight), config.max_weight) if w > 0 else 0.0 for w in now]


def _constants(config: WeightingConfig, progress: float) -> list[float]:
    values = [0.0] * len(TokenRegion)
    values[TokenRegion.TOOL_NAME] = config.gamma_name
    values[TokenRegion.FORMAT] = config.gamma_format and max(
        config.min_weight, config.gamma_format - config.alpha_format * progress
    )
    values[TokenRegion.TOOL_ARGS] = min(config.max_args, config.gamma_args + config.alpha_args * progress)
    values[TokenRegion.THINK] = min(config.max_think, config.gamma_think + config.alpha_think * progress)
    values[TokenRegion.RESPONSE] = min(config.max_think, config.gamma_response + config.alpha_response * progress)
    return [min(max(v, config.min_weight), config.max_weight) if v > 0 else 0.0 for v in values]


def _inverse(config: WeightingConfig, mean: float | None) -> float:
    assert mean is not None
    if config.source is WeightSource.VARIANCE_OPTIMAL:
        return 1.0 / max(mean, 1e-30)
    floored = max(mean, config.entropy_floor)
    return 1.0 / floored if config.entropy_rule == "inverse" else 1.0 / (1.0 - math.exp(-floored))


def _model_terms(reference: Reference) -> tuple[Tensor, Tensor]:
    """Log-probs and entropy by transformers' model in float64, and the gradient of the loss into ``reference``."""
    import transformers

    bundle = reference.bundle
    facts = bundle.facts
    settings = {k: v for k, v in facts.model.items() if k not in ("dtype", "torch_dtype", "auto_map", "architectures")}
    kind = settings.pop("model_type", None)
    try:
        config = transformers.AutoConfig.for_model(kind, **settings)
        config._attn_implementation = config._experts_implementation = "eager"  # others have no float64
        with torch.random.fork_rng(devices=[]):
            model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        model = model.to(torch.float64).eval()
        model.get_input_embeddings().padding_idx = None  # else a padding token that was sampled gets no gradient
        known = {name for name, _ in model.named_parameters()}
        left = model.load_state_dict(_experts_fused({n: t.double() for n, t in bundle.weights.items()}, known), False)
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise BundleError(f"the bundle's model cannot be built: {error}") from error
    tied = {"lm_head.weight"} if facts.model.get("tie_word_embeddings") else set()
    lacking = [n for n in left.missing_keys if n not in tied]
    if lacking or left.unexpected_keys:
        raise BundleError(f"weights do not fit the model: missing {lacking}, unexpected {left.unexpected_keys}")
    size = len(bundle.batch["labels"])
    log_probs, entropy = torch.zeros(size, dtype=torch.float64), torch.zeros(size, dtype=torch.float64)
    tokens = bundle.batch["token_ids"]
    for at, before in _segments(bundle):
        if not bool(reference.mask[at].any()):
            continue
        whole = torch.cat([*(tokens[above] for above in before), tokens[at]])
        logits = model(whole[None]).logits[0][len(whole) - (at.stop - at.start) :]
        log_p = torch.log_softmax(logits / facts.temperature, dim=-1)
        mine = log_p.gather(-1, bundle.batch["labels"][at][:, None])[:, 0]
        h = -(log_p.exp() * log_p).sum(-1)
        _token_losses(reference, mine, h, at)[reference.mask[at]].sum().div(max(facts.num_tokens, 1.0)).backward()
        log_probs[at], entropy[at] = mine.detach(), h.detach()
    gradient = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    reference.gradient = _experts_apart(gradient, set(bundle.weights))
    return log_probs, entropy


def _segments(bundle: ReplayBundle) -> list[tuple[slice, list[slice]]]:
    """Rows of every segment, and those of the segments that it continues, the first one first."""
    rows = [slice(first, last) for first, last in pairwise(bundle.batch["cu_seqlens"].tolist())]
    parents = bundle.batch["parents"].tolist() if "parents" in bundle.batch else [-1] * len(rows)
    before: list[list[slice]] = []
    for parent in parents:
        before.append([*before[parent], rows[parent]] if parent >= 0 else [])
    return list(zip(rows, before, strict=True))


_FUSED = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}  # transformers 5: [E, out, in] each


def _experts_fused(weights: dict[str, Tensor], known: set[str]) -> dict[str, Tensor]:
    """Matrices of single experts, as files have them, put together where this transformers holds them so."""
    for name in known - weights.keys():
        prefix, _, fused = name.rpartition(".")
        count = sum(key.startswith(f"{prefix}.") and key.endswith(".down_proj.weight") for key in weights)
        if prefix.endswith(".experts") and fused in _FUSED and count:
            parts = [[weights[f"{prefix}.{e}.{n}.weight"] for n in _FUSED[fused]] for e in range(count)]
            weights[name] = torch.stack([torch.cat(part) for part in parts])
    return {name: tensor for name, tensor in weights.items() if name in known or ".experts." not in name}


def _experts_apart(gradient: dict[str, Tensor], names: set[str]) -> dict[str, Tensor]:
    """Undo :func:`_experts_fused`."""
    for name in gradient.keys() - names:
        prefix, _, fused = name.rpartition(".")
        if fused in _FUSED:
            for expert, matrix in enumerate(gradient.pop(name)):
                for part, rows in zip(_FUSED[fused], matrix.chunk(len(_FUSED[fused])), strict=True):
                    gradient[f"{prefix}.{expert}.{part}.weight"] = rows
    return gradient


def _clipped(ratio: Tensor, advantages: Tensor, config: LossConfig) -> Tensor:
    """By the sign of the advantage, not by a maximum."""
    up = -advantages * ratio.clamp(max=1.0 + config.clip_high)
    down = -advantages * ratio.clamp(min=1.0 - config.clip_low)
    if config.dual_clip is not None:
        down = torch.minimum(down, -config.dual_clip * advantages)
    return torch.where(advantages >= 0, up, down)


def _correction(reference: Reference, config: LossConfig) -> Tensor:
    """Truncated importance weights of the engine's log-probs."""
    gap = reference.batch("old_log_probs") - reference.batch("rollout_log_probs")
    if config.tis_cap is None:
        return torch.ones_like(gap)
    owners = reference.bundle.batch["sequence_ids"]
    if config.tis_level == "sequence":
        whole = torch.zeros_like(gap)
        for sequence in owners[reference.mask].unique().tolist():
            mine = owners == sequence
            whole[mine] = gap[mine & reference.mask].sum()
        gap = whole
    limit = config.max_log_ratio
    return torch.where(reference.mask, gap.clamp(-limit, limit).exp().clamp(max=config.tis_cap), 1.0)


def _coefficients(reference: Reference, config: LossConfig) -> tuple[Tensor, Tensor]:
    """Of a token's value with its weight, and of one without (entropy): docs/algorithm.md, aggregations."""
    totals, weights = reference.bundle.facts.totals, reference.batch("token_weights")
    lengths, mask = reference.batch("sequence_lengths"), reference.mask
    if config.aggregation is LossAggregation.SEQUENCE_MEAN:
        plain = totals["num_tokens"] / max(totals["num_sequences"], 1.0) / lengths
        return plain * weights, plain
    if config.aggregation is LossAggregation.TOKEN_MEAN:
        ones = torch.ones_like(weights)
        return weights * (totals["num_tokens"] / max(totals["weight_sum"], 1e-300)), ones
    share = float((1.0 / lengths)[mask].sum()) / totals["num_sequences"] * totals["num_tokens"]
    weighted = weights / (float(weights[mask].sum()) + 1e-8) * share
    return weighted, torch.full_like(weights, share / (float(mask.sum()) + 1e-8))


def _token_losses(reference: Reference, log_probs: Tensor, entropy: Tensor, at: slice) -> Tensor:
    """Parts of the loss from log-probs and entropy with gradient; everything else as the bundle has it."""
    config = reference.bundle.facts.loss
    limit = config.max_log_ratio
    ratio = (log_probs - reference.batch("old_log_probs")[at]).clamp(-limit, limit).exp()
    weighted, plain = _coefficients(reference, config)
    loss = _clipped(ratio, reference.batch("advantages")[at], config) * _correction(reference, config)[at]
    return loss * weighted[at] - config.entropy_coef * entropy * plain[at]


def _loss_terms(reference: Reference) -> dict[str, Tensor]:
    """Ratio, clipped loss and parts of the loss, each from what was recorded of the ones before."""
    config = reference.bundle.facts.loss
    if config.kl_coef:
        raise BundleError("loss.kl_coef needs a reference policy, which bundles do not hold")
    limit = config.max_log_ratio
    weighted, plain = _coefficients(reference, config)
    correction = _correction(reference, config)
    terms = {
        "old_log_probs": reference.values["log_probs"],
        "rollout_log_probs": reference.values["log_probs"],
        "ratio": (reference.seen("log_probs") - reference.batch("old_log_probs")).clamp(-limit, limit).exp(),
        "policy_loss": _clipped(reference.seen("ratio"), reference.batch("advantages"), config) * correction,
        "token_losses": reference.seen("policy_loss") * weighted
        - config.entropy_coef * reference.seen("entropy") * plain,
    }
    if config.tis_cap is not None:
        terms["tis_weight"] = correction
    return terms
