"""What people, models and disks may hand us, mutated: each input is taken or refused by name, nothing else.

    outcome = fuzz(TARGETS["configuration"], scratch, cases=100, seed=1)

``python -m tests.fuzz --cases 10000`` runs more.  Data files have a fuzzer of their own
(``tests/data_tools/fuzzing.py``), checkpoints theirs in ``tests/mcore/test_safe_loading.py``.
"""

from __future__ import annotations

import json
import math
import pickle
import random
import shutil
import socket
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from megatron_rest.analysis.series import MetricsFileError, read_metrics
from megatron_rest.config import ConfigError, RestConfig, RewardConfig, load, to_dict, validate
from megatron_rest.data.rollout_file import SavedRollouts, read_rollouts, write_rollouts
from megatron_rest.hf_folder import load_tokenizer
from megatron_rest.mcore.hf import load_hf_weights, read_shape
from megatron_rest.mcore.safe_loading import check_description
from megatron_rest.model_map import parameter_map, shard_shape
from megatron_rest.regions import label_regions
from megatron_rest.rewards import tool_call_reward
from megatron_rest.rollout.environments.calls import parse_calls
from megatron_rest.rollout.environments.executor import LiteralCall, LiteralExecutor
from megatron_rest.rollout.wire import Connection, ConnectionLostError
from tests.data_tools.fuzzing import mutate
from tests.helpers.tiny_model import build_tiny_model

__all__ = ["TARGETS", "Outcome", "Target", "fuzz"]

SLOW_S = 10.0


@dataclass
class Outcome:
    """Of one target."""

    cases: int
    taken: int = 0
    refused: int = 0
    slowest_s: float = 0.0
    unexpected: tuple[str, ...] = ()


@dataclass(frozen=True)
class Target:
    """``case(chance, scratch)`` tries one input; raising one of ``refusals`` with a message is a refusal."""

    case: Callable[[random.Random, Path], None]
    refusals: tuple[type[Exception], ...]


def fuzz(target: Target, scratch: Path, *, cases: int, seed: int) -> Outcome:
    """Try ``cases`` inputs."""
    chance, outcome = random.Random(seed), Outcome(cases)
    unexpected = []
    for case in range(cases):
        started = time.process_time()  # not the clock's: the machine may be busy with something else
        try:
            target.case(chance, scratch)
            outcome.taken += 1
        except target.refusals as error:
            outcome.refused += 1
            if not str(error):
                unexpected.append(f"case {case}: {error!r} names nothing")
        except Exception:  # noqa: BLE001  finding these is the purpose
            unexpected.append(f"case {case}: {traceback.format_exc(limit=-4)}")
        seconds = time.process_time() - started
        outcome.slowest_s = max(outcome.slowest_s, round(seconds, 3))
        if seconds > SLOW_S:
            unexpected.append(f"case {case} took {seconds:.1f} s")
    outcome.unexpected = tuple(unexpected)
    return outcome


# Configurations and overrides ----------------------------------------------------------------------------------------

_ODD = (
    "", "null", "true", "-1", "0", "1", "1e400", "-.inf", ".nan", "1e-3", "07", "0x10", "2026-11-23", "[]", "{}",
    "[1, 2]",
    "{a: 1}", "'x'", "~", "*a", "&a b", "!!python/none", "!!binary aGk=", "9" * 400, "-9999999999999999999", "\x00",
    "é" * 50, "${HOME}", "$(id)", "a: b: c", "\t", "- - -", "1:30", "1_000", "yes", "none", "UNIFORM", "constant",
    "9" * 5000, "[" * 2000,
)  # fmt: skip


@lru_cache
def _keys() -> tuple[str, ...]:
    return tuple(f"{s.name}.{f.name}" for s in fields(RestConfig) for f in fields(getattr(RestConfig(), s.name)))


def _use(config: RestConfig, chance: random.Random) -> None:
    """What is taken can be written, read back and checked for a number of ranks."""
    text = yaml.safe_dump(to_dict(config))
    assert load_text(text) == config
    validate(config, world_size=chance.choice((1, 2, 4, 8)))


