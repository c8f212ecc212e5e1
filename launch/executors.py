"""Where jobs run: ``local`` (this machine) and ``slurm`` (container or bare).  Chosen by ``run.executor=NAME``.

Everything a cluster user must fill in is a parameter or environment variable read here, once:
``SLURM_ACCOUNT``, ``SLURM_PARTITION``, ``REST_IMAGE`` (empty = no container), ``REST_MOUNTS`` (comma separated),
``REST_SSH`` (user@host to submit from a laptop) with ``REST_SSH_DIR``, ``REST_ENV`` (what the network wants) and
``REST_INTERFACE`` (the network between the nodes).
"""

import dataclasses
import os
import re
import shlex
import shutil
from collections.abc import Iterator

from launch.compat import ensure_nemo_run_importable
from launch.recipe import stop
from launch.secrecy import looks_secret, refuse_secrets
from launch.shipping import CodePackager

ensure_nemo_run_importable()
import nemo_run as run  # noqa: E402

__all__ = [
    "CLUSTER_ENV",
    "CPU_ENV",
    "GPUS_PER_NODE",
    "check_executor",
    "local",
    "network_environment",
    "shell_environment",
    "slurm",
]

GPUS_PER_NODE = 8
INTERFACE = "REST_INTERFACE"  # read where the job runs: megatron_rest/network.py

CPU_ENV = {
    "CUDA_VISIBLE_DEVICES": "",  # torch's build for CUDA, which set-up may have had to take, would compute on a GPU
    "OMP_NUM_THREADS": "1",  # one rank a core; torchrun warns if it has to choose
    "OMP_WAIT_POLICY": "PASSIVE",  # idle threads that spin cost vLLM a factor 20 beside other ranks
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # "auto" pins every engine of a machine to the same cores
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # engine in the rank's process
    # A page of warnings at every start says that this is a CPU without CUDA, Triton and tcmalloc: known.
    "VLLM_LOGGING_LEVEL": "ERROR",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "TORCH_LOGS": "-all",
    "PYTHONWARNINGS": "ignore",
    "VLLM_NO_USAGE_STATS": "1",
    "TORCHDYNAMO_DISABLE": "1",  # the first log-prob request would compile C++ otherwise, and need a compiler
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "LOGLEVEL": "WARNING",
}

CLUSTER_ENV = {
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",  # Megatron overlaps TP communication by the order of launches
    "NCCL_NVLS_ENABLE": "0",  # NVLink SHARP buffers cost 1-2 GB a GPU, which colocated rollouts need
    "NCCL_CUMEM_ENABLE": "0",  # vLLM's sleep mode hands memory back only without cuMem allocations by NCCL
    "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",  # packed microbatches differ in size every step; engines
    # that have processes of their own start without it (megatron_rest/rollout/devices.py)
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "PYTHONUNBUFFERED": "1",
}


@run.cli.factory
def local() -> run.Config[run.LocalExecutor]:
    """Ranks on this machine's CPU; how many is the recipe's business."""
    size = shutil.get_terminal_size((120, 40))
    env = CPU_ENV | {"COLUMNS": str(size.columns), "LINES": str(size.lines)}
    return run.Config(run.LocalExecutor, env_vars=env)


@run.cli.factory
def slurm(nodes: int = 0, time: str = "04:00:00") -> run.Config[run.SlurmExecutor]:
    """Slurm; ``nodes=0`` leaves the number to the recipe."""
    image = os.environ.get("REST_IMAGE") or None
    # A rank may use all cores of its node: Slurm's default binds it to one, which starves data loading and vLLM.
    # And a rank that fails ends the others at once, as under torchrun: on GPUs they would wait for it until a timeout.
    srun_args = ["--cpu-bind=none", "--kill-on-bad-exit=1"]
    if image:
        srun_args.append("--no-container-mount-home")  # packages in ~/.local would win over the image's
    # A plain run.Config: @run.autoconvert would turn os.environ.get and everything else in here into Configs too.
    return run.Config(
        run.SlurmExecutor,
        account=os.environ.get("SLURM_ACCOUNT", "YOUR_ACCOUNT"),
        partition=os.environ.get("SLURM_PARTITION", "batch"),
        nodes=nodes,
        ntasks_per_node=GPUS_PER_NODE,  # one task a GPU: signals reach the ranks directly, no torchrun between
        gpus_per_node=GPUS_PER_NODE,
        mem="0",  # all of a node's memory
        exclusive=True,
        time=time,
        signal="TERM@300",  # 5 minutes before the limit, to every rank: save and stop
        job_name_prefix="rest-",
        container_image=image,
        srun_args=srun_args,
        container_mounts=[mount for mount in os.environ.get("REST_MOUNTS", "").split(",") if mount],
        env_vars=CLUSTER_ENV | network_environment(),
        tunnel=_tunnel(),
        packager=run.Config(CodePackager),
    )


def _tunnel() -> "run.Config[run.LocalTunnel] | run.Config[run.SSHTunnel]":
    target = os.environ.get("REST_SSH", "")
    if not target:
        # A LocalTunnel copies nothing, so sbatch must find the script where NeMo-Run writes it: NEMORUN_HOME has to
        # lie on shared storage and job_dir has to stay empty.
        return run.Config(run.LocalTunnel, job_dir="")
    user, _, host = target.rpartition("@")
    return run.Config(run.SSHTunnel, host=host, user=user, job_dir=os.environ.get("REST_SSH_DIR", "megatron_rest_runs"))


