"""Answer text and reference -> reward: does the answer keep the format, and does it call the right tools?

    reward = tool_call_reward(text, ground_truth, step=step, config=config.reward)

The rule of ToolRL (arXiv 2504.13958) with ResT's relaxed format and schedule.  The model's output is parsed as JSON
with limits on size and depth; nothing in it is evaluated or executed.
"""

from megatron_rest.rewards.findings import Finding
from megatron_rest.rewards.parsing import (
    ReferenceAnswerError,
    ToolCall,
    ToolCallError,
    answer_text,
    parse_tool_calls,
    read_reference,
)
from megatron_rest.rewards.schedule import RewardRanges, reward_ranges
from megatron_rest.rewards.tool_call import Judgement, judge_answer, tool_call_reward, why_not_earnable

__all__ = [
    "Finding",
    "Judgement",
    "ReferenceAnswerError",
    "RewardRanges",
    "ToolCall",
    "ToolCallError",
    "answer_text",
    "judge_answer",
    "parse_tool_calls",
    "read_reference",
    "reward_ranges",
    "tool_call_reward",
    "why_not_earnable",
]
