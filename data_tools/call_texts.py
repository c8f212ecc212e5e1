"""The calls that a message's text makes, in any spelling that data sets have.

A spelling is one entry of :data:`_SPELLINGS`: what it looks like, its name, and the dialects that may read it (those of
``model.dialect``, and a few that only data has).  Text that looks like a call and cannot be read is a
:class:`~data_tools.errors.RowError` that names the spelling: as an answer for the user it would teach a policy not to
call.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from data_tools.calls import ARGUMENT_KEYS, NAME_KEYS, Call, is_call, read_call
from data_tools.errors import RowError
from data_tools.tool_lists import Tool, fields_of
from data_tools.values import parsed
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
    Section,
    Turn,
    read_turn,
)
from megatron_rest.regions.call_formats.literals import LiteralCalls
from megatron_rest.regions.call_formats.named import NamedCalls
from megatron_rest.regions.call_formats.python import ANY_NAME, PythonCalls
from megatron_rest.regions.call_formats.xml import ElementCalls, GlmCalls
from megatron_rest.regions.calls import CallFormat
from megatron_rest.regions.dialect import Segment
from megatron_rest.token_region import TokenRegion


@dataclass(frozen=True, slots=True)
class Said:
    """What a message's text says."""

    text: str
    calls: list[Call]
    dialect: str = ""  # in which its calls are written


@dataclass(frozen=True, slots=True)
class _Spelling:
    """``sign`` is what a text in it has; ``dialects`` may read it, in this order."""

    name: str
    sign: str
    dialects: tuple[Dialect, ...] = ()


# --- dialects that only data has ---------------------------------------------------------------------------------


def _dialect(name: str, calls: CallFormat, *sections: tuple[str, str | None]) -> Dialect:
    """One whose text outside the sections is for the user."""
    made = tuple(
        Section(open=opened.encode(), close=closed.encode() if closed else None, region=None)
        for opened, closed in sections
    )
    return Dialect(name=name, sections=made, outside=TokenRegion.RESPONSE, end_markers=(), calls=calls)


def _react(raw: bytes, start: int, end: int, opened: Section | None, dialect: Dialect) -> Iterator[Segment]:
    """``Thought: ... Action: name, Action Input: {...}`` or ``Thought: ... Final Answer: ...``."""
    labels = [(part.start(), part.end(), part[1]) for part in _REACT_LABELS.finditer(raw, start, end)]
    before = labels[0][0] if labels else end
    if raw[start:before].strip():
        yield Segment(start, before, TokenRegion.RESPONSE)
    ends = [*(at for at, _, _ in labels[1:]), end]
    for (at, first, label), last in zip(labels, ends, strict=False):  # one end too many where there is no label
        regions = {b"Thought": TokenRegion.THINK, b"Final Answer": TokenRegion.RESPONSE}
        yield Segment(at if label == b"Action" else first, last, regions.get(label))


_REACT_LABELS = re.compile(rb"^[ \t]*(Thought|Action(?=:.*\n\s*Action Input:)|Final Answer):", re.MULTILINE)
_REACT_CALLS = NamedCalls(
    opening=re.compile(rb"[ \t]*Action:\s*([^\n]+?)\s*\n\s*Action Input:"),
    closing=None,
    form="Action: %s\nAction Input: %s",
)
_REACT = replace(_dialect("react", _REACT_CALLS), grammar=_react)

