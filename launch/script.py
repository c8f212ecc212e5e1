"""Scripts of Slurm's tasks and Kubernetes' pods: shell that ends in ``exec python -m ...``.

Every value in them is quoted or in a file.
"""

import shlex
from collections.abc import Sequence

from launch.executors import shell_environment
from launch.recipe import as_yaml, stop
from megatron_rest.config import RestConfig

__all__ = ["command_script", "host_script", "node_script", "rank_script"]

_PORT = "$((29400 + ${SLURM_JOB_ID:-0} % 1000))"  # jobs that share a machine, as in tests, take different ones
_END = "END_OF_RUN_YAML"
_PYTHON = '"${REST_PYTHON:-python}"'
# For those who look before the trainer has begun; if one is there the trainer compares (megatron_rest/run_folder.py).
_LEAVE_CONFIGURATION = """  if [ ! -e "$run_dir/run.yaml" ]; then
    cat "$config" > "$run_dir/run.yaml.part"  # not cp: mktemp's file is for its owner alone
    mv "$run_dir/run.yaml.part" "$run_dir/run.yaml"
  fi"""
_SAVE_SECONDS = 300  # as long as Slurm gives (launch/executors.py, signal); torchrun's 30 kill a rank while it saves


def rank_script(
    config: RestConfig, module: str, *, ranks_per_node: int, code: str, gpus_per_node: int = 0, user_code: str = ""
) -> str:
    """``python -m module --config FILE`` on every rank; what a rank needs to know, Slurm says.

    The configuration travels inside the script: what was submitted is what runs.  Rank 0 writes the job's log, the
    others ``logs/rank-N.log``; what is wrong with one node stands in both.  Nothing stays in the node's temporary
    folder.  ``code`` says which code was shipped, ``user_code`` what of the user's.
    """
    text = as_yaml(config)
    refuse_rewritten(text)
    return f"""set -euo pipefail
{_configuration(text)}
export RANK="$SLURM_PROCID" LOCAL_RANK="$SLURM_LOCALID" WORLD_SIZE="$SLURM_NTASKS"
export LOCAL_WORLD_SIZE={ranks_per_node} MASTER_PORT="${{MASTER_PORT:-{_PORT}}}"
export REST_GPUS_PER_NODE="${{REST_GPUS_PER_NODE:-{gpus_per_node}}}"
export REST_CODE={shlex.quote(code)} REST_USER_CODE={shlex.quote(user_code)}
{shell_environment()}run_dir={shlex.quote(config.trainer.run_dir)}
mkdir -p "$run_dir/logs"
if [ "$RANK" = 0 ]; then
{_LEAVE_CONFIGURATION}
else
  exec 3>&2
  export REST_JOB_LOG=3
  exec >> "$run_dir/logs/rank-$RANK.log" 2>&1
fi
exec 4< "$config"
rm "$config"
exec {_PYTHON} -m {module} --config /dev/fd/4
"""


def node_script(
    config: RestConfig, *, gpus_per_node: int = 0, code: str = "unknown", user_code: str = "", unpack: str = ""
) -> str:
    """A node of Kubeflow Trainer's torch runtimes: torchrun, which reads the variables PET_* that they set.

    Torchrun waits for its ranks as long as a step and its checkpoint may take; how long Kubernetes waits for torchrun
    the runtime says.  Rank 0 and the last one are told apart by the prefix that NeMo-Run looks for in the log.
    ``unpack`` is shell that brings the user's own packages along (launch/shipping.py).
    """
    return f"""set -euo pipefail
: "${{PET_NODE_RANK:?is not set: run.executor.runtime_ref has to be a torch runtime of Kubeflow Trainer}}"
{_configuration(as_yaml(config))}
{unpack}export REST_GPUS_PER_NODE="${{REST_GPUS_PER_NODE:-{gpus_per_node}}}"
export REST_CODE={shlex.quote(code)} REST_USER_CODE={shlex.quote(user_code)}
{shell_environment()}run_dir={shlex.quote(config.trainer.run_dir)}
mkdir -p "$run_dir/logs"
if [ "$PET_NODE_RANK" = 0 ]; then
{_LEAVE_CONFIGURATION}
fi
exec {_PYTHON} -m torch.distributed.run --shutdown-timeout {_SAVE_SECONDS} --tee 3 \\
  --log-dir "$run_dir/logs/node-$PET_NODE_RANK" -m megatron_rest.trainer --config "$config"
"""


def _configuration(text: str) -> str:
    """Shell that writes the YAML ``text`` into the file ``$config``."""
    if any(line.strip() == _END for line in text.splitlines()):
        stop(f"the configuration contains the line {_END}, which ends it in the job's script")
    return f"""config=$(mktemp --suffix=.yaml)
cat > "$config" <<'{_END}'
{text}{_END}
"""


def host_script(config: RestConfig, *, gpus: int) -> str:
    """A node that runs engines for the ranks of another group (megatron_rest/rollout/host.py)."""
    refuse_rewritten(config.trainer.run_dir)
    return f"""set -euo pipefail
run_dir={shlex.quote(config.trainer.run_dir)}
mkdir -p "$run_dir/logs"
exec 3>&2
export REST_JOB_LOG=3
exec >> "$run_dir/logs/engines-$SLURM_PROCID.log" 2>&1
{shell_environment()}exec {_PYTHON} -m megatron_rest.rollout.host "$run_dir/engines" --gpus {gpus}
"""


def command_script(module: str, arguments: Sequence[str]) -> str:
    """``python -m module arguments`` once."""
    words = shlex.join(arguments)
    refuse_rewritten(words)
    return f"set -euo pipefail\n{shell_environment()}exec {_PYTHON} -m {module} {words}\n"


def refuse_rewritten(text: str) -> None:
    """NeMo-Run replaces /nemo_run in the scripts of jobs without a container."""
    if "/nemo_run" in text:
        stop("a path contains /nemo_run, which NeMo-Run replaces in scripts: choose another")
