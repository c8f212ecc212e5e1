"""Judging a model's tool calls on published benchmarks: cases in, answers scored, intervals out.

An answer is text; it is parsed as the reward parses it and never executed.
"""

from megatron_rest.eval.cases import EvalCase, Score

__all__ = ["EvalCase", "Score"]
