"""The golden texts, and the toy tokenizer they are counted with (specification, section f)."""

from __future__ import annotations

import re

PIECE = re.compile(r"<think>|</think>|<tool_call>|</tool_call>|<\|im_end\|>|\w+|\s|[^\w\s]")
END = "<|im_end|>"

_ONE = '<tool_call>\n{"name": "%s", "parameters": {"k": 1}}\n</tool_call>'
TEXTS = {
    "A": "<think>a b c</think>\n" + _ONE % "get_x",
    "B": (
        '<think>a b c</think>\n<tool_call>\n{"name": "f", "parameters": {"k": 1}}\n'
        '{"name": "g", "parameters": {"k": 2}}\n</tool_call>'
    ),
    "C": "<think>a b c</think>\n<response>hi there</response>",
    "D": "<think>a b c\n" + _ONE % "f",
    "E": '<think>a</think>\n<tool_call>\n{"name": "f", "parameters": {}}\n</tool_call>',
    "F": '<think>a</think>\n<tool_call>\n{"parameters": {"name": "z"}, "name": "f"}\n</tool_call>',
    "G": '<think>a</think>\n<tool_call>\n{"name": "Get Team", "parameters": {"q": "}{"}}\n</tool_call>',
    "H": "<think>use <tool_call> b</think>\n" + _ONE % "f",
    "J": "no tags at all",
}


def pieces(text: str) -> list[bytes]:
    """Toy tokens of ``text`` and the end marker."""
    return [piece.encode() for piece in PIECE.findall(text + END)]
