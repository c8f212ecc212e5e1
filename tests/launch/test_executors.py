"""No text that a user may give an executor breaks out of the sbatch script that NeMo-Run makes of it (fuzzed)."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launch.compat import ensure_nemo_run_importable
from launch.executors import check_executor, slurm

ensure_nemo_run_importable()
import fiddle as fdl  # noqa: E402
import nemo_run as run  # noqa: E402
from nemo_run.core.execution.slurm import SlurmBatchRequest  # noqa: E402

METACHARACTERS = st.text(st.sampled_from("ab $`'\"\\\n;|&<>(){}[]*?!#~%=\té"), min_size=1, max_size=12)
LISTS = ("container_mounts", "container_env", "srun_args")
FIELDS = ("account", "partition", "qos", "comment", "constraint", "gres", "mem", "time", "signal", "network",
          "job_name_prefix", "container_image")  # fmt: skip
NODE = """
srun() { [ "$1" = --nodes=1 ] && echo 127.0.0.1 || true; }
scontrol() { echo node; }
"""


def sbatch_script(executor: run.SlurmExecutor, folder: Path) -> str:
    executor.assign("experiment", str(folder), "train", "train")
    request = SlurmBatchRequest(
        launch_cmd=["sbatch"], jobs=["train"], command_groups=[["bash", "train.sh"]], executor=executor, max_retries=0,
        extra_env={}, launcher=None,
    )  # fmt: skip
    return request.materialize()


def executor_with(**values: object) -> run.SlurmExecutor:
    executor: run.SlurmExecutor = fdl.build(slurm())
    for name, value in values.items():
        setattr(executor, name, value)
    return executor


@settings(max_examples=60, deadline=None)
@given(
    text=METACHARACTERS,
    field=st.sampled_from([*FIELDS, "env_vars", "container_mounts", "container_env", "srun_args", "parameters"]),
)
def test_no_text_of_an_executor_is_run(text: str, field: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("sbatch")
    hostile = f"{text}$(touch {folder}/pwned)`touch {folder}/pwned`;touch {folder}/pwned;\n touch {folder}/pwned\n"
    for value in (hostile, hostile.replace("\n", " "), hostile.replace("\n", "'")):
        executor = executor_with(account="team")
        if field == "env_vars":
            executor.env_vars["X"] = value
        elif field == "parameters":
            executor.additional_parameters = {value: "1"}
        elif field in FIELDS:
            setattr(executor, field, value)
        else:
            executor.container_image = "image" if field.startswith("container") else None
            setattr(executor, field, [value])
        try:
            check_executor(executor)
        except SystemExit as error:
            assert error.code == 2
            continue
        script = sbatch_script(executor, folder)
        env = {"PATH": os.environ["PATH"], "SLURM_JOB_NODELIST": "node", "SLURM_JOB_ID": "1"}
        subprocess.run(
            ["bash", "-c", NODE + script], cwd=folder, env=env, capture_output=True, timeout=300, check=False
        )
        assert not (folder / "pwned").exists(), script


@pytest.mark.parametrize("home", ["/lustre/my home", "/lustre/$(id)", "/lustre/nemo_run"])
def test_a_home_that_nemo_run_cannot_write_down_is_refused(home: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEMORUN_HOME", home)
    with pytest.raises(SystemExit):
        check_executor(executor_with(account="team"))


def test_setup_lines_are_shell_by_intent() -> None:
    check_executor(executor_with(account="team", setup_lines="module load cuda\nulimit -n 65536"))