def load_text(text: str) -> RestConfig:
    from megatron_rest.config import from_dict

    return from_dict(RestConfig, yaml.safe_load(text))


def configuration(chance: random.Random, scratch: Path) -> None:
    """A YAML file: values replaced, sections mixed up, bytes changed."""
    values: dict[str, Any] = to_dict(RestConfig())
    for _ in range(chance.randint(1, 3)):
        section, _, name = chance.choice(_keys()).partition(".")
        match chance.randrange(5):
            case 0:
                values[section] = chance.choice((None, [], "x", 1, {name: {}}))
            case 1 if isinstance(values[section], dict):
                values[section][chance.choice((name, name[:-1], name.upper(), "x", 3, None))] = chance.choice(
                    (1, "x", None)
                )
            case 2 if isinstance(values[section], dict):
                values[section][name] = chance.choice(
                    (-1, 0, 10**30, 1e308, math.inf, math.nan, "", [], {}, True, None)
                )
            case 3:
                values[chance.choice((section + "s", "", 1))] = {}
    data = yaml.safe_dump(values).encode()
    file = scratch / "run.yaml"
    file.write_bytes(mutate(data, chance) if chance.random() < 0.5 else data)
    _use(load(file), chance)


def overrides(chance: random.Random, scratch: Path) -> None:
    """Words of a command line."""
    items, defaults = [], to_dict(RestConfig())
    for _ in range(chance.choice((1, 1, 2, 4))):
        key = chance.choice(_keys())
        if chance.random() < 0.5:
            section, _, name = key.partition(".")
            items.append(f"{key}={yaml.safe_dump(defaults[section][name], default_flow_style=True).splitlines()[0]}")
            continue
        if chance.random() < 0.2:
            key = mutate(key.encode(), chance).decode("utf-8", errors="replace")
        value = chance.choice(_ODD) if chance.random() < 0.8 else mutate(b"1e-3", chance).decode("latin-1")
        items.append(
            chance.choice((f"{key}={value}", f"{key}={value}", f"{key}", f"{key}=={value}", f"+{key}={value}"))
        )
    _use(load(overrides=items), chance)


# Model outputs -------------------------------------------------------------------------------------------------------

_ANSWERS = (
    "<think>\nI look.\n</think>\n<tool_call>\n{\"name\": \"add\", \"parameters\": {\"amount\": 2, \"note\": \"x\"}}\n"
    "</tool_call>",
    "<think>\nTwo.\n</think>\n<tool_call>\n{\"name\": \"add\", \"arguments\": {\"amount\": -1}}\n"
    "{\"name\": \"find\", \"arguments\": {\"q\": [1, {\"a\": null}]}}\n</tool_call>",
    "<think>\nSay it.\n</think>\n<response>\nIt is 3 °C — \u5b8c\u6210 ✅\n</response>",
    "add(amount=1, note='a, (b)')",
)  # fmt: skip
_PIECES = (
    "<think>", "</think>", "<tool_call>", "</tool_call>", "<response>", "</response>", "<|im_end|>", "<|im_start|>",
    "{", "}",
    "[", "]", '"', "\\", "\\u0000", "\\ud800", "NaN", "Infinity", "-", "1e999", "\n", "\r", "\0", "\u2028", "name",
    '{"name": "add"}', '{"name": "add", "arguments": {}}', "null", "[" * 3000, '{"a":' * 500, "9" * 6000, "é", "<", ">",
    "add(", ")", "**", "lambda: 0", "f'{x}'", "__import__", "'" * 3, "(" * 300, "-" * 3000,
)  # fmt: skip


def _text(chance: random.Random) -> str:
    text = chance.choice(_ANSWERS)
    for _ in range(chance.randint(1, 6)):
        at, piece = chance.randrange(len(text) + 1), chance.choice(_PIECES)
        match chance.randrange(4):
            case 0:
                text = text[:at] + piece + text[at:]
            case 1:
                text = text[:at] + text[at + chance.randrange(30) :]
            case 2:
                text = text[:at] + piece + text[at + len(piece) :]
            case 3:
                text += chance.choice(_ANSWERS)
    return text