_OPEN_TAGS = ("<functioncall>", "<|python_tag|>", "<|tool_call|>", "<|tool_calls|>")
_OBJECTS = _dialect(
    "objects in tags",
    LiteralCalls(),
    *((f"<{tag}>", f"</{tag}>") for tag in ("tool_call", "TOOLCALL", "tool_calls", "function_call", "function_calls")),
    ("<functions>", "</functions>"),
    *((tag, None) for tag in _OPEN_TAGS),
    ("<|action_start|><|plugin|>", "<|action_end|>"),
)
_OBJECTS = replace(
    _OBJECTS,
    sections=(*_OBJECTS.sections, Section(open=b"<response>", close=b"</response>", region=TokenRegion.RESPONSE)),
)
_ANY_PYTHON = replace(
    PYTHONIC,
    name="pythonic with any names",
    sections=(
        *(section for section in PYTHONIC.sections if section.region is None),
        Section(open=b"<|tool_call_start|>", close=b"<|tool_call_end|>", region=None),
        Section(open=b"API-Request:", close=None, region=None),
    ),
    calls=PythonCalls(opening=ANY_NAME),
    bare_calls=re.compile(rb"\["),
    end_markers=(),
)
_KIMI = _dialect(
    "kimi_k2",
    NamedCalls(
        opening=re.compile(
            rb"<\|tool_call_begin\|>\s*(?:functions\.)?+([^\s<:]+)(?::\d+)?\s*<\|tool_call_argument_begin\|>"
        ),
        closing=b"<|tool_call_end|>",
        form="<|tool_call_begin|>functions.%s:0<|tool_call_argument_begin|>%s<|tool_call_end|>",
    ),
    ("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"),
)
_INVOKE = _dialect(
    "invoke",
    ElementCalls(
        opening=re.compile(rb"<invoke name=[\"']?([^\"'>\n]*+)[\"']?(>?)"),
        parameter=re.compile(
            rb"<parameter name=[\"']?([^\"'>\n]*+)[\"']?[^>\n]*>(.*?)(?:</parameter>|(?=<parameter name=)|\Z)",
            re.DOTALL,
        ),
        element=b"<invoke name=",
        argument=b"<parameter name=",
        closing=b"</invoke>",
        forms=(
            '<invoke name="%s">\n%s</invoke>',
            '<parameter name="%s">%s</parameter>\n',
            "<function_calls>\n%s\n</function_calls>",
        ),
    ),
    ("<function_calls>", "</function_calls>"),
    ("<tool_call>", "</tool_call>"),
    ("<minimax:tool_call>", "</minimax:tool_call>"),
)
_ELEMENTS = _dialect(
    "functions as elements",
    ElementCalls(),
    ("<tool_call>", "</tool_call>"),
    ("<seed:tool_call>", "</seed:tool_call>"),
)
_FUNCTION_CALLS = NamedCalls(
    opening=re.compile(rb"<function=([^>\s]+)>(?=\s*\{)"), closing=b"</function>", form="<function=%s>%s</function>"
)
_QWEN_AGENT = NamedCalls(
    opening=re.compile("✿FUNCTION✿: *([^\n]+)\n✿ARGS✿:".encode()), closing=None, form="✿FUNCTION✿: %s\n✿ARGS✿: %s"
)


def _labelled(label: str) -> Any:
    """The grammar of calls that begin with a label and need no section: the rest of the text is theirs."""
    opening = label.encode()

    def grammar(raw: bytes, start: int, end: int, opened: Section | None, dialect: Dialect) -> Iterator[Segment]:
        first = raw.find(opening, start, end)
        first = end if first < 0 else first
        if raw[start:first].strip():
            yield Segment(start, first, TokenRegion.RESPONSE)
        if first < end:
            yield Segment(first, end, None)

    return grammar


def _whole(dialect: Dialect) -> Dialect:
    """The dialect without ends of turns: a message of a data set is a turn, and nothing of it may get lost."""
    return replace(dialect, end_markers=())


