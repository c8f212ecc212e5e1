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
        pytest.skip(f"vLLM's parser of {name} reads token ids: test_harmony_by_token_ids")
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


def test_harmony_by_token_ids() -> None:
    """gpt-oss' parser works on ids of its own vocabulary, whose file no package brings."""
    import os

    if not os.environ.get("TIKTOKEN_ENCODINGS_BASE"):
        pytest.skip("TIKTOKEN_ENCODINGS_BASE names no folder with o200k_base.tiktoken")
    from vllm.entrypoints.openai.parser.harmony_utils import get_encoding
    from vllm.parser.harmony import HarmonyParser

    dialect, encoding = DIALECTS["harmony"], get_encoding()

    class Parser(HarmonyParser):
        """Without a model's tokenizer, which it asks for on broken text only."""

        reasoning_parser = tool_parser = True

        def __init__(self) -> None:
            self._parser = None
            self._next_tool_call_index = self._num_processed_messages = 0
            self._num_counted_tokens = self._num_reasoning_tokens = 0
            self._current_message_tokens: list[int] = []

    for calls, thought, response in (
        *((calls[:1], thought, None) for calls in CALLS for thought in (None, "hm, {x}")),
        ([], "t", "Fertig ✅"),
    ):
        text = dialect.write(calls, thought=thought, response=response) + (
            dialect.call_end if calls else dialect.turn_end
        )
        ids = encoding.encode(text, allowed_special="all")
        reasoning, content, found = Parser().parse(text, None, model_output_token_ids=ids)
        turn = read_turn(text, dialect=dialect)
        assert (turn.thought, turn.response) == (reasoning, content)
        assert [(c.name, c.parameters) for c in turn.calls] == calls
        assert [(c.name, json.loads(c.arguments)) for c in found or []] == calls