def check_executor(executor: run.SlurmExecutor) -> None:
    """Make what NeMo-Run writes into the sbatch script safe, or end with one line that says what is not.

    NeMo-Run quotes sbatch's flags, whose line ends at a line break in a value, so that the rest would run as a command.
    The environment, srun's arguments, the container's name and mounts, and the log's path it does not quote at all.
    """
    if executor.launcher is not None:
        stop("run.executor.launcher is not used here: every GPU has a Slurm task of its own (docs/launch.md)")
    # Else a job waits for ever for one that has failed; what a user adds does not replace it.
    executor.additional_parameters = {"kill_on_invalid_dep": "yes"} | (executor.additional_parameters or {})
    for name, text in _texts(executor):
        if any(ord(character) < 32 for character in text):
            stop(f"run.executor.{name} holds a line break or another control character")
        refuse_secrets(text, f"run.executor.{name}")
    for name, text in (
        ("run.executor.job_name_prefix", executor.job_name_prefix or ""),
        ("NEMORUN_HOME", os.environ.get("NEMORUN_HOME", "")),
        *((f"run.executor.additional_parameters key {key}", key) for key in executor.additional_parameters or {}),
    ):
        if not re.fullmatch(r"[\w./@%+:,=-]*", text):
            stop(f"{name} {text!r}: letters, digits and ./@%+:,=_- only, since NeMo-Run writes it without quoting")
    if "/nemo_run" in os.environ.get("NEMORUN_HOME", ""):
        stop("NEMORUN_HOME contains /nemo_run, which NeMo-Run replaces in scripts: choose another")
    executor.srun_args = [shlex.quote(word) for word in executor.srun_args or []]
    executor.container_mounts = [shlex.quote(mount) for mount in executor.container_mounts]
    if executor.container_image:
        executor.container_image = shlex.quote(executor.container_image)
    _check_environment(executor)


def _texts(executor: run.SlurmExecutor) -> Iterator[tuple[str, str]]:
    """Every text a user may have given, by field; ``setup_lines`` is shell by intent, ``env_vars`` is quoted below."""
    for field in dataclasses.fields(executor):
        if field.name in ("setup_lines", "packager", "tunnel"):
            continue
        value = getattr(executor, field.name, None)
        parts = [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else [value]
        yield from ((field.name, part) for part in parts if isinstance(part, str))


def _check_environment(executor: run.SlurmExecutor) -> None:
    for key in (*executor.env_vars, *(executor.container_env or [])):
        if not re.fullmatch(r"[A-Z_][A-Z0-9_]*", key):
            stop(f"environment variable {key!r}: capitals, digits and _ only (NeMo-Run writes names in capitals)")
    for key, value in executor.env_vars.items():
        if looks_secret(key):
            stop(
                f"run.executor.env_vars holds {key}, which looks like a secret and would be written into the sbatch "
                f"script: export {key} in the shell you submit from (Slurm passes it on) and leave it out here"
            )
        executor.env_vars[key] = shlex.quote(str(value)).replace("$", "$$")  # "$" starts one of NeMo-Run's macros


def network_environment() -> dict[str, str]:
    """``REST_ENV``: what a cluster's network wants, e.g. ``NCCL_SOCKET_IFNAME=ens3 GLOO_SOCKET_IFNAME=ens3``.

    And ``REST_INTERFACE``, the network between the nodes, for gloo and NCCL too.  :func:`shell_environment` has the
    words of ``REST_ENV`` that only a shell can carry out.
    """
    interface = os.environ.get(INTERFACE, "")
    chosen = {name: interface for name in (INTERFACE, "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME") if interface}
    return chosen | {name: value for name, kind, value in _words() if kind == "=" and name == name.upper()}


def shell_environment() -> str:
    """Lines of a job's script for the other words of ``REST_ENV``.

    ``LD_LIBRARY_PATH+=/opt/efa/lib`` puts a folder before those that the container or node has; a name in lower case
    (``http_proxy=...``) cannot be said to NeMo-Run, which writes all names in capitals.
    """
    lines = []
    for name, kind, value in _words():
        if kind == "+=":
            lines.append(f'export {name}={shlex.quote(value)}"${{{name}:+:${name}}}"\n')
        elif name != name.upper():
            lines.append(f"export {name}={shlex.quote(value)}\n")
    return "".join(lines)


def _words() -> list[tuple[str, str, str]]:
    """Name, ``=`` or ``+=``, and value."""
    found = []
    for word in shlex.split(os.environ.get("REST_ENV", "")):
        name, equals, value = word.partition("=")
        kind = "+=" if name.endswith("+") else "="
        name = name.removesuffix("+")
        if not equals or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            stop(f"REST_ENV holds {word!r}, expected NAME=value words (NAME+=value puts value before what is there)")
        if any(ord(character) < 32 for character in value):
            stop(f"REST_ENV: {name} holds a line break or another control character")
        found.append((name, kind, value))
    return found
