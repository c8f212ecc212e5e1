"""A training job on Slurm: one script per task, the configuration inside it, links of a chain for long runs.

Every rank is a Slurm task of its own.  NeMo-Run's Torchrun launcher is not used: it allows a rank 30 seconds between
SIGTERM and SIGKILL, too little to save 70B parameters, expands ``$SLURM_NODEID`` on the first node only, and cannot do
heterogeneous jobs.  What a rank needs to know, Slurm says.
"""

import shlex
import shutil
from pathlib import Path

from launch.compat import ensure_nemo_run_importable
from launch.executors import GPUS_PER_NODE, check_environment
from launch.recipe import as_yaml, resolve, stop
from megatron_rest.config import RestConfig

ensure_nemo_run_importable()
import nemo_run as run  # noqa: E402
from nemo_run.core.execution.base import ExecutorMacros  # noqa: E402

__all__ = ["launch_training", "train_script"]

_PORT = 29400  # jobs have their nodes to themselves (exclusive), so a fixed port is free
_END = "END_OF_RUN_YAML"


def launch_training(
    ctx: "run.cli.RunContext", title: str, base: RestConfig, *, nodes: int, links: int, baseline: str
) -> None:
    """Resolve, show or submit.  ``links`` jobs run one after the other; each continues from the newest checkpoint."""
    executor = ctx.executor
    if not isinstance(executor, run.SlurmExecutor):
        stop(f"{title} needs GPUs of {nodes} node(s): run.executor=slurm (the demo for a CPU is launch/rest_demo.py)")
    if links < 1:
        stop(f"links={links}: at least 1")
    executor.nodes = executor.nodes or nodes
    config = resolve(base, world_size=executor.nodes * GPUS_PER_NODE, baseline=baseline)
    _check(executor, config, dryrun=ctx.dryrun)
    check_environment(executor)
    # "$$" + macro: NeMo-Run fills in the name of the batch script's variable, the batch script its value
    executor.env_vars["MASTER_ADDR"] = "$$" + ExecutorMacros.HEAD_NODE_IP_VAR
    # by name, so that the job's values win over those baked into the image
    executor.container_env = sorted(executor.env_vars) if executor.container_image else None
    # a link that was stopped by the time limit ends with a failure status, and the next one is to go on all the same
    executor.dependency_type = "afterany"
    script = run.Script(inline=train_script(config))
    with run.Experiment(title, executor=executor, log_level="WARNING", clean_mode=ctx.dryrun) as experiment:
        previous: list[str] = []
        for link in range(1, links + 1):
            name = "train" if links == 1 else f"train-{link}"
            previous = [experiment.add(script, name=name, dependencies=previous, tail_logs=links == 1)]
        if ctx.dryrun:
            _show(experiment, config)
            return
        ctx.launch(experiment)
    if not ctx.detach:
        _end_with_status(experiment)


def train_script(config: RestConfig) -> str:
    """What every task runs.  The configuration travels inside the script: what was submitted is what runs."""
    text = as_yaml(config)
    if any(line.strip() == _END for line in text.splitlines()):
        stop(f"the configuration contains the line {_END}, which ends it in the job's script")
    if "/nemo_run" in text:
        stop("a path in the configuration contains /nemo_run, which NeMo-Run replaces in scripts: choose another")
    run_dir = shlex.quote(config.trainer.run_dir)
    return f"""set -euo pipefail
config=$(mktemp --suffix=.yaml)
cat > "$config" <<'{_END}'
{text}{_END}

export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
export LOCAL_WORLD_SIZE={GPUS_PER_NODE} MASTER_PORT={_PORT}
run_dir={run_dir}
mkdir -p "$run_dir/logs"
if [ "$RANK" = 0 ]; then
  cp "$config" "$run_dir/run.yaml.part"
  mv "$run_dir/run.yaml.part" "$run_dir/run.yaml"
else
  exec >> "$run_dir/logs/rank-$RANK.log" 2>&1
fi
exec "${{REST_PYTHON:-python}}" -m megatron_rest.trainer --config "$config"
"""


def _check(executor: run.SlurmExecutor, config: RestConfig, *, dryrun: bool) -> None:
    if executor.account == "YOUR_ACCOUNT" and not dryrun:
        stop("no Slurm account: export SLURM_ACCOUNT=... or say run.executor.account=...")
    for name, path in (("trainer.run_dir", config.trainer.run_dir), ("model.path", config.model.path)):
        if not Path(path).is_absolute():
            stop(f"{name}={path} is relative: on a cluster name an absolute path on storage that every node sees")


def _show(experiment: run.Experiment, config: RestConfig) -> None:
    """The files as sbatch and the nodes would get them; Experiment.dryrun prints them wrapped at 80 columns."""
    experiment.dryrun(log=False, delete_exp_dir=False)
    folder = Path(experiment._exp_dir)
    try:
        for path in sorted([*folder.glob("*_sbatch.sh"), *folder.glob("*/scripts/*.sh")]):
            print(f"# ----- {path.relative_to(folder)} -----\n{path.read_text()}", flush=True)
    finally:
        shutil.rmtree(folder)
    print(f"# ----- run.yaml -----\n{as_yaml(config)}", end="", flush=True)


def _end_with_status(experiment: run.Experiment) -> None:
    """NeMo-Run's command ends with 0 whatever became of its jobs."""
    states = {name: str(job["status"]) for name, job in experiment.status(return_dict=True).items()}
    if any("SUCCEEDED" not in state for state in states.values()):
        stop(f"failed: {', '.join(f'{name} {state}' for name, state in states.items())}", status=1)
