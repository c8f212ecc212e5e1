"""Is this tokenizer with this chat template fit for token-in, token-out training?  Asked once, before anything runs.

What is checked, on sample answers with thoughts, one and several calls, other scripts and emoji:

1. round trip       text -> ids -> bytes gives the text, byte for byte
2. regions          every token of an answer has a region of an answer, and the called names are TOOL_NAME
3. end of turn      the template ends an assistant's turn with ``eos_token``                             (multi-turn)
4. append-only      what the template renders for a longer conversation starts with what it rendered for the shorter
                    one and the policy's answer                                                          (multi-turn)
5. parser           our reading of the calls is that of vLLM's tool parser                               (multi-turn)

A template that drops earlier thoughts, say, fails the fourth: the policy would be trained on a context that a served
model never sees.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from megatron_rest.regions import TokenRegion, label_regions, token_bytes_table
from megatron_rest.rollout.environments.base import Message
from megatron_rest.rollout.environments.calls import Call, parse_calls
from megatron_rest.rollout.translator import ChatTranslator

__all__ = ["CertificationError", "certify"]

_VLLM_PARSER = "hermes"  # of <tool_call> blocks with one JSON object each


class CertificationError(ValueError):
    """The tokenizer or its chat template is not fit; the message lists why."""


def _hermes(*calls: Call, thought: str = "", text: str = "") -> str:
    parts = [f"<think>\n{thought}\n</think>\n\n"] if thought else []
    parts += [text] if text else []
    blocks = [json.dumps({"name": c.name, "arguments": c.arguments}, ensure_ascii=False) for c in calls]
    parts += ["\n".join(f"<tool_call>\n{block}\n</tool_call>" for block in blocks)]
    return "".join(parts)


_SAMPLES: tuple[tuple[str, tuple[Call, ...]], ...] = tuple(
    (_hermes(*calls, thought=thought, text=text), calls)
    for calls, thought, text in (
        ((), "", "The answer is 42."),
        ((), "Short: done, I think.", "Fertig, größer als 3 € – 完成 ✅"),
        ((Call("cd", {"folder": "document"}),), "", ""),
        ((Call("get_weather", {"city": "Zürich", "days": 3, "units": None}),), "Which city?\n  Zürich.", ""),
        (
            (
                Call("mkdir", {"dir_name": "a b", "tags": ["x", {"y": [1.5, True]}]}),
                Call("Store.echo", {"content": 'He said: "a\\b"\n{"name": "not a call"}', "file_name": "ü.txt"}),
            ),
            "Two steps, {first} the folder",
            "",
        ),
    )
)


def certify(tokenizer: Any, *, multi_turn: bool, starts_in_think: bool = False) -> None:
    """Raise :class:`CertificationError` with every reason found; return if there is none.

    Args:
        tokenizer: of transformers.
        multi_turn: environments will append to the conversation.
        starts_in_think: the generation prompt opens the thought.
    """
    try:
        table = token_bytes_table(tokenizer)
    except ValueError as error:
        raise CertificationError(f"the tokenizer is not fit for token-in, token-out training: {error}") from error
    reasons = [*_round_trip(tokenizer, table), *_regions(tokenizer, table)]
    if multi_turn:
        try:
            translator = ChatTranslator(tokenizer, starts_in_think=starts_in_think)
        except Exception as error:  # noqa: BLE001  a template is a program: whatever it raises is the finding
            reasons.append(f"end of turn: {error}")
        else:
            reasons += _append_only(translator)
        reasons += _parser(tokenizer)
    if reasons:
        what = "the tokenizer or its chat template is not fit for token-in, token-out training:"
        raise CertificationError("\n  - ".join([what, *dict.fromkeys(reasons)]))


def _round_trip(tokenizer: Any, table: Sequence[bytes]) -> list[str]:
    reasons = []
    for text, _ in _SAMPLES:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        back = b"".join(table[i] for i in ids)
        if back != text.encode():
            reasons.append(f"round trip: {text[:40]!r} comes back as {back[:40]!r}")
    return reasons


def _regions(tokenizer: Any, table: Sequence[bytes]) -> list[str]:
    reasons = []
    for text, calls in _SAMPLES:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        tokens = [table[i] for i in ids]
        regions = label_regions(tokens).tolist()
        if len(regions) != len(tokens) or int(TokenRegion.CONTEXT) in regions:
            reasons.append(f"regions: a token of {text[:40]!r} has none")
        named = b" ".join(t for t, r in zip(tokens, regions, strict=True) if r == TokenRegion.TOOL_NAME).decode()
        missing = [c.name for c in calls if c.name not in named.replace(" ", "")]
        if missing:
            reasons.append(f"regions: the tokens of {missing[0]!r} are not marked as a tool's name")
    return reasons


def _append_only(translator: ChatTranslator) -> list[str]:
    """Grow a conversation answer by answer, and compare with what the template makes of the whole."""
    reasons = []
    for role in ("tool", "user"):
        messages = [{"role": "user", "content": "Go."}]
        ours = translator.template(messages, add_generation_prompt=True)
        for text, _ in _SAMPLES:
            said = Message(role=role, content='{"ok": true, "größe": 3}')
            try:
                ours += text + str(translator._eos) + translator.suffix([said])
                messages += [{"role": "assistant", "content": text}, {"role": role, "content": said.content}]
                theirs = translator.template(messages, add_generation_prompt=True)
            except Exception as error:  # noqa: BLE001  as above
                reasons.append(f"append-only: the template refuses a {role} message: {error}")
                break
            if theirs != ours:
                at = next(i for i in range(len(ours) + 1) if ours[: i + 1] != theirs[: i + 1])
                reasons.append(
                    f"append-only: with {role} messages the template renders {theirs[max(0, at - 20) : at + 20]!r} "
                    f"where the conversation had {ours[max(0, at - 20) : at + 20]!r}"
                )
                break
    return reasons


def _parser(tokenizer: Any) -> list[str]:
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.tool_parsers import ToolParserManager

    reasons = []
    parser_class = ToolParserManager.get_tool_parser(_VLLM_PARSER)
    request = ChatCompletionRequest(model="m", messages=[{"role": "user", "content": "q"}], seed=None)
    for text, calls in _SAMPLES:
        answer = text.rpartition("</think>")[2]  # vLLM's reasoning parser takes the thought away before
        found = parser_class(tokenizer, None).extract_tool_calls(answer, request).tool_calls
        theirs = [Call(call.function.name, json.loads(call.function.arguments)) for call in found]
        ours = list(parse_calls(text).calls)
        if not ours == theirs == list(calls):
            reasons.append(f"parser: of {text[:40]!r} we read {ours}, vLLM's {_VLLM_PARSER} parser {theirs}")
    return reasons
