"""What was wrong with an answer, and where: each finding names the region (and the call) whose tokens it is about."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_rest.token_region import TokenRegion

__all__ = ["Finding"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One thing that was wrong.

    ``Finding(region=TOOL_ARGS, call=1, message='parameter "k": expected 1, got 2')`` is about the arguments of the
    second call in the answer, that is of its second run of TOOL_NAME tokens.
    """

    region: TokenRegion
    message: str
    call: int | None = None  # index of the call in the ANSWER; None: no call of the answer (something is missing, say)

    def __str__(self) -> str:
        where = self.region.name.lower() if self.call is None else f"{self.region.name.lower()} of call {self.call}"
        return f"{where}: {self.message}"
