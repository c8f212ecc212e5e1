"""Hostile configurations, data, folders, model outputs and peers: each would leave a file if anything of it ran.

The payloads are shown to work first (what is evaluated or unpickled carelessly does leave the file); checkpoint folders
are attacked in ``tests/mcore/test_safe_loading.py``, stored rollouts in ``tests/data/test_rollout_file.py``.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml

from data_tools.chat import ChatTokenizer
from data_tools.errors import DataError, RowError
from megatron_rest.config import ConfigError, RewardConfig, load
from megatron_rest.hf_folder import load_tokenizer
from megatron_rest.mcore.hf import load_hf_weights, read_shape
from megatron_rest.regions import label_regions
from megatron_rest.rewards import tool_call_reward
from megatron_rest.rollout.environments.calls import parse_calls
from megatron_rest.rollout.environments.executor import LiteralCall, LiteralExecutor
from megatron_rest.rollout.host import announced
from megatron_rest.rollout.vllm_engine import _read_folder
from megatron_rest.rollout.wire import Connection, ConnectionLostError
from tests.helpers.tiny_model import build_tokenizer

CONFIG = {
    "model_type": "qwen3", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 265,
}  # fmt: skip


@pytest.fixture
def canary(tmp_path: Path) -> Iterator[Path]:
    """The file that must not appear."""
    path = tmp_path / "owned"
    yield path
    assert not path.exists(), "something of the payload ran"


class Touch:
    """Unpickling this leaves the file."""

    def __init__(self, path: Path) -> None:
        self.command = f"touch {path}"

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (self.command,)


def expressions(canary: Path) -> list[str]:
    """Python that leaves the file, bare and as an argument of a call."""
    bare = f"__import__('os').system('touch {canary}')"
    return [
        bare,
        f"add(amount={bare})",
        f"add(note=str({bare}))",
        f"add(note=f\"{{{bare}}}\")",
        f"[x for x in [{bare}]]",
        f"(lambda: {bare})()",
        f"add(**{{'amount': {bare}}})",
        f"add.__globals__['__builtins__']['exec']({bare!r})",
        "add.__class__.__mro__[1].__subclasses__()",
    ]  # fmt: skip


def yaml_payload(canary: Path) -> str:
    return f'!!python/object/apply:os.system ["touch {canary}"]'


def template_payloads(canary: Path) -> list[str]:
    return [
        "{{ cycler.__init__.__globals__.os.popen('touch " + str(canary) + "').read() }}",
        "{{ self.__init__.__globals__.__builtins__.__import__('os').system('touch " + str(canary) + "') }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__.__base__.__subclasses__() }}",
        "{{ messages.append.__self__.__init__.__globals__ }}",
    ]


def test_the_payloads_would_work(tmp_path: Path) -> None:
    path = tmp_path / "owned"
    for attack in (
        lambda: eval(expressions(path)[0]),
        lambda: pickle.loads(pickle.dumps(Touch(path))),
        lambda: yaml.unsafe_load(yaml_payload(path)),
        lambda: __import__("jinja2").Template(template_payloads(path)[0]).render(),
    ):
        attack()
        assert path.exists()
        path.unlink()


def test_configurations(canary: Path, tmp_path: Path) -> None:
    payload = yaml_payload(canary)
    for text in (payload, f"trainer: {payload}", f"trainer:\n  steps: {payload}", f"? {payload}\n: 1"):
        file = tmp_path / "run.yaml"
        file.write_text(text)
        with pytest.raises(ConfigError):
            load(file)
    for override in (f"trainer.steps={payload}", f"optimizer.lr={payload}", f"trainer.steps={expressions(canary)[0]}"):
        with pytest.raises(ConfigError):
            load(overrides=[override])
    assert load(overrides=[f"model.path={payload}"]).model.path == payload, "text stays text"


def test_chat_templates(canary: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tokenizer"
    build_tokenizer(folder)
    messages = [{"role": "user", "content": "hello"}]
    for payload in template_payloads(canary):
        (folder / "chat_template.jinja").write_text(payload)
        with pytest.raises((DataError, RowError)):
            ChatTokenizer(folder).render(messages)
        with pytest.raises(Exception, match=r"unsafe|undefined|not callable"):
            load_tokenizer(folder).apply_chat_template(messages, tokenize=False)


def write_remote_code(folder: Path, canary: Path) -> None:
    """A folder in which transformers would find a model and a tokenizer of its own."""
    code = f"import os\nos.system('touch {canary}')\nclass M: pass\nclass T: pass\n"
    for name in ("modeling_m.py", "tokenization_t.py", "configuration_m.py"):
        (folder / name).write_text(code)


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_folders_with_python_of_their_own(file: str, canary: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    build_tokenizer(folder)
    write_remote_code(folder, canary)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    values = json.loads((folder / file).read_text())
    maps = {"AutoConfig": "configuration_m.M", "AutoModelForCausalLM": "modeling_m.M"}
    if file == "tokenizer_config.json":
        maps = {"AutoTokenizer": ["tokenization_t.T", None]}  # type: ignore[dict-item]
    (folder / file).write_text(json.dumps({**values, "auto_map": maps}))
    for use in (lambda: load_tokenizer(folder), lambda: read_shape(folder), lambda: _read_folder(folder, 64, True)):
        with pytest.raises(ConfigError, match=r"asks for Python of its own .*never run"):
            use()


def test_pickled_weights(canary: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Touch(canary)))
    shape = read_shape(tmp_path)
    with pytest.raises(ConfigError, match="from safetensors only"):
        load_hf_weights({}, tmp_path, shape, tp_rank=0, tp_size=1)
    with pytest.raises(FileNotFoundError, match="safetensors"):
        _read_folder(tmp_path, 64, False)
    (tmp_path / "model.safetensors").write_bytes(pickle.dumps(Touch(canary)))
    with pytest.raises(ConfigError, match=r"model\.safetensors"):
        load_hf_weights({}, tmp_path, shape, tp_rank=0, tp_size=1)


class Tool:
    """What a policy may call."""

    def add(self, amount: int = 0, note: str = "") -> str:
        return f"{amount} {note}"


def test_model_outputs_and_reference_answers(canary: Path) -> None:
    executor = LiteralExecutor({"tool": Tool()})
    for expression in expressions(canary):
        assert executor.run(expression).startswith("Error during execution")
        call = json.dumps({"name": "add", "arguments": {"note": expression}})
        texts = [
            expression,
            f"<think>\n{expression}\n</think>\n<tool_call>\n{expression}\n</tool_call>",
            f"<think>\nx\n</think>\n<tool_call>\n{call}\n</tool_call>",
            f"<think>\nx\n</think>\n<response>\n{expression}\n</response>",
        ]
        for text in texts:
            for found in parse_calls(text).calls:
                told = executor.run(LiteralCall(name=found.name, keywords=found.arguments))
                assert told == f"0 {expression}", "an argument that looks like code is a string"
            label_regions([bytes([byte]) for byte in text.encode()])
            for truth in texts:
                with contextlib.suppress(ValueError):  # a reference answer that cannot be parsed
                    tool_call_reward(text, truth, step=1, config=RewardConfig())


def receive_from(data: bytes) -> dict[str, object]:
    """What the protocol makes of these bytes."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        threading.Thread(target=lambda: (theirs.sendall(data), theirs.shutdown(socket.SHUT_WR)), daemon=True).start()
        return Connection(ours).receive(10.0, max_header=1 << 20, max_payload=1 << 20)


