"""The recipe of the 70B model, scaled down to CPU ranks, submitted by NeMo-Run to a real Slurm of three nodes.

1. ranks and engines are groups of one job, with ranks, GPUs and an address that other nodes reach; a chain goes on
2. the time limit's warning reaches the ranks before it, and the job's scripts end; a job that failed is requeued
3. cancelling ends everything; arrays and a folder in use are refused
4. the trainer itself: shipped code, engines on another node, where this project is not installed

In 1 to 3 a script stands in for the trainer; in 4 nothing does.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from megatron_rest.commands.tiny import make_base
from tests.cluster.slurm import Slurm, started, why_not
from tests.helpers.shipped import bare_python

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [
    pytest.mark.extended,
    pytest.mark.timeout(900),
    pytest.mark.skipif(bool(why_not()), reason=f"no real Slurm here: {why_not()}"),
]

STAND_IN = """#!/bin/bash
# stands in for trainer and host: notes who was called with what, and ends as the test wants
out="$TEST_OUT"
case "$2" in
  megatron_rest.rollout.host)
    printf '%s\\n' "$SLURM_PROCID $SLURM_NTASKS $SLURMD_NODENAME $MASTER_ADDR $CUDA_VISIBLE_DEVICES ${*:3}" \\
      > "$out/host-$SLURM_JOB_ID-$SLURM_PROCID"
    trap '' TERM
    sleep 300 & wait $!; wait ;;
  megatron_rest.cli) echo "${*:3}" > "$out/command"; exit ;;
esac
[ -f megatron_rest/trainer/__main__.py ] || exit 9
printf '%s\\n' "$RANK $LOCAL_RANK $WORLD_SIZE $LOCAL_WORLD_SIZE $MASTER_ADDR $MASTER_PORT $SLURMD_NODENAME \\
$CUDA_VISIBLE_DEVICES" >> "$out/rank-$SLURM_JOB_ID-$RANK"
case "${TEST_MODE:-}" in
  fail-once) if [ ! -f "$out/failed" ]; then [ "$RANK" != 1 ] || { touch "$out/failed"; exit 3; }; sleep 60; fi ;;
  wait) trap 'echo TERM > "$out/term-$RANK"; exit 75' TERM; sleep 200 & wait $! ;;
