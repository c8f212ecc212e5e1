"""The curriculum of region constants: structure first, reasoning later (section 4.3 of the paper; a.7 of its notation).

name(nu) = gamma_name                                        constant
format(nu) = max(min_weight, gamma_format - alpha_format nu)   decays
args(nu) = min(max_args, gamma_args + alpha_args nu)           grows, as think and response do under max_think
"""

from __future__ import annotations

import numpy as np

from megatron_rest.config import WeightingConfig
from megatron_rest.types import TokenRegion

__all__ = ["NUM_REGIONS", "check_progress", "clip_positive", "region_gammas"]

NUM_REGIONS = len(TokenRegion)


def region_gammas(config: WeightingConfig, progress: float) -> np.ndarray:
    """Raw weight of every region at ``progress``: float64 ``[6]`` indexed by :class:`TokenRegion`, CONTEXT 0.

    A region whose gamma is 0 stays 0 (the ablation that stops a region's gradient), unless it grows by its slope; all
    other values lie in ``[min_weight, max_weight]``.

    Raises:
        ValueError: progress outside [0, 1].
    """
    nu = check_progress(progress)
    raw = np.zeros(NUM_REGIONS)
    raw[TokenRegion.TOOL_NAME] = config.gamma_name
    if config.gamma_format > 0:
        raw[TokenRegion.FORMAT] = max(config.min_weight, config.gamma_format - config.alpha_format * nu)
    for region, gamma, alpha, cap in (
        (TokenRegion.TOOL_ARGS, config.gamma_args, config.alpha_args, config.max_args),
        (TokenRegion.THINK, config.gamma_think, config.alpha_think, config.max_think),
        (TokenRegion.RESPONSE, config.gamma_response, config.alpha_response, config.max_think),
    ):
        raw[region] = min(cap, gamma + alpha * nu)
        if gamma > 0:  # a slope below 0 lowers it, and does not switch it off
            raw[region] = max(config.min_weight, raw[region])
    return clip_positive(raw, config)


def clip_positive(raw: np.ndarray, config: WeightingConfig) -> np.ndarray:
    """Positive weights into ``[min_weight, max_weight]``; zeros stay zero."""
    return np.where(raw > 0, np.clip(raw, config.min_weight, config.max_weight), 0.0)


def check_progress(progress: float) -> float:
    """``progress`` itself if it lies in [0, 1]."""
    if not 0.0 <= progress <= 1.0:
        raise ValueError(f"progress is {progress}, expected a number in [0, 1]: (step - 1) / (steps - 1)")
    return float(progress)
