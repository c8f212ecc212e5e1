"""Short names of what docs/troubleshooting.md explains: a message ends with the name of its heading there."""

from __future__ import annotations

from enum import StrEnum

__all__ = ["Topic", "see"]


class Topic(StrEnum):
    """Headings of docs/troubleshooting.md, written as in its links."""

    OUT_OF_MEMORY = "out-of-memory"
    HANG = "hang"
    MISMATCH = "mismatch"
    TEMPLATE_REFUSED = "template-refused"
    ENGINES_RESTART = "engines-restart"
    FP8_CERTIFICATE = "fp8-certificate"
    DISK_FULL = "disk-full"
    NO_START = "no-start"
    NOT_FINITE = "not-finite"


def see(topic: Topic) -> str:
    """What a message of this topic ends with."""
    return f" [help: {topic}]"
