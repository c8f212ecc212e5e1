"""A fixed advantage for turns that are wrong in form: message penalties (NeMo-RL's ``invalid_tool_call_advantage`` and
``malformed_thinking_advantage``).

    A'_t = calls     on all tokens of a turn whose calls cannot be read
    A'_t = thought   on all tokens of a turn whose thought never closes, whatever its calls are
    A'_t = A         elsewhere

A turn is judged by the dialect's reader, which regions and rewards use.  It is the same whatever its siblings did, so a
group that fails alike still learns its form.  Says nothing of entropy.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_rest.credit_traits import traits_of
from megatron_rest.types import TurnMark
from megatron_rest.weighting.credit import Credit, CreditRows, CreditRule

__all__ = ["MessagePenalty"]


@dataclass(frozen=True, kw_only=True)
class MessagePenalty(CreditRule):
    """``calls`` and ``thought``: advantages of such turns (-5 each, as the Nemotron recipes have it), or null."""

    calls: float | None = -5.0
    thought: float | None = -5.0
    traits = traits_of("message_penalty")

    def __post_init__(self) -> None:
        given = [value for value in (self.calls, self.thought) if value is not None]
        if not given or not all(np.isfinite(value) and value <= 0 for value in given):
            raise ValueError(f"calls {self.calls} and thought {self.thought}: expected numbers <= 0, one at least")

    def credit(self, rows: CreditRows) -> Credit:
        assert rows.marks is not None
        advantages = rows.advantages[rows.sequence]
        for mark, value in ((TurnMark.CALLS, self.calls), (TurnMark.THOUGHT, self.thought)):
            if value is not None:
                advantages = np.where(rows.marks & mark, value, advantages)
        return Credit(advantages=advantages)
