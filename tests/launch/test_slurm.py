"""Whole jobs on a stand-in Slurm: submission, ranks, failure, chains, cancelling; NeMo-Run's own code does it all."""

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

from launch.processes import descendants

from .conftest import ROOT
from .forked import Server

FAKE_PYTHON = """#!/bin/bash
# stands in for the trainer and for the host of engines: note who was called with what, and end as the test wants
if [ "$2" = megatron_rest.rollout.host ]; then
  echo "$SLURM_PROCID of $SLURM_NTASKS: ${*:3}" > "$TEST_OUT/engines-$SLURM_PROCID"
  [ "$TEST_ENGINES" != fail ] || exit 4
  exec sleep "$TEST_ENGINES"
fi
if [ "$2" = megatron_rest.cli ]; then echo "${*:3}" > "$TEST_OUT/command-$SLURM_JOB_ID"; exit; fi
printf '%s ' "$RANK" "$LOCAL_RANK" "$WORLD_SIZE" "$MASTER_ADDR" "$SLURM_JOB_ID" >> "$TEST_OUT/call-$SLURM_JOB_ID-$RANK"
cp "$4" "$TEST_OUT/config-$RANK.yaml"
echo "rank $RANK has begun"
[ -f megatron_rest/trainer/__main__.py ] || exit 9  # the code has to be where the job runs
if [ "$RANK" = "${TEST_FAIL_RANK:-none}" ] && [ ! -f "$TEST_OUT/failed" ]; then
  until [ "$(ls "$TEST_OUT"/config-*.yaml | wc -l)" = "$WORLD_SIZE" ]; do sleep 0.05; done  # all have noted themselves
  touch "$TEST_OUT/failed"
  exit 3
fi
[ -z "${TEST_SLEEP:-}" ] || exec sleep "$TEST_SLEEP"
"""