_SPELLINGS = (
    _Spelling("qwen3_coder", r"<tool_call>\s*<function=", (_whole(QWEN3_CODER),)),
    _Spelling("seed_oss", r"</?seed:tool_call>", (_ELEMENTS,)),
    _Spelling("invoke", r"</?invoke\b|</?minimax:tool_call>", (_INVOKE,)),
    _Spelling("glm45", r"</?arg_(?:key|value)>", (_whole(GLM45),)),
    _Spelling("hermes", r"</?(?:tool_call|response)>", (_OBJECTS,)),
    _Spelling("toolcall (Nemotron, When2Call)", r"</?TOOLCALL>", (_OBJECTS,)),
    _Spelling("glaive", r"<functioncall>", (_OBJECTS,)),
    _Spelling("llama3", r"<\|python_tag\|>|<\|python_start\|>", (_OBJECTS, _ANY_PYTHON)),
    _Spelling("granite", r"<\|tool_calls?\|>", (_OBJECTS,)),
    _Spelling("kimi_k2", r"<\|tool_calls_section_|<\|tool_call_(?:argument_)?begin\|>", (_KIMI,)),
    _Spelling("lfm2", r"<\|tool_call_start\|>", (_ANY_PYTHON,)),
    _Spelling("internlm", r"<\|action_start\|>", (_OBJECTS,)),
    _Spelling("objects in tags", r"</?(?:tool_calls|function_calls?|functions)>", (_OBJECTS,)),
    _Spelling("mistral", r"\[TOOL_CALLS\]", (_whole(MISTRAL),)),
    _Spelling("deepseek", r"<｜tool▁call", (_whole(DEEPSEEK), _whole(DEEPSEEK_V31))),
    _Spelling("harmony", r"<\|(?:start|channel|constrain|message)\|>|\bto=functions\.", (_whole(HARMONY),)),
    _Spelling(
        "llama3.1",
        r"<function=|</function>",
        (
            replace(_dialect("functions in tags", _FUNCTION_CALLS), grammar=_labelled("<function=")),
            replace(_ELEMENTS, grammar=_labelled("<function=")),
        ),
    ),
    _Spelling(
        "qwen_agent",
        r"✿(?:FUNCTION|ARGS)✿",
        (replace(_dialect("qwen-agent", _QWEN_AGENT), grammar=_labelled("✿FUNCTION✿")),),
    ),
    _Spelling("api_bank", r"^[ \t]*API-Request:", (_ANY_PYTHON,)),
    _Spelling("react", r"^[ \t]*(?:Thought|Action|Action Input|Final Answer):", (_REACT,)),
    _Spelling("functionary", r"^>>>\s*\w"),
)
_SIGNS = tuple((re.compile(spelling.sign, re.MULTILINE), spelling) for spelling in _SPELLINGS)
_ANY_SIGN = re.compile("|".join(spelling.sign for spelling in _SPELLINGS), re.MULTILINE)


# --- reading -----------------------------------------------------------------------------------------------------

_MARKS = re.compile(r"[<>\[\]{}(✿=:`\\]|&(?:lt|quot|#)|API-|^\s*\S+\s*$")
_ENDS = re.compile(
    r"(?:\s*(?:<\|(?:im_end|endoftext|eot_id|eom_id|end_of_text|end|return|call)\|>|</s>|<｜end▁of▁sentence｜>))+\s*$"
)
_FENCE = re.compile(r"\s*```[\w-]*\n(.*?)\n?```\s*", re.DOTALL)
_KEY = r"[\"'](?:tool_?|action_?)?(?:arguments|parameters|args|kwargs|input)[\"']\s*:"
_HAS_ARGUMENTS = re.compile(_KEY, re.IGNORECASE)
_CALL_OBJECT = re.compile(rf"\{{\s*[\"'](?:{'|'.join((*NAME_KEYS, 'type', 'id'))})[\"']\s*:")
_BARE_PYTHON = re.compile(r"\s*\[\s*[^\s\[\](){}=,;:'\"][^\[\](){}=,;'\"\n]*\(")
_KEEP_TEXT = "mend the text, or give --adapter; calls_in_text: none in a --mapping keeps all text as it is"


def read_text(text: str, tools: list[Tool], calls_in_text: str = "auto") -> Said:
    """The calls that a message's text makes in any dialect, and what it says beside."""
    text = _ENDS.sub("", text)
    if calls_in_text == "none" or not _MARKS.search(text):
        return Said(text, [])  # without a bracket, a quote or a label nothing can be a call
    if not _ANY_SIGN.search(text):
        return _read_bare(text, tools)
    schemas = {tool["name"]: fields_of(tool["parameters"])[0] for tool in tools}
    spelling = next(spelling for sign, spelling in _SIGNS if sign.search(text))
    if calls_in_text not in ("auto", spelling.name):
        raise RowError(
            f"the text has calls as {spelling.name} writes them, --mapping says calls_in_text: {calls_in_text}"
        )
    why = ""
    for dialect in spelling.dialects:
        turn = read_turn(text, dialect=dialect, schemas=schemas, limits=REFERENCE_LIMITS)
        wrong = _why_not(turn, dialect, text)
        why = why or wrong
        if not wrong:
            calls = [read_call(call.raw) for call in turn.calls]
            _check_text(turn.response or "", tools)
            if calls and not isinstance(parsed((turn.response or "").strip()), str):
                raise RowError(
                    f"JSON stands beside the calls, as what is left of one: {turn.response!r:.80}", _KEEP_TEXT
                )
            if isinstance(dialect.calls, (ElementCalls, GlmCalls)):
                _check_values(calls)
            said = "\n".join(part for part in (_thought(turn), turn.response or "") if part)
            return Said(said, calls, spelling.name)
    raise RowError(
        f"the text looks like a call as {spelling.name} writes it, and none can be read: {why or 'no parser knows it'}",
        _KEEP_TEXT,
    )


