"""The code as a job ships it, in an environment where this project is not installed: from rows to a score.

Data conversion, warm start, two RL steps with an engine process and an environment, a reward and a logger of a user's
own package, export of a checkpoint, evaluation: every command runs in the shipped folder, as it does on a node.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from megatron_rest.config import load
from megatron_rest.user_code import DIGESTS, digest
from tests.helpers.shipped import bare_python, ship

ROOT = Path(__file__).resolve().parents[2]
SAMPLE = "data_tools/samples/rlla_sft.json"
STEPS = 2


@pytest.fixture(scope="module")
def users_package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example's, in a folder of its own, with a blank in its name, as somebody's project would lie."""
    package = tmp_path_factory.mktemp("a user") / "mytools"
    shutil.copytree(ROOT / "examples" / "own_code" / "mytools", package, ignore=shutil.ignore_patterns("__pycache__"))
    (package / "__pycache__").mkdir()
    (package / "__pycache__" / "env.cpython-311.pyc").write_bytes(b"not shipped")
    shutil.copy(ROOT / "examples" / "own_credit.py", package.parent)
    return package


NAMED = (
    "rollout.environment=mytools.environments:Workshop", "rollout.environment_arguments.tries=2",
    "reward.terms.environment.weight=2.0", "reward.terms.calls.function=mytools.rewards:calls_match",
    "trainer.loggers=mytools.loggers:PlainFile",
    "weighting.source=own_credit:BlameCalls", "weighting.options.boost=2.0",
)  # fmt: skip


@pytest.mark.extended
@pytest.mark.timeout(900)
def test_what_is_shipped_is_what_runs(tmp_path: Path, users_package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(users_package.parent))
    config = load(None, NAMED)
    python, code = bare_python(tmp_path / "venv"), ship(tmp_path, config)
    assert sorted(path.name for path in code.iterdir()) == [
        "data_tools", "launch", "megatron_rest", "mytools", "own_credit.py",
    ]  # fmt: skip
    assert not list(code.rglob("__pycache__"))
    rule = users_package.parent / "own_credit.py"
    digests = f"mytools={digest(users_package)} own_credit={digest(rule)}"
    unset = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "PYTHONPATH")
    environ = {k: v for k, v in os.environ.items() if k not in unset} | {DIGESTS: digests, "COLUMNS": "120"}

    def call(*arguments: object) -> str:
        done = subprocess.run(
            [python, "-m", *map(str, arguments)],
            cwd=code, env=environ, capture_output=True, text=True, check=False, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, f"{arguments}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
        return done.stdout

    tokenizer, data, model = tmp_path / "tokenizer", tmp_path / "data", tmp_path / "model"
    call("data_tools", "train-tokenizer", SAMPLE, "--vocab-size", 1001, "--output", tokenizer)
    style = ("--prompt-style", "slim", "--max-think-words", 6, "--processes", 1)
    call("data_tools", "convert", "--input", SAMPLE, "--output", data, "--tokenizer", tokenizer, *style)
    shape = ("--hidden-size", 64, "--layers", 2, "--heads", 2, "--kv-heads", 2, "--ffn-size", 160)
    call("megatron_rest.commands.init_model", "--tokenizer", tokenizer, "--output", model, "--max-length", 512, *shape)
    common = (
        f"data.train={data}", "model.max_sequence_length=352", "data.max_prompt_tokens=256",
        "rollout.max_response_tokens=32", "trainer.max_tokens_per_microbatch=1024", "data.prompts_per_step=4",
        "rollout.rollouts_per_prompt=4", "trainer.timeout_minutes=5", "rollout.kv_cache_bytes=16777216",
    )  # fmt: skip
    warm, run = tmp_path / "warm", tmp_path / "run"
    call(
        "megatron_rest.commands.warm_start", *common, f"model.path={model}", f"trainer.run_dir={warm}",
        "warm_start.epochs=1", "warm_start.lr=5e-3",
    )  # fmt: skip
    settings = (
        *common, f"model.path={warm / 'hf'}", f"trainer.run_dir={run}", f"trainer.steps={STEPS}",
        "rollout.replicas=1", "weight_sync.transport=gloo", *NAMED, "optimizer.lr=1e-4",
        "loss.entropy_coef=0.01", "checkpoint.export_hf=false",
        "rollout.engine_args.max_num_batched_tokens=1024", "megatron.ddp.gradient_reduce_div_fusion=false",
    )  # fmt: skip
    call("megatron_rest.cli", "train", *settings)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == STEPS
    for row in rows:
        values = row["metrics"]
        wanted = 2.0 * values["reward/environment"] + values["reward/calls"]
        assert values["reward/total"] == pytest.approx(wanted) and "reward/accuracy" not in values
    assert (run / "log.txt").read_text().endswith("finished\n")
    [start] = [json.loads(line) for line in (run / "starts.jsonl").read_text().splitlines()]
    assert start["user_code"]["rollout.environment"]["package_digest"] == digest(users_package)
    assert start["user_code"]["weighting.source"]["package_digest"] == digest(rule)
    assert start["resolved"]["engine_args"]["max_num_batched_tokens"] == 1024
    assert start["resolved"]["megatron"]["ddp"]["gradient_reduce_div_fusion"] is False
    assert yaml.safe_load((run / "config.yaml").read_text())["resolved"] == start["resolved"]
    assert not (run / "lock.json").exists(), "a run that has ended leaves no lock"
    call("megatron_rest.cli", "export", "--config", run / "config.yaml")
    [exported] = run.glob("hf_step*")
    call(
        "megatron_rest.cli", "eval", "run", exported, "--output", tmp_path / "eval", "--leave-out-long", "--cases", 2,
        "--categories", "simple_python", "--max-response-tokens", 16, "--kv-cache-gib", 0.05,
        "--prompt-style", "slim",
    )  # fmt: skip
    assert json.loads((tmp_path / "eval/bfcl/summary.json").read_text())

    # A version of the package that is not the one that was shipped is not trained with.
    with (code / "mytools" / "rewards.py").open("a") as file:
        file.write("# other\n")
    done = subprocess.run(
        [python, "-m", "megatron_rest.cli", "train", *settings, f"trainer.run_dir={tmp_path / 'other'}"],
        cwd=code, env=environ, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 2 and "mytools was shipped with digest" in done.stderr, done.stderr
