"""Qwen3-Coder, Qwen3.5: a ``<tool_call>`` block per call with ``<function=f>`` and ``<parameter=k>`` elements."""

from dataclasses import replace

from megatron_rest.regions.call_formats.xml import ElementCalls
from megatron_rest.regions.dialects.hermes import HERMES

__all__ = ["QWEN3_CODER"]

QWEN3_CODER = replace(
    HERMES, name="qwen3_coder", calls=ElementCalls(), vllm_parser="qwen3_coder", types_are_written=False
)
