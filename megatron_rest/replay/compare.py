"""Which term differs: the run's numbers beside the reference's, in the order in which one follows from the other."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_rest.replay.bundle import ReplayBundle
from megatron_rest.replay.reference import Reference

__all__ = ["Term", "compare"]

_FORMULA = 2e-5  # float32 arithmetic from given numbers, relative to the largest of them
_BY_DTYPE = {"float32": 1e-3, "bfloat16": 0.15, "float16": 0.05}  # log-probs in nats; gradients: relative norm
_FP8 = 0.5
_ENGINE = {"float32": 1e-3, "bfloat16": 0.3, "float16": 0.1}  # another implementation in that precision
_SMALL = 1e-6  # share of the whole gradient's norm below which a parameter's own is rounding


@dataclass(frozen=True, kw_only=True, slots=True)
class Term:
    """One comparison."""

    name: str
    difference: float
    tolerance: float
    what: str  # the difference is measured in
    where: str = ""  # the worst place

    @property
    def is_right(self) -> bool:
        """NaN is not."""
        return self.difference <= self.tolerance


def compare(bundle: ReplayBundle, reference: Reference) -> list[Term]:
    """All terms, first causes first; per parameter for the gradient."""
    facts = bundle.facts
    model = _FP8 if facts.fp8_recipe != "none" else _BY_DTYPE[facts.model_dtype]
    engine = max(model, _ENGINE[facts.rollout_dtype])
    terms = [
        _tokens("labels", bundle.batch["labels"], reference, 0.0, "token ids", is_relative=False),
        _tokens("sequence_lengths", bundle.batch["sequence_lengths"], reference, 0.0, "tokens", is_relative=False),
        _tokens("advantages", bundle.batch["advantages"], reference, _FORMULA),
        _tokens("token_weights", bundle.batch["token_weights"], reference, _FORMULA),
        _tokens("log_probs", bundle.seen["log_probs"], reference, model, "nats", is_relative=False),
        _tokens("entropy", bundle.seen["entropy"], reference, model, "nats", is_relative=False),
    ]
    if facts.update == 0:  # the weights of the scoring pass are those of this update
        old = bundle.batch["old_log_probs"]
        terms.append(_tokens("old_log_probs", old, reference, model, "nats", is_relative=False))
        if facts.is_on_policy:
            sampled = bundle.batch["rollout_log_probs"]
            terms.append(_tokens("rollout_log_probs", sampled, reference, engine, "nats", is_relative=False))
    if "tis_weight" in bundle.seen:
        terms.append(_tokens("tis_weight", bundle.seen["tis_weight"], reference, _FORMULA))
    terms += [_tokens(n, bundle.seen[n], reference, _FORMULA) for n in ("ratio", "policy_loss", "token_losses")]
    losses = bundle.seen["token_losses"].double()[reference.mask]
    scale = float(losses.abs().sum()) or 1.0
    terms += [
        Term(name="loss_sum", difference=abs(facts.loss_sum - float(losses.sum())) / scale, tolerance=_FORMULA,
             what="of the sum of absolute values"),
        Term(name="num_tokens", difference=abs(facts.num_tokens - float(reference.mask.sum())), tolerance=0.0,
             what="tokens"),
        *_gradients(bundle, reference, model),
    ]  # fmt: skip
    return terms


def _tokens(
    name: str, seen: Tensor, reference: Reference, tolerance: float, what: str = "", *, is_relative: bool = True
) -> Term:
    """Largest difference over the loss tokens; relative to the largest value, but to at least 1."""
    mask = reference.mask
    expected, got = reference.values[name][mask], seen.double()[mask]
    if not len(got):
        return Term(name=name, difference=0.0, tolerance=tolerance, what=what or "relative")
    gap = (got - expected).abs()
    gap = torch.where(gap.isnan(), torch.inf, gap)
    worst = int(gap.argmax())
    scale = max(float(expected.abs().max()), 1.0) if is_relative else 1.0
    index = int(mask.nonzero()[worst, 0])
    where = f"token {index}: {float(got[worst]):.7g}, reference {float(expected[worst]):.7g}"
    return Term(
        name=name, difference=float(gap[worst]) / scale, tolerance=tolerance, what=what or "relative", where=where
    )


def _gradients(bundle: ReplayBundle, reference: Reference, tolerance: float) -> list[Term]:
    whole = float(torch.stack([g.double().norm() for g in reference.gradient.values()] or [torch.zeros(1)]).norm())
    floor = max(whole * _SMALL, 1e-12)
    terms = []
    for name in sorted({*bundle.gradient, *reference.gradient}):
        got, expected = bundle.gradient.get(name), reference.gradient.get(name)
        if expected is None:  # a tied copy, or a parameter that no token of this microbatch touches
            expected = torch.zeros_like(got) if got is not None else None
        if got is None or expected is None or got.shape != expected.shape:
            term = Term(name=f"gradient {name}", difference=torch.inf, tolerance=tolerance, what="not in the bundle")
        else:
            gap = float((got.double() - expected).norm()) / max(float(expected.norm()), floor)
            gap = torch.inf if gap != gap else gap
            term = Term(name=f"gradient {name}", difference=gap, tolerance=tolerance, what="relative norm")
        terms.append(term)
    return terms
