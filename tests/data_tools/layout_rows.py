"""One conversation in every layout of the table, and one call in every spelling: rows of own wording."""

from __future__ import annotations

import json
from typing import Any

WEATHER: dict[str, Any] = {
    "name": "weather",
    "description": "Forecast of a town.",
    "parameters": {
        "type": "object",
        "properties": {"town": {"type": "string"}, "days": {"type": "integer"}},
        "required": ["town"],
    },
}
PRICE: dict[str, Any] = {
    "name": "price",
    "description": "Price of a thing.",
    "parameters": {"type": "object", "properties": {"item": {"type": "string"}}, "required": ["item"]},
}
TOOLS = [WEATHER, PRICE]
FUNCTIONS = [{"type": "function", "function": tool} for tool in TOOLS]
CALLS = [
    {"name": "weather", "arguments": {"town": "Bern", "days": 2}},
    {"name": "price", "arguments": {"item": "tea"}},
]
READ = [{"name": call["name"], "parameters": call["arguments"]} for call in CALLS]
QUESTION = "Rain in Bern, and what is tea?"
USER = {"role": "user", "content": QUESTION}
OPENAI = {
    "role": "assistant",
    "content": None,
    "tool_calls": [
        {"id": f"c{n}", "type": "function", "function": {**call, "arguments": json.dumps(call["arguments"])}}
        for n, call in enumerate(CALLS)
    ],
}
TEXT = json.dumps(CALLS)
HERMES = "\n".join(f"<tool_call>\n{json.dumps(call)}\n</tool_call>" for call in CALLS)
LINES = "\n".join(json.dumps(call) for call in READ)
TAGGED = f"<think> Look. </think>\n<tool_call>\n{LINES}\n</tool_call>"
PYTHONIC = "[weather(town='Bern', days=2), price(item='tea')]"
LISTED = f"You help.\n\n<tools>\n{json.dumps(FUNCTIONS)}\n</tools>\nGive each in <tool_call></tool_call>."
TOOLACE = f"You help. These can be called:\n{json.dumps([{**t, 'required': None} for t in TOOLS])}\nUse [func1(a=b)]"

