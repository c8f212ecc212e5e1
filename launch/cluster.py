"""One experiment on Slurm: preprocess -> warm start -> train, in links -> evaluate; each job waits for what it needs.

Every rank is a Slurm task of its own.  NeMo-Run's Torchrun launcher is not used: it allows a rank 30 seconds between
SIGTERM and SIGKILL, too little to save 70B parameters, expands ``$SLURM_NODEID`` on the first node only, and cannot do
heterogeneous jobs.  What a rank needs to know, Slurm says.
"""

import dataclasses
import inspect
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.checks import check_inputs_here, check_request, check_shape_of_job
from launch.compat import ensure_nemo_run_importable
from launch.executors import GPUS_PER_NODE, check_executor
from launch.recipe import (
    GIVEN,
    ROOT,
    as_yaml,
    evaluate_arguments,
    plan_text,
    refuse_folder_in_use,
    require_absolute_paths,
    resolve,
    stop,
    warn_of,
)
from launch.script import command_script, host_script, rank_script
from launch.secrecy import refuse_secrets
from launch.shipping import digests, user_packages
from launch.stages import HELP, Stages
from launch.trainjob import launch_on_kubernetes
from megatron_rest.code_version import code_version
from megatron_rest.config import RestConfig
from megatron_rest.rollout.devices import without_expandable_segments

ensure_nemo_run_importable()
import nemo_run as run  # noqa: E402

__all__ = ["cluster_recipe", "launch_training"]

# Address of the first node as Slurm's own daemons reach it from everywhere.  What the node's name resolves to on itself
# (NeMo-Run: hostname --ip-address) is a loopback address on Debian and Ubuntu.
_MASTER = """MASTER_ADDR=$(scontrol show node "$head_node" | sed -n 's/.*NodeAddr=\\([^ ]*\\).*/\\1/p' | head -n 1)
export MASTER_ADDR="${MASTER_ADDR:-$head_node_ip}"
"""
# NeMo-Run's scripts trace every command; the loop that watches a job's groups would add 20,000 lines in 4 hours.
_QUIET = "set +x\n"
_CPUS, _GIGABYTES = 8, 96  # of a job that takes a part of a node, for each GPU; without one as with one
_POLL_SECONDS = 5  # how late the job's script notices that a group has ended; NeMo-Run's own 60 wastes a minute a link


@dataclass(frozen=True, kw_only=True)
class _Job:
    """A script on its executor; several of both are the groups of one heterogeneous job."""

    name: str
    scripts: tuple[str, ...]
    executors: tuple[run.SlurmExecutor, ...]
    waits_for: str = ""  # name of the job before it


def cluster_recipe(
    name: str,
    what: str,
    recipe: RestConfig | Mapping[str, RestConfig],
    *,
    nodes: int,
    nodes_help: str,
    families: str = "",
) -> Callable[..., None]:
    """The entry point of a launch file: ``nemo-run launch/NAME.py nodes=... links=... section.key=value``.

    Args:
        name: of the experiment and its jobs.
        what: one sentence, the first line of ``--help``.
        recipe: the configuration; of several the argument ``family`` chooses one by its key, the first if it is absent.
        nodes: default; ``nodes_help`` says what may be given, ``families`` likewise of ``family``.
    """
    recipes = recipe if isinstance(recipe, Mapping) else {"": recipe}

    def launch(ctx: run.cli.RunContext, family: str = next(iter(recipes)), **arguments: Any) -> None:
        if family not in recipes:
            stop(f"family={family} is unknown: known are {', '.join(recipes)}")
        launch_training(ctx, name, recipes[family], Stages(**{"nodes": nodes, **arguments}))

    def parameter(name: str, kind: Any, default: Any = inspect.Parameter.empty) -> inspect.Parameter:
        return inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=kind, default=default)

    texts = {"ctx": "filled in by NeMo-Run.", "nodes": nodes_help, **HELP}
    stages = {field.name: field for field in dataclasses.fields(Stages)}
    defaults = {name: field.default for name, field in stages.items()} | {"nodes": nodes}
    asked = [parameter("ctx", run.cli.RunContext)]
    asked += [parameter(name, field.type, defaults[name]) for name, field in stages.items()]
    if families:
        texts["family"] = families
        asked.append(parameter("family", str, next(iter(recipes))))
    # NeMo-Run reads name, module, parameters and their descriptions from the function.
    launch.__name__ = launch.__qualname__ = name
    launch.__signature__ = inspect.Signature(asked)  # type: ignore[attr-defined]
    launch.__doc__ = "\n".join([what, "", "Args:", *(f"    {key}: {text}" for key, text in texts.items())])
    entry: Callable[..., None] = run.cli.entrypoint(type="experiment", name=name)(launch)
    return entry


