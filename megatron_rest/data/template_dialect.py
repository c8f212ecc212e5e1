"""Which dialect a chat template speaks: its words are a hint, what it renders decides.

A template that mentions ``<tool_call>`` may still write calls in another form, or leave out the tools that it is given
(DeepSeek's and SmolLM3's do): a model would be asked for calls to functions that nobody has described.
"""

from __future__ import annotations

from itertools import takewhile
from typing import Any

from megatron_rest.data.chat_template import PROBE_TOOLS, ChatTemplate, TemplateError
from megatron_rest.regions import Dialect, dialects_named_in, read_turn

__all__ = ["template_dialect", "why_unfit"]

_FUNCTION = PROBE_TOOLS[0]["function"]
_NAME, _CITY = str(_FUNCTION["name"]), "Bern"
_SCHEMAS = {_NAME: _FUNCTION["parameters"]["properties"]}
_ASKED = {"role": "user", "content": "Sunny?"}


def template_dialect(template: ChatTemplate) -> Dialect | None:
    """The dialect in which ``template`` shows calls and tools to a model; None where it shows none that is known."""
    named = dialects_named_in(template.for_tools().text)
    return next((dialect for dialect in named if not why_unfit(template, dialect)), None)


def why_unfit(template: ChatTemplate, dialect: Dialect) -> str:
    """Why prompts of ``template`` cannot ask for calls in ``dialect``; empty if they can.

    A template that renders no call of an earlier turn at all says nothing against a dialect.
    """
    if not template.shows_tools():
        return "the chat template leaves out the tools that it is given"
    turns = [turn for turn in _rendered_calls(template) if _NAME in turn]
    if turns and not any(_reads_back(turn, dialect) for turn in turns):
        return f"the chat template writes calls in another form than {dialect.name}: {turns[-1].strip()[:80]!r}"
    return ""


def _reads_back(turn: str, dialect: Dialect) -> bool:
    calls = read_turn(turn, dialect=dialect, schemas=_SCHEMAS).calls
    return [(call.name, call.parameters) for call in calls] == [(_NAME, {"city": _CITY})]


def _rendered_calls(template: ChatTemplate) -> list[str]:
    """An assistant's turn with a call, as the template writes it, for each form of the message that it takes."""
    arguments: dict[str, Any] = {"city": _CITY}
    turns: list[str] = []
    for content in ("", None):  # DeepSeek's templates render calls only where the content is null
        for told in (arguments, f'{{"city": "{_CITY}"}}'):
            call = {"id": "call12345", "type": "function", "function": {"name": _NAME, "arguments": told}}
            said = {"role": "assistant", "content": content, "tool_calls": [call]}
            try:
                asked = template.render([_ASKED], PROBE_TOOLS, add_generation_prompt=True)
                whole = template.render([_ASKED, said], PROBE_TOOLS)
            except TemplateError:
                continue
            shared = asked[
                : sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(asked, whole, strict=False)))
            ]
            head, opens, tag = shared.rpartition("<")
            if opens and ">" not in tag:  # the prompt opens a thought where this turn has another tag
                shared = head
            turns.append(whole[len(shared) :])
    return turns
