"""The script of a rank: what it hands to the trainer, and that no value breaks out of it."""

from __future__ import annotations

import dataclasses
import os
import subprocess
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from launch.script import command_script, rank_script
from megatron_rest.config import ModelConfig, RestConfig, TrainerConfig, from_dict

FAKE_PYTHON = """#!/bin/bash
printf '%s\\n' "$RANK" "$LOCAL_RANK" "$WORLD_SIZE" "$MASTER_PORT" "${@:1:3}" > "$TEST_OUT/call"
cp "$4" "$TEST_OUT/config.yaml"
"""


def run_rank(folder: Path, config: RestConfig, *, rank: int = 0) -> list[str]:
    """Run the script with a stand-in for python; the lines it was called with."""
    binaries = folder / "bin"
    binaries.mkdir(exist_ok=True)
    (binaries / "python").write_text(FAKE_PYTHON)
    (binaries / "python").chmod(0o755)
    env = {
        "PATH": f"{binaries}:/usr/bin:/bin", "HOME": "/nowhere", "TEST_OUT": str(folder), "TMPDIR": str(folder),
        "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank % 8), "SLURM_NTASKS": "16",
    }  # fmt: skip
    (folder / "script.sh").write_text(script(config))
    subprocess.run(["bash", str(folder / "script.sh")], cwd=folder, env=env, check=True, timeout=300)
    return (folder / "call").read_text().splitlines()


def script(config: RestConfig) -> str:
    return rank_script(config, "megatron_rest.trainer", ranks_per_node=8, code="abc123")


def configuration(run_dir: Path, path: str = "/models/m") -> RestConfig:
    return RestConfig(model=ModelConfig(path=path), trainer=TrainerConfig(run_dir=str(run_dir)))


def test_a_rank_learns_its_place_from_slurm(tmp_path: Path) -> None:
    call = run_rank(tmp_path, configuration(tmp_path / "run"), rank=11)
    assert call == ["11", "3", "16", "29400", "-m", "megatron_rest.trainer", "--config"]
    assert (tmp_path / "run/logs/rank-11.log").exists()
    assert not (tmp_path / "run/run.yaml").exists()


def test_rank_0_leaves_the_configuration_in_the_run_folder(tmp_path: Path) -> None:
    config = configuration(tmp_path / "run")
    run_rank(tmp_path, config)
    for path in (tmp_path / "config.yaml", tmp_path / "run/run.yaml"):
        assert from_dict(RestConfig, yaml.safe_load(path.read_text())) == config


METACHARACTERS = st.text(st.sampled_from("ab $`'\"\\\n;|&<>(){}[]*?!#~%=\t\u00e9"), min_size=1, max_size=12)


@settings(max_examples=40, deadline=None)
@given(text=METACHARACTERS)
def test_no_value_breaks_out_of_its_quotes(text: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("quotes")
    run_dir = folder / f"r{text}"  # no slash among the characters: one folder
    config = configuration(run_dir, path=f"/m/{text}$(touch {folder}/pwned)")
    run_rank(folder, config)
    assert from_dict(RestConfig, yaml.safe_load((folder / "config.yaml").read_text())) == config
    assert (Path(os.fspath(run_dir)) / "run.yaml").is_file()
    assert not (folder / "pwned").exists()


@settings(max_examples=20, deadline=None)
@given(text=METACHARACTERS)
def test_no_argument_of_a_command_breaks_out_of_its_quotes(text: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("command")
    (folder / "python").write_text('#!/bin/bash\nprintf "%s\\0" "$@" > "$TEST_OUT"\n')
    (folder / "python").chmod(0o755)
    given_arguments = ["convert", "--input", f"/d/{text}$(touch {folder}/pwned)"]
    env = {"PATH": f"{folder}:/usr/bin:/bin", "TEST_OUT": str(folder / "out")}
    command = command_script("data_tools", given_arguments)
    subprocess.run(["bash", "-c", command], cwd=folder, env=env, check=True, timeout=300)
    assert (folder / "out").read_text().split("\0")[:-1] == ["-m", "data_tools", *given_arguments]
    assert not (folder / "pwned").exists()


def test_a_path_that_nemo_run_would_rewrite_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    config = dataclasses.replace(RestConfig(), model=ModelConfig(path="/data/nemo_run/m"))
    with pytest.raises(SystemExit) as error:
        script(config)
    assert error.value.code == 2
    assert "/nemo_run" in capsys.readouterr().err


def test_ranks_leave_no_file_behind_and_a_colleague_may_read_run_yaml(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        run_rank(tmp_path, configuration(tmp_path / "run"))
    finally:
        os.umask(before)
    assert not list(tmp_path.glob("tmp.*"))  # TMPDIR of the script
    assert (tmp_path / "run/run.yaml").stat().st_mode & 0o777 == 0o644
