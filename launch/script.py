"""The script of a Slurm task: shell that ends in ``exec python -m ...``.  Every value in it is quoted or in a file."""

import shlex
from collections.abc import Sequence

from launch.recipe import as_yaml, stop
from megatron_rest.config import RestConfig

__all__ = ["command_script", "host_script", "rank_script"]

_PORT = 29400  # jobs have their nodes to themselves (exclusive), so a fixed port is free
_END = "END_OF_RUN_YAML"
_PYTHON = '"${REST_PYTHON:-python}"'


def rank_script(config: RestConfig, module: str, *, ranks_per_node: int, code: str) -> str:
    """``python -m module --config FILE`` on every rank; what a rank needs to know, Slurm says.

    The configuration travels inside the script: what was submitted is what runs.  Rank 0 writes the job's log, the
    others ``<run_dir>/logs/rank-N.log``.  ``code`` says which code was shipped.
    """
    text = as_yaml(config)
    if any(line.strip() == _END for line in text.splitlines()):
        stop(f"the configuration contains the line {_END}, which ends it in the job's script")
    refuse_rewritten(text)
    return f"""set -euo pipefail
config=$(mktemp --suffix=.yaml)
cat > "$config" <<'{_END}'
{text}{_END}

export RANK="$SLURM_PROCID" LOCAL_RANK="$SLURM_LOCALID" WORLD_SIZE="$SLURM_NTASKS"
export LOCAL_WORLD_SIZE={ranks_per_node} MASTER_PORT={_PORT} REST_CODE={shlex.quote(code)}
run_dir={shlex.quote(config.trainer.run_dir)}
mkdir -p "$run_dir/logs"
if [ "$RANK" = 0 ]; then
  cp "$config" "$run_dir/run.yaml.part"
  mv "$run_dir/run.yaml.part" "$run_dir/run.yaml"
else
  exec >> "$run_dir/logs/rank-$RANK.log" 2>&1
fi
exec {_PYTHON} -m {module} --config "$config"
"""


def host_script(config: RestConfig, *, gpus: int) -> str:
    """A node that runs engines for the ranks of another group (megatron_rest/rollout/host.py)."""
    refuse_rewritten(config.trainer.run_dir)
    return f"""set -euo pipefail
run_dir={shlex.quote(config.trainer.run_dir)}
mkdir -p "$run_dir/logs"
exec >> "$run_dir/logs/engines-$SLURM_PROCID.log" 2>&1
exec {_PYTHON} -m megatron_rest.rollout.host "$run_dir/engines" --gpus {gpus}
"""


def command_script(module: str, arguments: Sequence[str]) -> str:
    """``python -m module arguments`` once."""
    words = shlex.join(arguments)
    refuse_rewritten(words)
    return f"set -euo pipefail\nexec {_PYTHON} -m {module} {words}\n"


def refuse_rewritten(text: str) -> None:
    """NeMo-Run replaces /nemo_run in the scripts of jobs without a container."""
    if "/nemo_run" in text:
        stop("a path contains /nemo_run, which NeMo-Run replaces in scripts: choose another")