LAYOUT_ROWS: dict[str, dict[str, Any]] = {
    "verl": {"prompt": [USER], "reward_model": {"ground_truth": TAGGED}, "tools": TOOLS},
    "nemo-gym": {
        "responses_create_params": {"input": [USER], "tools": [{"type": "function", **tool} for tool in TOOLS]},
        "expected_action": [{"type": "function_call", **c, "arguments": json.dumps(c["arguments"])} for c in CALLS],
    },
    "tau2": {"simulations": [{"messages": [USER, OPENAI]}], "info": {"environment_info": {"tool_defs": FUNCTIONS}}},
    "tau-bench": {"traj": [USER, OPENAI, {"role": "user", "content": "###STOP###"}], "tools": TOOLS},
    "trl": {"prompt": [USER], "completion": [OPENAI], "tools": FUNCTIONS},
    "trl-preference": {"prompt": [USER], "chosen": [OPENAI], "rejected": [USER], "tools": FUNCTIONS},
    "trl-messages-preference": {"chosen": [USER, OPENAI], "rejected": [USER], "tools": FUNCTIONS},
    "slime": {"prompt": [USER], "label": TEXT, "metadata": {"tools": FUNCTIONS}},
    "verifiers": {"prompt": [USER], "answer": TEXT, "info": json.dumps({"oai_tools": FUNCTIONS}), "task": "t"},
    "trl-grpo": {"prompt": [USER], "ground_truth": CALLS, "tools": FUNCTIONS},
    "when2call": {
        "messages": [USER],
        "chosen_response": {"role": "assistant", "content": f"<TOOLCALL>{TEXT}</TOOLCALL>"},
        "tools": [json.dumps(tool) for tool in TOOLS],
    },
    "toucan": {
        "messages": json.dumps([USER, *({"role": "tool_call", "content": json.dumps(call)} for call in CALLS)]),
        "tools": json.dumps(FUNCTIONS),
        "target_tools": "weather",
    },
    "nemotron": {"messages": [USER, OPENAI], "metadata": json.dumps({"tools": FUNCTIONS})},
    "openai": {"messages": [USER, OPENAI], "tools": FUNCTIONS},
    "gemini": {
        "systemInstruction": {"parts": [{"text": "You help."}]},
        "contents": [
            {"role": "user", "parts": [{"text": QUESTION}]},
            {"role": "model", "parts": [{"functionCall": {"name": c["name"], "args": c["arguments"]}} for c in CALLS]},
        ],
        "tools": [{"functionDeclarations": TOOLS}],
    },
    "glaive-v2": {
        "system": "SYSTEM: You help. Use these functions if required -\n" + "\n".join(json.dumps(t) for t in TOOLS),
        "chat": f"USER: {QUESTION}\n\n\nASSISTANT: "
        + " ".join(f"<functioncall> {json.dumps(call)}" for call in CALLS)
        + " <|endoftext|>",
    },
    "toolbench": {
        "conversations": {
            "from": ["system", "user", "assistant"],
            "value": [
                f"You help. APIs: {TOOLS}",
                QUESTION,
                '\nThought: Tea.\nAction: price\nAction Input: {"item": "tea"}',
            ],
        }
    },
    "hermes-v1": {
        "conversations": [
            {"from": "system", "value": LISTED},
            {"from": "human", "value": QUESTION},
            {"from": "gpt", "value": "\n".join(f"<tool_call>\n{call}\n</tool_call>" for call in CALLS)},
        ]
    },
    "toolace": {
        "system": TOOLACE,
        "conversations": [{"from": "user", "value": QUESTION}, {"from": "assistant", "value": PYTHONIC}],
    },
    "sharegpt": {
        "conversations": [{"from": "human", "value": QUESTION}, {"from": "function_call", "value": TEXT}],
        "tools": json.dumps(TOOLS),
    },
    "toolmind": {"conversations": [USER, OPENAI], "tools": FUNCTIONS},
    "rlla": {"instruction": "", "input": QUESTION, "output": TAGGED, "tools": TOOLS},
    "alpaca": {"instruction": QUESTION, "input": "", "output": TAGGED, "system": "", "history": [], "tools": TOOLS},
    "xlam": {"query": QUESTION, "answers": TEXT, "tools": json.dumps(TOOLS)},
    "api_bank": {"system": "", "user": QUESTION, "answer": READ, "tools": TOOLS},
    "io": {"input": QUESTION, "output": TAGGED, "tools": TOOLS},
}
REFUSED_ROWS: dict[str, dict[str, Any]] = {
    "pandas columns": {"query": {"0": "a"}, "answers": {"0": "b"}},
    "when2call-mcq": {"question": "q", "answers": {"direct": "x"}, "correct_answer": "direct", "tools": []},
    "bfcl": {"id": "x_0", "question": [[USER]], "function": TOOLS},
    "stabletoolbench": {"api_list": [], "query": "q"},
}
SPELLINGS: dict[str, str] = {
    "hermes": HERMES,
    "a list in one block": f"<tool_call>\n{TEXT}\n</tool_call>",
    "python in blocks": "\n".join(f"<tool_call>{call}</tool_call>" for call in CALLS),
    "pretty": "\n".join(f"<tool_call>\n{json.dumps(call, indent=2)}\n</tool_call>" for call in CALLS),
    "toolcall": f"<TOOLCALL>{TEXT}</TOOLCALL>",
    "llama3": "; ".join(json.dumps({"name": c["name"], "parameters": c["arguments"]}) for c in CALLS),
    "python tag": f"<|python_tag|>{TEXT}<|eom_id|>",
    "pythonic": PYTHONIC,
    "fenced": f"```json\n{TEXT}\n```",
    "granite": f"<|tool_call|>{TEXT}",
    "mistral": f"[TOOL_CALLS]{TEXT}</s>",
    "qwen3_coder": "\n".join(
        f"<tool_call>\n<function={c['name']}>\n"
        + "\n".join(f"<parameter={key}>\n{value}\n</parameter>" for key, value in c["arguments"].items())
        + "\n</function>\n</tool_call>"
        for c in CALLS
    ),
    "api_bank": f"API-Request: {PYTHONIC}",
}
UNREADABLE: dict[str, str] = {
    "no end": '<tool_call>\n{"name": "price", "arguments": {"item": "tea"}}',
    "no JSON": "<tool_call>\nprice of tea\n</tool_call>",
    "more text": f"The form is {HERMES} as you see.",
    "invoke, open": '<function_calls>\n<invoke name="price">\n<parameter name="item">tea</invoke></function_calls>',
    "llama3.1, open": '<function=price>{"item": "tea"}',
    "kimi": "<|tool_calls_section_begin|><|tool_call_begin|>functions.price:0<|tool_calls_section_end|>",
    "functionary": '>>>price\n{"item": "tea"}',
    "escaped": "&lt;tool_call&gt;{&quot;name&quot;: &quot;price&quot;}&lt;/tool_call&gt;",
    "a list cut": '<|tool_call|>[{"name": "price", "arguments": {"item": "tea"}},',
    "a tag cut": "I look. <tool_ca",
    "mistral, cut": '[TOOL_CALLS] [{"name": "price", "arguments": {"item": "tea"}}',
    "kimi, no name": "<|tool_calls_section_begin|><|tool_call_begin|>functions.:0<|tool_call_argument_begin|>{}"
    "<|tool_call_end|><|tool_calls_section_end|>",
    "in prose, Python": "I call it:\n```python\n[rate(of='tea')]\n```",
    "a thought cut": "<think>\nI look.",
    "in prose": f"I call it:\n```json\n{json.dumps(CALLS[1])}\n```",
    "broken Python": "[price(item='tea'",
    "an unknown tool": "[prize(item='tea')]",
    "broken JSON": '{"name": "price", "arguments": {"item": "tea"}',
    "harmony, cut": "<|start|>assistant",
    "glaive, the second cut": '<functioncall> {"name": "price", "arguments": {"item": "tea"}}\n<functioncall>',
    "mistral, the second cut": '[TOOL_CALLS]price[ARGS]{"item": "tea"}[TOOL_CALLS] ',
    "a tag cut in front": 'nction>\n<function=price>{"item": "tea"}</function>',
    "keys in capitals": 'I look.\n{"Name": "prices", "argument": {"item": "tea"}}',
    "a label cut": "I look.\nAPI-Requ",
    "a damaged key": 'I look.\n{"name": "prices", ",arameters": {"item": "tea"}}',
    "a damaged key in a fence": '```json\n[{"name": "prices", \'rguments": {"item": "tea"}}]\n```',
    "keys of nobody's": 'I look.\n{"func": "prices", "argument": {"item": "tea"}}',
}