def _check_values(calls: list[Call]) -> None:
    """Where values are written without their types, a list that is no JSON would be read as text."""
    for call in calls:
        for key, value in call["parameters"].items():
            if isinstance(value, str) and _PYTHON_VALUE.fullmatch(value) and isinstance(parsed(value), str):
                raise RowError(
                    f"the call of {call['name']!r} has {key} {value[:60]!r}: a list or an object, and no JSON"
                )


_PYTHON_VALUE = re.compile(r"\s*(?:\[.*'.*\]|\{.*'.*\})\s*", re.DOTALL)


def _thought(turn: Turn) -> str:
    return f"<think>{turn.thought}</think>" if turn.thought and turn.thought.strip() else ""


_ANSWERS = {_OBJECTS.name: "<response>", _REACT.name: "Final Answer:", HARMONY.name: "<|channel|>final"}
"""What says, in a dialect, that a text without calls is meant as one."""


def _why_not(turn: Turn, dialect: Dialect, text: str) -> str:
    """Why a reading is not to be trusted; empty: it is."""
    if turn.errors:
        return turn.errors[0]
    if not turn.is_closed or not turn.is_response_closed:
        return "a section is never closed"
    if not turn.calls:
        answer = _ANSWERS.get(dialect.name)
        is_answer = turn.response is not None and not turn.has_calls and answer is not None and answer in text
        return "" if is_answer else "no call is in it"
    if text.rstrip().endswith(tuple(part.open.decode() for part in dialect.sections if part.region is None)):
        return "another call is opened, and none follows"
    if dialect.name in (_OBJECTS.name, _ANY_PYTHON.name, MISTRAL.name) and _is_list_open(text, dialect):
        return "its list is never closed"
    if dialect is _OBJECTS and not any(tag in text for tag in _OPEN_TAGS):
        closes = [section.close.decode() for section in dialect.sections if section.close is not None]
        rest = text[max(text.rfind(close) + len(close) for close in closes if close in text) :]
        if rest.strip():
            return f"text follows it: {rest.strip()[:60]!r}"
    return ""


def _is_list_open(text: str, dialect: Dialect) -> bool:
    """Whether a list of calls lost an end, and calls with it: each call alone would be read."""
    raw = text.encode("utf-8", "surrogatepass")
    tag = dialect.tag_pattern.search(raw)
    position, between = tag.end() if tag else 0, b""
    for call in dialect.calls.scan(raw, position, len(raw)):
        between += raw[position : call.start]
        position = call.end
    between += raw[position:]
    return between.count(b"[") != between.count(b"]")


def _read_bare(text: str, tools: list[Tool]) -> Said:
    """A text that is nothing but calls, without tags: JSON or Python."""
    fenced = _FENCE.fullmatch(text)
    body = fenced[1].strip() if fenced else text.strip()
    names = {tool["name"] for tool in tools}
    if body.startswith(("{", "[")) and _CALL_OBJECT.search(body):
        calls = _bare_objects(body, names)
        if calls is not None:
            return _listed(calls, names, "llama3_json")
    if _BARE_PYTHON.match(body) or any(body.startswith(f"{name}(") for name in names):
        in_list = body if body.startswith("[") else f"[{body}]"
        turn = read_turn(in_list, dialect=_ANY_PYTHON, limits=REFERENCE_LIMITS)
        if turn.calls and not turn.errors and turn.response is None and in_list.endswith("]"):
            return _listed([read_call(call.raw) for call in turn.calls], names, "pythonic")
    _check_text(text, tools)
    return Said(text, [])


def _bare_objects(body: str, names: set[str]) -> list[Call] | None:
    turn = read_turn(f"<|python_tag|>{body}", dialect=_OBJECTS, limits=REFERENCE_LIMITS)
    objects = [call.raw for call in turn.calls]
    if not turn.errors and objects and not any(is_call(item, names) for item in objects):
        return None  # JSON of another kind
    if turn.errors or not objects or not all(is_call(item, names) for item in objects):
        if _HAS_ARGUMENTS.search(body):
            why = turn.errors[0] if turn.errors else "some objects are none"
            raise RowError(f"the text looks like a call as llama3_json writes it, and none can be read: {why}")
        return None
    return [read_call(item) for item in objects]


