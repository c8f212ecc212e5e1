"""Hermes, Qwen2.5, Qwen3: a ``<tool_call>`` block per call, ``{"name": ..., "arguments": {...}}``; other text is the
answer."""

from megatron_rest.regions.dialect import Dialect, Section
from megatron_rest.token_region import TokenRegion

__all__ = ["HERMES", "THINK"]

THINK = Section(open=b"<think>", close=b"</think>", region=TokenRegion.THINK)

HERMES = Dialect(
    name="hermes",
    sections=(THINK, Section(open=b"<tool_call>", close=b"</tool_call>", region=None)),
    outside=TokenRegion.RESPONSE,
    end_markers=(b"<|im_end|>", b"<|endoftext|>"),
    vllm_parser="hermes",
)
