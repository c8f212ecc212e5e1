"""Memory and time of a configuration before it runs.

    megatron-rest plan launch/rest_70b.py [section.key=value ...]     a recipe (needs the launch extra)
    megatron-rest plan run.yaml --gpus 128 --gpu h200                 a configuration

Nothing is measured and no GPU is needed; docs/planner.md has the formulae and what they were checked against.
"""

from __future__ import annotations

import argparse
import json
import runpy
import sys

from megatron_rest.config import ConfigError, RestConfig, load
from megatron_rest.planner.hardware import HARDWARE
from megatron_rest.planner.plan import make_plan
from megatron_rest.planner.report import as_dict, as_text
from megatron_rest.scripts import recipe_file

__all__ = ["main", "recipe_or_file"]


def main(argv: list[str] | None = None) -> int:
    """0: it fits; 1: it does not; 2: it cannot run at all."""
    parser = argparse.ArgumentParser(
        prog="megatron-rest plan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", help="a recipe (launch/NAME.py, or NAME of an installed one) or a run.yaml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="change single values")
    parser.add_argument("--gpus", type=int, default=0, help="ranks (default: the recipe's, or one replica)")
    parser.add_argument("--gpu", choices=sorted(HARDWARE), help="default: h100, or what the recipe names")
    parser.add_argument(
        "--mean-prompt", type=float, default=0, help="tokens (default: as in data.train, else half of the limit)"
    )
    parser.add_argument(
        "--mean-response", type=float, default=0, help="tokens (default: as its references, else half of the limit)"
    )
    parser.add_argument(
        "--zero-groups", type=float, default=0, metavar="SHARE",
        help="share of groups whose rewards are all alike, in [0, 1): a run's advantage/zero_groups (default: 0)",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="bytes and seconds for programs")
    args = parser.parse_intermixed_args(argv)
    if not 0 <= args.zero_groups < 1:
        parser.error(f"--zero-groups {args.zero_groups:g}: a share from 0 to below 1")
    try:
        base, file, gpus, gpu = recipe_or_file(args.config)
        config = load(file, args.overrides, base=base)
        p = config.parallel
        plan = make_plan(
            config,
            HARDWARE[args.gpu or gpu],
            world_size=args.gpus or gpus or p.tensor_parallel * p.pipeline_parallel * p.context_parallel,
            mean_prompt=args.mean_prompt,
            mean_response=args.mean_response,
            zero_groups=args.zero_groups,
        ).with_simulated_sync()
    except ConfigError as error:
        print(f"megatron-rest plan: {error}", file=sys.stderr)
        return 2
    print(json.dumps(as_dict(plan), indent=1) if args.json else as_text(plan))
    return 0 if plan.fits else 1


def recipe_or_file(path: str) -> tuple[RestConfig | None, str | None, int, str]:
    """Base configuration, file over it, ranks and accelerator."""
    recipe = recipe_file(path)
    if not path.endswith(".py") and (recipe is None or recipe.suffix != ".py"):
        return None, path, 0, "h100"
    if recipe is None:
        raise ConfigError(f"no recipe {path}")
    names = runpy.run_path(str(recipe), run_name="recipe")  # a recipe is a program of the user's own
    if not isinstance(names.get("RECIPE"), RestConfig):
        raise ConfigError(f"{path} defines no RECIPE of type RestConfig")
    return names["RECIPE"], None, int(names.get("GPUS", 0)), str(names.get("GPU", "h100"))


if __name__ == "__main__":
    sys.exit(main())
