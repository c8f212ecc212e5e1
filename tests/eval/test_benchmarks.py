"""Benchmarks as a measure of the experiment; a scripted policy stands in for the engine, the checkers are real."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_rest.config import load, to_dict
from megatron_rest.eval import benchmarks
from megatron_rest.eval import run as run_module
from megatron_rest.eval.answers import AnswerLog
from megatron_rest.eval.selection import BENCHMARKS
from tests.helpers.tiny_model import build_tiny_model
from tests.rollout.test_certify import CHATML

CASES = 3


@pytest.fixture
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run folder, benchmarks of three categories, and a policy that never calls anything."""

    def never_calls(model: Any, output: Path, settings: Any, context: int, interviewer: Any, asked: Any) -> None:
        for benchmark, cases in asked.items():
            (output / benchmark).mkdir(exist_ok=True)
            with AnswerLog(output / benchmark / "answers.jsonl") as log:
                for case in cases:
                    assert interviewer.fits(case)
                    if case.case_id not in log.known:
                        log.add(case.case_id, "<response>no</response>", stop_reason="eos", tokens=3)

    (build_tiny_model(tmp_path / "run" / "hf") / "chat_template.jinja").write_text(CHATML)
    monkeypatch.setattr(run_module, "_answer_all", never_calls)
    monkeypatch.setattr(benchmarks, "ASKED", {"api-bank": ("level-2",), "bfcl": ("irrelevance", "live_parallel")})
    overrides = ["model.max_sequence_length=2034", "rollout.max_response_tokens=24"]
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(to_dict(load(overrides=overrides))))
    return tmp_path / "run"


def asked(run_dir: Path) -> dict[str, Any]:
    assert benchmarks.main([str(run_dir), "--config", str(run_dir.parent / "run.yaml"), "--cases", str(CASES)]) == 0
    return dict(json.loads((run_dir / "benchmarks.json").read_text()))


def test_what_tables_need_is_kept_by_category(run_dir: Path) -> None:
    found = asked(run_dir)
    parts = found["categories"]
    assert set(parts) == {"level-2", "irrelevance", "live_parallel"} and found["not_asked"] == {}
    assert parts["level-2"]["correct"] == "000" and parts["irrelevance"]["correct"] == "111"
    for part in parts.values():
        assert len(part["correct"]) == min(part["fitting"], CASES) <= part["all"]
    assert 0 < parts["irrelevance"]["fitting"] < parts["irrelevance"]["all"], "what does not fit is counted"
    assert found["settings"]["max_response_tokens"] == 24 and found["settings"]["cases"] == CASES
    assert asked(run_dir) == found, "the same command asks nobody again"


def test_a_benchmark_that_is_not_installed_is_named_and_left_out(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(categories: tuple[str, ...]) -> None:
        raise ModuleNotFoundError("BFCL needs the package bfcl-eval: pip install ...", name="bfcl_eval")

    monkeypatch.setattr(BENCHMARKS["bfcl"], "load", missing)
    found = asked(run_dir)
    assert set(found["categories"]) == {"level-2"} and "bfcl-eval" in found["not_asked"]["bfcl"]
    assert "bfcl is not asked: BFCL needs the package bfcl-eval" in capsys.readouterr().err


def test_nothing_to_ask_is_one_line(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short = load(tmp_path / "run.yaml", ["model.max_sequence_length=32"])
    (tmp_path / "short.yaml").write_text(yaml.safe_dump(to_dict(short)))
    assert benchmarks.main([str(run_dir), "--config", str(tmp_path / "short.yaml")]) == 2
    assert "no case of a benchmark fits 8 tokens of prompt" in capsys.readouterr().err
    assert not (run_dir / "benchmarks.json").exists()
