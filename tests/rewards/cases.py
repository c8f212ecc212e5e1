"""The 18 golden reward cases (specification, section f) and how answers are spelled."""

from __future__ import annotations

from dataclasses import dataclass

THOUGHT = "<think>q</think>\n"
OK = '{"name": "f", "parameters": {"a": 1, "b": "x"}}'


def calls(*lines: str, thought: str = THOUGHT) -> str:
    """An answer with one call a line."""
    return thought + "<tool_call>\n" + "\n".join(lines) + "\n</tool_call>"


@dataclass(frozen=True)
class Case:
    """Static (format, correctness) and the dynamic total at steps 0, 75, 105, 150."""

    name: str
    reference: str
    answer: str
    static: tuple[float, float]
    dynamic: tuple[float, float, float, float]


ONE = calls(OK)
TWO = calls('{"name": "f", "parameters": {"a": 1}}', '{"name": "g", "parameters": {"b": 2}}')
SPEAK = THOUGHT + "<response>hi</response>"
F, G = '{"name": "f", "parameters": {"a": 1}}', '{"name": "g", "parameters": {"b": 2}}'
_WORST = (0, -1, -1.4, -2)
_BARE = (-4, -3.5, -3.7, -4)

CASES = [
    Case("exact", ONE, ONE, (1, 3), (4, 4, 4, 4)),
    Case("one value wrong", ONE, calls(OK.replace('"x"', '"y"')), (1, 1.5), (3, 2.75, 2.65, 2.5)),
    Case("string for number", ONE, calls(OK.replace("1", '"1"')), (1, 1.5), (3, 2.75, 2.65, 2.5)),
    Case("missing key", ONE, calls('{"name": "f", "parameters": {"a": 1}}'), (1, 0.75), (2.5, 2.125, 1.975, 1.75)),
    Case("extra key", ONE, calls(OK.replace('"x"', '"x", "c": 3')), (1, 2.5), (3.6667, 3.5833, 3.55, 3.5)),
    Case("wrong name", ONE, calls(OK.replace('"f"', '"h"')), (1, -3), _WORST),
    Case("extra call", ONE, calls(OK, '{"name": "h", "parameters": {}}'), (1, 2.25), (3.5, 3.375, 3.325, 3.25)),
    Case("no think block", ONE, calls(OK, thought=""), (0, 3), (0, 1.5, 1.7, 2)),
    Case("broken JSON", ONE, calls(OK[:-1]), (1, -3), _WORST),
    Case("arguments key", ONE, calls(OK.replace("parameters", "arguments")), (1, -3), _WORST),
    Case("response instead", ONE, SPEAK, (0, -3), _BARE),
    Case("call plus response", ONE, ONE + "\n<response>hi</response>", (0, 3), (0, 1.5, 1.7, 2)),
    Case("free text around", ONE, "Well. " + ONE + " Done.", (1, 3), (4, 4, 4, 4)),
    Case("tag in thought", ONE, calls(OK, thought="<think>use <tool_call> b</think>\n"), (0, -3), _BARE),
    Case("swapped order", TWO, calls(G, F), (1, 3), (4, 4, 4, 4)),
    Case("only the first call", TWO, calls(F), (1, 0), (2, 1.5, 1.3, 1)),
    Case("response given", SPEAK, SPEAK.replace(">hi<", ">hello<"), (1, 0), (2, 1.5, 1.3, 1)),
    Case("response and a hallucinated call", SPEAK, ONE + "\n<response>hi</response>", (1, 0), (2, 1.5, 1.3, 1)),
    Case("response missing", SPEAK, THOUGHT + "hi", (0, 0), (-2, -1, -1, -1)),
]
STEPS = (0, 75, 105, 150)
