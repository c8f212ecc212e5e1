"""Sampled tokens -> regions: what each token of a tool-use answer is for; and the calls that an answer makes.

    >>> label_regions([b"<think>", b"hm", b"</think>", b"\\n"]).tolist()
    [1, 2, 1, 1]
    >>> read_turn('<tool_call>{"name": "f", "parameters": {}}</tool_call>').calls[0].name
    'f'

Labels are computed on the bytes of the *sampled* tokens.  Nothing is decoded and tokenised again, so a non-canonical
split, half a UTF-8 character or a tokenizer that cleans up spaces cannot shift a label.  Dialects (which tags, how
calls are spelled) are data: one small file each under ``dialects/``.

    dialect.py        what a dialect is, and its grammar: a turn's bytes -> segments
    call_formats/     segments of calls -> where names and arguments stand, and what the calls are
    label.py          segments -> regions of tokens
    read.py           segments -> thought, calls and answer, for rewards, environments and evaluation
"""

from megatron_rest.regions.calls import Schemas, ToolCall, ToolCallError, schemas_of
from megatron_rest.regions.dialect import Dialect, Section
from megatron_rest.regions.dialects import DIALECTS, dialects_named_in, find_dialect
from megatron_rest.regions.dialects.deepseek import DEEPSEEK, DEEPSEEK_V31
from megatron_rest.regions.dialects.glm45 import GLM45
from megatron_rest.regions.dialects.harmony import HARMONY
from megatron_rest.regions.dialects.hermes import HERMES
from megatron_rest.regions.dialects.llama3 import LLAMA3_JSON
from megatron_rest.regions.dialects.mistral import MISTRAL, MISTRAL_V11
from megatron_rest.regions.dialects.pythonic import PYTHONIC
from megatron_rest.regions.dialects.qwen3_coder import QWEN3_CODER
from megatron_rest.regions.dialects.toolrl import TOOLRL, TOOLRL_TAGS_ONLY
from megatron_rest.regions.label import label_regions, label_rollout, region_spans, turn_starts
from megatron_rest.regions.read import REFERENCE_LIMITS, Turn, answer_prefix, in_tags, is_thought_open, read_turn
from megatron_rest.regions.tokens import token_bytes_table
from megatron_rest.token_region import TokenRegion

__all__ = [
    "DEEPSEEK",
    "DEEPSEEK_V31",
    "DIALECTS",
    "GLM45",
    "HARMONY",
    "HERMES",
    "LLAMA3_JSON",
    "MISTRAL",
    "MISTRAL_V11",
    "PYTHONIC",
    "QWEN3_CODER",
    "REFERENCE_LIMITS",
    "TOOLRL",
    "TOOLRL_TAGS_ONLY",
    "Dialect",
    "Schemas",
    "Section",
    "TokenRegion",
    "ToolCall",
    "ToolCallError",
    "Turn",
    "answer_prefix",
    "dialects_named_in",
    "find_dialect",
    "in_tags",
    "is_thought_open",
    "label_regions",
    "label_rollout",
    "read_turn",
    "region_spans",
    "schemas_of",
    "token_bytes_table",
    "turn_starts",
]
