"""Gradients of a run's model on the rollouts that the run made: the data behind the variance of its policy gradient.

    for step in measure_run("runs/demo-rest"): print(step["variance"])

Measured are the steps whose rollouts were saved and whose weights are a Hugging Face folder: the first (sampled with
``model.path``: exactly on-policy), the last (``RUN_DIR/hf`` is what the last step left, so its rollouts are one step
old; how far that moved the log-probs is reported), and any between whose checkpoint was exported
(``RUN_DIR/hf_step_000012``: ``python -m megatron_rest.commands.export``; one step old, too).  Everything is computed
on one process in float32 by transformers, an implementation that shares no code with the trainer.

Cost: for each block of parameters one forward pass a sequence and one backward pass a region.  A model whose gradients
would take more than some blocks is passed once and its gradients kept as sketches
(:class:`megatron_rest.analysis.gradient_variance.GradientSketch`): inner products are then estimates, and ``sketch``
in the result says so.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_rest.analysis.gradient_variance import (
    GradientSketch,
    RegionGram,
    WeightingVariance,
    compare_weightings,
    entropy_against_score,
    region_gradients,
)
from megatron_rest.config import LossAggregation, RestConfig, WeightingConfig, WeightSource, load
from megatron_rest.data.rollout_file import SavedRollouts, read_rollouts, rollout_files
from megatron_rest.types import TokenRegion
from megatron_rest.weighting import RestWeighting

__all__ = ["NoRolloutsError", "RunGradients", "measure_gradients", "measure_run"]

Array = np.ndarray
_REGIONS = len(TokenRegion)
_BLOCK_BYTES = 2 << 30  # of the per-sequence, per-region gradients of one block of parameters
_MAX_BLOCKS = 8  # passes over all sequences; more of them, and a sketch is made instead
_SKETCH_COLUMNS = 65_521  # prime; a squared norm is within 0.6 % (one standard deviation)
# Theorem 2 as it stands: the bounds of training would hide how uneven its weights are.
_UNBOUNDED: dict[str, Any] = {"min_weight": 1e-12, "max_weight": 1e12}


class NoRolloutsError(ValueError):
    """The folder holds nothing that can be measured; the message says what is missing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunGradients:
    """Of N sequences with T tokens that carry loss."""

    gram: RegionGram
    region_counts: Array  # int64 [N, 6]
    scale: Array  # float64 [N], what multiplies a sequence's weighted sum of gradients
    clusters: Array  # int [N], prompt of each sequence
    region_ids: Array  # int64 [T]
    entropy: Array  # float64 [T], nats
    score_norm: Array  # float64 [T], 1 - sum p^2
    beta: Array  # float64 [T], ||h||^2 (1 - sum p^2) / temperature^2
    log_ratio: Array  # float64 [T], log-prob under these weights - the rollout's, nats
    num_parameters: int
    sketch: int  # columns of the sketches that the gram was made of; 0: of whole gradients


def measure_run(
    run_dir: str | Path, *, max_sequences: int = 64, answers: int = 0, steps: Sequence[int] = ()
) -> list[dict[str, Any]]:
    """Variance, entropies and score norms of ``steps`` (none: of all that can be measured), ready for JSON.

    Raises:
        NoRolloutsError: no configuration, no rollouts, or no weights that go with them.
    """
    run_dir = Path(run_dir)
    if not (run_dir / "config.yaml").is_file():
        raise NoRolloutsError(f"{run_dir} has no config.yaml: name the folder of a finished run")
    config = load(run_dir / "config.yaml")
    folders = {int(path.name.removeprefix("hf_step_")): path for path in run_dir.glob("hf_step_*")}
    folders |= {config.trainer.steps: run_dir / "hf", 1: Path(config.model.path)}
    saved = {step: (path, folders[step]) for step, path in rollout_files(run_dir) if step in folders}
    for step in steps:
        if step not in saved:
            raise NoRolloutsError(
                f"{run_dir} cannot be measured at step {step}: it needs rollouts (trainer.save_rollouts_every) and "
                f"weights (hf_step_{step:06d}: python -m megatron_rest.commands.export)"
            )
    chosen = [saved[step] for step in steps or sorted(saved)]
    found = [(path, folder) for path, folder in chosen if (folder / "config.json").is_file()]
    if not found or (steps and len(found) < len(chosen)):
        empty = [folder for path, folder in chosen if (path, folder) not in found]
        missing = f"no model in {empty[0]}" if empty else "no rollouts of the first or the last step"
        raise NoRolloutsError(f"{run_dir} cannot be measured: {missing}")
    return [
        _measure_step(
            config, read_rollouts(path), folder, run_dir=run_dir, max_sequences=max_sequences, answers=answers
        )
        for path, folder in found
    ]