esac
"""

# The 70B recipe's job, scaled down: 2 nodes of ranks and one of engines instead of 8 and 4; its scripts stay its own.
SCALED = (
    "nodes=2", "run.executor.partition=batch", "rollout.nodes=1", "rollout.replicas=1", "parallel.tensor_parallel=1",
    "parallel.pipeline_parallel=1", "parallel.virtual_pipeline=1", "parallel.sequence_parallel=false",
    "precision.recipe=none", "precision.bf16_layers_start=0", "precision.bf16_layers_end=0",
)  # fmt: skip


class Cluster:
    def __init__(self, slurm: Slurm, folder: Path) -> None:
        self.slurm, self.folder = slurm, folder
        python = folder / "stand in"
        python.write_text(STAND_IN)
        python.chmod(0o755)
        # Without PYTHONPATH, which the job would inherit: what runs there is what was shipped.
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "REST_", "PYTHONPATH"))}
        self.env = kept | slurm.env | {
            "NEMORUN_HOME": str(folder / "nemo"), "SLURM_ACCOUNT": "team", 
            "TEST_OUT": str(folder), "REST_PYTHON": str(python),
        }  # fmt: skip

    def recipe(self, run_dir: str, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "launch.cli", str(ROOT / "launch/rest_70b.py"), *SCALED,
             f"trainer.run_dir={self.folder / run_dir}", *arguments],
            cwd=ROOT, env=self.env | env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120,
            check=False,
        )  # fmt: skip

    def submit(self, run_dir: str, *arguments: str, **env: str) -> list[int]:
        """Numbers of the new jobs."""
        before = set(self.slurm.jobs())
        done = self.recipe(run_dir, "--yes", "--detach", *arguments, **env)
        assert done.returncode == 0, done.stdout + done.stderr
        return sorted(set(self.slurm.jobs()) - before)

    def said(self, name: str, seconds: float = 60) -> list[str]:
        """Words of the first line that a stand-in wrote."""
        path, end = self.folder / name, time.monotonic() + seconds
        while not (path.is_file() and path.read_text().endswith("\n")):
            assert time.monotonic() < end, f"{name} has not come: {self.slurm.jobs()}"
            time.sleep(0.2)
        return path.read_text().splitlines()[0].split()

    def logs(self) -> str:
        texts = [path.read_text(errors="replace")[-3000:] for path in (self.folder / "nemo").rglob("*.out")]
        texts += [path.read_text(errors="replace")[-3000:] for path in self.folder.glob("*/logs/*.log")]
        return "\n".join(texts)


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    with started(tmp_path_factory.mktemp("slurm")) as one:
        yield one


@pytest.fixture
def cluster(slurm: Slurm, tmp_path: Path) -> Cluster:
    return Cluster(slurm, tmp_path)


def test_ranks_and_engines_are_groups_of_one_job_and_a_chain_goes_on(cluster: Cluster) -> None:
    first, second, last = cluster.submit("a run's folder", "links=2", "evaluate=true")
    assert cluster.slurm.jobs()[second]["Dependency"].startswith("afterany:")
    for job in (first, second):
        ended = cluster.slurm.wait(job, "COMPLETED", "FAILED", seconds=90)
        assert ended["JobState"] == "COMPLETED", cluster.logs()
    ranks = [cluster.said(f"rank-{first}-{rank}") for rank in range(16)]
    assert [words[:4] for words in ranks] == [[str(r), str(r % 8), "16", "8"] for r in range(16)]
    assert {words[4] for words in ranks} == {cluster.slurm.address}, "what the other nodes reach, and no loopback"
    assert len({words[5] for words in ranks}) == 1
    assert [words[6] for words in ranks] == ["n1"] * 8 + ["n2"] * 8
    host = cluster.said(f"host-{first}-0")
    assert host[:4] == ["0", "1", "n3", cluster.slurm.address]
    shown = host[4]  # a rank or a host sees all GPUs of its node
    assert shown == "0,1,2,3,4,5,6,7" or shown.startswith("/"), host
    assert " ".join(host).endswith("/engines --gpus 8")
    assert cluster.slurm.wait(last, "COMPLETED", "FAILED", seconds=60)["TresPerNode"] == "gres:gpu:8"
    assert "--tensor-parallel 8" in (cluster.folder / "command").read_text()


def test_the_warning_comes_before_the_limit_and_everything_ends(cluster: Cluster) -> None:
    limit = ("run.executor.time=00:02:00", "run.executor.signal=TERM@80")  # room to end on a busy machine
    [job] = cluster.submit("run", *limit, TEST_MODE="wait")
    assert cluster.said("term-0", seconds=100) == ["TERM"] and cluster.said("term-15") == ["TERM"]
    ended = cluster.slurm.wait(job, "FAILED", "TIMEOUT", "COMPLETED", seconds=60)
    assert (ended["JobState"], ended["ExitCode"]) == ("FAILED", "75:0"), "stopped early, and not by force"


def test_a_job_that_fails_is_requeued(cluster: Cluster) -> None:
    [job] = cluster.submit("run", "requeue=1", TEST_MODE="fail-once")
    ended = cluster.slurm.wait(job, "COMPLETED", seconds=300)
    assert ended["Restarts"] == "1"
    assert len((cluster.folder / f"rank-{job}-0").read_text().splitlines()) == 2, "the same job, twice"


def test_cancelling_ends_everything_and_what_must_fail_is_refused(cluster: Cluster) -> None:
    [job] = cluster.submit("run", TEST_MODE="wait")
    cluster.said(f"rank-{job}-15")
    refused = cluster.recipe("run", "--yes", "--detach", "run.executor.array=0-1")
    assert refused.returncode == 2 and "would share one run folder" in refused.stderr, refused.stderr
    [experiment] = {path.name for path in (cluster.folder / "nemo").rglob("rest_70b_*") if path.is_dir()}
    subprocess.run(
        [sys.executable, "-m", "launch.cli", "experiment", "cancel", experiment, "0"],
        env=cluster.env, cwd=ROOT, capture_output=True, timeout=60, check=True, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert cluster.slurm.wait(job, "CANCELLED", seconds=60)
    end = time.monotonic() + 30
    while left := [p.pid for p in psutil.process_iter(["cmdline"]) if str(cluster.folder) in str(p.info["cmdline"])]:
        assert time.monotonic() < end, f"still there after scancel: {left}"
        time.sleep(0.5)


def test_the_trainer_itself_runs_as_it_is_shipped(cluster: Cluster) -> None:
    base = make_base(cluster.folder)
    python = bare_python(cluster.folder / "venv")
    tiny = (
        "run.executor.ntasks_per_node=1", "run.executor.gpus_per_node=1", "rollout.tensor_parallel=1",
        f"model.path={base / 'model'}", f"data.train={base / 'train'}", "model.dtype=float32", "rollout.dtype=float32",
        "model.max_sequence_length=352", "data.max_prompt_tokens=256", "rollout.max_response_tokens=32",
        "data.prompts_per_step=4", "rollout.rollouts_per_prompt=2", "optimizer.updates_per_step=1",
        "weight_sync.transport=gloo", "rollout.max_concurrent=16",
        "rollout.kv_cache_bytes=16777216", "trainer.max_tokens_per_microbatch=1024", "trainer.steps=2",
        "trainer.timeout_minutes=5", "checkpoint.export_hf=false", "checkpoint.save_every=0",
    )  # fmt: skip
    env = {"REST_PYTHON": str(python), "REST_GPUS_PER_NODE": "0"}
    [job] = cluster.submit("run", *tiny, **env)
    ended = cluster.slurm.wait(job, "COMPLETED", "FAILED", seconds=600)
    run = cluster.folder / "run"
    assert ended["JobState"] == "COMPLETED", cluster.logs()
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 2
    [start] = [json.loads(line) for line in (run / "starts.jsonl").read_text().splitlines()]
    assert start["world_size"] == 2 and start["job"]["SLURM_JOB_ID"] == str(job)
    assert "megatron_rest" not in start["packages"], "it is not installed there"
    said = (run / "logs/engines-0.log").read_text()
    assert f"engines for {run}/engines at {cluster.slurm.address} port" in said
    assert not (run / "lock.json").exists()
    assert (run / "run.yaml").is_file()
