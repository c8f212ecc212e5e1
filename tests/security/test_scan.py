"""Nothing that a model or a data file produced is evaluated, unpickled or handed to a shell.

1. every call of that kind in the packages is on the list below, with the reason why it is none of that
2. the list holds nothing that is not there any more
3. the scan sees what it is meant to see
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from tests.security.scan import findings

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("megatron_rest", "launch", "data_tools", "requirements", "examples")

RANKS = "plain numbers and names of our own, between ranks of one job; ranks trust each other (docs/reliability.md)"
RPC = "our own method names, to our own worker extension"
OWN_NAME = "a module of ours, from a table in the same file"
ALLOWED: dict[tuple[str, str], tuple[int, str]] = {
    ("megatron_rest/cli.py", "importlib.import_module"): (2, OWN_NAME),
    ("megatron_rest/scripts.py", "importlib.import_module"): (3, "our own entries, by literals"),
    ("megatron_rest/mcore/precision.py", "importlib.import_module"): (3, "Transformer Engine, by a literal"),
    ("megatron_rest/rollout/environments/bfcl.py", "importlib.import_module"): (3, "names from the package bfcl-eval"),
    ("megatron_rest/eval/bfcl_multi_turn.py", "exec_module"): (1, "a second copy of a module of the package bfcl-eval"),
    ("megatron_rest/user_code.py", "importlib.import_module"): (
        1, "package.module:attribute: the user's own package, asked for by name in the configuration",
    ),
    ("megatron_rest/trainer/trackers/told.py", "importlib.import_module"): (1, OWN_NAME),
    ("data_tools/adapter.py", "spec_from_file_location"): (1, "--adapter FILE.py:FUNCTION: the user's own code"),
    ("data_tools/adapter.py", "exec_module"): (1, "--adapter FILE.py:FUNCTION: running the user's file is the option"),
    ("launch/cli.py", "import runpy"): (1, "nemo-run FILE.py: running the user's recipe is the command"),
    ("launch/terminal.py", "import pty"): (1, "a terminal for the user's own jobs"),
    ("launch/terminal.py", "os.execvp"): (1, "a stage's command, a list of ours, no shell"),
    ("megatron_rest/planner/__main__.py", "import runpy"): (1, "plan FILE.py: the user's own recipe"),
    ("launch/compat.py", "importlib.import_module"): (1, "nemo_run, by a literal"),
    ("megatron_rest/mcore/checkpoint.py", "import pickle"): (
        1, "what a writing process of this run tells its parent, in a file that only they write and read",
    ),
    ("megatron_rest/mcore/safe_loading.py", "import pickle"): (1, "an unpickler that knows a list of classes only"),
    ("megatron_rest/mcore/checkpoint.py", "pickle between ranks"): (3, RANKS),
    ("megatron_rest/mcore/policy.py", "pickle between ranks"): (2, RANKS),
    ("megatron_rest/trainer/pace.py", "pickle between ranks"): (1, RANKS),
    ("megatron_rest/trainer/run.py", "pickle between ranks"): (1, RANKS),
    ("megatron_rest/trainer/canary.py", "pickle between ranks"): (1, RANKS),
    ("megatron_rest/trainer/engine_nodes.py", "pickle between ranks"): (1, RANKS),
    ("megatron_rest/weight_sync/source.py", "pickle between ranks"): (1, RANKS),
    ("megatron_rest/rollout/vllm_engine.py", "RPC of vLLM"): (3, RPC),
    ("megatron_rest/network.py", "listens on every address"): (
        1, "asks whether torchrun's port is free, as torchrun will listen on it; closed at once, nothing is accepted",
    ),
}  # fmt: skip


def test_every_place_is_known_and_justified() -> None:
    found: Counter[tuple[str, str]] = Counter()
    lines: dict[tuple[str, str], list[int]] = {}
    files = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    assert len(files) > 150, "the packages were not found"
    for path in files:
        name = str(path.relative_to(ROOT))
        for finding in findings(path.read_text(encoding="utf-8")):
            found[name, finding.what] += 1
            lines.setdefault((name, finding.what), []).append(finding.line)
    unknown = {key: lines[key] for key, count in found.items() if count > ALLOWED.get(key, (0, ""))[0]}
    assert unknown == {}, "can this turn data into code?  If not, say why in ALLOWED"
    gone = {key for key, (count, _) in ALLOWED.items() if found[key] < count}
    assert gone == set(), "no longer there: take it off the list"
    assert all(len(reason) > 10 for _, reason in ALLOWED.values())


@pytest.mark.parametrize(
    ("source", "what"),
    [
        ("eval(x)", "eval"),
        ("import builtins\nbuiltins.exec(x)", "exec"),
        ("__import__(x)", "__import__"),
        ("import pickle", "import pickle"),
        ("from dill import loads", "import dill"),
        ("import torch\ntorch.load(f)", "torch.load without weights_only"),
        ("from torch import load as read\nread(f, weights_only=False)", "torch.load without weights_only"),
        ("import torch\ntorch.load(f, weights_only=flag)", "torch.load without weights_only"),
        ("import numpy as np\nnp.load(f)", "np.load without allow_pickle=False"),
        ("import yaml\nyaml.load(t, Loader=yaml.Loader)", "yaml.load"),
        ("from yaml import unsafe_load\nunsafe_load(t)", "yaml.unsafe_load"),
        ("import subprocess\nsubprocess.run(f'ls {x}', shell=True)", "subprocess with a shell"),
        ("from subprocess import Popen\nPopen('ls ' + x)", "subprocess of a string"),
        ("import subprocess\nsubprocess.run(['ls'], shell=flag)", "subprocess with a shell"),
        ("import os\nos.system(x)", "os.system"),
        ("from importlib import import_module\nimport_module(x)", "importlib.import_module"),
        ("M.from_pretrained(p)", "from_pretrained without trust_remote_code=False"),
        ("LLM(model=m, trust_remote_code=True)", "trust_remote_code"),
        ("dist.all_gather_object(a, b)", "pickle between ranks"),
        ("import jinja2\njinja2.Environment()", "jinja2.Environment"),
        ("import socket\nsocket.create_server(('', 0))", "listens on every address"),
        ("s.bind(('0.0.0.0', 1))", "listens on every address"),
        ("archive.extractall(p)", "extractall"),
    ],
)
def test_the_scan_sees(source: str, what: str) -> None:
    assert what in [finding.what for finding in findings(source)]


@pytest.mark.parametrize(
    "source",
    [
        "model.eval()",
        "import re\nre.compile(x)",
        "import torch\ntorch.load(f, weights_only=True)",
        "import yaml\nyaml.safe_load(t)",
        "import subprocess\nsubprocess.run(['ls', x], check=True)",
        "M.from_pretrained(p, trust_remote_code=False)",
        "import socket\nsocket.create_server((address, 0))",
    ],
)
def test_what_is_harmless_is_left_alone(source: str) -> None:
    assert findings(source) == []
