"""Is this tokenizer with this chat template fit for token-in, token-out training?  Asked once, before anything runs.

What is checked, on sample answers in the run's dialect with thoughts, one and several calls, other scripts and emoji:

1. round trip       text -> ids -> bytes gives the text, byte for byte
2. regions          every token of an answer has a region of an answer, and the called names are TOOL_NAME
3. end of turn      the template ends an assistant's turn with a token at which engines stop
4. append-only      what the template renders for a longer conversation starts with what it rendered for the shorter
                    one and the policy's answer                                                          (multi-turn)
5. parser           our reading of the calls is that of vLLM's tool parser of the dialect                (multi-turn)

A template that drops earlier thoughts, say, fails the fourth: the policy would be trained on a context that a served
model never sees.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Sequence
from typing import Any

from megatron_rest.data.chat_template import (
    APPEND_ONLY,
    STOCK,
    TEMPLATE_DATE,
    ChatTemplate,
    shipped_templates,
    template_of,
)
from megatron_rest.help_topics import Topic, see
from megatron_rest.regions import HERMES, TOOLRL, Dialect, TokenRegion, label_regions, read_turn, token_bytes_table
from megatron_rest.rollout.chat import ChatSettings
from megatron_rest.rollout.environments.base import Message
from megatron_rest.rollout.environments.calls import Call
from megatron_rest.rollout.translator import ChatTranslator

__all__ = ["CertificationError", "certify", "serving_notes"]


class CertificationError(ValueError):
    """The tokenizer or its chat template is not fit; the message lists why."""


_SAID: tuple[tuple[tuple[Call, ...], str, str], ...] = (
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
_TYPES = {"folder": "string", "city": "string", "days": "integer", "units": "null", "dir_name": "string"}
_TYPES |= {"tags": "array", "content": "string", "file_name": "string"}


def _samples(dialect: Dialect) -> list[tuple[str, tuple[Call, ...]]]:
    """Answers as a model of the dialect writes them; in Hermes' form for ToolRL's tags, whose reader is the same."""
    dialect = HERMES if dialect is TOOLRL else dialect
    samples = []
    for calls, thought, text in _SAID:
        calls = calls[:1] if dialect.one_call_a_turn else calls
        if not dialect.dotted_names:
            calls = tuple(Call(call.name.replace(".", "_"), call.arguments) for call in calls)
        pairs = [(call.name, call.arguments) for call in calls]
        samples.append((dialect.write(pairs, thought=thought or None, response=text or None), calls))
    return samples


def certify(
    tokenizer: Any, *, multi_turn: bool, chat: ChatSettings | None = None, stop_token_ids: Sequence[int] = ()
) -> None:
    """Raise :class:`CertificationError` with every reason found; return if there is none.

    Args:
        tokenizer: of transformers.
        multi_turn: environments will append to the conversation.
        chat: template and dialect of the run; None = the tokenizer's template, ToolRL's tags.
        stop_token_ids: where engines stop; empty = not known, and not checked.
    """
    chat = chat or ChatSettings()
    try:
        table = token_bytes_table(tokenizer)
    except ValueError as error:
        raise CertificationError(
            f"the tokenizer is not fit for token-in, token-out training: {error}{see(Topic.TEMPLATE_REFUSED)}"
        ) from error
    samples = _samples(chat.reads)
    reasons = [*_round_trip(tokenizer, table, samples), *_regions(tokenizer, table, samples, chat.reads)]
    if stop_token_ids:
        reasons += _end_of_turn(tokenizer, chat, stop_token_ids)
    if multi_turn:
        try:
            translator = ChatTranslator(tokenizer, chat=chat)
        except Exception as error:  # noqa: BLE001  a template is a program: whatever it raises is the finding
            reasons.append(f"end of turn: {error}")
        else:
            reasons += _append_only(translator, samples, _remedy(tokenizer, chat))
        reasons += _parser(tokenizer, samples, chat.reads)
    if reasons:
        what = "the tokenizer or its chat template is not fit for token-in, token-out training:"
        raise CertificationError("\n  - ".join([what, *dict.fromkeys(reasons)]) + see(Topic.TEMPLATE_REFUSED))


def serving_notes(tokenizer: Any, chat: ChatSettings) -> list[str]:
    """What a server must do for its model to see what the policy saw, one line each."""
    try:
        stock, used = ChatTemplate.of_tokenizer(tokenizer), chat.template(tokenizer)
    except ValueError:
        return []
    notes = []
    if used.text != stock.text:
        notes.append(
            f"model.chat_template={chat.chat_template}: the exported folder brings this template, and a server must "
            "use it; the model's own writes earlier turns differently"
        )
    if "strftime_now" in used.text:
        notes.append(
            f"the chat template asks for the date: prompts say {TEMPLATE_DATE.date()} throughout, a server says today's"
        )
    return notes


def _remedy(tokenizer: Any, chat: ChatSettings) -> str:
    """What to set where the stock template rewrites turns; empty if nothing shipped fits."""
    if chat.chat_template != STOCK:
        return ""
    try:
        template_of(ChatTemplate.of_tokenizer(tokenizer), APPEND_ONLY)
    except ValueError:
        return (
            f"; set model.chat_template to the one of the model's family ({', '.join(shipped_templates())}), or to the "
            "path of an append-only template of your own"
        )
    return "; set model.chat_template=append_only"


def _round_trip(tokenizer: Any, table: Sequence[bytes], samples: Sequence[tuple[str, tuple[Call, ...]]]) -> list[str]:
    reasons = []
    for text, _ in samples:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        back = b"".join(table[i] for i in ids)
        if back != unicodedata.normalize("NFC", text).encode():
            reasons.append(f"round trip: {text[:40]!r} comes back as {back[:40]!r}")
    return reasons


def _regions(
    tokenizer: Any, table: Sequence[bytes], samples: Sequence[tuple[str, tuple[Call, ...]]], dialect: Dialect
) -> list[str]:
    reasons = []
    for text, calls in samples:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        tokens = [table[i] for i in ids]
        regions = label_regions(tokens, dialect=dialect).tolist()
        if len(regions) != len(tokens) or int(TokenRegion.CONTEXT) in regions:
            reasons.append(f"regions: a token of {text[:40]!r} has none")
        named = b" ".join(t for t, r in zip(tokens, regions, strict=True) if r == TokenRegion.TOOL_NAME).decode()
        missing = [c.name for c in calls if c.name not in named.replace(" ", "")]
        if missing:
            reasons.append(f"regions: the tokens of {missing[0]!r} are not marked as a tool's name")
    return reasons


def _end_of_turn(tokenizer: Any, chat: ChatSettings, stop_token_ids: Sequence[int]) -> list[str]:
    """The end that the template writes is one token, and engines stop at it."""
    added = {token.content: int(i) for i, token in tokenizer.added_tokens_decoder.items()}
    try:
        end = chat.reads.turn_end or chat.template(tokenizer).end_of_turn(list(added))
    except ValueError:
        return []  # no template: prompts were rendered elsewhere
    if end and added.get(end) not in stop_token_ids:
        return [
            f"end of turn: the chat template ends a turn with {end!r} (id {added.get(end)}), and engines stop at "
            f"{list(stop_token_ids)}: nothing would ever end"
        ]
    return []


def _append_only(translator: ChatTranslator, samples: Sequence[tuple[str, tuple[Call, ...]]], remedy: str) -> list[str]:
    """Grow a conversation answer by answer, and compare with what the template makes of the whole."""
    reasons = []
    for role in ("tool", "user"):
        messages = [{"role": "user", "content": "Go."}]
        ours = translator.template(messages, add_generation_prompt=True)
        for text, _ in samples:
            said = Message(role=role, content='{"ok": true, "größe": 3}')
            whole = _behind(translator.prefix, text)
            try:
                ours += whole.removeprefix(translator.prefix) + "".join(translator.end_and_suffix([said]))
                messages += [{"role": "assistant", "content": whole}, {"role": role, "content": said.content}]
                theirs = translator.template(messages, add_generation_prompt=True)
            except Exception as error:  # noqa: BLE001  as above
                reasons.append(f"append-only: the template refuses a {role} message: {error}{remedy}")
                break
            if theirs != ours:
                at = next(i for i in range(len(ours) + 1) if ours[: i + 1] != theirs[: i + 1])
                reasons.append(
                    f"append-only: with {role} messages the template renders {theirs[max(0, at - 20) : at + 20]!r} "
                    f"where the conversation had {ours[max(0, at - 20) : at + 20]!r}{remedy}"
                )
                break
    return reasons


def _behind(prefix: str, text: str) -> str:
    """A sample answer as a whole where the generation prompt has written ``prefix`` of it."""
    if not prefix or text.startswith(prefix):
        return text
    is_open = not prefix.rstrip().endswith(("</think>", "[/THINK]"))
    body = text.rpartition("</think>")[2].lstrip("\n")
    return prefix + ("\n</think>\n\n" if is_open else "") + body


def _parser(tokenizer: Any, samples: Sequence[tuple[str, tuple[Call, ...]]], dialect: Dialect) -> list[str]:
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.tool_parsers import ToolParserManager

    if not dialect.vllm_parser or not dialect.vllm_parser_reads_text:  # none reads it, or none reads its text
        return []
    schemas = {call.name: {k: {"type": _TYPES[k]} for k in call.arguments} for _, calls in samples for call in calls}
    tools: Any = [
        {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": properties}}}
        for name, properties in schemas.items()
    ]
    request = ChatCompletionRequest(model="m", messages=[{"role": "user", "content": "q"}], tools=tools, seed=None)
    offered: Any = request.tools
    reasons = []
    for text, calls in samples:
        answer = text.rpartition("</think>")[2].rpartition("[/THINK]")[2]  # a reasoning parser takes the thought away
        try:
            parser = ToolParserManager.get_tool_parser(dialect.vllm_parser)(tokenizer, offered)
            found = parser.extract_tool_calls(answer.strip(), request).tool_calls
            theirs = [Call(call.function.name, json.loads(call.function.arguments)) for call in found]
        except Exception as error:  # noqa: BLE001  parsers raise whatever they do for vocabularies without their tokens
            return [f"parser: vLLM's {dialect.vllm_parser} parser does not work with this tokenizer: {error}"]
        ours = [Call(call.name, call.parameters) for call in read_turn(text, dialect=dialect, schemas=schemas).calls]
        if not ours == theirs == list(calls):
            reasons.append(f"parser: of {text[:40]!r} we read {ours}, vLLM's {dialect.vllm_parser} parser {theirs}")
    return reasons
