"""One line of what ``megatron-rest doctor`` prints."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["BROKEN", "OFF", "OK", "Finding"]

OK, OFF, BROKEN = "ok", "off", "broken"


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """A package or an ability of this machine."""

    name: str
    state: str  # ok, off (absent, works without) or broken (in the way)
    detail: str
    mend: str = ""  # what to do, or what it would need