class _Tools:
    """What a policy may call."""

    def add(self, amount: float = 0, note: str = "") -> str:
        return f"{amount + 1} {note}"

    def find(self, q: Any) -> list[Any]:
        return [q, q]


def answers(chance: random.Random, scratch: Path) -> None:
    """An answer through everything that reads answers: no exception, no number that is none."""
    text = _text(chance)
    data = text.encode("utf-8", errors="surrogatepass")
    if chance.random() < 0.3:
        data = mutate(data, chance)
        text = data.decode("utf-8", errors="replace")
    tokens, position = [], 0
    while position < len(data):
        size = chance.choice((1, 1, 2, 3, 7, 40))
        tokens.append(data[position : position + size])
        position += size
    for starts_in_think in (False, True):
        regions = label_regions(tokens, starts_in_think=starts_in_think)
        assert len(regions) == len(tokens), "every token has a region"
        for config in (RewardConfig(), RewardConfig(strict_format=True, granularity="coarse", length_bonus=True)):
            reward = tool_call_reward(
                text, chance.choice(_ANSWERS[:3]), step=1, config=config, starts_in_think=starts_in_think
            )
            assert math.isfinite(reward.total) and 0.0 <= reward.accuracy <= 1.0
        executor = LiteralExecutor({"tools": _Tools()})
        for call in parse_calls(text, starts_in_think=starts_in_think).calls:
            assert isinstance(executor.run(LiteralCall(name=call.name, keywords=call.arguments)), str)


def executor_calls(chance: random.Random, scratch: Path) -> None:
    """Python-like text to the executor of tools: a string comes back, whatever it is."""
    text = _ANSWERS[3] if chance.random() < 0.7 else "find(q=[1, {'a': (2, None)}])"
    data = text.encode()
    for _ in range(chance.randint(1, 3)):
        at, piece = chance.randrange(len(data) + 1), chance.choice(_PIECES).encode("utf-8", errors="surrogatepass")
        data = data[:at] + piece + data[at:] if chance.random() < 0.6 else mutate(data or b"x", chance)
    said = LiteralExecutor({"tools": _Tools()}).run(data.decode("utf-8", errors="replace"))
    assert isinstance(said, str)


# Files and peers -----------------------------------------------------------------------------------------------------


@contextmanager
def _changed(file: Path, data: bytes) -> Iterator[None]:
    before = file.read_bytes()
    file.unlink()  # what is still mapped keeps its bytes
    file.write_bytes(data)
    try:
        yield
    finally:
        file.unlink()
        file.write_bytes(before)


@lru_cache
def _model(scratch: Path) -> Path:
    return build_tiny_model(scratch / "model", layers=1)


def hf_folder(chance: random.Random, scratch: Path) -> None:
    """One file of a model folder changed: what the trainer reads of it is right in shape, or it is refused."""
    folder = _model(scratch)
    file = folder / chance.choice(
        ("config.json", "config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors")
    )
    data = file.read_bytes()
    if file.suffix == ".json" and chance.random() < 0.6:
        values = json.loads(data)
        key = chance.choice(sorted(values))
        values[key] = chance.choice((None, -1, 0, 1, 3, 10**12, 1.5, "", "x", [], {}, [1], {"a": 1}, True, "qwen2"))
        if chance.random() < 0.2:
            del values[key]
        data = json.dumps(values).encode()
    else:  # of the weights the header: any bytes behind it are weights
        size = 8 + int.from_bytes(data[:8], "little") if file.suffix == ".safetensors" else len(data)
        data = mutate(data[:size], chance) + data[size:]
    with _changed(file, data):
        if file.name.startswith("tokenizer"):
            load_tokenizer(folder)
            return
        shape = read_shape(folder)
        numbers = shape.hidden_size * shape.vocab_size, shape.ffn_hidden_size * shape.hidden_size, shape.num_layers
        if max(numbers[:2]) > 1 << 22 or shape.num_layers > 64:
            return  # such models exist; this test has not the memory
        shards = {spec.megatron_name: torch.empty(shard_shape(spec, shape, tp_size=1)) for spec in parameter_map(shape)}
        load_hf_weights(shards, folder, shape, tp_rank=0, tp_size=1)


