"""The layouts that public tool-use sets and trainers have, by name: one table entry each.

An entry says how the layout is recognised, and where its parts are (:class:`~data_tools.columns.Columns`, the same that
a ``--mapping`` file says); what they are is read alike for all of them (:mod:`data_tools.conversation`).  ``reshape``
is for the few whose rows have no messages as they are.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from data_tools.columns import TOOL_PATHS, Columns, Row
from data_tools.errors import DataError, RowError
from data_tools.tool_lists import TOOL_LIST
from data_tools.values import parsed, refuse_marked

OWN = "mapping"  # the name of a layout that --column or --mapping describes


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """One entry of the table."""

    name: str
    who: str  # whose rows look so
    columns: str  # as the documentation shows them
    reference: str  # which part is the reference answer
    is_it: Callable[[Row], bool]
    where: Columns = dataclasses.field(default_factory=Columns)
    reshape: Callable[[Row], list[Row]] | None = None
    read: frozenset[str] = frozenset()  # columns that ``reshape`` reads; the others stay as the row's metadata
    tagged: bool = False  # the answer must be in ToolRL's tags or hold calls: other text is another kind of reference
    refusal: str = ""  # why rows like this are no training data


def _first(row: Row) -> Any:
    """The first message of ``conversations``."""
    value = parsed(row.get("conversations"))
    if isinstance(value, dict):
        return value
    return parsed(value[0]) if isinstance(value, list) and value else None


def _any_text(row: Row, sign: str) -> bool:
    return re.search(sign, str(row.get("conversations"))) is not None


def _is_sharegpt(row: Row) -> bool:
    first = _first(row)
    return isinstance(first, dict) and "from" in first


def _has(*names: str) -> Callable[[Row], bool]:
    return lambda row: all(row.get(name) is not None for name in names)


def _is_messages(row: Row, *names: str) -> bool:
    return any(isinstance(parsed(row.get(name)), (list, dict)) for name in names)


def _is_rlla(row: Row) -> bool:
    text = row.get("instruction")
    if not {"instruction", "input", "output"} <= row.keys() or "history" in row or "system" in row:
        return False
    return isinstance(text, str) and (not text.strip() or TOOL_LIST in text or "<tool_call>" in text)


def _is_alpaca(row: Row) -> bool:
    return isinstance(row.get("instruction"), str) and ("output" in row or "expected_output" in row)


_SPEAKERS = re.compile(r"(?:^|\n)\s*(USER|ASSISTANT|FUNCTION RESPONSE):[ \t]*")
_GLAIVE_SYSTEM = re.compile(r"^\s*SYSTEM:\s*")
_GLAIVE_INSTRUCTION = re.compile(r"[^.\n]*\bfunctions?\b[^.\n]*(?:use them if required|if required)[^.\n]*-?\s*(?=\{)")


def _glaive(row: Row) -> list[Row]:
    """One text, cut at its speakers."""
    text = str(row["chat"])
    found = list(_SPEAKERS.finditer(text))
    if not found or text[: found[0].start()].strip():
        raise RowError("the chat does not begin with `USER:`")
    roles = {"USER": "user", "ASSISTANT": "assistant", "FUNCTION RESPONSE": "tool"}
    ends = [*(speaker.start() for speaker in found[1:]), len(text)]
    messages = [
        {"role": roles[speaker[1]], "content": text[speaker.end() : end].replace("<|endoftext|>", "").strip()}
        for speaker, end in zip(found, ends, strict=True)
    ]
    system = _GLAIVE_INSTRUCTION.sub("", _GLAIVE_SYSTEM.sub("", str(row.get("system") or "")))
    return [{"messages": messages, "system": system, "tools": row.get("tools")}]


def _nemo_gym(row: Row) -> list[Row]:
    asked = parsed(row["responses_create_params"])
    if not isinstance(asked, dict) or "input" not in asked:
        raise RowError("responses_create_params has no input")
    expected = next(
        (row[key] for key in ("expected_action", "expected_output", "expected_answer") if row.get(key)), None
    )
    if expected is None:
        raise RowError("the row has no expected_action: there is no reference answer")
    expected = parsed(expected)
    items = expected if isinstance(expected, list) else [expected]
    reference = [
        {"role": "assistant", "content": item} if isinstance(item, str) else _answer_item(item) for item in items
    ]
    return [
        {
            "messages": asked["input"],
            "system": asked.get("instructions"),
            "tools": asked.get("tools"),
            "reference": reference,
        }
    ]


def _answer_item(item: Any) -> Any:
    """An item of the Responses API, or a bare call."""
    if isinstance(item, dict) and "role" not in item and item.get("type") != "function_call" and "name" in item:
        return {"role": "assistant", "tool_calls": [item]}
    return (
        item
        if not isinstance(item, dict) or "role" in item or item.get("type") != "message"
        else {**item, "role": "assistant"}
    )


def _gemini(row: Row) -> list[Row]:
    system = parsed(row.get("systemInstruction") or row.get("system_instruction"))
    parts = system.get("parts") if isinstance(system, dict) else None
    if isinstance(parts, list):
        system = "".join(str(part.get("text", "")) if isinstance(part, dict) else str(part) for part in parts)
    return [{"messages": row["contents"], "system": system, "tools": row.get("tools")}]


def _tau2(row: Row) -> list[Row]:
    """One object a file: every simulation is a row, under the policy of the environment."""
    info = parsed(row.get("info"))
    environment = parsed(info.get("environment_info")) if isinstance(info, dict) else {}
    environment = environment if isinstance(environment, dict) else {}
    rows = []
    for simulation in parsed(row["simulations"]) or []:
        messages = [
            {**message, "tool_calls": message.get("tool_calls") if message.get("role") != "user" else None}
            for message in simulation.get("messages", [])
            if message.get("requestor", "assistant") != "user"
            and not (message.get("role") == "user" and message.get("tool_calls"))
        ]
        rows.append({"messages": messages, "system": environment.get("policy"), "tools": environment.get("tool_defs")})
    if not rows:
        raise RowError("simulations is empty")
    return rows


def _quarantined(row: Row) -> list[Row]:
    refuse_marked(row["content"])
    return [row["content"]]


def _is_bfcl(row: Row) -> bool:
    question = row.get("question")
    return (isinstance(question, list) and "function" in row) or (
        row.keys() <= {"id", "ground_truth", "_row"} and isinstance(row.get("ground_truth"), list) and "id" in row
    )


def _is_columnar(row: Row) -> bool:
    return len(row) > 1 and all(isinstance(v, dict) and v and all(str(k).isdecimal() for k in v) for v in row.values())


MESSAGES = ("messages", "conversations", "conversation", "dialog", "dialogue", "trajectory", "turns", "chat")
_CALL_COLUMNS = (
    "answers",
    "ground_truth",
    "label",
    "answer",
    "solution",
    "expected_calls",
    "expected_tool_calls",
    "target",
)

LAYOUTS: tuple[Layout, ...] = (
    Layout(
        name="quarantine",
        who="`quarantine.jsonl` of an earlier conversion, mended",
        reference="that of the row inside",
        columns="file, row, reason, content",
        is_it=lambda row: {"file", "row", "reason", "content"} <= row.keys() and isinstance(row["content"], dict),
        reshape=_quarantined,
    ),
    Layout(
        name="pandas columns",
        who="`DataFrame.to_json` without an orient",
        columns="every column an object of rows",
        reference="",
        is_it=_is_columnar,
        refusal="this is pandas' JSON of whole columns: write it with `to_json(path, orient='records', lines=True)`",
    ),
    Layout(
        name="when2call-mcq",
        who="When2Call's multiple-choice test",
        columns="question, answers, correct_answer",
        reference="",
        is_it=_has("correct_answer", "answers", "question"),
        refusal="this is multiple-choice evaluation data: it has no reference call to learn from",
    ),
    Layout(
        name="bfcl",
        who="BFCL's questions and possible answers",
        columns="id, question, function / id, ground_truth",
        reference="",
        is_it=_is_bfcl,
        refusal="this is evaluation data of BFCL: evaluate on it (docs/evaluation.md), train on other data",
    ),
    Layout(
        name="stabletoolbench",
        who="ToolBench's queries",
        columns="api_list, query",
        reference="",
        is_it=lambda row: {"api_list", "query"} <= row.keys() and not _is_messages(row, *MESSAGES),
        refusal="these are queries without reference answers: take ToolBench's answers (`conversations`) instead",
    ),
    Layout(
        name="verl",
        who="verl, ToolRL's rlla",
        columns="prompt, reward_model.ground_truth [, tools]",
        reference="tagged text, calls (a list or its JSON text), or text with calls in any dialect",
        is_it=lambda row: "prompt" in row and isinstance(parsed(row.get("reward_model")), dict),
        where=Columns(messages=("prompt",), answer=("reward_model.ground_truth",)),
        tagged=True,
    ),
    Layout(
        name="nemo-gym",
        who="NeMo Gym",
        columns="responses_create_params.input, expected_action",
        reference="expected_action",
        is_it=_has("responses_create_params"),
        reshape=_nemo_gym,
        read=frozenset(("responses_create_params", "expected_action", "expected_output", "expected_answer")),
        where=Columns(messages=("messages",), reference="reference"),
    ),
    Layout(
        name="tau2",
        who="tau2-bench's results",
        columns="simulations (one object a file)",
        reference="`--reference`",
        is_it=lambda row: isinstance(parsed(row.get("simulations")), list),
        reshape=_tau2,
        read=frozenset(("simulations", "info", "tasks")),
        where=Columns(messages=("messages",)),
    ),
    Layout(
        name="tau-bench",
        who="tau-bench's trajectories",
        columns="traj",
        reference="`--reference`",
        is_it=lambda row: _is_messages(row, "traj"),
        where=Columns(messages=("traj",)),
    ),
    Layout(
        name="trl",
        who="TRL's prompt and completion",
        columns="prompt, completion [, tools]",
        reference="completion",
        is_it=_has("prompt", "completion"),
        where=Columns(messages=("prompt",), reference="completion"),
    ),
    Layout(
        name="trl-preference",
        who="TRL's preference pairs",
        columns="prompt, chosen, rejected [, tools]",
        reference="chosen",
        is_it=_has("prompt", "chosen"),
        where=Columns(messages=("prompt",), reference="chosen"),
    ),
    Layout(
        name="slime",
        who="slime",
        columns="prompt, label [, metadata.tools]",
        reference="label: calls or tagged text",
        is_it=_has("prompt", "label"),
        where=Columns(messages=("prompt",), answer=("label",)),
        tagged=True,
    ),
    Layout(
        name="verifiers",
        who="verifiers, prime-rl",
        columns="prompt, answer, info.oai_tools",
        reference="answer: calls or tagged text",
        is_it=lambda row: {"prompt", "answer"} <= row.keys() and ("info" in row or "task" in row),
        where=Columns(messages=("prompt",), answer=("answer",)),
        tagged=True,
    ),
    Layout(
        name="trl-grpo",
        who="TRL's GRPO rows, OpenRLHF",
        columns="prompt, ground_truth | solution | answer | answers [, tools]",
        reference="calls or tagged text",
        is_it=lambda row: "prompt" in row and any(row.get(name) is not None for name in _CALL_COLUMNS),
        where=Columns(messages=("prompt",), answer=_CALL_COLUMNS),
        tagged=True,
    ),
    Layout(
        name="when2call",
        who="When2Call's preferences",
        columns="messages, chosen_response [, tools]",
        reference="chosen_response",
        is_it=lambda row: _is_messages(row, "messages") and "chosen_response" in row,
        where=Columns(messages=("messages",), reference="chosen_response"),
    ),
    Layout(
        name="trl-messages-preference",
        who="preference pairs as whole conversations",
        columns="chosen, rejected",
        reference="last message of chosen",
        is_it=lambda row: _is_messages(row, "chosen") and "rejected" in row,
        where=Columns(messages=("chosen",)),
    ),
    Layout(
        name="toucan",
        who="Toucan-1.5M",
        columns="messages (JSON text), tools, target_tools",
        reference="`--reference`",
        is_it=lambda row: _is_messages(row, "messages") and "target_tools" in row,
        where=Columns(messages=("messages",)),
    ),
    Layout(
        name="nemotron",
        who="Nemotron's post-training sets (v1: tools in `metadata`)",
        columns="messages, metadata.tools | tools",
        reference="`--reference`",
        is_it=lambda row: _is_messages(row, "messages") and ("metadata" in row and "tools" not in row),
        where=Columns(messages=("messages",)),
    ),
    Layout(
        name="openai",
        who="OpenAI, ms-swift, TRL, NeMo-RL, Nemotron-Agentic, Hermes and Qwen texts",
        columns="messages [, tools]",
        reference="`--reference`",
        is_it=lambda row: "messages" in row,
        where=Columns(messages=("messages",)),
    ),
    Layout(
        name="gemini",
        who="Gemini's requests and tuning sets",
        columns="contents with parts [, systemInstruction, tools]",
        reference="`--reference`",
        is_it=lambda row: _is_messages(row, "contents"),
        reshape=_gemini,
        read=frozenset(("contents", "systemInstruction", "system_instruction")),
        where=Columns(messages=("messages",)),
    ),
    Layout(
        name="glaive-v2",
        who="glaive-function-calling-v2",
        columns="system, chat (one text)",
        reference="`--reference`",
        is_it=lambda row: isinstance(row.get("chat"), str) and _SPEAKERS.search(row["chat"]) is not None,
        reshape=_glaive,
        read=frozenset(("chat",)),
        where=Columns(messages=("messages",)),
    ),
    Layout(
        name="toolbench",
        who="ToolBench (ToolLLaMA)",
        columns="conversations with Thought, Action, Action Input",
        reference="`--reference`",
        is_it=lambda row: _is_sharegpt(row) and _any_text(row, r"Action Input:"),
        where=Columns(messages=("conversations",)),
    ),
    Layout(
        name="hermes-v1",
        who="hermes-function-calling-v1",
        columns="conversations with <tool_call> [, tools]",
        reference="`--reference`",
        is_it=lambda row: _is_sharegpt(row) and _any_text(row, r"<tool_call>"),
        where=Columns(messages=("conversations",)),
    ),
    Layout(
        name="toolace",
        who="ToolACE",
        columns="system, conversations with [f(a=b)]",
        reference="`--reference`",
        is_it=lambda row: _is_sharegpt(row) and "system" in row and not any(path in row for path in TOOL_PATHS),
        where=Columns(messages=("conversations",)),
    ),
    Layout(
        name="sharegpt",
        who="APIGen-MT, LLaMA-Factory, axolotl: from and value",
        columns="conversations [, system, tools]",
        reference="`--reference`",
        is_it=_is_sharegpt,
        where=Columns(messages=("conversations",)),
    ),
    Layout(
        name="toolmind",
        who="ToolMind and other sets with messages under another name",
        columns="conversations | conversation | dialogue | trajectory | turns | chat",
        reference="`--reference`",
        is_it=lambda row: _is_messages(row, *MESSAGES[1:]),
        where=Columns(messages=MESSAGES[1:]),
    ),
    Layout(
        name="rlla",
        who="ToolRL's rlla_sft",
        columns="instruction (system), input (user), output",
        reference="output: tagged text",
        is_it=_is_rlla,
        where=Columns(system=("instruction",), user=("input",), answer=("output",)),
        tagged=True,
    ),
    Layout(
        name="alpaca",
        who="LLaMA-Factory's alpaca, API-Bank's original",
        columns="instruction [, input], output [, system, history, tools]",
        reference="output: text, calls in it are read",
        is_it=_is_alpaca,
        where=Columns(
            user=("instruction",),
            input=("input",),
            answer=("output", "expected_output"),
            history=("history",),
        ),
    ),
    Layout(
        name="xlam",
        who="xLAM-60k, APIGen",
        columns="query, answers, tools",
        reference="answers: calls",
        is_it=_has("query", "answers"),
        where=Columns(user=("query",), calls=("answers",)),
    ),
    Layout(
        name="api_bank",
        who="API-Bank as ToolRL has it",
        columns="system, user, answer",
        reference="answer: one call, or a list",
        is_it=lambda row: {"system", "user", "answer"} <= row.keys(),
        where=Columns(system=("system",), user=("user",), calls=("answer",)),
    ),
    Layout(
        name="io",
        who="input and output",
        columns="input (text or messages), output [, tools]",
        reference="output: tagged text",
        is_it=lambda row: {"input", "output"} <= row.keys(),
        where=Columns(messages=("input",), answer=("output",)),
        tagged=True,
    ),
)


def layout_of(row: Row, name: str = "") -> Layout:
    """The layout of a row, by its content or by ``name``."""
    if name:
        return find_layout(name)
    for layout in LAYOUTS:
        if layout.is_it(row):
            return layout
    raise RowError(
        f"no known layout has the columns {', '.join(sorted(map(str, row))[:12])}: "
        "name them with --column or --mapping",
        _guess(row),
    )


def find_layout(name: str) -> Layout:
    """By name; DataError names the known ones."""
    found = next((layout for layout in LAYOUTS if layout.name == name), None)
    if found is None:
        raise DataError(f"--layout {name!r} is not known: known are {', '.join(layout.name for layout in LAYOUTS)}")
    return found


_QUESTIONS = ("query", "question", "prompt", "user", "input", "instruction", "q", "problem")
_ANSWERS = (
    "calls",
    "tool_calls",
    "function_calls",
    "answers",
    "gold",
    "ground_truth",
    "label",
    "target",
    "answer",
    "output",
)


def _guess(row: Row) -> str:
    """A command that may mend it."""
    lists = next((key for key, value in row.items() if isinstance(parsed(value), list) and "tool" not in key), None)
    question = next((name for name in _QUESTIONS if name in row), "QUESTION")
    answer = next((name for name in _ANSWERS if name in row), lists or "CALLS")
    return f"for example --column user={question} --column calls={answer} (docs/data.md has a page on mappings)"


def table() -> str:
    """The layouts as docs/data.md lists them (``python -m data_tools.layouts`` prints it)."""
    lines = ["| `--layout` | whose | columns | reference |", "|---|---|---|---|"]
    for layout in LAYOUTS:
        reference = f"refused: {layout.refusal}" if layout.refusal else layout.reference
        cells = (f"`{layout.name}`", layout.who, layout.columns, reference)
        lines.append("| " + " | ".join(cell.replace("|", "or") for cell in cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
