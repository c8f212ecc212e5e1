"""GLM-4.5 and later: a ``<tool_call>`` block per call, name first, then ``<arg_key>`` and ``<arg_value>`` elements.

The turn of the policy ends where another's begins: a model samples ``<|observation|>`` behind calls and
``<|user|>`` behind an answer.
"""

from megatron_rest.regions.call_formats.xml import GlmCalls
from megatron_rest.regions.dialect import Dialect, Section
from megatron_rest.regions.dialects.hermes import THINK
from megatron_rest.token_region import TokenRegion

__all__ = ["GLM45"]

GLM45 = Dialect(
    name="glm45",
    sections=(THINK, Section(open=b"<tool_call>", close=b"</tool_call>", region=None)),
    outside=TokenRegion.RESPONSE,
    end_markers=(b"<|user|>", b"<|observation|>", b"<|endoftext|>"),
    calls=GlmCalls(),
    control_tokens=("<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"),
    thought_form="\n<think>{}</think>\n",
    call_end="<|observation|>",
    turn_end="<|user|>",
    vllm_parser="glm45",
    types_are_written=False,
)
