"""A stand-in for a Kubernetes cluster with Kubeflow Trainer: an API server for TrainJobs, and ``kubectl``.

Enough for NeMo-Run's executor and the real client: create, read and delete a TrainJob, whose pods are processes of this
machine with the environment that Trainer's torch runtimes set.  No scheduling, images, volumes or access rights: it
shows that what we send is what would run, no more.

    python fakekube.py serve FOLDER IMAGE   # writes FOLDER/kubeconfig; IMAGE: folder of the programs on a pod's PATH
    python fakekube.py kubectl ARGUMENTS
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

STATE = Path(os.environ.get("FAKEKUBE_STATE", "/nonexistent"))
OVERRIDES = {"serviceAccountName", "nodeSelector", "affinity", "tolerations", "volumes", "initContainers", "containers",
             "schedulingGates", "imagePullSecrets"}  # fmt: skip
"""What a TrainJob may change in a pod (PodTemplateSpecOverride); the server would drop anything else silently."""


def expand(text: str, env: dict[str, str]) -> str:
    """What Kubernetes makes of commands and environment: ``$$`` is a dollar, ``$(NAME)`` a known variable's value."""
    return re.sub(
        r"\$\$|\$\(([^)]*)\)",
        lambda m: "$" if m[1] is None else env.get(m[1], m[0]),
        text,
    )


def expanded_environment(entries: list[dict[str, str]]) -> dict[str, str]:
    """Each value may name the variables before it."""
    env: dict[str, str] = {}
    for entry in entries:
        env[entry["name"]] = expand(entry["value"], env)
    return env


def write(name: str, record: dict[str, object]) -> None:
    part = STATE / f"{name}.part"
    part.write_text(json.dumps(record))
    part.replace(STATE / f"{name}.json")


def read(name: str) -> dict:
    return json.loads((STATE / f"{name}.json").read_text())


def problem(body: dict) -> str:
    """Why Trainer would refuse this TrainJob, or not do what it says."""
    if not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", body["metadata"]["name"]):
        return "metadata.name must match RFC 1035 DNS label format"
    for override in body["spec"].get("podTemplateOverrides", []):
        unknown = set(override.get("spec", {})) - OVERRIDES
        if unknown:
            return f"unknown fields in podTemplateOverrides: {unknown}"
        (patch,) = body["spec"]["runtimePatches"]  # the same for later versions of Trainer
        (job,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
        if job != {"name": "node", "template": {"spec": {"template": {"spec": override["spec"]}}}}:
            return "runtimePatches say something else than podTemplateOverrides"
    if any(entry["name"].startswith("PET_") for entry in body["spec"]["trainer"]["env"]):
        return "reserved envs"
    return ""


def start_pods(body: dict, image: str) -> None:
    name, trainer = body["metadata"]["name"], body["spec"]["trainer"]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    given = expanded_environment(trainer["env"])
    pods = []
    for node in range(trainer["numNodes"]):
        env = given | {
            "PET_NNODES": str(trainer["numNodes"]), "PET_NPROC_PER_NODE": str(trainer["numProcPerNode"]),
            "PET_NODE_RANK": str(node), "PET_MASTER_ADDR": "127.0.0.1", "PET_MASTER_PORT": str(port),
        }  # fmt: skip
        log = STATE / f"{name}-{node}.log"
        with open(log, "wb") as out:
            process = subprocess.Popen(
                [expand(word, env) for word in trainer["command"]], stdout=out, stderr=out, stdin=subprocess.DEVNULL,
                env=env | {"PATH": f"{image}:/usr/bin:/bin"}, start_new_session=True, cwd=STATE,
            )  # fmt: skip
        pods.append({"name": f"{name}-node-0-{node}", "log": str(log), "pid": process.pid, "code": None})
        threading.Thread(target=reap, args=(name, node, process), daemon=True).start()
    write(name, {"body": body, "pods": pods})


LOCK = threading.Lock()


def reap(name: str, node: int, process: subprocess.Popen[bytes]) -> None:
    code = process.wait()
    with LOCK:
        record = read(name)
        record["pods"][node]["code"] = code
        write(name, record)


def status(name: str) -> dict[str, int]:
    codes = [pod["code"] for pod in read(name)["pods"]]
    failed, running = any(codes), any(code is None for code in codes)
    return {"active": int(running and not failed), "ready": int(running and not failed),
            "failed": int(failed), "succeeded": int(not failed and not running), "suspended": 0}  # fmt: skip


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        wrong = problem(body)
        if not wrong:
            with LOCK:
                start_pods(body, sys.argv[3])
        self.answer(400 if wrong else 201, {"message": wrong} if wrong else body)

    def do_GET(self) -> None:
        name = self.path.rpartition("/")[2]
        if not (STATE / f"{name}.json").exists():
            self.answer(404, {"message": "not found"})
            return
        job = {"name": "node", **status(name)}
        self.answer(200, read(name)["body"] | {"status": {"jobsStatus": [job]}})

    def do_DELETE(self) -> None:
        name = self.path.rpartition("/")[2]
        with LOCK:
            record = read(name)
            (STATE / f"{name}.json").rename(STATE / f"{name}.deleted")
        for pod in record["pods"]:  # to the first process alone, as a container's runtime does
            if pod["code"] is None:
                os.kill(pod["pid"], signal.SIGTERM)
        self.answer(200, {"status": "Success"})

    def answer(self, code: int, body: dict) -> None:
        text = json.dumps(body).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *arguments: object) -> None:
        pass


def serve() -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    address = f"http://127.0.0.1:{server.server_address[1]}"
    config = {
        "apiVersion": "v1", "kind": "Config", "current-context": "c",
        "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
        "clusters": [{"name": "c", "cluster": {"server": address}}], "users": [{"name": "u", "user": {}}],
    }  # fmt: skip
    part = STATE / "kubeconfig.part"
    part.write_text(json.dumps(config))
    part.replace(STATE / "kubeconfig")
    server.serve_forever()


def kubectl(arguments: list[str]) -> None:
    if arguments[0] == "exec":  # NeMo-Run asks a pod for the GROUP_RANK of its ranks
        print(f"GROUP_RANK={arguments[1].rpartition('-')[2]}")
        return
    name = next(word for word in arguments if word.startswith("jobset.sigs.k8s.io/jobset-name=")).partition("=")[2]
    pods = read(name)["pods"] if (STATE / f"{name}.json").exists() else []
    if arguments[:2] == ["get", "pods"]:
        labels = [{"batch.kubernetes.io/job-completion-index": str(i)} for i in range(len(pods))]
        items = [{"metadata": {"name": p["name"], "labels": m}} for p, m in zip(pods, labels, strict=True)]
        print(json.dumps({"items": items}))
        return
    while "-f" in arguments and any(pod["code"] is None for pod in read(name)["pods"]):
        time.sleep(0.1)
    stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ ", time.gmtime()) if "--timestamps" in arguments else ""
    for pod in pods:
        for line in Path(pod["log"]).read_text().splitlines():
            print(f"[pod/{pod['name']}/node] {stamp}{line}")


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve()
    else:
        kubectl(sys.argv[2:])
