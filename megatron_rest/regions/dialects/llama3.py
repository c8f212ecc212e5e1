"""Llama 3 JSON calls: the whole turn is ``{"name": ..., "parameters": {...}}``, several joined by ``;``, no tags.

``<|python_tag|>`` may come first.  A turn that does not start with JSON is text for the user.  Think tags are accepted
for models that were taught to reason in them.
"""

import re

from megatron_rest.regions.call_formats.json_objects import JsonCalls
from megatron_rest.regions.dialect import Dialect, Section
from megatron_rest.regions.dialects.hermes import THINK
from megatron_rest.token_region import TokenRegion

__all__ = ["LLAMA3_END_MARKERS", "LLAMA3_JSON"]

LLAMA3_END_MARKERS = (b"<|eot_id|>", b"<|eom_id|>", b"<|end_of_text|>")

LLAMA3_JSON = Dialect(
    name="llama3_json",
    sections=(THINK, Section(open=b"<|python_tag|>", close=None, region=None)),
    outside=TokenRegion.RESPONSE,
    end_markers=LLAMA3_END_MARKERS,
    calls=JsonCalls("parameters", "", "; ", "", re.compile(rb"[\s\[\],;]*")),
    bare_calls=re.compile(rb"[{\[]"),
    vllm_parser="llama3_json",
)
