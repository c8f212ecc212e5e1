"""Every key of ``metrics.jsonl``: its unit and what it is.  The report and docs/metrics.md show this table.

python -m megatron_rest.analysis.metric_table      prints it as docs/metrics.md has it

``{region}`` and other names in braces stand for any one word (``{name...}`` for several with slashes).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache

__all__ = ["METRICS", "Metric", "find_metric", "table"]


@dataclass(frozen=True, slots=True)
class Metric:
    """One row of the table."""

    key: str
    unit: str
    meaning: str


METRICS: tuple[Metric, ...] = (
    Metric("reward/total", "reward", "what advantages are computed from, mean over judged rollouts"),
    Metric("reward/static", "reward", "the same without the schedule of the built-in rule: comparable between steps"),
    Metric("reward/format", "reward", "format part of the built-in rule; the schedule moves its range"),
    Metric("reward/correctness", "reward", "correctness part of the built-in rule; the schedule moves its range, so it "
           "may fall while accuracy rises"),
    Metric("reward/accuracy", "0 to 1", "S_acc of the built-in rule, or what a reward of your own calls accuracy; "
           "absent where no reward says any"),
    Metric("reward/format_valid", "share", "answers of valid format; absent where no reward looks at it"),
    Metric("reward/environment", "reward", "what the environment gave"),
    Metric("reward/tool_call", "reward", "the built-in rule as one of several terms, unweighted"),
    Metric("reward/not_judged", "share", "rollouts that infrastructure ended or whose reward failed: without loss"),
    Metric("reward/failed", "share", "rollouts whose reward did not come about; absent when there is none"),
    Metric("reward/{term}", "reward", "a term of `reward.terms` or your own function, unweighted"),
    Metric("reward/{term}/{part...}", "its own", "a number that a reward of your own gave besides (`Reward.parts`)"),
    Metric("response/length", "tokens", "of the policy's own, mean over judged rollouts"),
    Metric("response/truncated", "share", "rollouts that did not end by themselves"),
    Metric("prompt/length", "tokens", "mean over rollouts"),
    Metric("advantage/zero_groups", "share", "groups without a signal: all advantages 0"),
    Metric("rollout/count", "rollouts", "of the step"),
    Metric("rollout/staleness", "versions", "optimised versions that the sampling policy lay behind, mean over tokens"),
    Metric("rollout/staleness_max", "versions", "of the oldest token"),
    Metric("rollout/continued", "share", "rollouts that several versions have sampled (`rollout.on_update=keep`)"),
    Metric("rollout/restarts", "engines", "replaced so far"),
    Metric("rollout/extra_draws", "draws", "of `data.resample_zero_groups`"),
    Metric("rollout/dropped_groups", "groups", "sampled and not trained on, by `data.resample_zero_groups`"),
    Metric("stop/{reason}", "share", "rollouts by what ended them (docs/rollout.md)"),
    Metric("pack/rows", "rows", "tokens that the update computes, padding included"),
    Metric("pack/rows_saved", "share", "of rows that a prompt for each answer would take"),
    Metric("pack/left_out", "rollouts", "without a gradient: not computed in updates"),
    Metric("pack/prompt_copies", "copies", "of a prompt that are computed"),
    Metric("pack/imbalance", "ratio", "largest replica's work to the mean's"),
    Metric("pack/empty_microbatches", "microbatches", "that only keep ranks in step"),
    Metric("entropy/all", "nats", "of the policy before the update, mean over its tokens, unweighted"),
    Metric("entropy/{region}", "nats", "the same over tokens of a region"),
    Metric("weight_mass/{region}", "share", "of all token weights"),
    Metric("tokens/{region}", "share", "of all tokens with loss"),
    Metric("tokens/age_{age}", "share", "of all tokens with loss: sampled by a policy so many versions older than the "
           "one that trains; with `rollout.max_staleness`, the three by age"),
    Metric("mismatch/age_{age}", "nats", "mean over tokens of an age"),
    Metric("tis_clipped/age_{age}", "share", "tokens of an age whose importance ratio `loss.tis_cap` cut"),
    Metric("mismatch/abs_log_prob_mean", "nats", "distance of engine's and trainer's log-probs, before the update"),
    Metric("mismatch/abs_log_prob_max", "nats", "the largest one"),
    Metric("mismatch/first_token", "nats", "mean over the first tokens of rollouts"),
    Metric("mismatch/{region}", "nats", "mean over tokens of a region"),
    Metric("tis_clipped/all", "share", "tokens whose importance ratio `loss.tis_cap` cut"),
    Metric("tis_clipped/{region}", "share", "the same over tokens of a region"),
    Metric("kl_ref/all", "nats", "KL to the reference policy before the update (`loss.kl_estimator`)"),
    Metric("kl_ref/{region}", "nats", "the same over tokens of a region"),
    Metric("loss/policy", "loss", "what was minimised, mean over the step's updates"),
    Metric("loss/loss", "loss", "the same from its sums: over all tokens of the step's updates"),
    Metric("loss/policy_token_mean", "loss", "clipped policy loss, unweighted mean over tokens"),
    Metric("loss/ratio", "ratio", "new to old probability, mean over tokens"),
    Metric("loss/kl_old_new", "nats", "k3 estimate of KL(old, new)"),
    Metric("loss/clip_fraction", "share", "tokens that the clip cuts off the gradient"),
    Metric("loss/clip_high", "share", "those with a ratio above 1"),
    Metric("loss/clip_low", "share", "those with a ratio below 1"),
    Metric("loss/dual_clip_fraction", "share", "tokens that `loss.dual_clip` bounds"),
    Metric("loss/tis_weight", "ratio", "importance weight of `loss.tis_cap`, mean over tokens"),
    Metric("loss/kl_ref", "nats", "KL term of the loss, mean over tokens"),
    Metric("loss/entropy", "nats", "in the update's forward pass"),
    Metric("optimizer/grad_norm", "norm", "before clipping, mean over updates"),
    Metric("optimizer/lr", "1", "of the last update"),
    Metric("optimizer/skipped", "updates", "left out because loss or gradient was not finite"),
    Metric("sync/seconds", "s", "transfer of the weights, without the canary"),
    Metric("sync/bytes", "bytes", "that went to the engines"),
    Metric("sync/canary_max_abs", "nats", "largest distance of log-probs on the canary after the transfer"),
    Metric("sync/canary_middle_abs", "nats", "that of the middle token, which the tolerance bounds"),
    Metric("sync/canary_far", "share", "canary tokens more than ten tolerances apart"),
    Metric("sync/canary_order", "share", "pairs of likeliest next tokens in the same order on both sides"),
    Metric("sync/engines", "engines", "that took the weights"),
    Metric("validation/truncated", "share", "answers that did not end by themselves"),
    Metric("validation/{benchmark}/accuracy", "share", "of the cases asked"),
    Metric("validation/{benchmark}/soft_accuracy", "0 to 1", "with partial credit"),
    Metric("validation/{benchmark}/{category}/accuracy", "share", "of a category"),
    Metric("validation/{benchmark}/{category}/soft_accuracy", "0 to 1", "with partial credit"),
    Metric("tracker/failures", "times", "that `trainer.loggers` could not be told something, so far; absent when none"),
    Metric("progress", "0 to 1", "of the curriculum"),
    Metric("seconds/total", "s", "of the step with its checkpoint"),
    Metric("seconds/rollout", "s", "sampling; one step off: waiting for what was sampled meanwhile"),
    Metric("seconds/reward", "s", "rewards, regions, packing"),
    Metric("seconds/score", "s", "log-probs of the policy as the step begins"),
    Metric("seconds/weights", "s", "token weights"),
    Metric("seconds/update", "s", "forward, backward and optimiser; metrics and files of rollouts"),
    Metric("seconds/sync", "s", "weights into the engines, and the canary"),
    Metric("seconds/validation", "s", "benchmarks"),
    Metric("seconds/checkpoint", "s", "saving; of an asynchronous save what holds up the step"),
    Metric("seconds/wait", "s", "for rollouts that a checkpoint has to hold; at the end for background saves"),
)  # fmt: skip


def find_metric(key: str) -> Metric | None:
    """The row of a key; the most particular one (``seconds/...`` for phases)."""
    return next((metric for metric in METRICS if _pattern(metric.key).fullmatch(key)), None)


@cache
def _pattern(key: str) -> re.Pattern[str]:
    parts = re.split(r"(\{[a-z]+(?:\.\.\.)?\})", key)
    return re.compile(
        "".join((".+" if p.endswith("...}") else "[^/]+") if p[:1] == "{" else re.escape(p) for p in parts)
    )


def table() -> str:
    """As Markdown."""
    rows = [f"| `{metric.key}` | {metric.unit} | {metric.meaning} |" for metric in METRICS]
    return "\n".join(["| key | unit | what it is |", "|---|---|---|", *rows])


if __name__ == "__main__":
    print(table())
