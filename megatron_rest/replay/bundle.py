"""One microbatch with everything that determines its loss, and what the run made of it: one safetensors file.

    RUN_DIR/replay/step_000010_update_1.safetensors

    batch.NAME        the MicroBatch, index t speaking of labels[t]
    step.NAME         rewards and groups of the whole step, which the advantages come from
    weights.NAME      the policy at that update, under Hugging Face names
    seen.NAME         what the run computed: log_probs, entropy, ratio, policy_loss, token_losses, tis_weight
    gradient.NAME     d loss / d weights, loss = sum of token_losses / loss tokens of the microbatch

Numbers and configuration stand in the file's header as JSON (:class:`BundleFacts`).  Nothing is pickled.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_rest.config import AdvantageConfig, ConfigError, LossConfig, WeightingConfig, from_dict, to_dict

__all__ = ["BundleError", "BundleFacts", "ReplayBundle", "bundle_path", "read_bundle", "write_bundle"]

_FORMAT = "megatron_rest.replay/1"
_PARTS = ("batch", "step", "weights", "seen", "gradient")
_FILE = re.compile(r"step_(\d{6,})_update_(\d+)\.safetensors")


class BundleError(ValueError):
    """A file that is no bundle or a damaged one; the message names it and what is wrong."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BundleFacts:
    """What is no tensor."""

    step: int  # 1-based
    update: int  # optimiser update of the step, from 0
    progress: float  # of the curriculum
    temperature: float
    model_dtype: str
    rollout_dtype: str
    fp8_recipe: str
    is_on_policy: bool  # sampled by exactly these weights, from the whole distribution
    loss_sum: float
    num_tokens: float  # of the microbatch
    totals: dict[str, float]  # BatchTotals of the optimiser update
    region_means: list[float | None]  # state of a measuring weight source after this step's measurement
    loss: LossConfig
    weighting: WeightingConfig
    advantage: AdvantageConfig
    model: dict[str, Any]  # config.json of the model


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplayBundle:
    """Names without their part: ``batch["token_ids"]``."""

    facts: BundleFacts
    batch: Mapping[str, Tensor]
    step: Mapping[str, Tensor]
    weights: Mapping[str, Tensor]
    seen: Mapping[str, Tensor]
    gradient: Mapping[str, Tensor]


def bundle_path(run_dir: str | Path, step: int, update: int) -> Path:
    """Where the bundle of an update is."""
    return Path(run_dir) / "replay" / f"step_{step:06d}_update_{update}.safetensors"


def write_bundle(path: str | Path, bundle: ReplayBundle) -> Path:
    """Write the file, the whole or nothing of it."""
    from safetensors.torch import save_file

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    tensors = {
        f"{part}.{name}": tensor.detach().cpu().contiguous().clone()  # views of one buffer cannot be stored
        for part in _PARTS
        for name, tensor in getattr(bundle, part).items()
    }
    facts = asdict(bundle.facts) | {name: to_dict(getattr(bundle.facts, name)) for name in _CONFIGS}
    save_file(tensors, partial, metadata={"format": _FORMAT, "facts": json.dumps(facts)})
    partial.replace(path)
    return path


def read_bundle(path: str | Path) -> ReplayBundle:
    """Undo :func:`write_bundle`.  Raises :class:`BundleError` for anything else."""
    from safetensors import SafetensorError, safe_open

    parts: dict[str, dict[str, Tensor]] = {part: {} for part in _PARTS}
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != _FORMAT:
                raise BundleError(f"{path} is no replay bundle: its format is {metadata.get('format')!r}")
            facts = _facts(json.loads(metadata.get("facts", "null")))
            for key in file.keys():  # noqa: SIM118  not a mapping
                part, _, name = key.partition(".")
                if part not in parts:
                    raise BundleError(f"{path} holds {key}, which is no part of a bundle")
                parts[part][name] = file.get_tensor(key)
    except FileNotFoundError:
        raise BundleError(f"{path} is not there") from None
    except (SafetensorError, OSError, json.JSONDecodeError, RecursionError, TypeError, KeyError, ConfigError) as error:
        raise BundleError(f"{path} is damaged or no replay bundle: {error}") from error
    return ReplayBundle(facts=facts, **parts)


_CONFIGS: dict[str, type] = {"loss": LossConfig, "weighting": WeightingConfig, "advantage": AdvantageConfig}


def _facts(values: dict[str, Any]) -> BundleFacts:
    return BundleFacts(**(values | {name: from_dict(kind, values[name]) for name, kind in _CONFIGS.items()}))
