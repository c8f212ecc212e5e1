"""The row layouts of public tool-use sets and trainers as small files of own wording, and what becomes of each.

python -m tests.data_tools.public_layouts        prints the table of docs/data.md

Keys, roles and nesting are those of the sets; every word in them is ours.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from data_tools.encode import check_reference, examples_of_row
from data_tools.errors import RowError
from data_tools.examples import Example, Reading
from data_tools.readers import read_chunks, resolve_inputs
from tests.data_tools.layout_rows import (
    CALLS,
    FUNCTIONS,
    HERMES,
    LAYOUT_ROWS,
    OPENAI,
    PYTHONIC,
    QUESTION,
    READ,
    REFUSED_ROWS,
    TAGGED,
    TEXT,
    TOOLACE,
    TOOLS,
    USER,
)

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class PublicLayout:
    """A file of one row, and what is right for it."""

    name: str
    row: Row
    form: str = "jsonl"  # json: a list, object: the row is the file, parquet
    calls: tuple[Row, ...] = tuple(READ)
    tools: tuple[Row, ...] = tuple(TOOLS)
    think: str | None = None
    refusal: str = ""  # words of the reason, for what holds no reference that can be learned from


def _said(**message: Any) -> list[Row]:
    return [USER, {"role": "assistant", **message}]


_OBJECT_CALLS = [{"type": "function", "function": call} for call in CALLS]
_RESULTS = [{"role": "tool", "tool_call_id": f"c{n}", "content": str(n)} for n in range(len(CALLS))]
_SHAREGPT = [{"from": "human", "value": QUESTION}, {"from": "function_call", "value": TEXT}]
_REACT = '\nThought: Tea.\nAction: price\nAction Input: {"item": "tea"}'
_APIS = f"You help. APIs: {TOOLS}"
_PYTHONS = "\n".join(f"<tool_call>\n{call}\n</tool_call>" for call in CALLS)
_ALPACA = {
    "instruction": QUESTION,
    "input": "",
    "output": TEXT,
    "system": "",
    "history": [],
    "tools": json.dumps(TOOLS),
}
_RLLA = {"data_source": "rlla", "prompt": [USER], "ability": "tools", "tools": TOOLS}
_IMAGE = {
    "role": "user",
    "content": [{"type": "image_url", "image_url": {"url": "x"}}, {"type": "text", "text": QUESTION}],
}

LAYOUTS = (
    PublicLayout(name="OpenAI, arguments as text", row={"messages": [USER, OPENAI], "tools": FUNCTIONS}),
    PublicLayout(
        name="OpenAI, arguments as objects", row={"messages": _said(tool_calls=_OBJECT_CALLS), "tools": FUNCTIONS}
    ),
    PublicLayout(name="OpenAI, tools as JSON text", row={"messages": [USER, OPENAI], "tools": json.dumps(FUNCTIONS)}),
    PublicLayout(
        name="OpenAI, thought in `reasoning`",
        row={"messages": [USER, {**OPENAI, "reasoning": "Look."}], "tools": FUNCTIONS},
        think="Look.",
    ),
    PublicLayout(
        name="OpenAI, thought in `thinking`",
        row={"messages": [USER, {**OPENAI, "thinking": "Look."}], "tools": FUNCTIONS},
        think="Look.",
    ),
    PublicLayout(
        name="OpenAI, `<think>` in the content",
        row={"messages": [USER, {**OPENAI, "content": "<think>\nLook.\n</think>\n\n"}], "tools": FUNCTIONS},
        think="Look.",
    ),
    PublicLayout(
        name="OpenAI of 2023: developer, `function_call`, role function",
        row={
            "messages": [
                {"role": "developer", "content": "You help."},
                *_said(function_call={"name": "price", "arguments": '{"item": "ice"}'}),
                {"role": "function", "name": "price", "content": "3"},
                {"role": "assistant", "function_call": {"name": "price", "arguments": '{"item": "tea"}'}},
            ],
            "functions": TOOLS,
        },
        calls=(READ[1],),
    ),
    PublicLayout(name="Hermes or Qwen3 text in messages", row={"messages": _said(content=HERMES), "tools": FUNCTIONS}),
    PublicLayout(
        name="Tool-N1, a list in one block",
        row={"messages": _said(content=f"<think>Look.</think>\n<tool_call>\n{TEXT}\n</tool_call>"), "tools": FUNCTIONS},
        think="Look.",
    ),
    PublicLayout(name="xLAM-60k", row={"id": 1, **LAYOUT_ROWS["xlam"]}, form="json"),
    PublicLayout(
        name="ToolACE",
        row={
            "system": TOOLACE,
            "conversations": [{"from": "user", "value": QUESTION}, {"from": "assistant", "value": PYTHONIC}],
        },
        form="json",
    ),
    PublicLayout(
        name="hermes-function-calling-v1",
        row={**LAYOUT_ROWS["hermes-v1"], "id": "u", "category": "c", "tools": json.dumps(FUNCTIONS)},
        form="json",
    ),
    PublicLayout(name="glaive-function-calling-v2", row=LAYOUT_ROWS["glaive-v2"], form="json"),
    PublicLayout(
        name="APIGen-MT-5k",
        row={"conversations": _SHAREGPT, "system": "You help.", "tools": json.dumps(TOOLS)},
        form="json",
    ),
    PublicLayout(
        name="LLaMA-Factory, ShareGPT",
        row={
            "conversations": [
                {"from": "human", "value": "Tea?"},
                {"from": "function_call", "value": json.dumps(CALLS[1])},
                {"from": "observation", "value": "3"},
                {"from": "gpt", "value": "Three."},
                *_SHAREGPT,
            ],
            "tools": json.dumps(TOOLS),
        },
        form="json",
    ),
    PublicLayout(name="LLaMA-Factory, alpaca", row=_ALPACA, form="json"),
    PublicLayout(
        name="LLaMA-Factory, alpaca with an input and a history",
        row={**_ALPACA, "instruction": "Answer:", "input": QUESTION, "history": [["Hi.", "Hello."]]},
        form="json",
    ),
    PublicLayout(
        name="ToolBench, a list of messages",
        row={
            "id": "1",
            "conversations": [
                {"from": "system", "value": _APIS},
                {"from": "user", "value": QUESTION},
                {"from": "assistant", "value": _REACT},
            ],
        },
        form="json",
        calls=(READ[1],),
    ),
    PublicLayout(
        name="ToolBench, parallel arrays", row={"id": "1", **LAYOUT_ROWS["toolbench"]}, form="json", calls=(READ[1],)
    ),
    PublicLayout(
        name="Nemotron-Post-Training-v1, tool calling",
        row={"uuid": "u", "category": "tool", "reasoning": "off", **LAYOUT_ROWS["nemotron"]},
    ),
    PublicLayout(
        name="Nemotron-Agentic-v1",
        row={
            "uuid": "u",
            "messages": [USER, {**OPENAI, "reasoning_content": "Look."}],
            "tools": FUNCTIONS,
            "used_in": ["v1"],
        },
        think="Look.",
    ),
    PublicLayout(
        name="When2Call, SFT",
        row={
            "tools": [json.dumps(tool) for tool in TOOLS],
            "messages": _said(content=f"<TOOLCALL>{TEXT}</TOOLCALL>"),
        },
    ),
    PublicLayout(name="When2Call, preferences", row={**LAYOUT_ROWS["when2call"], "rejected_response": USER}),
    PublicLayout(
        name="API-Bank as published",
        row={
            "instruction": "Write an API request.",
            "input": f"User: {QUESTION}",
            "output": f"API-Request: {PYTHONIC}",
            "file": "f",
        },
        form="json",
        tools=(),
    ),
    PublicLayout(name="API-Bank as ToolRL has it", row=LAYOUT_ROWS["api_bank"], form="parquet"),
    PublicLayout(
        name="tau-bench, a trajectory",
        row={"task_id": 0, "reward": 1.0, "info": {}, **LAYOUT_ROWS["tau-bench"]},
        form="json",
    ),
    PublicLayout(name="tau2-bench, results", row=LAYOUT_ROWS["tau2"], form="object"),
    PublicLayout(
        name="verl, tagged text (rlla_4k)",
        row={**_RLLA, "reward_model": {"style": "rule", "ground_truth": TAGGED}},
        form="parquet",
        think="Look.",
    ),
    PublicLayout(
        name="verl, calls as JSON text",
        row={**_RLLA, "reward_model": {"style": "rule", "ground_truth": TEXT}},
        form="parquet",
    ),
    PublicLayout(
        name="verl, calls as a list",
        row={**_RLLA, "reward_model": {"style": "rule", "ground_truth": CALLS}},
        form="parquet",
    ),
    PublicLayout(
        name="TRL, messages and tools",
        row={"messages": [USER, {**OPENAI, "content": ""}], "tools": FUNCTIONS, "chat_template_kwargs": None},
    ),
    PublicLayout(name="TRL, prompt and completion", row=LAYOUT_ROWS["trl"]),
    PublicLayout(name="TRL, GRPO", row=LAYOUT_ROWS["trl-grpo"]),
    PublicLayout(
        name="NeMo-RL, OpenAI's messages",
        row={
            "messages": [{"role": "system", "content": "You help."}, USER, OPENAI],
            "tools": FUNCTIONS,
            "task_name": "t",
        },
    ),
    PublicLayout(name="NeMo Gym", row={**LAYOUT_ROWS["nemo-gym"], "agent_ref": {"name": "a"}}),
    PublicLayout(name="slime", row=LAYOUT_ROWS["slime"]),
    PublicLayout(name="verifiers, prime-rl", row=LAYOUT_ROWS["verifiers"]),
    PublicLayout(
        name="ms-swift, agents",
        row={
            "tools": json.dumps(FUNCTIONS),
            "messages": [USER, *({"role": "tool_call", "content": json.dumps(call)} for call in CALLS)],
        },
    ),
    PublicLayout(
        name="Toucan-1.5M", row={"uuid": "u", "subset_name": "s", "question": QUESTION, **LAYOUT_ROWS["toucan"]}
    ),
    PublicLayout(
        name="messages and tools as JSON text",
        row={"messages": json.dumps([USER, OPENAI]), "tools_json": json.dumps(FUNCTIONS)},
        form="parquet",
    ),
    PublicLayout(name="ToolMind", row=LAYOUT_ROWS["toolmind"]),
    PublicLayout(
        name="ToolBench, queries alone",
        row={**REFUSED_ROWS["stabletoolbench"], "relevant APIs": [["a", "b"]], "query_id": 7},
        form="json",
        refusal="queries without reference answers",
    ),
    PublicLayout(
        name="When2Call, multiple choice", row=REFUSED_ROWS["when2call-mcq"], refusal="multiple-choice evaluation data"
    ),
    PublicLayout(name="BFCL, questions", row=REFUSED_ROWS["bfcl"], refusal="evaluation data of BFCL"),
    PublicLayout(
        name="BFCL, possible answers",
        row={"id": "x_0", "ground_truth": [{"price": {"item": ["tea"]}}]},
        refusal="evaluation data of BFCL",
    ),
    PublicLayout(
        name="verl, an answer that is no call (a sum)",
        row={**_RLLA, "reward_model": {"style": "rule", "ground_truth": "72"}},
        form="parquet",
        refusal="is this the right column",
    ),
    PublicLayout(
        name="messages with images",
        row={"messages": [_IMAGE, OPENAI], "tools": FUNCTIONS},
        refusal="images are not supported",
    ),
)


def write(layout: PublicLayout, folder: Path) -> Path:
    """The file as its users have it."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = folder / f"rows.{'json' if layout.form == 'object' else layout.form}"
    if layout.form == "parquet":
        pq.write_table(pa.Table.from_pylist([layout.row]), path)
    else:
        text = json.dumps([layout.row] if layout.form == "json" else layout.row, ensure_ascii=False)
        path.write_text(text + "\n", encoding="utf-8")
    return path


