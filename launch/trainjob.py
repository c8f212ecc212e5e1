"""Kubernetes through NeMo-Run's own executor for Kubeflow Trainer: ``run.executor=kubeflow`` makes a recipe a TrainJob.

What runs there is the training of a recipe whose engines are colocated.  Stages that wait for one another and groups of
nodes NeMo-Run knows on Slurm only; a recipe that asks for them is refused by name.

``REST_IMAGE``, ``REST_NAMESPACE``, ``REST_RUNTIME``, ``REST_MOUNTS`` (``claim:/path``, comma separated), ``REST_ENV``
and ``REST_PYTHON`` are read here, once (docs/launch.md).
"""

import dataclasses
import os
import re
import shutil
from typing import Any

import yaml

from launch.checks import check_inputs_here
from launch.compat import ensure_nemo_run_importable
from launch.executors import CLUSTER_ENV, GPUS_PER_NODE, network_environment
from launch.recipe import (
    GIVEN,
    ROOT,
    as_yaml,
    plan_text,
    refuse_folder_in_use,
    require_absolute_paths,
    resolve,
    stop,
    warn_of,
)
from launch.script import node_script
from launch.secrecy import looks_secret, refuse_secrets
from launch.shipping import as_script, digests, user_packages
from launch.stages import Stages
from megatron_rest.code_version import code_version
from megatron_rest.config import RestConfig
from megatron_rest.engine_gpus import why_not

ensure_nemo_run_importable()
import nemo_run as run  # noqa: E402

__all__ = ["kubeflow", "launch_on_kubernetes"]

_IN_A_SECRET = "(from a Secret of the cluster: run.executor.env_list with valueFrom, docs/launch.md)"

# NeMo-Run reads the kubeconfig when the executor is built; a dry run shall do without a cluster, so _connect does it.
_read_kubeconfig = run.KubeflowExecutor.__post_init__
run.KubeflowExecutor.__post_init__ = lambda self: None
# It submits and returns like those that may detach, and is only missing in their list.
run.Experiment._DETACH_SUPPORTED_EXECUTORS += (run.KubeflowExecutor,)


@run.cli.factory
def kubeflow(gpus_per_node: int = GPUS_PER_NODE) -> run.Config[run.Executor]:
    """Kubeflow Trainer; the number of nodes is the recipe's ``nodes=``.

    Announced as an Executor: NeMo-Run's command line looks for names among few classes, of which Kubeflow's is none.
    """
    volumes, mounts = _volumes()
    env = CLUSTER_ENV | network_environment()
    if "REST_PYTHON" in os.environ:
        env["REST_PYTHON"] = os.environ["REST_PYTHON"]
    return run.Config(
        run.KubeflowExecutor,
        runtime_ref=os.environ.get("REST_RUNTIME", "torch-distributed"),
        namespace=os.environ.get("REST_NAMESPACE", "default"),
        image=os.environ.get("REST_IMAGE", ""),
        num_nodes=0,
        gpus_per_node=gpus_per_node,
        volumes=volumes,
        volume_mounts=mounts,
        env_vars=env,
    )