def _measure_step(
    config: RestConfig, rollouts: SavedRollouts, folder: Path, *, run_dir: Path, max_sequences: int, answers: int
) -> dict[str, Any]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True, trust_remote_code=False
    ).eval()
    measured = measure_gradients(
        model,
        rollouts,
        max_sequences=max_sequences,
        answers=answers,
        temperature=config.rollout.temperature,
        per_sequence_mean=config.loss.aggregation is LossAggregation.SEQUENCE_MEAN,
    )
    return {
        "step": rollouts.step,
        "model": str(folder.relative_to(run_dir) if folder.is_relative_to(run_dir) else folder),
        "num_sequences": len(measured.scale),
        "num_groups": len(np.unique(measured.clusters)),
        "num_tokens": len(measured.region_ids),
        "num_parameters": measured.num_parameters,
        "sketch": measured.sketch,
        "mean_abs_log_ratio": float(np.abs(measured.log_ratio).mean()),
        "variance": [asdict(row) for row in variances(measured, config.weighting)],
        "gradient": measured.gram.by_region(measured.scale, measured.region_counts),
        "entropy": entropy_against_score(measured.entropy, measured.score_norm, measured.region_ids),
        "last_layer": entropy_against_score(measured.entropy, measured.beta, measured.region_ids),
    }


def variances(measured: RunGradients, config: WeightingConfig) -> list[WeightingVariance]:
    """Uniform first, then ResT's constants at both ends of the curriculum, both entropy rules, and Theorem 2.

    Region means come from the same rollouts, as in training.  ``config`` gives constants, floors and bounds.
    """

    def follow(source: WeightSource, values: Array, **changes: Any) -> RestWeighting:
        weighting = RestWeighting(replace(config, source=source, **changes))
        sums = np.bincount(measured.region_ids, weights=values, minlength=_REGIONS)
        weighting.update(sums.tolist(), np.bincount(measured.region_ids, minlength=_REGIONS).tolist())
        return weighting

    whole = RestWeighting(replace(config, source=WeightSource.VARIANCE_OPTIMAL, **_UNBOUNDED))
    whole.update(*(part.tolist() for part in measured.gram.beta(measured.scale, measured.region_counts)))
    constants = RestWeighting(replace(config, source=WeightSource.CONSTANT))
    at_start = {
        "ResT constants, progress 0": constants,
        "1/(1 - exp(-H)), as trained": follow(WeightSource.ENTROPY_EMA, measured.entropy, entropy_rule="score_bound"),
        "1/H, as trained": follow(WeightSource.ENTROPY_EMA, measured.entropy, entropy_rule="inverse"),
        "Theorem 2, last layer, as trained": follow(WeightSource.VARIANCE_OPTIMAL, measured.beta),
        "Theorem 2, last layer, no bounds": follow(WeightSource.VARIANCE_OPTIMAL, measured.beta, **_UNBOUNDED),
        "Theorem 2, whole gradient, no bounds": whole,
    }
    data = (measured.gram, measured.region_counts, measured.scale)
    rows = compare_weightings(*data, at_start, clusters=measured.clusters)
    at_end = {"ResT constants, progress 1": constants}
    return [*rows[:2], *compare_weightings(*data, at_end, progress=1.0, clusters=measured.clusters)[1:], *rows[2:]]