def launch_training(ctx: "run.cli.RunContext", title: str, base: RestConfig, stages: Stages) -> None:
    """Resolve, then show (``--dryrun``) or submit."""
    executor = ctx.executor
    for name in ("nodes", "links"):
        if getattr(stages, name) < 1:
            stop(f"{name}={getattr(stages, name)}: at least 1")
    if stages.requeue < 0:
        stop(f"requeue={stages.requeue}: at least 0")
    if isinstance(executor, run.KubeflowExecutor):
        submitted = launch_on_kubernetes(ctx, title, base, stages)
        if submitted is not None and not ctx.detach:
            _end_with_status(submitted, [])
        return
    if not isinstance(executor, run.SlurmExecutor):
        stop(
            f"{title} needs GPUs of {stages.nodes} node(s): run.executor=slurm or kubeflow (the demo for a CPU is "
            "launch/rest_demo.py)"
        )
    if executor.nodes:
        stop(f"run.executor.nodes={executor.nodes}: say nodes={executor.nodes}, which the recipe reads")
    executor.nodes = stages.nodes
    check_shape_of_job(executor)
    world_size = executor.nodes * executor.ntasks_per_node
    config = resolve(base, world_size=world_size, baseline=stages.baseline)
    _check(executor, config, world_size=world_size, dryrun=ctx.dryrun)
    plan = plan_text(config, "h100", world_size=world_size)
    jobs = _jobs(executor, config, stages)
    with run.Experiment(title, executor=executor, log_level="WARNING", clean_mode=ctx.dryrun) as experiment:
        ids: dict[str, str] = {}
        for job in jobs:
            scripts = [run.Script(inline=script) for script in job.scripts]
            is_group = len(scripts) > 1
            ids[job.name] = experiment.add(
                scripts if is_group else scripts[0],
                executor=list(job.executors) if is_group else job.executors[0],
                name=job.name,
                dependencies=[ids[job.waits_for]] if job.waits_for else [],
                tail_logs=len(jobs) == 1,
            )
        if ctx.dryrun:
            _show(experiment)
            print(f"# ----- plan -----\n{plan}\n# ----- run.yaml -----\n{as_yaml(config)}", end="", flush=True)
            return
        warn_of(plan)
        ctx.launch(experiment)
    if not ctx.detach:
        _end_with_status(experiment, jobs)


def _jobs(executor: run.SlurmExecutor, config: RestConfig, stages: Stages) -> list[_Job]:
    """In order of submission."""
    jobs: list[_Job] = []
    ranks = executor.clone()
    ranks.dependency_type = "afterok"
    settings: dict[str, Any] = {
        "ranks_per_node": ranks.ntasks_per_node,
        "gpus_per_node": ranks.gpus_per_node,
        "code": code_version(ROOT),
        "user_code": digests(user_packages(config)),
    }

    def add(name: str, *parts: tuple[str, run.SlurmExecutor]) -> None:
        scripts, executors = zip(*parts, strict=True)
        for script in scripts:
            refuse_secrets(script, f"the script of {name}")
        before = jobs[-1].name if jobs else ""
        jobs.append(_Job(name=name, scripts=scripts, executors=executors, waits_for=before))

    if GIVEN.preprocess:
        if not Path(GIVEN.preprocess).is_absolute():
            stop(f"preprocess={GIVEN.preprocess} is relative: name an absolute path that the job's node sees")
        arguments = ["convert", "--input", GIVEN.preprocess, "--output", config.data.train, "--tokenizer"]
        add("preprocess", (command_script("data_tools", [*arguments, config.model.path]), _light(executor, gpus=0)))
    if stages.warm_start:
        folder = f"{config.trainer.run_dir}/warm-start"
        warm = dataclasses.replace(config, trainer=dataclasses.replace(config.trainer, run_dir=folder))
        module = "megatron_rest.commands.warm_start"
        add("warm-start", (rank_script(warm, module, **settings), ranks))
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, path=f"{folder}/hf"))
    script = rank_script(config, "megatron_rest.trainer", **settings)
    for link in range(1, stages.links + 1):
        train = ranks.clone()
        if link > 1:  # a link that was stopped by the time limit ends with a failure status; the next one goes on
            train.dependency_type = "afterany"
        if stages.requeue:
            train.retries = stages.requeue  # NeMo-Run's script calls scontrol requeue; its sbatch says --requeue
        name = "train" if stages.links == 1 else f"train-{link}"
        if config.rollout.nodes:
            # The trainer comes first: its exit status is the job's, and when it ends the engines' group is ended.
            add(name, *_groups(train, script, config))
        else:
            add(name, (script, train))
    if stages.evaluate:  # only a run that is finished: a link that was stopped ends with a failure status
        light = _light(executor, gpus=config.rollout.tensor_parallel)
        add("evaluate", (command_script("megatron_rest.cli", evaluate_arguments(config)), light))
    return jobs