def _volumes() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Shared memory for NCCL and vLLM, of which a container has 64 MB by default, and the claims of ``REST_MOUNTS``."""
    volumes: list[dict[str, Any]] = [{"name": "shared-memory", "emptyDir": {"medium": "Memory"}}]
    mounts = [{"name": "shared-memory", "mountPath": "/dev/shm"}]
    for i, mount in enumerate(filter(None, os.environ.get("REST_MOUNTS", "").split(","))):
        claim, _, path = mount.partition(":")
        if not path.startswith("/"):
            stop(f"REST_MOUNTS holds {mount!r}, expected claim:/path (a PersistentVolumeClaim and where to mount it)")
        volumes.append({"name": f"claim-{i}", "persistentVolumeClaim": {"claimName": claim}})
        mounts.append({"name": f"claim-{i}", "mountPath": path})
    return volumes, mounts


def launch_on_kubernetes(
    ctx: "run.cli.RunContext", title: str, base: RestConfig, stages: Stages
) -> run.Experiment | None:
    """Resolve, then submit one TrainJob; or show it (``--dryrun``) and return None."""
    executor = ctx.executor
    _refuse_stages(stages)
    if executor.num_nodes:
        stop(f"run.executor.num_nodes={executor.num_nodes}: say nodes={executor.num_nodes}, which the recipe reads")
    executor.num_nodes = stages.nodes
    world_size = executor.num_nodes * executor.nproc_per_node()
    config = resolve(base, world_size=world_size, baseline=stages.baseline)
    if config.rollout.nodes:
        stop(
            f"rollout.nodes={config.rollout.nodes}: engines on nodes of their own are a second group of nodes, which "
            "NeMo-Run knows on Slurm only; on Kubernetes take a recipe with colocated engines (launch/rest_8b.py)"
        )
    fault = why_not(
        config,
        world_size=world_size,
        ranks_per_node=executor.nproc_per_node(),
        gpus_per_node=executor.gpus_per_node or executor.nproc_per_node(),
    )
    if fault:
        stop(fault)
    require_absolute_paths(config)
    check_inputs_here(config)
    refuse_folder_in_use(config)
    if not executor.image and not ctx.dryrun:
        stop("no container image: export REST_IMAGE=... or say run.executor.image=...")
    _check_executor(executor)
    _patch_for_newer_trainers(executor)
    packages = user_packages(config)
    script = node_script(
        config,
        gpus_per_node=executor.gpus_per_node or 0,
        code=code_version(ROOT),
        user_code=digests(packages),
        unpack=as_script(packages),
    )
    refuse_secrets(script, "the script of train", instead=_IN_A_SECRET)
    plan = plan_text(config, "h100", world_size=world_size)
    if ctx.dryrun:
        command = ["bash", "-c", _dollars_kept(script)]
        print(f"# ----- trainjob.yaml -----\n{_as_block(executor.get_job_body(_job_name(title), command))}", end="")
        print(f"# ----- plan -----\n{plan}\n# ----- run.yaml -----\n{as_yaml(config)}", end="", flush=True)
        return None
    warn_of(plan)
    _connect(executor)
    executor.train_job_basename = title
    with run.Experiment(title, executor=executor, log_level="WARNING") as experiment:
        # Twice, since NeMo-Run's macros are written with dollars too.
        arguments = [_dollars_kept(_dollars_kept(script))]
        # NeMo-Run follows the log with kubectl, and without it fails in a thread that nobody waits for.
        experiment.add(
            run.Script(path="-c", entrypoint="bash", args=arguments),
            executor=executor,
            name="train",
            tail_logs=shutil.which("kubectl") is not None,
        )
        ctx.launch(experiment)
    return experiment


def _job_name(title: str) -> str:
    return f"{title.replace('_', '-')}-000000"  # as NeMo-Run would name it, whose last six characters are random


def _refuse_stages(stages: Stages) -> None:
    """Whatever a recipe offers beside its training is a job of its own, or a repeated one."""
    asked = [
        f"{field.name}={getattr(stages, field.name)}"
        for field in dataclasses.fields(stages)
        if field.name not in ("nodes", "baseline") and getattr(stages, field.name) != field.default
    ]
    if GIVEN.preprocess:
        asked.append(f"preprocess={GIVEN.preprocess}")
    if asked:
        stop(
            f"{asked[0]}: NeMo-Run makes one job wait for another on Slurm only; on Kubernetes a recipe runs its "
            "training (submitted again, it continues from the newest checkpoint)"
        )


def _connect(executor: run.KubeflowExecutor) -> None:
    """Read the kubeconfig, or inside a cluster the service account; from here on NeMo-Run does so by itself again."""
    run.KubeflowExecutor.__post_init__ = _read_kubeconfig
    try:
        executor.__post_init__()
    except ImportError:
        stop("the Kubernetes client is not installed: pip install -e '.[kubernetes]'")
    except Exception as error:  # noqa: BLE001  whatever the client found wrong with the file
        stop(f"no Kubernetes cluster: {error} (kubectl's configuration, or the file that KUBECONFIG names)")


def _check_executor(executor: run.KubeflowExecutor) -> None:
    """Refuse secrets and fields that nothing here reads; make the environment what Kubernetes wants."""
    if executor.launcher is not None:
        stop("run.executor.launcher is not used here: the script calls torchrun itself (docs/launch.md)")
    if executor.workdir_pvc:
        stop("run.executor.workdir_pvc is not used here: the code is in the image, or on a claim (docs/launch.md)")
    for entry in executor.env_list:
        if "value" in entry:
            _refuse_secret_name("env_list", str(entry.get("name", "")))
    for name in executor.env_vars:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            stop(f"environment variable {name!r}: letters, digits and _ only")
        _refuse_secret_name("env_vars", name)
    refuse_secrets(yaml.safe_dump(executor.get_job_body("train", [])), "run.executor", instead=_IN_A_SECRET)
    executor.env_vars = {name: _dollars_kept(str(value)) for name, value in executor.env_vars.items()}


def _patch_for_newer_trainers(executor: run.KubeflowExecutor) -> None:
    """Volumes and all else of the pods once more, as ``runtimePatches``.

    Kubeflow Trainer 2.2 reads these where 2.0 and 2.1 read the ``podTemplateOverrides`` that NeMo-Run writes.  Each
    drops the field it does not know, silently: with one of them alone, half of the clusters would mount nothing.
    """
    jobs = [
        {"name": job["name"], "template": {"spec": {"template": {k: v for k, v in o.items() if k != "targetJobs"}}}}
        for o in executor.get_job_body("train", [])["spec"].get("podTemplateOverrides", [])
        for job in o["targetJobs"]
    ]
    patch = {"manager": "nemo-run", "trainingRuntimeSpec": {"template": {"spec": {"replicatedJobs": jobs}}}}
    executor.spec_kwargs = {"runtimePatches": [patch]} | executor.spec_kwargs


def _refuse_secret_name(field: str, name: str) -> None:
    if looks_secret(name):
        stop(f"run.executor.{field} holds {name}, which looks like a secret: leave it out {_IN_A_SECRET}")


def _dollars_kept(text: str) -> str:
    """Kubernetes replaces ``$(NAME)`` in commands and environment, and every ``$$`` by ``$``."""
    return text.replace("$", "$$")


class _Dumper(yaml.SafeDumper):
    """Scripts as blocks of lines; what is there twice is written twice."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)


def _as_block(manifest: dict[str, Any]) -> str:
    return yaml.dump(manifest, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