@lru_cache
def _rollouts(scratch: Path) -> Path:
    lengths = np.array([3, 4], np.int64)
    floats = {n: np.zeros(7, np.float32) for n in ("rollout_log_probs", "old_log_probs", "entropy", "token_weights")}
    return write_rollouts(
        scratch,
        SavedRollouts(
            step=1, progress=0.0, lengths=lengths, group_ids=np.zeros(2, np.int32), advantages=np.zeros(2, np.float32),
            rewards=np.zeros(2, np.float32), token_ids=np.zeros(7, np.int32), loss_mask=np.ones(7, bool),
            region_ids=np.ones(7, np.int8), **floats,
        ),
    )  # fmt: skip


def stored_rollouts(chance: random.Random, scratch: Path) -> None:
    """A file of saved rollouts changed."""
    file = _rollouts(scratch)
    with _changed(file, mutate(file.read_bytes(), chance)):
        saved = read_rollouts(file)
        assert sum(saved.lengths) == len(saved.token_ids)


def metrics_file(chance: random.Random, scratch: Path) -> None:
    """``metrics.jsonl`` changed: read by report, comparison and a resumed run."""
    rows = [
        {"step": i, "policy_version": i, "metrics": {"a": 1.0, "b": None}, "seconds": {"total": 1.0}} for i in (1, 2, 3)
    ]
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    file = scratch / "metrics.jsonl"
    file.write_bytes(mutate(data, chance))
    for row in read_metrics(file):
        assert isinstance(row["step"], int)


def checkpoint_descriptions(chance: random.Random, scratch: Path) -> None:
    """``.metadata`` of a checkpoint changed, beyond what its sums would find: by somebody who made new ones."""
    from torch.distributed.checkpoint import metadata as dcp

    properties = dcp.TensorProperties(dtype=torch.bfloat16)
    chunk = dcp.ChunkStorageMetadata(offsets=torch.Size([0, 0]), sizes=torch.Size([4, 4]))
    entries = {
        "weight": dcp.TensorStorageMetadata(properties=properties, size=torch.Size([4, 4]), chunks=[chunk]),
        "state": dcp.BytesStorageMetadata(),
    }
    description = dcp.Metadata(state_dict_metadata=entries, planner_data={"weight": ("weight",)}, storage_data={})
    (scratch / ".metadata").write_bytes(mutate(pickle.dumps(description), chance))
    check_description(scratch)


def messages(chance: random.Random, scratch: Path) -> None:
    """The bytes of a message between a rank and its engine's process changed."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        Connection(theirs).send("run", {"token_ids": np.arange(5, dtype=np.int32), "mask": np.ones(3, bool)}, key=1)
        sent = bytearray(1 << 16)
        sent = sent[: ours.recv_into(sent)]
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(mutate(bytes(sent), chance))
        theirs.shutdown(socket.SHUT_WR)
        got = Connection(ours).receive(5.0, max_header=1 << 20, max_payload=1 << 20)
        assert isinstance(got["kind"], str)


TARGETS = {
    "configuration files": Target(configuration, (ConfigError,)),
    "command-line overrides": Target(overrides, (ConfigError,)),
    "answers of a model": Target(answers, ()),
    "tool calls to the executor": Target(executor_calls, ()),
    "Hugging Face folders": Target(hf_folder, (ConfigError,)),
    "stored rollouts": Target(stored_rollouts, (ValueError,)),
    "metrics.jsonl": Target(metrics_file, (MetricsFileError,)),
    "checkpoint descriptions": Target(checkpoint_descriptions, (ConfigError,)),
    "messages of an engine": Target(messages, (ConnectionLostError,)),
}


def clean(scratch: Path) -> None:
    """Forget what the targets keep in ``scratch``."""
    shutil.rmtree(scratch, ignore_errors=True)
    _model.cache_clear()
    _rollouts.cache_clear()