def message(header: bytes, payload: bytes = b"", *, sizes: tuple[int, int] | None = None) -> bytes:
    lengths = sizes if sizes is not None else (len(header), len(payload))
    return struct.pack("!IQ", *lengths) + header + payload


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"GET / HTTP/1.1\r\nHost: engine\r\n\r\n",
        message(b"", sizes=(2**32 - 1, 0)),
        message(b"{}", sizes=(2, 2**63)),
        message(b"{}"),
        message(b"[]"),
        message(b"\xff\xfe"),
        message(b'{"kind": 1, "arrays": []}'),
        message(b'{"kind": "run"}'),
        message(b'{"kind": "run", "arrays": 3}'),
        message(b'{"kind": "run", "arrays": [["kind", "int32", 1]]}', bytes(4)),
        message(b'{"kind": "run", "arrays": [["a", "object", 1]]}', bytes(8)),
        message(b'{"kind": "run", "arrays": [["a", "int32", -1]]}', bytes(8)),
        message(b'{"kind": "run", "arrays": [["a", "int32", 1.5]]}', bytes(8)),
        message(b'{"kind": "run", "arrays": [["a", "int32", 3]]}', bytes(8)),
        message(b'{"kind": "run", "arrays": [["a", "int32", 1]]}', bytes(8)),
        message(b'{"kind": "run", "arrays": ' + b"[" * 100_000),
        message(pickle.dumps({"kind": "run"})),
    ],
    ids=range(18),
)
def test_peers_that_speak_something_else(data: bytes, canary: Path) -> None:
    with pytest.raises(ConnectionLostError):
        receive_from(data)


def test_messages_of_ours_pass() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        arrays = {"a": np.arange(3, dtype=np.int32), "empty": np.empty(0, np.float32), "b": np.array([True])}
        Connection(theirs).send("run", arrays, key=1)
        got = Connection(ours).receive(10.0)
    assert got["kind"] == "run" and got["key"] == 1
    assert all(np.array_equal(got[name], array) and got[name].dtype == array.dtype for name, array in arrays.items())


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "{}", '{"address": 1, "port": 2, "key": "", "num_gpus": 0}', "[" * 100_000,
     '{"address": "a", "port": 70000, "key": "", "num_gpus": 0}'],
    ids=range(7),
)  # fmt: skip
def test_announcements_that_are_none(text: str, tmp_path: Path) -> None:
    (tmp_path / "node.json").write_text(text)
    with pytest.raises(ConfigError, match=r"node\.json is not what an engine host leaves there"):
        announced(tmp_path)