def read(layout: PublicLayout, folder: Path) -> tuple[list[Example], str]:
    """The examples of a layout's file without any option, or why there are none."""
    examples: list[Example] = []
    try:
        for chunk in read_chunks(resolve_inputs([write(layout, folder)])):
            for _, row in chunk.rows():
                examples += examples_of_row(row, Reading())
        for example in examples:
            check_reference(example)
    except RowError as error:
        return [], str(error)
    return examples, ""


def why_wrong(layout: PublicLayout, folder: Path) -> str:
    """What is not as it should be; empty: nothing."""
    examples, refusal = read(layout, folder)
    if layout.refusal or refusal:
        return "" if layout.refusal and layout.refusal in refusal else f"refused: {refusal or 'no'}"
    if len(examples) != 1:
        return f"{len(examples)} examples"
    [example] = examples
    asked = [message["content"] for message in example.messages if message["role"] == "user"][-1]
    found = {
        "calls": example.calls == [*layout.calls],
        "tools": example.tools == [*layout.tools],
        "thought": layout.think is None or example.think == layout.think,
        "question": asked.endswith(QUESTION),
        "response": example.response is None,
        "problems": not example.problems or not layout.tools,
    }
    return ", ".join(name for name, is_right in found.items() if not is_right)


def table() -> str:
    """For docs/data.md, of what this tree does with the files."""
    lines = ["| rows of | file | read as |", "|---|---|---|"]
    for layout in LAYOUTS:
        with TemporaryDirectory() as folder:
            wrong = why_wrong(layout, Path(folder))
            examples, refusal = read(layout, Path(folder))
        became = (
            f"**wrong**: {wrong}" if wrong else f"refused: {layout.refusal}" if refusal else f"`{examples[0].layout}`"
        )
        form = {"json": "JSON list", "object": "one JSON object", "jsonl": "JSON lines", "parquet": "Parquet"}[
            layout.form
        ]
        lines.append(f"| {layout.name} | {form} | {became} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
