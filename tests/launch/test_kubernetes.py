"""Whole TrainJobs on a stand-in Kubernetes: NeMo-Run's executor, its client, and torchrun in the pods are real."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from launch.processes import descendants
from launch.script import node_script
from launch.trainjob import _dollars_kept
from megatron_rest.config import ModelConfig, RestConfig, TrainerConfig, from_dict

from .conftest import ROOT
from .fakekube import expand, expanded_environment

PYTHON = """#!/bin/bash
# the image's python: the real torchrun, with a stand-in for the trainer
export PYTHONPATH='{root}' OMP_NUM_THREADS=1
exec '{python}' "${{@/#megatron_rest.trainer/tests.launch.kuberank}}"
"""
SMALL = ("run.executor=kubeflow", "run.executor.gpus_per_node=2", "parallel.tensor_parallel=2")


class Cluster:
    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.folder = folder
        self.run_dir = folder / "run"
        tools, image = folder / "bin", folder / "image"
        for path in (tools, image, folder / "state"):
            path.mkdir()
        stand_in = Path(__file__).with_name("fakekube.py")
        program(tools / "kubectl", f'#!/bin/bash\nexec "{sys.executable}" "{stand_in}" kubectl "$@"\n')
        program(image / "python", PYTHON.format(root=ROOT, python=sys.executable))
        self.env = environment | {
            "FAKEKUBE_STATE": str(folder / "state"), "KUBECONFIG": str(folder / "state/kubeconfig"),
            "NEMORUN_HOME": str(folder / "nemo"), "REST_IMAGE": "img:1", "REST_MOUNTS": f"lustre:{folder}",
            "PATH": f"{tools}:{environment['PATH']}",
        }  # fmt: skip
        self.server = subprocess.Popen(
            [sys.executable, str(stand_in), "serve", str(folder / "state"), str(image)], env=self.env
        )
        wait_for(lambda: (folder / "state/kubeconfig").exists(), "the server")

    def nemo_run(self, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "launch.cli", *arguments],
            capture_output=True, text=True, cwd=self.folder, env=self.env | env, stdin=subprocess.DEVNULL, timeout=500,
            check=False,
        )  # fmt: skip

    def submit(self, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        recipe = str(ROOT / "launch/rest_8b.py")
        return self.nemo_run(recipe, "--yes", *SMALL, f"trainer.run_dir={self.run_dir}", *arguments, **env)

    def ranks(self) -> dict[int, dict]:
        return {(r := json.loads(p.read_text()))["RANK"]: r for p in self.run_dir.glob("rank-*.json")}

    def jobs(self) -> list[dict]:
        files = [p for p in (self.folder / "state").iterdir() if p.suffix in (".json", ".deleted")]
        return [json.loads(path.read_text()) for path in files]

    def close(self) -> None:
        for pod in [pod for job in self.jobs() for pod in job["pods"]]:
            for pid in [*descendants(pod["pid"]), pod["pid"]]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        self.server.kill()
        self.server.wait()


def program(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


def wait_for(condition, what: str) -> None:
    deadline = time.monotonic() + 240
    while not condition():
        assert time.monotonic() < deadline, f"waited for {what}"
        time.sleep(0.05)


@pytest.fixture
def cluster(tmp_path: Path, environment: dict[str, str]) -> Iterator[Cluster]:
    one = Cluster(tmp_path, environment)
    yield one
    one.close()


def test_a_trainjob_runs_every_rank_with_the_submitted_configuration_and_no_secret(cluster: Cluster) -> None:
    secrets = {"HF_TOKEN": "hf_zq81xv", "WANDB_API_KEY": "zq81xv-key"}
    done = cluster.submit("nodes=2", "trainer.steps=1", "optimizer.lr=3e-6", **secrets)
    assert done.returncode == 0, done.stdout + done.stderr
    ranks = cluster.ranks()
    assert sorted(ranks) == [0, 1, 2, 3]
    for rank, record in ranks.items():
        assert (record["WORLD_SIZE"], record["LOCAL_WORLD_SIZE"]) == (4, 2)
        assert (record["GROUP_RANK"], record["LOCAL_RANK"]) == divmod(rank, 2)
        assert yaml.safe_load(record["config"])["optimizer"]["lr"] == 3e-6
        assert record["environment"]["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"
        assert record["config"] == (cluster.run_dir / "run.yaml").read_text()
    assert "rank 0 has begun" in done.stdout + done.stderr  # followed with kubectl while it ran
    assert [p for p in cluster.run_dir.glob("logs/node-1/*/attempt_0/1/stdout.log") if "rank 3" in p.read_text()]
    (job,) = cluster.jobs()
    override = job["body"]["spec"]["podTemplateOverrides"][0]["spec"]
    assert {"name": "claim-0", "mountPath": str(cluster.folder)} in override["containers"][0]["volumeMounts"]
    for path in [*(cluster.folder / "nemo").rglob("*"), *(cluster.folder / "state").rglob("*")]:
        assert not path.is_file() or b"zq81xv" not in path.read_bytes(), path


@pytest.mark.extended
def test_status_logs_and_cancel_are_nemo_runs_and_cancelled_ranks_have_time_to_save(cluster: Cluster) -> None:
    done = cluster.submit("--detach", "trainer.steps=9")
    assert done.returncode == 0, done.stdout + done.stderr
    wait_for(lambda: len(list(cluster.run_dir.glob("waiting-*"))) == 2, "ranks")
    (experiment,) = {re.search(r"rest_8b_\d{10,}", str(p))[0] for p in (cluster.folder / "nemo").rglob("rest_8b_*")}
    status = cluster.nemo_run("experiment", "status", experiment)
    assert "RUNNING" in status.stdout, status.stdout + status.stderr
    cluster.nemo_run("experiment", "cancel", experiment, "0")
    wait_for(lambda: len(list(cluster.run_dir.glob("saved-*"))) == 2, "ranks to save")
    assert not list((cluster.folder / "state").glob("rest-8b-*.json")), "the TrainJob is deleted"


@pytest.mark.extended
def test_a_failed_rank_is_a_failed_command_whose_log_can_be_read_later(cluster: Cluster) -> None:
    done = cluster.submit("trainer.steps=1", "trainer.seed=13")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "train FAILED" in done.stderr
    (experiment,) = {re.search(r"rest_8b_\d{10,}", str(p))[0] for p in (cluster.folder / "nemo").rglob("rest_8b_*")}
    logs = cluster.nemo_run("experiment", "logs", experiment, "0")
    assert "rank 0 has begun" in logs.stdout + logs.stderr, logs.stdout + logs.stderr


METACHARACTERS = st.text(st.sampled_from("ab $`'\"\\\n;|&<>(){}[]*?!#~%=\té"), min_size=1, max_size=12)
POD = """#!/bin/bash
for word in "$@"; do case "$word" in */tmp.*.yaml) cp "$word" "$TEST_OUT";; esac; done
"""


@settings(max_examples=40, deadline=None)
@given(text=METACHARACTERS)
def test_no_value_breaks_out_of_its_quotes_or_is_replaced(text: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("pod")
    program(folder / "python", POD)
    run_dir = folder / f"r{text}$(HOME)$$"
    config = RestConfig(
        model=ModelConfig(path=f"/m/{text}$(touch {folder}/pwned)$(HOME)${{HOME}}"),
        trainer=TrainerConfig(run_dir=str(run_dir)),
    )
    env = expanded_environment(
        [{"name": "HOME", "value": "/nowhere"}, {"name": "X", "value": _dollars_kept(f"{text}$(HOME)$$")}]
    )
    assert env["X"] == f"{text}$(HOME)$$"
    script = expand(_dollars_kept(node_script(config)), env)
    subprocess.run(
        ["bash", "-c", script], cwd=folder, check=True, timeout=300,
        env={"PATH": f"{folder}:/usr/bin:/bin", "TEST_OUT": str(folder / "config.yaml"), "PET_NODE_RANK": "0",
             "TMPDIR": str(folder)},
    )  # fmt: skip
    assert from_dict(RestConfig, yaml.safe_load((folder / "config.yaml").read_text())) == config
    assert (run_dir / "run.yaml").is_file()
    assert not (folder / "pwned").exists()


def test_a_pod_of_another_runtime_says_what_is_missing() -> None:
    done = subprocess.run(
        ["bash", "-c", node_script(RestConfig())], capture_output=True, text=True, env={}, check=False
    )
    assert done.returncode != 0
    assert "has to be a torch runtime" in done.stderr