def _listed(calls: list[Call], names: set[str], dialect: str) -> Said:
    unknown = next((call["name"] for call in calls if names and call["name"] not in names), None)
    if unknown is not None:
        raise RowError(
            f"the text looks like a call as {dialect} writes it, of {unknown[:60]!r}, which is not among the tools"
        )
    return Said("", calls, dialect)


# --- text that must not be an answer -----------------------------------------------------------------------------


def _check_text(text: str, tools: list[Tool]) -> None:
    """Refuse text for the user that looks like a call: a spelling that is not known, or one that is damaged or escaped
    once too often."""
    body = text.strip()
    if not body:
        return
    plain = _unescaped(body)
    if (
        _is_cut(body)
        or any(_looks_like_calls(form, tools) for form in {body, plain})
        or (plain != body and _ANY_SIGN.search(plain))
    ):
        raise RowError(f"the text looks like a call, and none can be read: {body[:80]!r}", _KEEP_TEXT)


def _unescaped(body: str) -> str:
    """Text that was stored as HTML or as the inside of a JSON string."""
    plain = html.unescape(body) if "&" in body else body
    return _ESCAPE.sub(_character, plain) if "\\" in plain else plain


_ESCAPE = re.compile(r"\\(?:u([0-9a-fA-F]{4})|n|(.))")


def _character(escape: re.Match[str]) -> str:
    return chr(int(escape[1], 16)) if escape[1] else escape[2] or "\n"


def _is_cut(body: str) -> bool:
    """Whether a text ends (or begins) inside of what a call may stand in: a tag, a bracket, a fence."""
    if _CUT_TAG.search(body) or _CUT_TAG_IN_FRONT.match(body) or (body.count("```") % 2 and _CUT_FENCE.search(body)):
        return True
    if opening := _LINE_OPENING.search(body):
        rest = body[opening.start() :]
        if sum(map(rest.count, "[{")) > sum(map(rest.count, "]}")):
            return True
    return bool(_CLOSING_END.search(body)) and sum(map(body.count, "[{(")) < sum(map(body.count, "]})"))


_CUT_TAG = re.compile(
    r"<[|/｜]?[^\W\d][^<>\s]{0,60}$|<(?:invoke|parameter)\b[^<>\n]*$|<[|/｜]*$"  # <tool_ca, <|python_t, </
    r"|\[/?[A-Z]+(?:_[A-Z]*)?$"  # [TOOL_C
    r"|(?:^|\n)[ \t]*`{1,2}$"
)
_CUT_TAG_IN_FRONT = re.compile(r"[\w:|▁｜]{1,30}>(?=[\s<]|$)")  # ol_call>
_CUT_FENCE = re.compile(r"```\w*\s*(?:[\[{<](?:(?!```).)*)?$", re.DOTALL)
_LINE_OPENING = re.compile(r"^[ \t]*[\"']?[\[{]", re.MULTILINE)
_CLOSING_END = re.compile(r"(?<![:;=])[\]}][\"'`\s]*$")


def _looks_like_calls(body: str, tools: list[Tool]) -> bool:
    names = {tool["name"] for tool in tools}
    if _REMAINS.search(body) or _NAMED_OBJECT.search(body) or body.strip("`'\"[]()") in names:
        return True
    if body.startswith(("{", "[{", '["', "['", "[[", '"{', '"[')):
        value = parsed(body)
        if not isinstance(value, str):  # JSON for the user, unless it names a tool or has arguments
            items = [item for item in (value if isinstance(value, list) else [value]) if isinstance(item, dict)]
            return any(_is_near_call(item, names) for item in items)
        if body.startswith(("{", "[{", '"{', '"[{')):
            return True  # broken JSON
    if _HAS_ARGUMENTS.search(body) or (_BARE_PYTHON.match(body) and _KEYWORDS.search(body)):
        return True
    if _ENDS_AS_CALLS.search(body) and len(_PROSE.findall(body)) < FEWEST_PROSE_WORDS:
        return True
    if _PYTHON_ARGUMENT.search(_CODE.sub("", body)) or _FENCED_CALL.search(body) or _LINE_CALLS.search(body):
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
    keys = {str(key).lower().replace("-", "_") for key in item}
    if _SURE_KEYS & keys or names & {str(value).strip() for value in item.values()}:
        return True
    if _NEAR_ARGUMENT_KEYS & keys and set(NAME_KEYS) & keys:
        return True
    others = [value for key, value in item.items() if str(key).lower() not in NAME_KEYS]
    return bool(names or others) and len(others) < len(item) and all(isinstance(value, dict) for value in others)