def _light(executor: run.SlurmExecutor, *, gpus: int) -> run.SlurmExecutor:
    """One task with so many GPUs of a node that others may use too; a partition for work without GPUs if there is one.

    A job that needs all GPUs of a node takes it whole, as the ranks do.
    """
    one = executor.clone()
    one.nodes, one.ntasks_per_node, one.signal, one.dependency_type = 1, 1, None, "afterok"
    one.gpus_per_node = gpus or None
    one.env_vars = without_expandable_segments(one.env_vars)  # the trainer's, and engines of several GPUs refuse them
    if gpus < (executor.gpus_per_node or GPUS_PER_NODE):
        one.exclusive, one.cpus_per_task = None, _CPUS * max(gpus, 1)
        one.mem = f"{_GIGABYTES * max(gpus, 1)}G"
    if not gpus:
        one.partition = os.environ.get("REST_CPU_PARTITION") or one.partition
    return one


def _groups(train: run.SlurmExecutor, script: str, config: RestConfig) -> list[tuple[str, run.SlurmExecutor]]:
    """One heterogeneous job: ranks on their nodes, one engine host on each node of the other group."""
    train.heterogeneous = True
    train.wait_time_for_group_job, train.monitor_group_job_wait_time = 1, _POLL_SECONDS
    hosts = train.clone()
    hosts.nodes, hosts.ntasks_per_node = config.rollout.nodes, 1
    return [(script, train), (host_script(config, gpus=train.gpus_per_node or 0), hosts)]


def _check(executor: run.SlurmExecutor, config: RestConfig, *, world_size: int, dryrun: bool) -> None:
    if executor.account == "YOUR_ACCOUNT" and not dryrun:
        stop("no Slurm account: export SLURM_ACCOUNT=... or say run.executor.account=...")
    require_absolute_paths(config)
    check_inputs_here(config)
    check_request(executor, config, world_size=world_size)
    refuse_folder_in_use(config)
    executor.packager.tops += map(str, user_packages(config))
    check_executor(executor)
    master = "" if "MASTER_ADDR" in executor.env_vars else _MASTER
    executor.setup_lines = master + _QUIET + (executor.setup_lines or "")
    if executor.container_image:  # by name, so that the job's values win over those baked into the image
        executor.container_env = sorted({*(executor.container_env or []), *executor.env_vars, "MASTER_ADDR"})


def _show(experiment: run.Experiment) -> None:
    """The files as sbatch and the nodes would get them; Experiment.dryrun prints them wrapped at 80 columns."""
    experiment.dryrun(log=False, delete_exp_dir=False)
    folder = Path(experiment._exp_dir)
    try:
        for path in sorted([*folder.glob("*_sbatch.sh"), *folder.glob("*/scripts/*.sh")]):
            print(f"# ----- {path.relative_to(folder)} -----\n{path.read_text()}", flush=True)
    finally:
        shutil.rmtree(folder)


def _end_with_status(experiment: run.Experiment, jobs: list[_Job]) -> None:
    """NeMo-Run's command ends with 0 whatever became of its jobs.

    Of a chain the last link counts: the ones before it may well have ended at their time limit.
    """
    links = [job.name for job in jobs if job.name.startswith("train-")]
    states = {name: str(job["status"]) for name, job in experiment.status(return_dict=True).items()}
    failed = {name: state for name, state in states.items() if "SUCCEEDED" not in state and name not in links[:-1]}
    if failed:
        stop(f"failed: {', '.join(f'{name} {state}' for name, state in failed.items())}", status=1)
