"""From a recipe and the command line to tasks of a NeMo-Run experiment.

A recipe is a :class:`~megatron_rest.config.RestConfig` written in Python with a reason beside each number.  What the
command line adds (``config=FILE.yaml``, ``section.key=value``) is laid over it, the whole is validated before anything
starts, written to ``<run_dir>/run.yaml``, and handed to the stages by that path alone: no number travels in arguments.
"""

import dataclasses
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from megatron_rest import run_folder
from megatron_rest.config import ConfigError, ParallelConfig, RestConfig, load, to_dict, validate
from megatron_rest.help_topics import Topic, see
from megatron_rest.planner.hardware import HARDWARE
from megatron_rest.planner.plan import make_plan
from megatron_rest.planner.report import as_text

__all__ = [
    "GIVEN",
    "ROOT",
    "Given",
    "Stage",
    "as_yaml",
    "claim",
    "evaluate_arguments",
    "plan_text",
    "refuse_folder_in_use",
    "require_absolute_paths",
    "resolve",
    "stop",
    "warm_start_of",
    "warn_of",
    "write_atomically",
]

ROOT = Path(__file__).resolve().parent.parent
"""The checkout: what is shipped, and where the sample data lies."""


@dataclass
class Given:
    """What the command line says about the configuration tree; filled in by ``launch.cli.run_recipe``."""

    file: str = ""
    preprocess: str = ""
    """Rows to convert into ``data.train`` first; a path, so it never meets NeMo-Run's parser either."""
    overrides: list[str] = field(default_factory=list)

    def take(self, arguments: Sequence[str]) -> None:
        """Sort ``config=FILE`` and ``preprocess=ROWS`` from ``section.key=value``."""
        self.file = self.preprocess = ""
        self.overrides = []
        for argument in arguments:
            key, _, value = argument.partition("=")
            if key == "config":
                self.file = value
            elif key == "preprocess":
                self.preprocess = value
            else:
                self.overrides.append(argument)


GIVEN = Given()


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One command of an experiment: ``python -m module arguments``, on ``ranks`` ranks under torchrun if ranks > 0."""

    name: str
    module: str
    arguments: tuple[str, ...] = ()
    ranks: int = 0
    produces: Path | None = None
    """Folder this stage fills; a stage whose folder carries its stamp is not run again."""


def resolve(base: RestConfig, *, world_size: int | None = None, baseline: str = "") -> RestConfig:
    """The configuration that will run, checked; a mistake ends the program with one line and status 2.

    ``world_size`` None: one replica of the layout, whatever it is.
    """
    try:
        config = load(GIVEN.file or None, [*_baseline(baseline), *GIVEN.overrides], base=base)
        validate(config, world_size=world_size or config.parallel.replica_size)
    except ConfigError as error:
        stop(str(error))
    return config


def require_absolute_paths(config: RestConfig) -> None:
    """What a node of a cluster opens."""
    for name, path in (
        ("trainer.run_dir", config.trainer.run_dir),
        ("model.path", config.model.path),
        ("data.train", config.data.train),
    ):
        if not Path(path).is_absolute():
            stop(f"{name}={path} is relative: on a cluster name an absolute path on storage that every node sees")


def _baseline(name: str) -> list[str]:
    """The reference algorithms differ from the recipe by these values alone, so seeds and data stay the same."""
    known = {"": [], "rest": [], "grpo": ["weighting.source=uniform"]}
    if name not in known:
        stop(f"baseline={name} is unknown: known are {', '.join(filter(None, known))}")
    return known[name]


def warm_start_of(config: RestConfig, default: RestConfig, base: Path) -> RestConfig:
    """Supervised training from ``base/model`` into ``base/warm-start``, on data-parallel ranks.

    Of the run's configuration it takes only what shapes it, the rest is the recipe's own ``default``: another learning
    rate or baseline of the RL run does not train it again.
    """
    own = config.trainer
    return dataclasses.replace(
        default,
        model=dataclasses.replace(config.model, path=str(base / "model")),
        parallel=ParallelConfig(),
        warm_start=config.warm_start,
        trainer=dataclasses.replace(
            default.trainer, run_dir=str(base / "warm-start"), seed=own.seed, threads=own.threads
        ),
    )


def warn_of(plan: str) -> None:
    """Print a plan that doubts the job, which is submitted all the same: it is an estimate."""
    if "does not fit" in plan or "not possible" in plan:
        print(plan, file=sys.stderr, flush=True)


def plan_text(config: RestConfig, hardware: str, *, world_size: int) -> str:
    """The planner's page; or why there is none (a model that nobody here knows is no reason not to start)."""
    try:
        plan = make_plan(config, HARDWARE[hardware], world_size=world_size)
        return as_text(plan.with_simulated_sync())
    except ConfigError as error:
        return f"plan: not possible: {error}"


def as_yaml(config: RestConfig) -> str:
    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)


def claim(config: RestConfig) -> Path:
    """Write ``run.yaml`` into the run folder; what is in use, or belongs to another configuration, ends the program."""
    refuse_folder_in_use(config)
    try:
        return run_folder.claim(config)
    except ConfigError as error:
        stop(str(error))
        raise


def refuse_folder_in_use(config: RestConfig) -> None:
    """A run that is under way keeps its folder; two would overwrite each other's checkpoints."""
    owner = run_folder.owner_of(config.trainer.run_dir)
    if owner is not None:
        stop(
            f"trainer.run_dir={config.trainer.run_dir} belongs to {owner}: wait for it, stop it, or choose another"
            f"{see(Topic.NO_START)}"
        )


def evaluate_arguments(config: RestConfig) -> list[str]:
    """``megatron-rest eval run`` on what a run has trained, both benchmarks, into ``<run_dir>/eval``.

    Answers may be as long as in training, and the context what the model was made for; started again, it continues.
    """
    run_dir = config.trainer.run_dir
    return [
        *("eval", "run", run_dir, "--output", f"{run_dir}/eval"),
        *("--max-response-tokens", str(config.rollout.max_response_tokens)),
        *("--tensor-parallel", str(config.rollout.tensor_parallel)),
        *("--dtype", config.rollout.dtype),
    ]


def write_atomically(path: Path, text: str) -> None:
    """The whole file or none: a rank that starts early never reads half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def stop(message: str, status: int = 2) -> None:
    """End with one line on stderr.  SystemExit passes NeMo-Run's ``except Exception``, a ConfigError would not."""
    print(f"nemo-run: {message}", file=sys.stderr, flush=True)
    raise SystemExit(status)
