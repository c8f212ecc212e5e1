"""Mistral: calls behind ``[TOOL_CALLS]`` to the end of the turn, as a JSON list or (from v11) ``name[ARGS]{...}``."""

from dataclasses import replace

from megatron_rest.regions.call_formats.mistral import MistralCalls
from megatron_rest.regions.dialect import Dialect, Section
from megatron_rest.regions.dialects.hermes import THINK
from megatron_rest.token_region import TokenRegion

__all__ = ["MISTRAL", "MISTRAL_V11"]

MISTRAL = Dialect(
    name="mistral",
    sections=(
        Section(open=b"[THINK]", close=b"[/THINK]", region=TokenRegion.THINK),
        THINK,
        Section(open=b"[TOOL_CALLS]", close=None, region=None),
    ),
    outside=TokenRegion.RESPONSE,
    end_markers=(b"</s>",),
    calls=MistralCalls(),
    control_tokens=("[ARGS]", "[CALL_ID]"),
    thought_form="[THINK]{}[/THINK]",
    before_calls="",
    vllm_parser="mistral",
)
MISTRAL_V11 = replace(MISTRAL, name="mistral_v11", calls=MistralCalls(named=True))