class Cluster:
    def __init__(self, folder: Path, environment: dict[str, str], server: Server) -> None:
        self.folder = folder
        self._server = server
        tools = folder / "bin"
        tools.mkdir()
        self.env = environment | {
            "FAKESLURM_STATE": str(folder / "state"),
            "SLURM_ACCOUNT": "team",
            "TEST_OUT": str(folder),
            "NEMORUN_HOME": str(folder / "nemo"),
        }
        subprocess.run(
            [sys.executable, str(Path(__file__).with_name("fakeslurm.py")), "install", str(tools)],
            env=self.env, check=True,
        )  # fmt: skip
        (tools / "python").write_text(FAKE_PYTHON)
        (tools / "python").chmod(0o755)
        # ours first also after the launcher has made sure that this environment's programs are found
        self.env["PATH"] = f"{tools}:{Path(sys.executable).parent}:{self.env['PATH']}"

    def nemo_run(self, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        return self._server.run(list(arguments), env=self.env | env, cwd=self.folder)

    def submit(self, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        recipe = str(ROOT / "launch/rest_8b.py")
        return self.nemo_run(recipe, "--yes", f"trainer.run_dir={self.folder}/run", *arguments, **env)

    def jobs(self) -> list[dict[str, str]]:
        return [json.loads(path.read_text()) for path in sorted((self.folder / "state").glob("*.json"))]


@pytest.fixture
def cluster(tmp_path: Path, environment: dict[str, str], server: Server) -> Iterator[Cluster]:
    one = Cluster(tmp_path, environment, server)
    yield one
    for job in one.jobs():  # a failed test leaves no job behind
        for pid in [*descendants(int(job["pid"])), int(job["pid"])]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def test_a_job_runs_every_rank_with_the_submitted_configuration_and_no_secret(cluster: Cluster) -> None:
    done = cluster.submit("optimizer.lr=3e-6", HF_TOKEN="hf_zq81xv", WANDB_API_KEY="zq81xv-key")
    assert done.returncode == 0, done.stdout + done.stderr
    calls = {path.name: path.read_text().split() for path in cluster.folder.glob("call-*")}
    expected = {f"call-1001-{rank}": [str(rank), str(rank), "8", "127.0.0.1", "1001"] for rank in range(8)}
    assert calls == expected
    for rank in range(8):
        config = yaml.safe_load((cluster.folder / f"config-{rank}.yaml").read_text())
        assert config["optimizer"]["lr"] == 3e-6
    assert (cluster.folder / "run/run.yaml").read_text() == (cluster.folder / "config-0.yaml").read_text()
    for path in [*(cluster.folder / "nemo").rglob("*"), *(cluster.folder / "run").rglob("*")]:
        assert not path.is_file() or b"zq81xv" not in path.read_bytes(), path
    assert "zq81xv" not in done.stdout + done.stderr


@pytest.mark.extended
def test_a_failed_rank_is_a_failed_command(cluster: Cluster) -> None:
    done = cluster.submit(TEST_FAIL_RANK="5")
    assert done.returncode == 1, done.stdout
    assert "train FAILED" in done.stderr


def test_a_failed_rank_ends_the_others(cluster: Cluster) -> None:
    done = cluster.submit(TEST_FAIL_RANK="5", TEST_SLEEP="1000")  # longer than submit waits
    assert done.returncode == 1, done.stdout
    assert "train FAILED" in done.stderr


def test_a_chain_goes_on_after_a_link_that_was_stopped(cluster: Cluster) -> None:
    done = cluster.submit("links=2", "evaluate=true", TEST_FAIL_RANK="0")
    assert done.returncode == 0, done.stderr  # what the last link ends with counts
    assert [job["state"] for job in cluster.jobs()] == ["FAILED", "COMPLETED", "COMPLETED"]
    assert [job["after"] for job in cluster.jobs()] == ["", "afterany:1001", "afterok:1002"]
    evaluated = (cluster.folder / "command-1003").read_text()
    assert evaluated.startswith(f"eval run {cluster.folder}/run --output {cluster.folder}/run/eval ")
    assert len(list(cluster.folder.glob("call-1002-*"))) == 8


def test_a_failed_job_is_put_back_into_the_queue(cluster: Cluster) -> None:
    done = cluster.submit("requeue=1", TEST_FAIL_RANK="5")
    assert done.returncode == 0, done.stdout + done.stderr
    assert [(job["state"], job["restarts"]) for job in cluster.jobs()] == [("COMPLETED", 1)]
    calls = (cluster.folder / "call-1001-0").read_text().split()
    assert calls.count("1001") == 2, "the same job, twice"


@pytest.mark.extended
def test_what_waits_for_a_failed_job_is_not_run(cluster: Cluster) -> None:
    done = cluster.submit("warm_start=true", "evaluate=true", TEST_FAIL_RANK="3")
    assert done.returncode == 1
    assert "warm-start FAILED" in done.stderr
    assert [job["state"] for job in cluster.jobs()] == ["FAILED", "CANCELLED", "CANCELLED"]
    assert not list(cluster.folder.glob("c*-100[23]*")), "neither training nor its evaluation"


ENGINES = ("rollout.nodes=2", "rollout.replicas=2", "rollout.tensor_parallel=8", "weight_sync.transport=gloo")
ENGINES += ("rollout.sleep_level=0",)  # they have GPUs of their own


def test_ranks_and_engines_are_groups_of_one_job(cluster: Cluster) -> None:
    done = cluster.submit(*ENGINES, "run.executor.ntasks_per_node=8", TEST_ENGINES="1000")
    assert done.returncode == 0, done.stdout + done.stderr  # the ranks ended well, so the engines' group was ended
    (job,) = cluster.jobs()
    assert job["state"] == "COMPLETED"
    assert len(list(cluster.folder.glob("call-1001-*"))) == 8
    hosts = sorted(path.read_text() for path in cluster.folder.glob("engines-*"))
    assert hosts == [f"{node} of 2: {cluster.folder}/run/engines --gpus 8\n" for node in range(2)]


@pytest.mark.extended
@pytest.mark.parametrize(
    "failing", [{"TEST_FAIL_RANK": "5", "TEST_ENGINES": "1000"}, {"TEST_ENGINES": "fail", "TEST_SLEEP": "1000"}]
)
def test_one_group_that_fails_ends_the_other(failing: dict[str, str], cluster: Cluster) -> None:
    done = cluster.submit(*ENGINES, **failing)  # which waits less than the group that goes on would
    assert done.returncode == 1, done.stdout
    assert "train FAILED" in done.stderr


@pytest.mark.slow
def test_status_logs_and_cancel_are_nemo_runs(cluster: Cluster) -> None:
    done = cluster.submit("--detach", TEST_SLEEP="1000")
    assert done.returncode == 0, done.stdout + done.stderr
    deadline = time.monotonic() + 400
    while cluster.jobs()[0]["state"] != "RUNNING":
        assert time.monotonic() < deadline
        time.sleep(0.1)
    (experiment,) = re.findall(
        r"rest_8b_\d{10,}", " ".join(p.name for p in (cluster.folder / "nemo").rglob("rest_8b_*"))
    )
    while not any("rank 0 has begun" in p.read_text() for p in (cluster.folder / "nemo").rglob("log-rest-train_*.out")):
        assert time.monotonic() < deadline, "a job that runs has started its ranks, sooner or later"
        time.sleep(0.1)
    status = cluster.nemo_run("experiment", "status", experiment)
    assert "RUNNING" in status.stdout, status.stdout + status.stderr
    cluster.nemo_run("experiment", "cancel", experiment, "0")
    assert cluster.jobs()[0]["state"] == "CANCELLED"
    logs = cluster.nemo_run("experiment", "logs", experiment, "0")  # of a running job it follows
    assert "rank 0 has begun" in logs.stdout + logs.stderr, logs.stdout + logs.stderr
