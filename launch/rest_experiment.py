"""ResT against GRPO and Dr. GRPO, from one warm start, over several seeds, on one machine's CPU.

    nemo-run launch/rest_experiment.py [--dryrun] [--yes] [about=toy|smollm2] [seeds=3] [only=NAME,...] [key=value ...]

Real Megatron-Core and real vLLM, one rank; *toy* is a model of two million random parameters, *smollm2* a pretrained
one of 135 million.  Every run has the same prompts in the same order, the same number of rollouts and updates, and
differs from its neighbours by algorithm or seed alone.  What is finished is not done again, and an interrupted run goes
on from its checkpoint; so the same command continues.  A run of smollm2 is judged as soon as it ends, on held-out
prompts, and what the tables need of it (no weights) goes into a folder that the repository keeps: it continues on
another machine, too.  One seed also answers API-Bank and BFCL, and the variance of its gradient is measured.
"""

import dataclasses
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from launch import rest_demo
from launch.cli import run_recipe
from launch.compat import ensure_nemo_run_importable
from launch.local import run_stages, show_stages
from launch.recipe import GIVEN, ROOT, Stage, as_yaml, claim, resolve, stop, write_atomically
from megatron_rest.config import (
    CheckpointConfig,
    ConfigError,
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
from megatron_rest.eval.training_tables import rate_rewards
from megatron_rest.run_folder import is_finished, other_settings

ensure_nemo_run_importable()
import nemo_run as run  # noqa: E402

SAMPLES = ROOT / "data_tools" / "samples"
VOCABULARY = 2048
THINK_WORDS = 8
STEPS = 16

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

PRIMARY = {name: ALGORITHMS[name] for name in ("grpo", "dr_grpo", "paper", "variance_optimal")}
SECONDARY = {
    "paper_grpo_rate": ALGORITHMS["paper"],
    "entropy_ema": ALGORITHMS["entropy_ema"],
    "paper_still": (
        "weighting.source=constant",
        *(f"weighting.alpha_{name}=0" for name in ("format", "args", "think", "response")),
    ),
    "paper_dr": (*ALGORITHMS["paper"], "advantage.estimator=dr_grpo", "loss.aggregation=token_mean"),
    "paper_backwards": (
        *("weighting.source=constant", "weighting.gamma_format=0.79", "weighting.alpha_format=-0.21"),
        *(f"weighting.gamma_{name}=0.81" for name in ("args", "think", "response")),
        *(f"weighting.alpha_{name}=-0.21" for name in ("args", "think", "response")),
    ),
    **{name: (f"weighting.source={name}",) for name in ("otb", "empg", "entropy_mask", "gtpo")},
}
"""Of docs/experiment_plan.md, in this order."""


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
            module="megatron_rest.commands.init_model",
            arguments=("--tokenizer", str(tokenizer), "--output", str(model), *shape),
            produces=model,
        ),
        Stage(
            name="warm-start",
            module="megatron_rest.commands.warm_start",
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


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What an experiment is about: a model, its data, what its algorithms start from, and how they are judged."""

    recipe: Callable[[Path], RestConfig]
    base_stages: Callable[[Path], list[Stage]]  # made once, the same for every run
    warm_start: Callable[[Path], RestConfig]
    algorithms: Mapping[str, tuple[str, ...]]
    sets: Callable[[Path], tuple[str, ...]]  # arguments of the evaluation
    answers: int  # to each prompt of the evaluation
    kept: Path | None = None  # where the small files of finished runs go; None: they stay in their run folders
    rates: tuple[float, ...] = ()  # learning rates, of which those who weigh tokens and those who do not get the best
    benchmark_cases: int = 0  # of each category of API-Bank and BFCL, asked of what is measured; 0 = none
    measured: tuple[str, ...] = ()  # runs whose gradient's variance is measured, at the start, the middle and the end


def smollm2_recipe(folder: Path) -> RestConfig:
    """The demo's 16 steps of 32 rollouts: 20 to 30 minutes of two cores, and held-out accuracy more than doubles."""
    return rest_demo.recipe(folder / "base", folder)


def toy_sets(base: Path) -> tuple[str, ...]:
    heldout = ("--set", f"heldout={base / 'parts' / 'heldout'}", str(base / "test"))
    parts = base / "fit-parts"
    return ("--set", f"rl={parts / 'rl'}", "--set", f"seen={parts / 'seen'}", *heldout)


SETUPS = {
    "toy": Setup(
        recipe=recipe,
        base_stages=base_stages,
        warm_start=warm_start_config,
        algorithms=ALGORITHMS,
        sets=toy_sets,
        answers=8,
    ),
    "smollm2": Setup(
        recipe=smollm2_recipe,
        base_stages=lambda base: rest_demo.base_stages(base, rest_demo.GGUF),
        warm_start=lambda folder: rest_demo.warm_start_config(smollm2_recipe(folder), folder / "base"),
        algorithms=PRIMARY | SECONDARY,
        sets=rest_demo.heldout_sets,
        answers=rest_demo.ANSWERS,
        kept=ROOT / "docs" / "results" / "smollm2",
        rates=(2e-5, 5e-5, 1e-4),
        benchmark_cases=12,  # of SmolLM2's 3,501 that fit: the prompts are most of the time
        measured=tuple(f"{name}/seed-1" for name in PRIMARY),
    ),
}
MEASURED_ROLLOUTS = 32  # of a step: a backward pass of the whole model for each and each of its regions
BASELINE = "grpo"
TUNED = (BASELINE, "paper")  # without and with weights
RATE_OF = {"paper_grpo_rate": BASELINE}  # whose learning rate it takes, if not that of its kind
TUNING_SEED = 101  # not used again


def configurations(folder: Path, seeds: int, setup: Setup = SETUPS["toy"]) -> dict[str, RestConfig]:
    """Every run by its name, ``ALGORITHM/seed-N``; seed by seed, so that what is finished early can be compared."""
    rates = {} if _has_own_rate() else chosen_rates(setup)
    runs = {}
    for seed in range(1, seeds + 1):
        for name, overrides in setup.algorithms.items():
            config = _configuration(folder, f"{name}/seed-{seed}", setup, seed, overrides)
            if rates:
                kind = TUNED[0] if config.weighting.source == "uniform" else TUNED[1]
                rate = rates[RATE_OF.get(name, kind)]
                config = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, lr=rate))
            runs[f"{name}/seed-{seed}"] = config
    return runs


