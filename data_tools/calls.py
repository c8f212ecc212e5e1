"""Calls of a row: values of many spellings, and text in any dialect, as ``{"name", "parameters"}``."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from data_tools.errors import RowError
from data_tools.tool_lists import Tool, fields_of
from data_tools.values import parsed, with_pairs
from megatron_rest.regions import (
    DEEPSEEK,
    DEEPSEEK_V31,
    GLM45,
    HARMONY,
    MISTRAL,
    PYTHONIC,
    QWEN3_CODER,
    REFERENCE_LIMITS,
    Dialect,
    Schemas,
    Section,
    ToolCall,
    ToolCallError,
    Turn,
    read_turn,
)
from megatron_rest.regions.call_formats.literals import LiteralCalls, json_or_literal
from megatron_rest.regions.call_formats.python import ANY_NAME, PythonCalls
from megatron_rest.regions.calls import CallSpan, Limits
from megatron_rest.regions.dialect import Segment
from megatron_rest.token_region import TokenRegion

Call = dict[str, Any]
_NAMES = ("name", "function", "tool_name", "function_name", "tool", "api_name", "action")
_ARGUMENTS = ("arguments", "parameters", "args", "kwargs", "input", "tool_input", "action_input")
_ASIDE = {"id", "type", "index", "call_id", "tool_call_id", "requestor", "status", "caller", "cache_control", "error"}


def read_calls(value: Any) -> list[Call]:
    """A list of calls, one call, or JSON text of either."""
    value = parsed(value, "the calls")
    if isinstance(value, dict):
        value = parsed(value.get("tool_calls"), "the calls") if value.get("tool_calls") else [value]
    if not isinstance(value, list):
        raise RowError(f"the calls are {type(value).__name__}, expected a list")
    return [read_call(item) for item in value]


def read_call(value: Any) -> Call:
    """One call; RowError for one whose name or arguments are not where data sets have them."""
    value = with_pairs(parsed(value, "a call"))
    inner = parsed(value.get("function")) if isinstance(value, dict) else None
    if isinstance(inner, dict):
        value = inner
    elif isinstance(value, dict) and isinstance(call := value.get("functionCall"), dict):  # Gemini's
        value = call
    if not isinstance(value, dict):
        raise RowError(f"a tool call is {type(value).__name__}, expected an object: {str(value)[:120]}")
    value = {key: item for key, item in value.items() if item is not None}
    keys = [key for key in _NAMES if isinstance(value.get(key), str) and value[key].strip()]
    if not keys:
        raise RowError(f"a tool call has no name: {str(value)[:120]}", _no_name(value))
    name = value[keys[0]]
    given = {key: value[key] for key in _ARGUMENTS if key in value and key != keys[0]}
    if len({str(item) for item in given.values()}) > 1:
        raise RowError(f"the call of {name!r} has arguments under {' and '.join(given)}: which are meant?")
    others = value.keys() - {*given, *_NAMES} - _ASIDE
    if not given and others:
        raise RowError(
            f"the call of {name!r} has no arguments under {', '.join(_ARGUMENTS)}: it has {', '.join(sorted(others))}",
            "an --adapter can rename them",
        )
    return {"name": name, "parameters": _arguments(next(iter(given.values()), None), name)}


def _no_name(value: dict[str, Any]) -> str:
    if len(value) == 1 and isinstance(next(iter(value.values())), dict):
        return "this is BFCL's form of possible answers (values in lists), for evaluation: docs/evaluation.md"
    return ""


def _arguments(value: Any, name: str) -> dict[str, Any]:
    if value is None or (isinstance(value, str) and not value.strip()):
        return {}
    value = with_pairs(parsed(value, f"the arguments of call {name!r}"))
    if not isinstance(value, dict):
        raise RowError(f"the parameters of call {name!r} are {type(value).__name__}, expected an object")
    return value


def without_meaningless_nulls(calls: list[Call], tools: list[Tool], nulls: str) -> list[Call]:
    """Calls without arguments that are null, unless the tool requires the parameter or its type allows null.

    Arrow unites the keys of all objects of a column and fills the gaps with null, and what writes JSON from such a
    table keeps them; only the tool says whether a null was meant.
    """
    if nulls == "keep" or not any(_has_null(call["parameters"]) for call in calls):
        return calls
    schemas = {tool["name"]: tool["parameters"] for tool in tools} if nulls == "auto" else {}
    return [{**call, "parameters": _pruned(call["parameters"], schemas.get(call["name"]))} for call in calls]


def _has_null(value: Any) -> bool:
    if isinstance(value, dict):
        return any(item is None or _has_null(item) for item in value.values())
    return isinstance(value, list) and any(_has_null(item) for item in value)


def _pruned(value: Any, schema: Any) -> Any:
    if isinstance(value, dict):
        fields, required = fields_of(schema)
        return {
            key: _pruned(item, fields.get(key))
            for key, item in value.items()
            if item is not None or key in required or allows_null(fields.get(key))
        }
    if isinstance(value, list):
        return [_pruned(item, schema.get("items") if isinstance(schema, dict) else None) for item in value]
    return value


def allows_null(schema: Any) -> bool:
    """Whether a parameter's schema lets it be null."""
    if not isinstance(schema, dict):
        return False
    kinds = schema.get("type")
    kinds = kinds if isinstance(kinds, list) else [kinds]
    choices = [*_list(schema.get("anyOf")), *_list(schema.get("oneOf"))]
    return (
        "null" in kinds
        or schema.get("nullable") is True
        or None in _list(schema.get("enum"))
        or any(allows_null(choice) for choice in choices)
    )


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


