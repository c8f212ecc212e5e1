"""ResT in four weightings against GRPO and Dr. GRPO, from one warm start, over several seeds, on one machine's CPU.

    nemo-run launch/rest_experiment.py [--dryrun] [--yes] [seeds=3] [only=NAME,...] [section.key=value ...]

Real Megatron-Core and real vLLM, one rank, a model of two million parameters.  Every run has the same prompts in the
same order, the same number of rollouts and updates, and differs from its neighbours by algorithm or seed alone.  What
is finished is not done again, and an interrupted run goes on from its checkpoint; so the same command continues.
"""

import dataclasses
from pathlib import Path

from launch.cli import run_recipe
from launch.compat import ensure_nemo_run_importable
from launch.local import run_stages, show_stages
from launch.recipe import GIVEN, ROOT, Stage, as_yaml, claim, resolve, stop, write_atomically
from megatron_rest.config import (
    CheckpointConfig,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    RestConfig,
    RewardConfig,
    RolloutConfig,
    TrainerConfig,
    WarmStartConfig,
    WeightSyncConfig,
    load,
)
from megatron_rest.run_folder import is_finished

ensure_nemo_run_importable()
import nemo_run as run  # noqa: E402

SAMPLES = ROOT / "data_tools" / "samples"
VOCABULARY = 2048
THINK_WORDS = 8
STEPS = 16
ANSWERS = 8  # to each prompt of the evaluation

ALGORITHMS = {
    "grpo": ("weighting.source=uniform",),
    # No division by the group's standard deviation and none by the length of an answer.  The constant that Dr. GRPO
    # divides by instead is the batch's token count here: under Adam only its change from batch to batch matters.
    "dr_grpo": ("weighting.source=uniform", "advantage.estimator=dr_grpo", "loss.aggregation=token_mean"),
    "paper": ("weighting.source=constant", "weighting.alpha_format=0.21"),  # as RestWeighting.paper()
    "reference_code": ("weighting.source=reference_code",),
    "entropy_ema": ("weighting.source=entropy_ema",),
    "variance_optimal": ("weighting.source=variance_optimal",),
}
"""What distinguishes the algorithms, as overrides of the recipe."""


def recipe(folder: Path) -> RestConfig:
    """A few minutes a run on one core, and a policy that half knows its prompts: there is something to gain."""
    base = folder / "base"
    return RestConfig(
        model=ModelConfig(path=str(base / "warm-start" / "hf"), max_sequence_length=288, dtype="float32"),
        data=DataConfig(
            train=str(base / "fit-parts" / "rl"),
            prompts_per_step=12,  # all prompts of RL in every update: one that sees two of them unlearns the others
            max_prompt_tokens=192,
            require_reachable=True,
        ),
        rollout=RolloutConfig(
            rollouts_per_prompt=16,  # at the same number of rollouts better than 8 and twice the steps
            max_response_tokens=96,
            kv_cache_bytes=64 << 20,
            max_concurrent=64,
        ),
        reward=RewardConfig(schedule_steps=STEPS),  # the schedule completes within the run
        optimizer=OptimizerConfig(lr=2e-4, adam_beta2=0.95),
        weight_sync=WeightSyncConfig(bucket_bytes=4 << 20),
        checkpoint=CheckpointConfig(save_every=8, keep_last=1),
        trainer=TrainerConfig(steps=STEPS, max_tokens_per_microbatch=4096),
        warm_start=WarmStartConfig(
            epochs=40, batch_size=8, lr=2e-3, target_loss=0.05, answers=str(base / "parts" / "fit")
        ),
    )


def configurations(folder: Path, seeds: int) -> dict[str, RestConfig]:
    """Every run by its name, ``ALGORITHM/seed-N``; seed by seed, so that what is finished early can be compared."""
    return {
        f"{name}/seed-{seed}": load(
            None,
            [f"trainer.run_dir={folder / name / f'seed-{seed}'}", f"trainer.seed={seed}", *overrides],
            base=resolve(recipe(folder), world_size=1),
        )
        for seed in range(1, seeds + 1)
        for name, overrides in ALGORITHMS.items()
    }


def base_stages(base: Path) -> list[Stage]:
    """Tokenizer, prompts in parts, warm start: made once, the same for every run.

    ``fit`` has the answers that the warm start learns; RL trains on a third of them (``rl``), the others
    (``seen``) and what the warm start has not seen (``heldout``, and the rows of test.parquet) only judge.
    """
    tokenizer, model = base / "tokenizer", base / "model"
    style = ("--prompt-style", "slim", "--max-think-words", str(THINK_WORDS), "--processes", "1", "--overwrite")

    def data(name: str, *arguments: str, produces: Path) -> Stage:
        return Stage(name=name, module="data_tools", arguments=arguments, produces=produces)

    def convert(name: str, rows: str) -> Stage:
        paths = ("--input", str(SAMPLES / rows), "--output", str(base / name), "--tokenizer", str(tokenizer))
        return data(name, "convert", *paths, *style, produces=base / name)

    def split(name: str, source: Path, parts: tuple[str, ...], seed: int) -> Stage:
        arguments = ("split", str(source), "--output", str(base / name), "--parts", *parts, "--seed", str(seed))
        return data(name, *arguments, produces=base / name)

    vocabulary = ("--vocab-size", str(VOCABULARY), "--output", str(tokenizer))
    shape = ("--hidden-size", "192", "--heads", "3", "--kv-heads", "1", "--ffn-size", "512", "--max-length", "512")
    return [
        data("tokenizer", "train-tokenizer", str(SAMPLES / "rlla_sft.json"), *vocabulary, produces=tokenizer),
        convert("prompts", "rlla_sft.json"),
        convert("test", "test.parquet"),
        split("parts", base / "prompts", ("fit=0.7", "heldout=0.3"), seed=1),
        split("fit-parts", base / "parts" / "fit", ("rl=0.3", "seen=0.7"), seed=3),
        Stage(
            name="model",
            module="megatron_rest.trainer.init_model",
            arguments=("--tokenizer", str(tokenizer), "--output", str(model), *shape),
            produces=model,
        ),
        Stage(
            name="warm-start",
            module="megatron_rest.trainer.warm_start",
            arguments=("--config", str(base / "warm-start.yaml")),
            ranks=2,
            produces=base / "warm-start",
        ),
    ]


