"""A stand-in Slurm on one machine, enough for NeMo-Run's executor: sbatch, srun, scontrol, sacct, squeue, scancel.

``sbatch`` starts the script at once (after the jobs it depends on), all "nodes" are this host, ``srun`` starts a
process for every task.  No queue, no limits, no containers: it shows that our scripts fit NeMo-Run's, no more.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

STATE = Path(os.environ["FAKESLURM_STATE"])
NO_VALUE = {"--requeue", "--parsable", "--exclusive", "--overlap", "--noheader"}


def options(arguments: list[str]) -> tuple[dict[str, str], list[str]]:
    found: dict[str, str] = {}
    rest = list(arguments)
    while rest and rest[0].startswith("-"):
        name, equals, value = rest.pop(0).partition("=")
        if not equals and name not in NO_VALUE:
            value = rest.pop(0)
        found[name.lstrip("-")] = value
    return found, rest


def job(number: str, **changes: object) -> dict[str, str]:
    path = STATE / f"{number}.json"
    record = (json.loads(path.read_text()) if path.exists() else {}) | changes
    if changes:
        path.with_suffix(".part").write_text(json.dumps(record))
        path.with_suffix(".part").replace(path)
    return record


def sbatch(arguments: list[str]) -> None:
    given, (script, *_) = options(arguments)
    groups = [
        {name: shlex.split(value)[0] for name, value in re.findall(r"^#SBATCH --([\w-]+)=(.*)$", part, re.MULTILINE)}
        for part in Path(script).read_text().split("#SBATCH hetjob\n")
    ]
    flags = groups[0]
    number = str(1001 + len(list(STATE.glob("*.json"))))
    job(number, state="PENDING", name=flags["job-name"], after=given.get("dependency", ""), began=0.0)
    (STATE / f"{number}.flags").write_text(json.dumps(groups))
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__).resolve()), "run", number, script, flags["output"].replace("%j", number)],
        start_new_session=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    job(number, pid=process.pid)
    print(number)


def run(number: str, script: str, output: str) -> None:
    kind, _, others = job(number)["after"].partition(":")
    for other in filter(None, others.split(":")):
        while job(other)["state"] in ("PENDING", "RUNNING"):
            time.sleep(0.05)
        if kind == "afterok" and job(other)["state"] != "COMPLETED":
            job(number, state="CANCELLED")
            return
    groups = (STATE / f"{number}.flags").read_text()
    env = os.environ | {"SLURM_JOB_ID": number, "SLURM_JOB_NODELIST": "localhost", "FAKESLURM_GROUPS": groups}
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    restarts = 0
    while True:
        job(number, state="RUNNING", began=time.time(), restarts=restarts)
        env |= {"SLURM_RESTART_COUNT": str(restarts)} if restarts else {}
        with open(output, "ab") as out:
            code = subprocess.run(["bash", script], stdout=out, stderr=out, env=env, check=False).returncode
        if job(number)["state"] != "REQUEUED":
            break
        restarts += 1
    if job(number)["state"] == "RUNNING":
        job(number, state="FAILED" if code else "COMPLETED")


def srun(arguments: list[str]) -> None:
    given, command = options(arguments)
    if command[:1] == ["hostname"]:
        print("127.0.0.1")
        return
    flags = json.loads(os.environ["FAKESLURM_GROUPS"])[int(given.get("het-group", "0"))]
    tasks = int(flags["nodes"]) * int(flags["ntasks-per-node"])
    name = given["output"].replace("%j", os.environ["SLURM_JOB_ID"])
    with open(name, "ab") as out:
        ranks = [
            subprocess.Popen(
                command, cwd=given.get("chdir"), stdout=out, stderr=out,
                env=os.environ | {
                    "SLURM_PROCID": str(rank), "SLURM_NTASKS": str(tasks),
                    "SLURM_LOCALID": str(rank % int(flags["ntasks-per-node"])),
                },
            )
            for rank in range(tasks)
        ]  # fmt: skip
        while (codes := [rank.poll() for rank in ranks]).count(None):
            if any(codes) and given.get("kill-on-bad-exit") == "1":
                for rank in ranks:
                    rank.terminate()
                break
            time.sleep(0.05)
    sys.exit(max(abs(rank.wait()) for rank in ranks))


def main() -> None:
    tool, *arguments = sys.argv[1:]
    STATE.mkdir(parents=True, exist_ok=True)
    if tool == "install":
        for name in ("sbatch", "srun", "scontrol", "sacct", "squeue", "scancel"):
            path = Path(arguments[0]) / name
            path.write_text(f'#!/bin/bash\nexec "{sys.executable}" "{Path(__file__).resolve()}" {name} "$@"\n')
            path.chmod(0o755)
    elif tool == "sbatch":
        sbatch(arguments)
    elif tool == "run":
        run(*arguments)
    elif tool == "srun":
        srun(arguments)
    elif tool == "scontrol" and arguments[0] == "requeue":
        job(arguments[1], state="REQUEUED")
    elif tool == "scontrol":
        print("localhost")
    elif tool == "sacct":
        number = arguments[arguments.index("-j") + 1]
        record = job(number)
        print("JobID|JobName|Partition|Account|AllocCPUS|State|ExitCode")
        print(f"{number}|{record['name']}|p|a|1|{record['state']}|0:0")
    elif tool == "scancel":
        record = job(arguments[-1], state="CANCELLED")
        os.killpg(int(record["pid"]), signal.SIGTERM)


if __name__ == "__main__":
    main()
