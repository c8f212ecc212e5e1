"""Llama 3.2, Llama 4, ToolACE: the whole turn is ``[f(city="Bern"), g()]``; ``<|python_tag|>`` may come first."""

import re

from megatron_rest.regions.call_formats.python import PythonCalls
from megatron_rest.regions.dialect import Dialect, Section
from megatron_rest.regions.dialects.hermes import THINK
from megatron_rest.regions.dialects.llama3 import LLAMA3_END_MARKERS
from megatron_rest.token_region import TokenRegion

__all__ = ["PYTHONIC"]

PYTHONIC = Dialect(
    name="pythonic",
    sections=(
        THINK,
        Section(open=b"<|python_start|>", close=b"<|python_end|>", region=None),
        Section(open=b"<|python_tag|>", close=None, region=None),
    ),
    outside=TokenRegion.RESPONSE,
    end_markers=(*LLAMA3_END_MARKERS, b"<|eot|>", b"<|eom|>", b"<|im_end|>", b"<|endoftext|>"),
    calls=PythonCalls(),
    bare_calls=re.compile(rb"\[\s*[A-Za-z_][\w.]*\("),
    dotted_names=False,  # vLLM reads plain names only
    vllm_parser="pythonic",
)