def tuning(folder: Path, setup: Setup) -> dict[str, RestConfig]:
    """The runs that choose learning rates, ``tuning/ALGORITHM-RATE``."""
    return {
        f"tuning/{name}-{rate:g}": _configuration(
            folder, f"tuning/{name}-{rate:g}", setup, TUNING_SEED, (*setup.algorithms[name], f"optimizer.lr={rate}")
        )
        for name in TUNED
        for rate in setup.rates
    }


def chosen_rates(setup: Setup) -> dict[str, float]:
    """Of each tuned algorithm the rate with the highest training reward at the end; nothing before all are kept."""
    if not setup.rates or setup.kept is None:
        return {}
    rewards = rate_rewards(setup.kept)
    if any(set(setup.rates) - rewards.get(name, {}).keys() for name in TUNED):
        return {}
    return {name: max(setup.rates, key=lambda rate: rewards[name][rate]) for name in TUNED}


def _has_own_rate() -> bool:
    return any(item.startswith("optimizer.lr=") for item in GIVEN.overrides)


def _configuration(folder: Path, name: str, setup: Setup, seed: int, overrides: tuple[str, ...]) -> RestConfig:
    own = [f"trainer.run_dir={folder / name}", f"trainer.seed={seed}", *overrides]
    config = load(None, own, base=resolve(setup.recipe(folder), world_size=1))
    if name not in setup.measured:
        return config
    middle = _middle(config)
    kept = [f"trainer.save_rollouts_every={middle}", f"checkpoint.save_every={middle}", "checkpoint.keep_last=3"]
    return load(None, kept, base=config)


