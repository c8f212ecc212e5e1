"""Does reweighting lower the variance of the policy gradient?  The command; the mathematics lie in ``tabular`` (where
the theorems can be checked exactly), ``gradient_variance`` (any model's gradients) and ``run_gradients`` (a run's).

    python -m megatron_rest.analysis.variance [--out runs/variance] [--gradients gradients.npz]
    python -m megatron_rest.analysis.variance --run RUN_DIR   # -> RUN_DIR/variance.json, plots/{variance,entropy}_*.png

The second takes the rollouts that a run saved and the weights that sampled them, and reports the measured ratio
whatever it is.  What the theorems assume, and what breaks them, stands beside every result (:data:`ASSUMPTIONS`,
:func:`megatron_rest.analysis.tabular.decisive_token`).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from megatron_rest.analysis.evidence import EVIDENCE_FILE, evidence_lines
from megatron_rest.analysis.gradient_variance import RegionGram, compare_weightings, entropy_against_score
from megatron_rest.analysis.run_gradients import NoRolloutsError, measure_run
from megatron_rest.analysis.tabular import decisive_token, tabular_experiment
from megatron_rest.config import WeightingConfig, WeightSource
from megatron_rest.rollout.process import cpu_share
from megatron_rest.types import TokenRegion
from megatron_rest.weighting import RestWeighting

__all__ = ["ASSUMPTIONS", "main"]

_REGIONS = len(TokenRegion)

ASSUMPTIONS = (
    "Theorem 1 needs the advantage (or its square) to be independent of the scores. A group-relative advantage is not: "
    "it is computed from the reward of the very tokens that it weights.",
    "Theorem 1 drops the cross terms E[<grad_t, grad_u>]; they vanish on-policy only if the advantage is independent "
    "of the actions. With them, Cauchy-Schwarz costs a factor T.",
    "Theorem 2 minimises the bound, not the variance, and unequal weights estimate the gradient of another objective: "
    "a lower variance is no proof of a better step.",
    "As H goes to 0 the rule sends weights to infinity on tokens whose gradient vanishes; floors and caps are part of "
    "the method, and the effective step shrinks after normalisation.",
)


def _model_section(path: Path) -> dict[str, Any]:
    """From an .npz: region_gradients [N, 6, D], region_counts [N, 6], scale [N]; optional [T] entropy, score_norm and
    region_ids."""
    data = np.load(path, allow_pickle=False)
    counts, scale = data["region_counts"], data["scale"]
    gram = RegionGram(len(scale))
    gram.add_block(data["region_gradients"])
    optimal = RestWeighting(WeightingConfig(source=WeightSource.VARIANCE_OPTIMAL))
    optimal.update(*(part.tolist() for part in gram.beta(scale, counts)))
    weightings = {"ResT constants, progress 0": RestWeighting.paper(), "optimal by region (clipped)": optimal}
    if "entropy" in data:
        entropy = RestWeighting(WeightingConfig(source=WeightSource.ENTROPY_EMA))
        sums = np.bincount(data["region_ids"], weights=data["entropy"], minlength=_REGIONS)
        entropy.update(sums.tolist(), np.bincount(data["region_ids"], minlength=_REGIONS).tolist())
        weightings["entropy, as trained (clipped)"] = entropy
    section: dict[str, Any] = {"variance": [asdict(row) for row in compare_weightings(gram, counts, scale, weightings)]}
    if "entropy" in data and "score_norm" in data:
        section["entropy"] = entropy_against_score(data["entropy"], data["score_norm"], data["region_ids"])
    return section


def _plot(rows: list[dict[str, Any]], title: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    path.parent.mkdir(parents=True, exist_ok=True)
    figure, axes = plt.subplots(figsize=(8, 0.6 * len(rows) + 1.6), layout="constrained")
    places = np.arange(len(rows))
    errors = [2 * row["standard_error"] for row in rows]
    axes.barh(places, [row["variance"] for row in rows], xerr=errors, label="measured")
    if all(row["bound"] is not None for row in rows):
        axes.plot([row["bound"] for row in rows], places, "k|", markersize=18, label="Theorem 1's bound")
    axes.set_yticks(places, [f"{row['name']}  (x{row['ratio']:.3f})" for row in rows])
    axes.invert_yaxis()
    axes.set_xlabel("variance of the policy gradient (trace), bars: 2 standard errors")
    axes.set_title(title)
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _plot_entropy(step: dict[str, Any], path: Path) -> None:
    """Score norm over entropy, tokens in tenths: the first of the paper's claims, as measured."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for axes, key, label in zip(
        panels, ("entropy", "last_layer"), ("1 - sum p^2", "|h|^2 (1 - sum p^2), last layer"), strict=True
    ):
        measured = step[key]
        axes.plot(*zip(*measured["tenths"], strict=True), "o-", color="0.4", label="tenths of the tokens by entropy")
        for name, values in measured["regions"].items():
            axes.scatter(values["entropy"], values["score_norm"], s=60, label=f"{name} ({values['tokens']})")
        axes.set_xlabel("entropy, nats")
        axes.set_ylabel(f"squared score norm: {label}")
        correlation = measured["correlation"]
        axes.set_title("" if correlation is None else f"correlation over tokens {correlation:.2f}")
    panels[0].legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _table(rows: list[dict[str, Any]]) -> str:
    columns = ("variance", "standard_error", "exact", "bound", "ratio", "ratio_standard_error", "signal")
    titles = ("variance", "+-", "exact", "bound", "ratio", "+-", "signal")
    lines = [f"{'weights':36s} " + " ".join(f"{title:>9s}" for title in titles)]
    for row in rows:
        cells = [f"{row[name]:9.4f}" if row[name] is not None else f"{'':9s}" for name in columns]
        lines.append(f"{row['name']:36s} " + " ".join(cells))
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one of the two experiments, print tables, write JSON and figures; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/variance"), help="folder for variance.json and figures")
    parser.add_argument("--sequences", type=int, default=4000, help="of the tabular experiment (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the tabular experiment (%(default)s)")
    parser.add_argument("--gradients", type=Path, help=".npz with a model's per-sequence, per-region gradients")
    parser.add_argument("--run", type=Path, metavar="RUN_DIR", help="measure a run's own rollouts; writes into RUN_DIR")
    parser.add_argument("--max-sequences", type=int, default=64, help="of a saved step, --run only (%(default)s)")
    parser.add_argument("--answers", type=int, default=0, help="of each prompt, --run only (0: all that were saved)")
    parser.add_argument("--steps", type=int, nargs="+", default=(), metavar="N", help="--run only (all that can be)")
    args = parser.parse_args(argv)
    if args.run is None:
        _tabular(args.out, num_sequences=args.sequences, seed=args.seed, gradients=args.gradients)
        return 0
    import torch

    torch.set_num_threads(cpu_share())  # a launcher's stages start with one
    try:
        _run(args.run, max_sequences=args.max_sequences, answers=args.answers, steps=args.steps)
    except NoRolloutsError as error:
        print(f"megatron_rest.analysis.variance: {error}", file=sys.stderr)
        return 2
    return 0


