"""What each rule of token credit asks for and may change: enough to plan a run with it.  No torch.

The rules themselves are in :mod:`megatron_rest.weighting`, one file each.  Configuration, plan and trainer read the
same table, so which passes a step makes follows from it in all three.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

__all__ = [
    "BUILT_IN",
    "OWN",
    "READS_TOKEN_REWARDS",
    "STATISTICS",
    "CreditTraits",
    "Normalisation",
    "Scope",
    "traits_of",
]

STATISTICS = ("log_probs", "entropy", "sum_p2", "beta", "ref_log_probs", "marks", "token_rewards")
"""What a rule may need of every token: log-prob (nats), entropy (nats), sum p^2, squared score norm of the output
layer, log-prob under the reference policy, what is wrong in form with its turn (``types.TurnMark``), and what it earned
by itself (``rewards.functions.Reward``)."""

_OF_SAMPLES = {"marks", "token_rewards"}  # no model says them
_NOT_SCORED = {"ref_log_probs", *_OF_SAMPLES}  # there without a scoring pass


class Scope(StrEnum):
    """Whose tokens the credit of a token depends on."""

    ROLLOUT = "rollout"  # those of its own rollout
    GROUP = "group"  # those of its siblings
    STEP = "step"  # those of all rollouts of the step


class Normalisation(StrEnum):
    """What a rule's weights add up to.  The loss divides by sequences or tokens of the step, whatever they are."""

    ROLLOUT = "rollout"  # mean 1 over the loss tokens of each rollout (a rollout without weight: 0); checked
    POSITIVE = "positive"  # mean 1 over those of positive weight: their sum is known after scoring only
    NONE = "none"  # as the method has it


@dataclass(frozen=True, kw_only=True, slots=True)
class CreditTraits:
    """What a rule declares."""

    needs: frozenset[str] = frozenset()  # of STATISTICS
    scope: Scope = Scope.ROLLOUT
    normalisation: Normalisation = Normalisation.NONE
    moves_zero: bool = False  # a rollout whose advantage is 0 may get a gradient all the same
    follows: str = ""  # the statistic whose region means it follows over the run (its state)

    def __post_init__(self) -> None:
        unknown = self.needs - set(STATISTICS)
        if unknown:
            raise ValueError(f"needs holds {', '.join(sorted(unknown))}: known are {', '.join(STATISTICS)}")

    @property
    def measured(self) -> frozenset[str]:
        """What models say of every token, among ``needs``."""
        return self.needs - _OF_SAMPLES

    @property
    def is_scored(self) -> bool:
        """Whether something has to be measured in the scoring pass of every step."""
        return bool(self.needs - _NOT_SCORED)

    @property
    def with_score_norms(self) -> bool:
        """Whether the scoring pass has to measure sum p^2 (and, with it, score norms)."""
        return bool(self.needs & {"sum_p2", "beta"})

    @property
    def is_of_all(self) -> bool:
        """Whether rollouts that are not trained on are measured, too."""
        return self.is_scored and (self.scope is not Scope.ROLLOUT or bool(self.follows))


_MEAN_ONE = CreditTraits(normalisation=Normalisation.ROLLOUT)


def _following(statistic: str) -> CreditTraits:
    return CreditTraits(needs=frozenset({statistic}), normalisation=Normalisation.ROLLOUT, follows=statistic)


def _of(*needs: str, scope: Scope, moves_zero: bool = False) -> CreditTraits:
    return CreditTraits(needs=frozenset(needs), scope=scope, moves_zero=moves_zero)


BUILT_IN: dict[str, tuple[str, CreditTraits]] = {
    # ResT's region weights
    "uniform": ("", _MEAN_ONE),
    "constant": ("", _MEAN_ONE),
    "reference_code": ("", CreditTraits(normalisation=Normalisation.POSITIVE)),
    "entropy_offline": ("", _following("entropy")),
    "entropy_ema": ("", _following("entropy")),
    "variance_optimal": ("", _following("beta")),
    # others' token weights and advantages
    "entropy_mask": ("entropy_mask:EntropyMask", _of("entropy", scope=Scope.STEP)),
    "hicra": ("hicra:Hicra", _of(scope=Scope.ROLLOUT)),
    "message_penalty": ("message_penalty:MessagePenalty", _of("marks", scope=Scope.ROLLOUT, moves_zero=True)),
    "egpo": ("egpo:Egpo", _of("entropy", scope=Scope.ROLLOUT)),
    "aem": ("aem:Aem", _of("entropy", scope=Scope.GROUP)),
    "empg": ("empg:Empg", _of("entropy", scope=Scope.STEP, moves_zero=True)),
    "gtpo": ("gtpo:Gtpo", _of("entropy", scope=Scope.GROUP)),
    "otb": ("otb:OptimalTokenBaseline", _of("log_probs", "sum_p2", scope=Scope.GROUP, moves_zero=True)),
    "otb_turns": ("otb:over_turns", _of("log_probs", "sum_p2", scope=Scope.GROUP, moves_zero=True)),
    # token advantages from what single turns, calls or tokens earned
    "process": ("process:ProcessSupervision", _of("token_rewards", scope=Scope.GROUP, moves_zero=True)),
    "matchtir": ("matchtir:MatchTir", _of("token_rewards", scope=Scope.GROUP, moves_zero=True)),
    "reward_to_go": ("reward_to_go:RewardToGo", _of("token_rewards", scope=Scope.STEP, moves_zero=True)),
}
"""``weighting.source`` -> where its factory is in :mod:`megatron_rest.weighting` (nothing: ResT's own), and what it
declares."""

READS_TOKEN_REWARDS = frozenset({"process", "matchtir", "reward_to_go", "otb", "otb_turns"})
"""Rules that look at what single turns, calls or tokens earned; others of :data:`BUILT_IN` know an answer's total."""

OWN = CreditTraits(needs=frozenset(STATISTICS) - {"ref_log_probs"}, scope=Scope.STEP, moves_zero=True)
"""What a plan takes for a rule of the user's own, which it does not import: the most that one can ask for."""


def traits_of(source: str) -> CreditTraits:
    """Of ``weighting.source``: as declared, or :data:`OWN` for ``package.module:attribute``."""
    return BUILT_IN[str(source)][1] if str(source) in BUILT_IN else OWN
