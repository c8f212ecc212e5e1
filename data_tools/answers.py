"""A reference answer as ToolRL writes it.

<think> thoughts </think>
<tool_call>
{"name": "...", "parameters": {...}}        one JSON object a line
</tool_call>
<response> text for the user </response>
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from data_tools.errors import RowError
from data_tools.values import dumps
from megatron_rest.rewards.parsing import ReferenceAnswerError, read_reference, thought_end

# ToolRL's own stand-in for a missing thought.
PLACEHOLDER_THOUGHT = "I should use the appropriate tool with proper parameters to respond to the user's need."
_THINK = re.compile(r"<think>(.*?)</think>", re.DOTALL)
_TAGS = re.compile(r"</?(think|tool_call|response)>")
_SECTIONS = re.compile(r"<(think|tool_call|response)>.*?</\1>", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Answer:
    """A parsed reference answer."""

    think: str | None
    calls: list[dict[str, Any]]
    response: str | None


def parse_answer(text: str) -> Answer:
    """Split a tagged reference answer, as the reward reads it; :class:`RowError` with the reason where it could not."""
    try:
        reference = read_reference(text)
    except ReferenceAnswerError as error:
        raise RowError(str(error)) from error
    if not reference.sections:
        raise RowError("the reference answer has neither <tool_call> nor <response>: is this the right column?")
    if not reference.is_closed:
        raise RowError("the reference answer opens <response> and never closes it")
    calls = [{"name": call.name, "parameters": call.parameters} for call in reference.calls]
    return Answer(reference.thought, calls, reference.response)


def is_in_toolrls_form(text: str) -> bool:
    """Whether a tagged answer that was read may stay as it came: one block of calls, and nothing outside the tags."""
    body = text[thought_end(text) :]
    return body.count("<tool_call>") <= 1 and not _SECTIONS.sub("", body).strip()


def compose_answer(
    calls: list[dict[str, Any]], *, think: str | None = None, response: str | None = None, placeholder: bool = True
) -> str:
    """The tagged text of an answer that came in parts.  ``placeholder``: ToolRL's sentence for a missing thought."""
    parts = [f"<think> {think or PLACEHOLDER_THOUGHT} </think>"] if think or placeholder else []
    if calls:
        parts.append("\n".join(["<tool_call>", *(dumps(call) for call in calls), "</tool_call>"]))
    if response is not None:
        parts.append(f"<response> {response} </response>")
    if not calls and response is None:
        raise RowError("the reference answer has neither tool calls nor a response")
    return "\n".join(parts)


def without_tags(thought: str) -> str:
    """A thought that mentions tags by their names only: the published reward takes the first tag anywhere for one."""
    return _TAGS.sub(r"\1", thought)


def shorten_thought(text: str, max_words: int) -> str:
    """Keep the first ``max_words`` words of the thought; the rest of the answer stays as it is."""
    thought = _THINK.search(text)
    if thought is None or len(thought.group(1).split()) <= max_words:
        return text
    words = " ".join(thought.group(1).split()[:max_words])
    return f"{text[: thought.start()]}<think> {words} </think>{text[thought.end() :]}"