FEWEST_PROSE_WORDS = 6  # that an answer has which ends in brackets and quotes by chance
_SURE_KEYS = frozenset(ARGUMENT_KEYS) - {"input"}
_NEAR_ARGUMENT_KEYS = frozenset({"argument", "parameter", "params", "param", "inputs"})
_PROSE = re.compile(r"(?:^|\s)[^\W\d_]+(?=[\s.,;:!?]|$)")
_ENDS_AS_CALLS = re.compile(r"[\"'\]}]\s*[)}\]]+[\s`\"']*$")
_KEYWORDS = re.compile(r"\(\s*(?:\)|[A-Za-z_]\w*\s*=)")
_CODE = re.compile(r"```(?!tool).*?(?:```|$)", re.DOTALL)
_LINE_CALLS = re.compile(r"^[ \t]*\[[A-Za-z_][\w.]*\([^\n]*\)\][ \t]*$", re.MULTILINE)
_FENCED_CALL = re.compile(r"```\w*\s*\[\s*[^\s\[\](){}=,;:'\"][^\[\](){}=,;'\"\n]*\(\s*(?:\w+\s*=|\))")
_PYTHON_ARGUMENT = re.compile(r"[(,]\s*\w+\s*=\s*[\"'\[{]")
# A name and then an object, under whatever key: one of both keys may be damaged, or nobody's.
_NAMED_OBJECT = re.compile(
    rf"\{{\s*[\"'](?:{'|'.join((*NAME_KEYS, 'func', 'fn', 'method', 'call'))})[\"']\s*:\s*[\"'][^\"'\n]*[\"']\s*,"
    r"\s*[^\n:{}]{1,40}:\s*\{",
    re.IGNORECASE,
)
# What is left of a call's marks where some of them are damaged.
_REMAINS = re.compile(
    r"tool_?calls?>|toolcall>|</?tool[_ ]?call|functioncall|function_calls?>|arg_key>|arg_value>|</?parameter|<function"
    r"|</function|invoke>|invoke name|Action Input|API-?Request:|(?:^|\n)[ \t]*API-\w*:?$|```tool|python_tag"
    r"|tool▁|<\|tool|\[TOOL_CALLS|\[ARGS\]|✿|\bfunctions\.\w+:\d",
    re.IGNORECASE,
)


# --- thoughts ----------------------------------------------------------------------------------------------------

_THOUGHT_TAGS = "think|thinking|thought|thoughts|reasoning|scratch_pad"
_LEADING = re.compile(rf"\s*(?:<({_THOUGHT_TAGS})>)?((?:(?!<(?:{_THOUGHT_TAGS})>).)*?)</({_THOUGHT_TAGS})>", re.DOTALL)
_MISTRAL_THOUGHT = re.compile(r"\s*\[THINK\](.*?)\[/THINK\]", re.DOTALL)
_OPENED = re.compile(rf"\s*(<(?:{_THOUGHT_TAGS})>|\[THINK\])")


def leading_thought(text: str) -> tuple[str | None, str]:
    """``<think> ... </think>`` (or a relative) at the beginning of a message's text, and the rest.

    A thought that the template opened has its closing tag only.  RowError for one that is never closed.
    """
    opened = _OPENED.match(text)
    if opened is None and "</" not in text:
        return None, text
    found = _MISTRAL_THOUGHT.match(text)
    if found:
        return found[1].strip() or None, text[found.end() :].lstrip()
    found = _LEADING.match(text)
    if found is None or (found[1] and found[1] != found[3]):
        if opened:
            raise RowError(f"the text opens {opened[1]} and never closes it")
        return None, text
    if not found[1] and (found[3] != "think" or "<response>" in found[2] or _ANY_SIGN.search(found[2])):
        return None, text
    return found[2].strip() or None, text[found.end() :].lstrip()