def warm_start_config(folder: Path) -> RestConfig:
    """Two data-parallel ranks from random weights; of the runs' configuration only what shapes it, so it is kept."""
    config, base = recipe(folder), folder / "base"
    return RestConfig(
        model=dataclasses.replace(config.model, path=str(base / "model")),
        data=config.data,
        rollout=config.rollout,  # the longest answer that counts as reachable
        warm_start=config.warm_start,
        trainer=TrainerConfig(run_dir=str(base / "warm-start"), max_tokens_per_microbatch=2048),
    )


def train_stage(name: str, config: RestConfig) -> Stage:
    """One run; the trainer goes on from a checkpoint it finds."""
    arguments = ("--config", str(Path(config.trainer.run_dir) / "run.yaml"))
    return Stage(name=name.replace("/", "-"), module="megatron_rest.trainer", arguments=arguments, ranks=1)


def evaluate_stage(folder: Path, run_dirs: list[Path]) -> Stage:
    """Every policy answers the same prompts; those that have are not asked again."""
    base = folder / "base"
    heldout = (f"heldout={base / 'parts' / 'heldout'}", str(base / "test"))
    sets = (
        "--set",
        f"rl={base / 'fit-parts' / 'rl'}",
        "--set",
        f"seen={base / 'fit-parts' / 'seen'}",
        "--set",
        *heldout,
    )
    return Stage(
        name="evaluate",
        module="megatron_rest.eval.prompt_sets",
        arguments=(
            *map(str, [base / "warm-start", *run_dirs]),
            *("--config", str(folder / "experiment.yaml"), "--samples", str(ANSWERS), *sets),
        ),
    )


@run.cli.entrypoint(type="experiment", name="rest_experiment")
def rest_experiment(ctx: run.cli.RunContext, seeds: int = 3, only: str = "", folder: str = "runs/experiment") -> None:
    """Six algorithms, several seeds, one table.

    Args:
        ctx: filled in by NeMo-Run.
        seeds: runs of each algorithm.
        only: names with commas between them: base, a run (paper/seed-1), evaluate, report; empty = all.
        folder: where everything goes.
    """
    root = Path(folder).absolute()
    if not isinstance(ctx.executor, run.LocalExecutor):
        stop("the experiment runs on this machine only: leave out run.executor=")
    if any(item.startswith("trainer.run_dir=") for item in GIVEN.overrides):
        stop("trainer.run_dir is not for you to set here, every run has its own: give folder=")
    runs = configurations(root, seeds)
    wanted = only.split(",") if only else ["base", *runs, "evaluate", "report"]
    unknown = sorted(set(wanted) - {"base", "evaluate", "report", *runs})
    if unknown:
        stop(f"only={unknown[0]} is unknown: known are base, evaluate, report, {', '.join(runs)}")
    due = {name: config for name, config in runs.items() if name in wanted and not is_finished(config)}
    stages = base_stages(root / "base") if "base" in wanted else []
    stages += [train_stage(name, config) for name, config in due.items()]
    if "evaluate" in wanted:
        there = [c for name, c in runs.items() if name in due or is_finished(c)]
        stages.append(evaluate_stage(root, [Path(c.trainer.run_dir) for c in there]))
    if "report" in wanted:
        stages.append(Stage(name="report", module="megatron_rest.eval.experiment", arguments=(str(root),)))
    if ctx.dryrun:
        show_stages(stages, root / "logs")
        for name, overrides in ALGORITHMS.items():
            print(f"# {name}: {' '.join(overrides)}")
        print(f"# ----- {root / 'experiment.yaml'} -----\n{as_yaml(resolve(recipe(root), world_size=1))}", end="")
        return
    for config in due.values():
        claim(config)
    write_atomically(root / "base" / "warm-start.yaml", as_yaml(warm_start_config(root)))
    write_atomically(root / "experiment.yaml", as_yaml(resolve(recipe(root), world_size=1)))
    for name in (name for name in wanted if name in runs and name not in due):
        print(f"==> {name}: done before", flush=True)
    run_stages("rest_experiment", stages, ctx.executor, root / "logs")


if __name__ == "__main__":
    run_recipe(rest_experiment, executor="local")