# --- calls as text -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Said:
    """What a message's text says."""

    text: str
    calls: list[Call]
    dialect: str = ""  # in which its calls are written


def _react(raw: bytes, start: int, end: int, opened: Section | None, dialect: Dialect) -> Iterator[Segment]:
    """``Thought: ... Action: name, Action Input: {...}`` or ``Thought: ... Final Answer: ...``."""
    parts = _REACT_PARTS.finditer(raw, start, end)
    labels = [(part.start(), part.end(), part[1]) for part in parts]
    if raw[start : labels[0][0] if labels else end].strip():
        yield Segment(start, labels[0][0] if labels else end, TokenRegion.RESPONSE)
    for (_, first, label), (last, _, _) in zip(labels, [*labels[1:], (end, end, b"")], strict=False):
        regions = {b"Thought": TokenRegion.THINK, b"Final Answer": TokenRegion.RESPONSE}
        yield Segment(first, last, regions.get(label))


_REACT_PARTS = re.compile(rb"^[ \t]*(Thought|Action(?=:.*\n\s*Action Input:)|Final Answer):", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class _ReactCalls(LiteralCalls):
    """``name\\nAction Input: {...}``."""

    def load(self, text: bytes, call: CallSpan, limits: Limits, schemas: Schemas) -> ToolCall:
        found = _ACTION.fullmatch(text[call.start : call.end].decode("utf-8", "surrogatepass"))
        if found is None:
            raise ToolCallError("an action is not of the form `Action: name`, `Action Input: {...}`")
        value = {"name": found[1], "arguments": json_or_literal(found[2] or "{}", limits)}
        return ToolCall(name=None, parameters={}, raw=value)

    def scan(self, text: bytes, start: int, end: int) -> Iterator[CallSpan]:
        if text[start:end].strip():
            yield CallSpan(start, end, None)


_ACTION = re.compile(r"\s*([^\n]+?)\s*\n\s*Action Input:\s*(.*?)\s*", re.DOTALL)

_TAGS = ("tool_call", "TOOLCALL", "tool_calls", "function_call", "function_calls", "functions")
_OPEN_TAGS = ("<functioncall>", "<|python_tag|>", "<|tool_call|>", "<|tool_calls|>")
_OBJECTS = Dialect(
    name="objects in tags",
    sections=(
        *(Section(open=f"<{tag}>".encode(), close=f"</{tag}>".encode(), region=None) for tag in _TAGS),
        *(Section(open=tag.encode(), close=None, region=None) for tag in _OPEN_TAGS),
        Section(open=b"<|action_start|><|plugin|>", close=b"<|action_end|>", region=None),
        Section(open=b"<response>", close=b"</response>", region=TokenRegion.RESPONSE),
    ),
    outside=TokenRegion.RESPONSE,
    end_markers=(),
    calls=LiteralCalls(),
)
_ANY_PYTHON = replace(
    PYTHONIC,
    name="pythonic with any names",
    sections=(
        *(s for s in PYTHONIC.sections if s.region is None),
        Section(open=b"API-Request:", close=None, region=None),
    ),
    calls=PythonCalls(opening=ANY_NAME),
    bare_calls=re.compile(rb"\["),
    end_markers=(),
)
_REACT = Dialect(
    name="ReAct", sections=(), outside=TokenRegion.RESPONSE, end_markers=(), calls=_ReactCalls(), grammar=_react
)


def _whole(dialect: Dialect) -> Dialect:
    """The dialect without ends of turns: a message of a data set is a turn, and nothing of it may get lost."""
    return replace(dialect, end_markers=())


# What a spelling looks like, what it is called, and which dialects may read it, in this order.
_SPELLINGS: tuple[tuple[re.Pattern[str], str, tuple[Dialect, ...]], ...] = tuple(
    (re.compile(sign, re.MULTILINE), name, dialects)
    for sign, name, dialects in (
        (r"<tool_call>\s*<function=", "qwen3_coder", (_whole(QWEN3_CODER),)),
        (r"<arg_key>", "glm45", (_whole(GLM45),)),
        (r"</?(?:tool_call|response)>", "hermes", (_OBJECTS,)),
        (r"</?TOOLCALL>", "toolcall (Nemotron, When2Call)", (_OBJECTS,)),
        (r"<functioncall>", "glaive", (_OBJECTS,)),
        (r"<\|python_tag\|>|<\|python_start\|>", "llama3", (_OBJECTS, _ANY_PYTHON)),
        (r"<\|tool_calls?\|>", "granite", (_OBJECTS,)),
        (r"<\|action_start\|>", "internlm", (_OBJECTS,)),
        (r"</?(?:tool_calls|function_calls?)>", "objects in tags", (_OBJECTS,)),
        (r"\[TOOL_CALLS\]", "mistral", (_whole(MISTRAL),)),
        (r"<｜tool▁call", "deepseek", (_whole(DEEPSEEK), _whole(DEEPSEEK_V31))),
        (r"<\|channel\|>", "harmony", (_whole(HARMONY),)),
        (r"^[ \t]*API-Request:", "api_bank", (_ANY_PYTHON,)),
        (r"^[ \t]*(?:Action|Action Input|Final Answer):", "react", (_REACT,)),
        (r"<function=", "functions in tags (llama3.1)", ()),
        (r"<invoke\b|<\w+:tool_call>", "calls as XML", ()),
        (r"<\|tool_calls?_(?:section_)?begin\|>", "kimi_k2", ()),
        (r"✿FUNCTION✿", "qwen-agent", ()),
        (r"\bto=functions\.", "harmony", ()),
    )
)
_MARKS = re.compile(r"[<\[{(✿=:]|`")
_ENDS = re.compile(
    r"(?:\s*(?:<\|(?:im_end|endoftext|eot_id|eom_id|end_of_text|end|return|call)\|>|</s>|<｜end▁of▁sentence｜>))+\s*$"
)
_FENCE = re.compile(r"\s*```[\w-]*\n(.*?)\n?```\s*", re.DOTALL)
_CALL_OBJECT = re.compile(r"\{\s*[\"'](?:name|function|tool_name|tool|action|type|id)[\"']\s*:")
_HAS_ARGUMENTS = re.compile(rf"[\"'](?:{'|'.join(_ARGUMENTS)})[\"']\s*:")
_BARE_PYTHON = re.compile(r"\s*\[\s*[^\s\[\](){}=,;:'\"][^\[\](){}=,;'\"\n]*\(")
_KEYWORDS = re.compile(r"\(\s*(?:\)|[A-Za-z_]\w*\s*=)")


def read_text(text: str, tools: list[Tool], calls_in_text: str = "auto") -> Said:
    """The calls that a message's text makes in any dialect, and what it says beside.

    Text that looks like a call and cannot be read as one is a :class:`RowError` that names the dialect: as an answer
    for the user it would teach a policy not to call.
    """
    text = _ENDS.sub("", text)
    if calls_in_text == "none" or not _MARKS.search(text):
        return Said(text, [])  # without a bracket, a quote or a label nothing can be a call
    schemas = {tool["name"]: fields_of(tool["parameters"])[0] for tool in tools}
    for sign, name, dialects in _SPELLINGS:
        if not sign.search(text):
            continue
        if calls_in_text not in ("auto", name):
            raise RowError(f"the text has calls as {name} writes them, --mapping says calls_in_text: {calls_in_text}")
        why = ""
        for dialect in dialects:
            turn = read_turn(text, dialect=dialect, schemas=schemas, limits=REFERENCE_LIMITS)
            wrong = _why_not(turn, dialect, text)
            why = why or wrong
            if not wrong:
                calls = [read_call(call.raw) for call in turn.calls]
                _check_text(turn.response or "", tools)
                said = "\n".join(part for part in (_thought(turn), turn.response or "") if part)
                return Said(said, calls, name)
        raise RowError(
            f"the text looks like a call as {name} writes it, and none can be read: {why or 'no parser knows it'}",
            _KEEP_TEXT,
        )
    return _read_bare(text, tools)


def _thought(turn: Turn) -> str:
    return f"<think>{turn.thought}</think>" if turn.thought and turn.thought.strip() else ""


def _why_not(turn: Turn, dialect: Dialect, text: str) -> str:
    """Why a reading is not to be trusted; empty: it is."""
    if turn.errors:
        return turn.errors[0]
    if not turn.is_closed or not turn.is_response_closed:
        return "a section is never closed"
    if not turn.calls:
        is_marked = "Final Answer:" in text if dialect is _REACT else "<response>" in text
        return "" if turn.response is not None and not turn.has_calls and is_marked else "no call is in it"
    if dialect is _OBJECTS and not any(tag in text for tag in _OPEN_TAGS):
        closes = [section.close.decode() for section in dialect.sections if section.close is not None]
        rest = text[max(text.rfind(close) + len(close) for close in closes if close in text) :]
        if rest.strip():
            return f"text follows it: {rest.strip()[:60]!r}"
    return ""


def _read_bare(text: str, tools: list[Tool]) -> Said:
    """A text that is nothing but calls, without tags: JSON or Python."""
    fenced = _FENCE.fullmatch(text)
    body = fenced[1].strip() if fenced else text.strip()
    names = {tool["name"] for tool in tools}
    if body.startswith(("{", "[")) and _CALL_OBJECT.search(body):
        calls = _bare_objects(body, names)
        if calls is not None:
            return _listed(text, calls, names, "llama3_json")
    if _BARE_PYTHON.match(body) or any(body.startswith(f"{name}(") for name in names):
        in_list = body if body.startswith("[") else f"[{body}]"
        turn = read_turn(in_list, dialect=_ANY_PYTHON, limits=REFERENCE_LIMITS)
        if turn.calls and not turn.errors and turn.response is None and in_list.endswith("]"):
            return _listed(text, [read_call(call.raw) for call in turn.calls], names, "pythonic")
    _check_text(text, tools)
    return Said(text, [])


def _bare_objects(body: str, names: set[str]) -> list[Call] | None:
    turn = read_turn(f"<|python_tag|>{body}", dialect=_OBJECTS, limits=REFERENCE_LIMITS)
    objects = [call.raw for call in turn.calls]
    if not turn.errors and objects and not any(_is_call(item, names) for item in objects):
        return None  # JSON of another kind
    if turn.errors or not objects or not all(_is_call(item, names) for item in objects):
        if _HAS_ARGUMENTS.search(body):
            why = turn.errors[0] if turn.errors else "some objects are none"
            raise RowError(f"the text looks like a call as llama3_json writes it, and none can be read: {why}")
        return None
    return [read_call(item) for item in objects]


def _is_call(value: dict[str, Any], names: set[str]) -> bool:
    inner = value.get("function")
    value = inner if isinstance(inner, dict) else value
    called = [value[key] for key in _NAMES if isinstance(value.get(key), str)]
    return bool(called) and (called[0] in names or any(key in value for key in _ARGUMENTS))


def _listed(text: str, calls: list[Call], names: set[str], dialect: str) -> Said:
    unknown = next((call["name"] for call in calls if names and call["name"] not in names), None)
    if unknown is not None:
        raise RowError(
            f"the text looks like a call as {dialect} writes it, of {unknown[:60]!r}, which is not among the tools"
        )
    return Said("", calls, dialect)


def _check_text(text: str, tools: list[Tool]) -> None:
    """Refuse text for the user that looks like a call: a spelling that is not known, or one that is damaged."""
    body = text.strip()
    if body and _looks_like_calls(body, tools):
        raise RowError(f"the text looks like a call, and none can be read: {body[:80]!r}", _KEEP_TEXT)


def _looks_like_calls(body: str, tools: list[Tool]) -> bool:
    names = {tool["name"] for tool in tools}
    if _REMAINS.search(body) or _BROKEN_FENCE.match(body):
        return True
    if body.startswith(("{", "[{", '["', "['", "[[")):
        value = parsed(body)
        if not isinstance(value, str):  # JSON for the user, unless it names a tool or has arguments
            items = [item for item in (value if isinstance(value, list) else [value]) if isinstance(item, dict)]
            return any(_is_near_call(item, names) for item in items)
        if body.startswith(("{", "[{")):
            return True  # broken JSON
    if _HAS_ARGUMENTS.search(body) or (_BARE_PYTHON.match(body) and _KEYWORDS.search(body)):
        return True
    if _ENDS_AS_CALLS.search(body) and len(_PROSE.findall(body)) < FEWEST_PROSE_WORDS:
        return True
    if _PYTHON_ARGUMENT.search(_CODE.sub("", body)):
        return True
    if any(re.search(rf"(?<!\w){re.escape(name)}\((?!s\))", body) for name in names):
        return True
    keys = {key for tool in tools for key in fields_of(tool["parameters"])[0]}
    if not keys:
        return False
    any_key = "|".join(map(re.escape, sorted(keys)))
    return re.search(rf"(?:^|\W)(?:{any_key})\s*=\s*[\"'\[{{\d]|[\"'](?:{any_key})[\"']\s*:", body) is not None


def _is_near_call(item: dict[str, Any], names: set[str]) -> bool:
    """JSON that names a tool, or has arguments, or a name and nothing else but an object."""
    if _ARGUMENTS_KEYS & item.keys() or names & {str(value).strip() for value in item.values()}:
        return True
    others = [value for key, value in item.items() if key not in _NAMES]
    return bool(names) and len(others) < len(item) and all(isinstance(value, dict) for value in others)


FEWEST_PROSE_WORDS = 6  # that an answer has which ends in brackets and quotes by chance
_BROKEN_FENCE = re.compile(r"`{2,3}[\w`]*\n\s*[{\[](?!.*[}\]]\s*```\s*$)", re.DOTALL)
_PROSE = re.compile(r"(?:^|\s)[^\W\d_]+(?=[\s.,;:!?]|$)")
_ENDS_AS_CALLS = re.compile(r"[\"'\]}]\s*[)}\]]+[\s`\"']*$")
_ARGUMENTS_KEYS = frozenset(_ARGUMENTS) - {"input"}
_KEEP_TEXT = "mend the text, or give --adapter; calls_in_text: none in a --mapping keeps all text as it is"
_CODE = re.compile(r"```(?!tool).*?(?:```|$)", re.DOTALL)
_PYTHON_ARGUMENT = re.compile(r"[(,]\s*\w+\s*=\s*[\"'\[{]")
# What is left of a call's marks where some of them are damaged.
_REMAINS = re.compile(
    r"tool_?calls?>|toolcall>|</?tool[_ ]?call|functioncall|function_calls?>|arg_key>|arg_value>|</?parameter|<function"
    r"|Action Input|API-?Request:|```tool|python_tag|tool▁|<\|tool|\[TOOL_CALLS|\[ARGS\]|invoke name",
    re.IGNORECASE,
)


# --- thoughts ----------------------------------------------------------------------------------------------------

_THOUGHT_TAGS = "think|thinking|thought|thoughts|reasoning|scratch_pad"
_LEADING = re.compile(rf"\s*(?:<({_THOUGHT_TAGS})>)?((?:(?!<(?:{_THOUGHT_TAGS})>).)*?)</({_THOUGHT_TAGS})>", re.DOTALL)
_MISTRAL_THOUGHT = re.compile(r"\s*\[THINK\](.*?)\[/THINK\]", re.DOTALL)


def leading_thought(text: str) -> tuple[str | None, str]:
    """``<think> ... </think>`` (or a relative) at the beginning of a message's text, and the rest.

    A thought that the template opened has its closing tag only.
    """
    if "</" not in text and "[/THINK]" not in text:
        return None, text
    found = _MISTRAL_THOUGHT.match(text)
    if found:
        return found[1].strip() or None, text[found.end() :].lstrip()
    found = _LEADING.match(text)
    if found is None or (found[1] and found[1] != found[3]):
        return None, text
    if not found[1] and (found[3] != "think" or re.search(r"<tool_call>|<response>", found[2])):
        return None, text
    return found[2].strip() or None, text[found.end() :].lstrip()