def _middle(config: RestConfig) -> int:
    return max(config.trainer.steps // 2, 1)


def train_stage(name: str, config: RestConfig) -> Stage:
    """One run; the trainer goes on from a checkpoint it finds."""
    arguments = ("--config", str(Path(config.trainer.run_dir) / "run.yaml"))
    return Stage(name=name.replace("/", "-"), module="megatron_rest.trainer", arguments=arguments, ranks=1)


def evaluate_stage(folder: Path, setup: Setup, run_dirs: list[Path], name: str = "evaluate") -> Stage:
    """Every policy answers the same prompts; those that have are not asked again."""
    settings = ("--config", str(folder / "experiment.yaml"), "--samples", str(setup.answers))
    return Stage(
        name=name,
        module="megatron_rest.eval.prompt_sets",
        arguments=(*map(str, run_dirs), *settings, *setup.sets(folder / "base")),
    )


def judging_stages(folder: Path, setup: Setup, run_dir: Path, label: str, *, is_measured: bool) -> list[Stage]:
    """One policy on held-out prompts; a measured one on the benchmarks' cases too, which are the same for all."""
    stages = [evaluate_stage(folder, setup, [run_dir], f"evaluate-{label}")]
    if setup.benchmark_cases and is_measured:
        settings = ("--config", str(folder / "experiment.yaml"), "--cases", str(setup.benchmark_cases))
        arguments = (str(run_dir), *settings)
        stages.append(Stage(name=f"benchmarks-{label}", module="megatron_rest.eval.benchmarks", arguments=arguments))
    return stages


def variance_stages(name: str, config: RestConfig) -> list[Stage]:
    """The middle's weights as a folder, then the variance; of its start, which all algorithms share, the baseline's."""
    run_dir, middle = Path(config.trainer.run_dir), _middle(config)
    steps = sorted({*([1] if name.startswith(f"{BASELINE}/") else []), middle, config.trainer.steps})
    checkpoint = f"checkpoint.load={run_dir / 'checkpoints' / f'step_{middle:06d}'}"
    measured = ("--run", str(run_dir), "--max-sequences", str(MEASURED_ROLLOUTS), "--steps", *map(str, steps))
    label = name.replace("/", "-")
    return [
        Stage(
            name=f"middle-{label}",
            module="megatron_rest.commands.export",
            arguments=("--config", str(run_dir / "run.yaml"), checkpoint),
            produces=run_dir / f"hf_step_{middle:06d}",
        ),
        Stage(name=f"variance-{label}", module="megatron_rest.analysis.variance", arguments=measured),
    ]


def keep_stage(setup: Setup, name: str, run_dir: Path) -> Stage:
    """What the tables need of a judged run, for the repository; its checkpoints go: 44 runs would fill 100 GB."""
    kept = setup.kept or run_dir
    options = [*(["--unjudged"] if _is_tuning(name) else []), "--remove-checkpoints"]
    return Stage(
        name=f"keep-{name.replace('/', '-')}",
        module="megatron_rest.eval.keep",
        arguments=(str(run_dir), str(kept / name), *options),
        produces=kept / name,
    )


def _is_tuning(name: str) -> bool:
    return name.startswith("tuning/")


def run_stages_of(folder: Path, setup: Setup, due: Mapping[str, RestConfig]) -> list[Stage]:
    """Training, and with a place to keep results also judging: run by run, so that nothing is lost between two."""
    stages = []
    for name, config in due.items():
        stages.append(train_stage(name, config))
        if setup.kept is not None:
            run_dir, label = Path(config.trainer.run_dir), name.replace("/", "-")
            if not _is_tuning(name):
                stages += judging_stages(folder, setup, run_dir, label, is_measured=name in setup.measured)
            if name in setup.measured:
                stages += variance_stages(name, config)
            stages.append(keep_stage(setup, name, run_dir))
    return stages


def is_done(name: str, config: RestConfig, setup: Setup) -> bool:
    """Whether a run has ended here, or its results are kept.  Ends the program if they are of other settings."""
    if setup.kept is None:
        return is_finished(config)
    file = setup.kept / name / "config.yaml"
    if not file.is_file():
        return False
    try:
        kept = load(file, [f"trainer.run_dir={config.trainer.run_dir}", f"model.path={config.model.path}"])
        kept = dataclasses.replace(kept, data=dataclasses.replace(kept.data, train=config.data.train))
        other = other_settings(kept, config)
        other += ["trainer.steps"] if kept.trainer.steps != config.trainer.steps else []
    except ConfigError as error:
        other = [str(error)]
    if other:
        stop(
            f"{file.parent} holds a run with other settings ({', '.join(other)}): take the folder away, or say what it "
            "was made with"
        )
    return True


def refuse_a_full_disk(folder: Path, due: Mapping[str, RestConfig], *, is_kept: bool) -> None:
    """End the program if the runs would fill the disk hours from now.

    A run leaves its last weights, in float32 as the warm start's; a checkpoint has Adam's two moments as well, and the
    next is written before the oldest goes.  Of runs that are kept only the one under way has any.
    """
    weights = sum(file.stat().st_size for file in (folder / "base" / "warm-start" / "hf").glob("*.safetensors"))
    checkpoints = [3 * weights * (config.checkpoint.keep_last + 1) for config in due.values()]
    need = weights * len(due) + (max(checkpoints, default=0) if is_kept else sum(checkpoints))
    if need and need > (free := shutil.disk_usage(folder).free):  # before the warm start nothing is known
        stop(
            f"{len(due)} runs want {need / 1e9:.0f} GB below {folder}, and {free / 1e9:.0f} GB are free: make room "
            "(runs that are done need no checkpoints/), ask for fewer with only=, or give folder= on a larger disk"
        )


@run.cli.entrypoint(type="experiment", name="rest_experiment")
def rest_experiment(
    ctx: run.cli.RunContext, about: str = "toy", seeds: int = 3, only: str = "", folder: str = ""
) -> None:
    """Several algorithms, several seeds, one table.

    Args:
        ctx: filled in by NeMo-Run.
        about: toy = a random model of 2 M parameters; smollm2 = SmolLM2-135M-Instruct (docs/experiment_plan.md).
        seeds: runs of each algorithm.
        only: names with commas between them: base, tuning (of learning rates), an algorithm, a run (paper/seed-1),
            evaluate, report; empty = all, where rates are to be tuned first: base and tuning.
        folder: where everything goes; empty = runs/experiment, or runs/experiment-smollm2.
    """
    if about not in SETUPS:
        stop(f"about={about} is unknown: {' or '.join(SETUPS)}")
    setup = SETUPS[about]
    root = Path(folder or ("runs/experiment" if about == "toy" else f"runs/experiment-{about}")).absolute()
    if not isinstance(ctx.executor, run.LocalExecutor):
        stop("the experiment runs on this machine only: leave out run.executor=")
    if any(item.startswith("trainer.run_dir=") for item in GIVEN.overrides):
        stop("trainer.run_dir is not for you to set here, every run has its own: give folder=")
    runs = tuning(root, setup) | configurations(root, seeds, setup)
    is_tuned = not setup.rates or _has_own_rate() or bool(chosen_rates(setup))
    wanted = _wanted(only or ("" if is_tuned else "base,tuning"), runs, setup)
    early = [name for name in wanted if name in runs and not _is_tuning(name)]
    if early and not is_tuned and not ctx.dryrun:
        count = len(TUNED) * len(setup.rates)
        stop(f"{early[0]} has no learning rate yet: only=base,tuning first ({count} runs), or give optimizer.lr=")
    due = {n: c for n, c in runs.items() if n in wanted and not is_done(n, c, setup)}
    stages = setup.base_stages(root / "base") if "base" in wanted else []
    if "base" in wanted and setup.kept is not None:
        warm_start = root / "base" / "warm-start"
        stages += judging_stages(root, setup, warm_start, "warm-start", is_measured=True)
        stages.append(keep_stage(setup, "base/warm-start", warm_start))
    stages += run_stages_of(root, setup, due)
    if "evaluate" in wanted and setup.kept is None:
        there = [c for name, c in runs.items() if name in due or is_finished(c)]
        policies = [root / "base" / "warm-start", *(Path(c.trainer.run_dir) for c in there)]
        stages.append(evaluate_stage(root, setup, policies))
    if "report" in wanted:
        arguments = (str(setup.kept or root),)
        stages.append(Stage(name="report", module="megatron_rest.eval.experiment", arguments=arguments))
    if ctx.dryrun:
        show_stages(stages, root / "logs")
        for name, overrides in setup.algorithms.items():
            print(f"# {name}: {' '.join(overrides)}")
        print(f"# ----- {root / 'experiment.yaml'} -----\n{as_yaml(resolve(setup.recipe(root), world_size=1))}", end="")
        return
    refuse_a_full_disk(root, due, is_kept=setup.kept is not None)
    for config in due.values():
        claim(config)
    write_atomically(root / "base" / "warm-start.yaml", as_yaml(setup.warm_start(root)))
    write_atomically(root / "experiment.yaml", as_yaml(resolve(setup.recipe(root), world_size=1)))
    for name in (name for name in wanted if name in runs and name not in due):
        print(f"==> {name}: done before", flush=True)
    run_stages("rest_experiment", stages, ctx.executor, root / "logs")


def _wanted(only: str, runs: Mapping[str, RestConfig], setup: Setup) -> list[str]:
    """``only=`` as names of runs and stages; an algorithm stands for all its runs."""
    if not only:
        return ["base", *(name for name in runs if not _is_tuning(name)), "evaluate", "report"]
    found: list[str] = []
    for item in only.split(","):
        if item in setup.algorithms or (item == "tuning" and setup.rates):
            found += [name for name in runs if name.startswith(f"{item}/")]
        elif item in ("base", "evaluate", "report", *runs):
            found.append(item)
        else:
            stop(f"only={item} is unknown: known are base, evaluate, report, {', '.join([*setup.algorithms, *runs])}")
    return found


if __name__ == "__main__":
    run_recipe(rest_experiment, executor="local")
