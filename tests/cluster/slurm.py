"""A real Slurm on this machine: slurmctld and three slurmd from the distribution's packages, in a folder of their own.

Every node is this machine under another name, with eight GPUs that are names only, so that jobs ask for what they would
ask for on a cluster and get ``CUDA_VISIBLE_DEVICES`` from Slurm itself.  Without accounting, containers and a second
machine; authentication is switched off.  Needs root, as slurmd does.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import stat
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PACKAGES = "slurm-wlm slurm-wlm-basic-plugins"
NODES = 3
_SECONDS = 40.0

_CONFIGURATION = """ClusterName=onemachine
SlurmctldHost={host}({address})
SlurmctldPort={control}
SlurmUser=root
SlurmdUser=root
AuthType=auth/none
CredType=cred/none
AuthInfo=cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/pgid
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
MpiDefault=none
SwitchType=switch/none
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,sched_min_interval=100000
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
KillWait=5
MinJobAge=600
GresTypes=gpu
{nodes}
PartitionName=batch Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def why_not() -> str:
    """What is missing; empty if a Slurm can be started here."""
    missing = [tool for tool in ("slurmctld", "slurmd", "sbatch", "srun") if _tool(tool) is None]
    if missing:
        return f"no {', '.join(missing)}: apt-get install --no-install-recommends {PACKAGES}"
    if os.geteuid() != 0:
        return "slurmd wants root"
    return "" if own_address() else "this machine has no address but the loopback"


def own_address() -> str:
    """Of the default route; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            return ""
        address = str(probe.getsockname()[0])
    return "" if address.startswith("127.") else address


class Slurm:
    """The running cluster; ``env`` leads Slurm's commands and NeMo-Run to it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.address = own_address()
        self._daemons: list[subprocess.Popen[bytes]] = []
        configuration = folder / "slurm.conf"
        host = socket.gethostname().partition(".")[0]
        control, *ports = _free_ports(1 + NODES)
        nodes = "\n".join(
            f"NodeName=n{i + 1} NodeHostname={host} NodeAddr={self.address} Port={port} CPUs=8 RealMemory=8000 "
            "Gres=gpu:8 State=UNKNOWN"
            for i, port in enumerate(ports)
        )
        configuration.write_text(
            _CONFIGURATION.format(host=host, address=self.address, control=control, folder=folder, nodes=nodes)
        )
        for gpu in range(8):
            _device(folder / f"nvidia{gpu}")
        (folder / "gres.conf").write_text(f"Name=gpu File={folder}/nvidia[0-7]\n")
        (folder / "state").mkdir()
        self.env = {"SLURM_CONF": str(configuration)}

    def start(self) -> None:
        for name, arguments in (
            ("slurmctld", ["-D", "-c"]),
            *(("slurmd", ["-D", "-c", "-N", f"n{i + 1}"]) for i in range(NODES)),
        ):
            command = [_tool(name) or name, *arguments, "-f", self.env["SLURM_CONF"]]
            log = open(self.folder / f"{name}{len(self._daemons)}.out", "wb")  # noqa: SIM115
            self._daemons.append(subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | self.env))
        end = time.monotonic() + _SECONDS
        while self.run("sinfo", "-h", "-o", "%T %D").strip() != f"idle {NODES}":
            if time.monotonic() > end:
                logs = "\n".join(p.read_text()[-1500:] for p in sorted(self.folder.glob("*.log")))
                raise RuntimeError(f"{self.run('sinfo', '-N', '-l')}\n{logs}")
            time.sleep(0.5)

    def stop(self) -> None:
        """Jobs first: a slurmd leaves its steps running."""
        self.run("scancel", "--full", "--signal=KILL", "-u", "root")
        self.run("scancel", "-u", "root")
        end = time.monotonic() + _SECONDS
        while self.run("squeue", "-h") and time.monotonic() < end:
            time.sleep(0.5)
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in self._daemons:
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    def run(self, *command: str) -> str:
        """Output of one of Slurm's commands."""
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | self.env, check=False)
        return done.stdout

    def jobs(self) -> dict[int, dict[str, str]]:
        """All jobs there have been, by number, as scontrol shows them; of a heterogeneous one its first part."""
        text = self.run("scontrol", "show", "job", "-o")
        found = [dict(re.findall(r"(\w+)=(\S*)", line)) for line in text.splitlines() if line.startswith("JobId=")]
        return {int(job["JobId"]): job for job in found if job.get("HetJobOffset", "0") == "0"}

    def wait(self, job: int, *states: str, seconds: float) -> dict[str, str]:
        """The job when it is in one of ``states``.

        A scheduler of Slurm looks at a job again only after something has changed.  On a cluster other jobs see to
        that; here a comment on a waiting job does, or one that was put back waits for minutes after its time has come.
        """
        end = time.monotonic() + seconds
        while True:
            found = self.jobs().get(job, {})
            if found.get("JobState") in states:
                return found
            if found.get("JobState") == "PENDING":
                self.run("scontrol", "update", f"JobId={job}", "Comment=waiting")
            if time.monotonic() > end:
                raise AssertionError(f"job {job} is not {' or '.join(states)} after {seconds} s: {found}")
            time.sleep(0.5)


@contextmanager
def started(folder: Path) -> Iterator[Slurm]:
    """A Slurm as long as the block runs."""
    slurm = Slurm(folder)
    try:
        slurm.start()
        yield slurm
    finally:
        slurm.stop()


def _tool(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


def _device(path: Path) -> None:
    """Something that Slurm takes for a GPU's device file and nobody can do harm with: another /dev/null."""
    try:
        os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 3))
    except PermissionError:  # in some containers; then Slurm counts GPUs, and names none in CUDA_VISIBLE_DEVICES
        path.touch()


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports
