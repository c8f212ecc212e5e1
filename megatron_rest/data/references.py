"""References that cannot earn their own reward never reach a run.

Conversion checks them under the default rules, which the manifest names.  A run whose rules differ looks again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_rest.config import RewardConfig
from megatron_rest.data.prompts import PromptDataset
from megatron_rest.regions import Dialect, answer_prefix
from megatron_rest.rewards import why_not_earnable

__all__ = ["without_hopeless_references"]

_RULES = ("strict_format", "accept_arguments", "opaque_thought", "granularity")  # what full marks depend on


def without_hopeless_references(
    dataset: PromptDataset, manifest: Mapping[str, Any], *, reward: RewardConfig, dialect: Dialect
) -> tuple[PromptDataset, list[str]]:
    """The prompts whose references earn full marks under ``reward``, and why the others do not.

    Nothing is looked at where conversion checked the same rules.
    """
    checked = manifest.get("references", {}).get("earn_full_marks_under", {})
    if all(checked.get(rule) == getattr(reward, rule) for rule in _RULES):
        return dataset, []
    prompt = str(manifest.get("tokenizer", {}).get("generation_prompt", ""))
    prefix = answer_prefix(prompt.encode(), dialect)
    kept: list[int] = []
    reasons: list[str] = []
    for index in range(len(dataset)):
        row = dataset.record(index)
        # Some templates open no thought behind a tool's output (DeepSeek's): such an answer opens its own.
        written = "" if dialect.thought and row["answer_text"].startswith(dialect.thought.open.decode()) else prefix
        why = why_not_earnable(written + row["answer_text"], row["ground_truth"], config=reward, dialect=dialect)
        if why:
            reasons.append(f"prompt {row['prompt_id']}: {why}")
        else:
            kept.append(index)
    return dataset.only(kept, left_out=len(reasons)), reasons