def _run(run_dir: Path, *, max_sequences: int, answers: int, steps: Sequence[int]) -> None:
    measured = measure_run(run_dir, max_sequences=max_sequences, answers=answers, steps=steps)
    _write(run_dir / EVIDENCE_FILE, {"steps": measured})
    for step in measured:
        path = run_dir / "plots" / f"variance_step_{step['step']:06d}.png"
        title = f"{run_dir.name}, step {step['step']}: {step['num_sequences']} rollouts, all parameters"
        _plot(step["variance"], title, path)
        _plot_entropy(step, path.with_name(f"entropy_step_{step['step']:06d}.png"))
    print("\n".join(evidence_lines(run_dir)))
    print(f"\n{run_dir / EVIDENCE_FILE}")


def _tabular(out: Path, *, num_sequences: int, seed: int, gradients: Path | None) -> None:
    rows = [asdict(row) for row in tabular_experiment(num_sequences=num_sequences, seed=seed)]
    report: dict[str, Any] = {"tabular": {"sequences": num_sequences, "seed": seed, "variance": rows}}
    print(f"Tabular softmax policy, {num_sequences} sequences, advantage independent of the actions\n{_table(rows)}")
    _plot(rows, "Tabular policy", out / "variance_tabular.png")
    if gradients:
        report["model"] = _model_section(gradients)
        print(f"\nModel, {gradients}\n{_table(report['model']['variance'])}")
        _plot(report["model"]["variance"], "Model", out / "variance_model.png")
    token = decisive_token()
    print(
        f"\nDecisive token (advantage depends on it): variance {token['variance']:.4f}, bound {token['bound']:.4f}: "
        f"the bound fails; independent advantage: {token['variance_if_independent']:.4f}"
    )
    print("Assumptions:\n" + "\n".join(f"- {line}" for line in ASSUMPTIONS))
    _write(out / EVIDENCE_FILE, report)


def _write(path: Path, report: dict[str, Any]) -> None:
    """The report with what it assumes beside it; the whole file or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    text = json.dumps({"assumptions": list(ASSUMPTIONS), "decisive_token": decisive_token(), **report}, indent=2)
    partial.write_text(text + "\n")
    partial.replace(path)


if __name__ == "__main__":
    sys.exit(main())