def measure_gradients(
    model: Any,
    rollouts: SavedRollouts,
    *,
    max_sequences: int,
    answers: int = 0,
    temperature: float = 1.0,
    per_sequence_mean: bool = True,
    block_bytes: int = _BLOCK_BYTES,
    max_blocks: int | None = None,
    sketch_columns: int = _SKETCH_COLUMNS,
) -> RunGradients:
    """Per-sequence, per-region gradients of a causal language model on the first ``max_sequences`` rollouts.

    Args:
        model: of transformers; its parameters are what is differentiated by.
        rollouts: sampled by ``model`` or by weights near to it.
        max_sequences: whole groups of siblings, as many as fit (at least one).
        answers: of each prompt, the first ones (0: all): more prompts in the same time, which is what errors shrink by.
        temperature: of the sampler.
        per_sequence_mean: a sequence counts A_i / T_i (``sequence_mean``) instead of A_i.
        block_bytes: memory that gradients may take; less means more passes over the sequences.
        max_blocks: passes over the sequences (8); where more would be needed, sketches are made instead.
        sketch_columns: numbers of a sketch.
    """
    chosen = _whole_groups(rollouts.group_ids, max_sequences, answers)
    sequences = [_Sequence.of(rollouts, at) for at in (rollouts.slices[i] for i in chosen)]
    tokens = [_token_statistics(model, sequence, temperature) for sequence in sequences]
    counts = np.stack([np.bincount(s.region_ids[s.mask], minlength=_REGIONS) for s in sequences])
    counts[:, TokenRegion.CONTEXT] = 0
    scale = rollouts.advantages[chosen].astype(np.float64)
    if per_sequence_mean:
        scale = scale / np.maximum(counts.sum(axis=1), 1)
    used = counts * (scale != 0)[:, None]  # without an advantage a sequence adds nothing
    blocks = list(_blocks(list(model.parameters()), block_bytes // (4 * max(int(np.count_nonzero(used)), 1))))
    is_sketched = len(blocks) > (_MAX_BLOCKS if max_blocks is None else max_blocks)
    if is_sketched:
        gram = _sketched_gram(model, sequences, used, temperature, sketch_columns)
    else:
        gram = _gram(model, sequences, used, temperature, blocks)
    regions = np.concatenate([s.region_ids[s.mask] for s in sequences]).astype(np.int64)
    entropy, score_norm, beta, log_ratio = np.concatenate(tokens, axis=1)[:, regions != TokenRegion.CONTEXT]
    return RunGradients(
        gram=gram,
        region_counts=counts,
        scale=scale,
        clusters=rollouts.group_ids[chosen],
        region_ids=regions[regions != TokenRegion.CONTEXT],
        entropy=entropy,
        score_norm=score_norm,
        beta=beta,
        log_ratio=log_ratio,
        num_parameters=sum(p.numel() for p in model.parameters()),
        sketch=sketch_columns if is_sketched else 0,
    )


@dataclass(frozen=True, slots=True)
class _Sequence:
    """One rollout, label-aligned: index t speaks of token t + 1."""

    token_ids: Tensor  # int64 [L + 1]
    mask: Array  # bool [L]
    region_ids: Array  # int64 [L]
    log_probs: Array  # float32 [L]

    @property
    def regions(self) -> Array:
        """int64 ``[M]``, of the tokens that carry loss."""
        return self.region_ids[self.mask]

    @classmethod
    def of(cls, rollouts: SavedRollouts, at: slice) -> _Sequence:
        labels = slice(at.start + 1, at.stop)
        return cls(
            torch.from_numpy(rollouts.token_ids[at].astype(np.int64)),
            rollouts.loss_mask[labels],
            rollouts.region_ids[labels].astype(np.int64),
            rollouts.rollout_log_probs[labels],
        )


def _forward(model: Any, sequence: _Sequence, temperature: float) -> tuple[Tensor, Tensor]:
    """Hidden states ``[M, H]`` and log-softmax ``[M, V]`` at the M positions whose labels carry loss."""
    hidden = model.base_model(sequence.token_ids[None, :-1], use_cache=False)[0][0]
    hidden = hidden[torch.from_numpy(sequence.mask)]
    return hidden, torch.log_softmax(model.get_output_embeddings()(hidden) / temperature, dim=-1)


def _label_log_probs(log_p: Tensor, sequence: _Sequence) -> Tensor:
    labels = sequence.token_ids[1:][torch.from_numpy(sequence.mask)]
    return log_p.gather(-1, labels[:, None])[:, 0]


@torch.no_grad()
def _token_statistics(model: Any, sequence: _Sequence, temperature: float) -> Array:
    """Entropy, 1 - sum p^2, last-layer score norm and log-ratio to the rollout, float64 ``[4, M]``."""
    hidden, log_p = _forward(model, sequence, temperature)
    log_p, p = log_p.double(), log_p.double().exp()
    score_norm = 1.0 - p.square().sum(-1)
    beta = hidden.double().square().sum(-1) * score_norm / temperature**2
    log_ratio = _label_log_probs(log_p, sequence) - torch.from_numpy(sequence.log_probs[sequence.mask])
    return torch.stack([-(p * log_p).sum(-1), score_norm, beta, log_ratio]).numpy()


def _gram(
    model: Any, sequences: Sequence[_Sequence], counts: Array, temperature: float, blocks: Sequence[list[Tensor]]
) -> RegionGram:
    """Of the (sequence, region) pairs with tokens."""
    gram = RegionGram(len(sequences))
    rows = np.flatnonzero(counts)
    for block in blocks:
        gradients = np.zeros((len(rows), sum(p.numel() for p in block)), np.float32)
        for i in np.unique(rows // _REGIONS):
            mine = rows // _REGIONS == i
            gradients[mine] = _gradients(model, sequences[i], block, temperature)[rows[mine] % _REGIONS]
        gram.add_rows(gradients, rows)
    return gram


def _sketched_gram(
    model: Any, sequences: Sequence[_Sequence], counts: Array, temperature: float, columns: int
) -> RegionGram:
    """The same, estimated, in one pass over the sequences."""
    gram = RegionGram(len(sequences))
    rows = np.flatnonzero(counts)
    parameters = list(model.parameters())
    sketch = GradientSketch(parameters, columns=columns)
    sketches = np.zeros((len(rows), columns), np.float32)
    for i in np.unique(rows // _REGIONS):
        _, log_p = _forward(model, sequences[i], temperature)
        log_probs, of_token = _label_log_probs(log_p, sequences[i]), torch.from_numpy(sequences[i].regions)
        mine = np.flatnonzero(rows // _REGIONS == i)
        for at in mine:
            total = log_probs[of_token == rows[at] % _REGIONS].sum()
            parts = torch.autograd.grad(total, parameters, retain_graph=bool(at != mine[-1]), materialize_grads=True)
            sketches[at] = sketch(parts)
    gram.add_rows(sketches, rows)
    return gram


def _gradients(model: Any, sequence: _Sequence, block: Sequence[Tensor], temperature: float) -> Array:
    """float32 ``[6, d]`` of one block of parameters."""
    _, log_p = _forward(model, sequence, temperature)
    log_probs = _label_log_probs(log_p, sequence)
    regions = torch.from_numpy(sequence.regions)
    owner = torch.zeros(len(log_probs), dtype=torch.int64)
    return region_gradients(log_probs, regions, owner, block, num_sequences=1)[0][0]


def _blocks(parameters: Sequence[Tensor], max_numbers: int) -> Iterator[list[Tensor]]:
    """Consecutive parameters with at most ``max_numbers`` numbers together; a larger one stands alone."""
    block: list[Tensor] = []
    for parameter in parameters:
        if block and sum(p.numel() for p in block) + parameter.numel() > max_numbers:
            yield block
            block = []
        block.append(parameter)
    if block:
        yield block


def _whole_groups(group_ids: Array, max_sequences: int, answers: int) -> Array:
    """Indices of ``answers`` siblings (0: all) of the first groups that fit; a group that is too large alone is cut."""
    members = [np.flatnonzero(group_ids == group) for group in np.unique(group_ids)]
    members = [group[:answers] if answers else group for group in members]
    fitting = int(np.searchsorted(np.cumsum([len(group) for group in members]), max_sequences, side="right"))
    return np.sort(np.concatenate(members[: max(fitting, 1)]))[:max_sequences]
