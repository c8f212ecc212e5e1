"""One number with the bound that it should keep."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Finding", "page"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """A simulated number; ``at_most`` says on which side of ``bound`` it should lie."""

    name: str
    value: float
    unit: str
    bound: float | None = None
    at_most: bool = True
    detail: str = ""

    @property
    def is_reached(self) -> bool:
        if self.bound is None:
            return True
        return self.value <= self.bound if self.at_most else self.value >= self.bound

    def __str__(self) -> str:
        text = f"{self.name:<52} {_number(self.value):>9} {self.unit}"
        if self.bound is not None:
            side = "at most" if self.at_most else "at least"
            text += f"   {'reached' if self.is_reached else 'MISSED'}: {side} {_number(self.bound)}"
        return f"{text}   ({self.detail})" if self.detail else text


def page(title: str, findings: list[Finding]) -> str:
    """Bounds that are missed first, then the rest in order."""
    missed = [f for f in findings if not f.is_reached]
    rest = [f for f in findings if f.is_reached]
    head = f"{title}: {len(missed)} bounds missed" if missed else f"{title}: every bound reached"
    return "\n".join([head, *(f"  {f}" for f in (*missed, *rest))])


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
