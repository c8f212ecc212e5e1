"""Calls that we write are read by the parser that vLLM ships for the dialect, as the same calls."""

from __future__ import annotations

import json
from typing import Any

import pytest

from megatron_rest.regions import DIALECTS, read_turn

CALLS: tuple[list[tuple[str, dict[str, Any]]], ...] = (
    [("cd", {"folder": "document"})],
    [("get_weather", {"city": "Zürich", "days": 3, "units": None, "deep": {"a": [1, 2.5, True]}})],
    [("now", {}), ("say", {"text": 'He said: "x\\y"\n{"name": "no"}', "zip": "12345"})],
)
TYPES = {"folder": "string", "city": "string", "days": "integer", "units": "null", "deep": "object"}
TYPES |= {"text": "string", "zip": "string"}
SCHEMAS = {name: {k: {"type": TYPES[k]} for k in arguments} for calls in CALLS for name, arguments in calls}
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": properties}}}
    for name, properties in SCHEMAS.items()
]


def tokenizer_with(tokens: list[str]) -> Any:
    """Bytes and the dialect's tags, which vLLM's parsers look up by name."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(tokens)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.mark.parametrize("name", DIALECTS)
def test_what_we_write_vllm_reads(name: str) -> None:
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.tool_parsers import ToolParserManager

    dialect = DIALECTS[name]
    if not dialect.vllm_parser_reads_text:
        pytest.skip(f"vLLM's parser of {name} reads token ids of a vocabulary that no package brings")
    request: Any = ChatCompletionRequest(model="m", messages=[{"role": "user", "content": "q"}], tools=TOOLS, seed=None)
    tokens = [*dialect.tags(), *dialect.control_tokens, "<|python_tag|>"]
    tokenizer = tokenizer_with([t for t in tokens if name != "mistral" or t != "[ARGS]"])
    for calls in CALLS:
        if name == "toolrl":
            calls = calls[:1]  # vLLM reads one object a block, and only "arguments"
        text = dialect.write(calls)
        ours = [(c.name, c.parameters) for c in read_turn(text, dialect=dialect, schemas=SCHEMAS).calls]
        if name == "toolrl":
            text = text.replace('"parameters"', '"arguments"')
        parser = ToolParserManager.get_tool_parser(dialect.vllm_parser)(tokenizer, request.tools)
        found = parser.extract_tool_calls(text, request).tool_calls
        assert ours == [(c.function.name, json.loads(c.function.arguments)) for c in found] == calls
