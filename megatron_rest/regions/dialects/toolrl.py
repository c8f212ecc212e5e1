"""ToolRL's tags: a thought, then a block with one ``{"name": ..., "parameters": {...}}`` a line and/or a response
block.

The format of the rlla_4k data and of the paper's prompts (arXiv 2504.13958, arXiv 2509.21826).  Text outside every
block is no part of the format, so it counts as FORMAT like the newlines there.
"""

from dataclasses import replace

from megatron_rest.regions.call_formats.json_objects import JsonCalls
from megatron_rest.regions.dialect import Dialect, Section
from megatron_rest.token_region import TokenRegion

__all__ = ["TOOLRL", "TOOLRL_TAGS_ONLY"]

TOOLRL = Dialect(
    name="toolrl",
    sections=(
        Section(open=b"<think>", close=b"</think>", region=TokenRegion.THINK),
        Section(open=b"<tool_call>", close=b"</tool_call>", region=None),
        Section(open=b"<response>", close=b"</response>", region=TokenRegion.RESPONSE),
    ),
    outside=TokenRegion.FORMAT,
    # Models of the Qwen and the Llama family were trained on this format.
    end_markers=(b"<|im_end|>", b"<|endoftext|>", b"<|eot_id|>", b"<|eom_id|>", b"<|end_of_text|>"),
    calls=JsonCalls("parameters", "<tool_call>\n", "\n", "\n</tool_call>"),
    thought_form="<think> {} </think>\n",
    response_form="<response> {} </response>",
    response_first=False,
    vllm_parser="hermes",  # reads one object a block, under "arguments"
)

# Where the published code gives weight exactly 0 (JSON glue, newlines, end of turn): CONTEXT instead of FORMAT.
TOOLRL_TAGS_ONLY = replace(TOOLRL, name="toolrl_tags_only", outside=TokenRegion.CONTEXT, glue=TokenRegion.CONTEXT)
