"""DeepSeek V3 and R1 (``deepseek``) and V3.1 (``deepseek_v31``): calls in a block of special tokens."""

from dataclasses import replace

from megatron_rest.regions.call_formats.deepseek import BLOCK, DeepSeekCalls
from megatron_rest.regions.dialect import Dialect, Section
from megatron_rest.regions.dialects.hermes import THINK
from megatron_rest.token_region import TokenRegion

__all__ = ["DEEPSEEK", "DEEPSEEK_V31"]

DEEPSEEK = Dialect(
    name="deepseek",
    sections=(THINK, Section(open=BLOCK[0].encode(), close=BLOCK[1].encode(), region=None)),
    outside=TokenRegion.RESPONSE,
    end_markers=("<｜end▁of▁sentence｜>".encode(),),
    calls=DeepSeekCalls(),
    control_tokens=("<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>"),
    before_calls="",
    vllm_parser="deepseek_v3",
)
DEEPSEEK_V31 = replace(
    DEEPSEEK,
    name="deepseek_v31",
    calls=DeepSeekCalls(fenced=False),
    thought_form="<think>{}</think>",
    vllm_parser="deepseek_v31",
)
