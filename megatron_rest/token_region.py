"""What a token of a tool-use conversation is for; alone in its file so that data tools need no torch."""

from enum import IntEnum

__all__ = ["TokenRegion"]


class TokenRegion(IntEnum):
    """What a token is for.  Every token belongs to exactly one region; the order is stable (it is stored in files)."""

    CONTEXT = 0  # prompt, tool outputs, padding: never trained on
    FORMAT = 1  # tags, JSON glue, newlines between sections, end of turn
    THINK = 2  # reasoning between the think tags
    TOOL_NAME = 3  # characters of a called tool's name
    TOOL_ARGS = 4  # the arguments object of a call, braces included
    RESPONSE = 5  # text for the user
