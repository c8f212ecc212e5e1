"""ResT at toy size on one machine's CPU: Megatron-Core at TP 2 x PP 2, vLLM, real tool-use data, a random model.

    nemo-run launch/rest_toy.py [--dryrun] [--yes] [baseline=grpo] [section.key=value ...]

What `make demo MODEL=toy` runs: nothing to fetch, a few minutes.  Stages: tokenizer, prompts, model, warm-start (kept
in ``base`` and reused), then train, variance, evaluate (if asked for) and report.
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
    ParallelConfig,
    RestConfig,
    RolloutConfig,
    TrainerConfig,
    WarmStartConfig,
    WeightSyncConfig,
    load,
)

ensure_nemo_run_importable()
import nemo_run as run  # noqa: E402

SAMPLE = ROOT / "data_tools" / "samples" / "rlla_sft.json"
RANKS = 4  # TP 2 x PP 2: the smallest layout with both kinds of model parallelism
WARM_START_RANKS = 2  # data parallel; the warm-started model changes its layout on the way into RL
VOCABULARY = 2048  # half a Qwen token's bytes, but every id is seen often enough to be learned in two minutes
THINK_WORDS = 8  # a toy model that learns to ramble never closes its tags


def recipe(base: Path, run_dir: Path) -> RestConfig:
    """The numbers for 3.7 M parameters, 24 prompts, 60 steps.

    What a model of this size can do is recall: it has seen the prompts' reference answers in the warm start, which
    stops while most of them are still beyond it, and RL sharpens what it half knows.
    """
    return RestConfig(
        model=ModelConfig(
            path=str(base / "warm-start" / "hf"),
            max_sequence_length=352,  # the longest prompt and the longest response
            dtype="float32",  # bfloat16 is slower than float32 on most CPUs
        ),
        parallel=ParallelConfig(tensor_parallel=2, pipeline_parallel=2),
        data=DataConfig(
            train=str(base / "prompts"),
            prompts_per_step=8,
            max_prompt_tokens=256,
            max_prompts=24,  # three steps see them all, so the first and the last three compare like with like
            require_reachable=True,
        ),
        rollout=RolloutConfig(
            rollouts_per_prompt=8,  # groups large enough to hold a valid answer while few are
            max_response_tokens=96,
            kv_cache_bytes=64 << 20,  # one engine a rank
            max_concurrent=64,
        ),
        optimizer=OptimizerConfig(
            lr=2e-4,  # random-initialised toy: a pretrained model's 1e-6 would not move it; 1e-3 collapses
            adam_beta2=0.95,
            updates_per_step=2,  # the second update sees ratios other than 1
        ),
        weight_sync=WeightSyncConfig(bucket_bytes=4 << 20),  # buckets that stay in a CPU's cache
        checkpoint=CheckpointConfig(save_every=20),
        trainer=TrainerConfig(run_dir=str(run_dir), steps=60, seed=1, max_tokens_per_microbatch=4096),
        warm_start=WarmStartConfig(
            epochs=36,  # the learning rate is laid out for so many; the target is met in about half
            batch_size=8,
            lr=2e-3,
            target_loss=0.15,  # nats a token: tool names begin to be right below this
        ),
    )


def warm_start_config(config: RestConfig, base: Path) -> RestConfig:
    """The supervised stage, from random weights."""
    own = ["trainer.max_tokens_per_microbatch=2048"]
    return load(None, own, base=warm_start_of(config, recipe(base, base), base))


def plan(base: Path, config: RestConfig, *, evaluate: bool = False) -> list[Stage]:
    """Everything from the sample file to the plots."""
    run_dir = Path(config.trainer.run_dir)
    tokenizer, prompts, model = base / "tokenizer", base / "prompts", base / "model"
    return [
        Stage(
            name="tokenizer",
            module="data_tools",
            arguments=("train-tokenizer", str(SAMPLE), "--vocab-size", str(VOCABULARY), "--output", str(tokenizer)),
            produces=tokenizer,
        ),
        Stage(
            name="prompts",
            module="data_tools",
            arguments=(
                *("convert", "--input", str(SAMPLE), "--output", str(prompts), "--tokenizer", str(tokenizer)),
                *("--prompt-style", "slim", "--max-think-words", str(THINK_WORDS), "--processes", "1", "--overwrite"),
            ),
            produces=prompts,
        ),
        Stage(
            name="model",
            module="megatron_rest.commands.init_model",
            arguments=(
                *("--tokenizer", str(tokenizer), "--output", str(model)),
                *("--heads", "4", "--kv-heads", "2", "--max-length", "512"),
            ),
            produces=model,
        ),
        Stage(
            name="warm-start",
            module="megatron_rest.commands.warm_start",
            arguments=("--config", str(base / "warm-start.yaml")),
            ranks=WARM_START_RANKS,
            produces=base / "warm-start",
        ),
        Stage(
            name="train",
            module="megatron_rest.trainer",
            arguments=("--config", str(run_dir / "run.yaml")),
            ranks=RANKS,
        ),
        Stage(
            name="variance",
            module="megatron_rest.analysis.variance",
            # Five prompts: enough to see the ratio, few enough to take less time than six steps of training.
            arguments=("--run", str(run_dir), "--max-sequences", "40"),
        ),
        *([evaluation(config)] if evaluate else []),
        Stage(name="report", module="megatron_rest.cli", arguments=("report", str(run_dir), "--no-summary")),
    ]


def evaluation(config: RestConfig) -> Stage:
    """Cases whose prompts, written as the training data is, fit a toy's context: most of BFCL's single calls."""
    run_dir = config.trainer.run_dir
    return Stage(
        name="evaluate",
        module="megatron_rest.cli",
        arguments=(
            *("eval", "run", run_dir, "--output", f"{run_dir}/eval", "--leave-out-long", "--cases", "20"),
            *("--max-response-tokens", str(config.rollout.max_response_tokens), "--kv-cache-gib", "0.25"),
            *("--categories", "api-bank", "simple_python", "multiple", "parallel", "live_simple", "irrelevance"),
        ),
    )


@run.cli.entrypoint(type="experiment", name="rest_toy")
def rest_toy(ctx: run.cli.RunContext, baseline: str = "", base: str = "runs/toy-base", evaluate: bool = False) -> None:
    """ResT at toy size on this machine's CPU.

    Args:
        ctx: filled in by NeMo-Run.
        baseline: grpo = uniform token weights, same seeds; empty = ResT.
        base: folder for tokenizer, data and warm-started model, shared by runs.
        evaluate: score API-Bank and BFCL after training, on cases that fit the toy's context.
    """
    folder = Path(base).absolute()
    run_dir = Path(f"runs/toy-{baseline or 'rest'}").absolute()
    if not isinstance(ctx.executor, run.LocalExecutor):
        stop("the toy runs on this machine only: leave out run.executor=")
    config = resolve(recipe(folder, run_dir), world_size=RANKS, baseline=baseline)
    stages = plan(folder, config, evaluate=evaluate)
    warm_start = warm_start_config(config, folder)
    run_here("rest_toy", stages, config, warm_start, base=folder, world_size=RANKS, ctx=ctx)


if __name__ == "__main__":
    run_recipe(rest_toy, executor="local")
