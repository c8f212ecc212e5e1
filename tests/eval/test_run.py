"""``megatron-rest eval run`` with a real vLLM and a random model: answers kept, continued, never mixed.

What the answers are is tested where there is something to compare them with: tests/rollout/test_vllm_engine.py (greedy)
and tests/trainer/test_run.py (the policy's own answers while it trained).
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_rest.cli import main
from megatron_rest.config import RestConfig, to_dict
from megatron_rest.eval import models
from megatron_rest.eval import run as run_module
from megatron_rest.eval.answers import AnswerLog, read_answers
from megatron_rest.eval.asking import Interviewer
from megatron_rest.eval.cases import EvalCase
from megatron_rest.eval.scoring import judge
from megatron_rest.eval.selection import draw, find_categories, load_cases
from tests.helpers.tiny_model import build_tiny_model
from tests.rollout.test_certify import CHATML

OPTIONS = [
    "--categories",
    "level-2",
    "live_parallel",
    "multi_turn_miss_param",
    "--cases",
    "2",
    "--prompt-style",
    "slim",
]
OPTIONS += ["--max-model-len", "9400", "--max-response-tokens", "24", "--leave-out-long", "--kv-cache-gib", "0.1"]
CASES = {"api-bank": 2, "bfcl": 4}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = build_tiny_model(tmp_path_factory.mktemp("model"), max_position_embeddings=16_384, seed=3)
    (folder / "chat_template.jinja").write_text(CHATML)
    return folder


def evaluate(model: Path, output: Path, *more: str) -> int:
    return main(["eval", "run", str(model), "--output", str(output), *OPTIONS, *more])


@pytest.fixture(scope="module")
def done(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "eval"
    assert evaluate(model, output) == 0
    return output


def answers_of(output: Path) -> dict[str, dict[str, Any]]:
    return {benchmark: read_answers(output / benchmark / "answers.jsonl") for benchmark in CASES}


@pytest.mark.slow
def test_answers_are_kept_and_scored(done: Path) -> None:
    for benchmark, answers in answers_of(done).items():
        assert len(answers) == CASES[benchmark]
        rows = [json.loads(line) for line in (done / benchmark / "answers.jsonl").read_text().splitlines()]
        assert all(row["stop_reason"] in ("eos", "length", "context") and row["tokens"] > 0 for row in rows)
        summary = json.loads((done / benchmark / "summary.json").read_text())
        assert summary["all"]["cases"] == CASES[benchmark] and summary["decontamination"] == []
        cases = {case.case_id: case for case in load_cases(benchmark)}
        assert not set(summary["left_out"]) & set(answers)
        chosen = [cases[case_id] for case_id in answers]
        assert sum(verdict.score.is_correct for verdict in judge(chosen, answers)) == summary["all"]["correct"]
        for case in chosen:
            assert isinstance(answers[case.case_id], list) == case.category.startswith("multi_turn")
    conversations = [a for a in answers_of(done)["bfcl"].values() if isinstance(a, list)]
    assert len(conversations) == 2 and all(turns[0] for turns in conversations)


@pytest.mark.extended
def test_a_run_that_was_killed_continues_where_it_was(done: Path, model: Path, tmp_path: Path) -> None:
    output = tmp_path / "eval"
    (output / "bfcl").mkdir(parents=True)
    (output / "run.json").write_text((done / "run.json").read_text())
    kept, half = (done / "bfcl" / "answers.jsonl").read_text().splitlines(keepends=True)[:2]
    (output / "bfcl" / "answers.jsonl").write_text(kept + half[:-9])
    assert evaluate(model, output) == 0
    assert (output / "bfcl" / "answers.jsonl").read_text().startswith(kept)
    assert answers_of(output) == answers_of(done)
    for benchmark in CASES:
        assert (output / benchmark / "verdicts.jsonl").read_text() == (done / benchmark / "verdicts.jsonl").read_text()


def test_a_complete_run_needs_no_engine(
    done: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run_module, "_start_engine", lambda *_: pytest.fail("nothing is left to answer"))
    assert evaluate(model, done) == 0
    assert "multi_turn_miss_param" in capsys.readouterr().out


def test_what_would_mix_or_does_not_fit_is_one_line(
    done: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("")
    wrong = {
        "differs in settings.seed": (model, done, ["--seed", "5"]),
        "holds no run.json": (model, tmp_path / "other", []),
        "did you mean live_parallel?": (model, tmp_path / "new", ["--categories", "live_paralel"]),
        "is neither an HF folder": (tmp_path, tmp_path / "new", []),
        "is an HF folder, not that of a run": (model, tmp_path / "new", ["--step", "3"]),
        "no prompt of level-2 fits": (model, tmp_path / "new", ["--max-model-len", "64"]),
    }
    for words, (folder, output, options) in wrong.items():
        assert evaluate(folder, output, *options) == 2
        error = capsys.readouterr().err
        assert words in error and len(error.splitlines()) == 1, error
    assert not (tmp_path / "new").exists()
    short = [option for option in OPTIONS if option != "--leave-out-long"]
    arguments = ["eval", "run", str(model), "--output", str(tmp_path / "new"), *short, "--max-model-len", "700"]
    assert main(arguments) == 2
    assert "or say --leave-out-long" in capsys.readouterr().err


SHOWN = (
    "{% if tools %}{{ '<|im_start|>system\\n' }}{% for t in tools %}{{ t | tojson }}{% endfor %}"
    "{{ 'Call in <tool_call></tool_call>.<|im_end|>\\n' }}{% endif %}"
)


def test_a_stock_folder_is_asked_as_its_template_shows(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(model, tmp_path / "model")
    (folder / "chat_template.jinja").write_text(SHOWN + CHATML)
    asked: dict[str, str] = {}
    encode = Interviewer._encode

    def remember(self: Interviewer, case: EvalCase) -> Any:
        ids = encode(self, case)
        asked[case.case_id] = self._text(ids)
        return ids

    monkeypatch.setattr(Interviewer, "_encode", remember)
    options = ["--categories", "level-2", "live_parallel", "--cases", "1", *OPTIONS[6:]]
    assert main(["eval", "run", str(folder), "--output", str(tmp_path / "auto"), *options]) == 0
    assert "in the dialect hermes" in capsys.readouterr().err
    assert json.loads((tmp_path / "auto" / "run.json").read_text())["settings"]["dialect"] == "hermes"
    answers = {name: read_answers(tmp_path / "auto" / name / "answers.jsonl") for name in ("bfcl", "api-bank")}
    [case], [other] = answers["bfcl"], answers["api-bank"]
    assert "Call in <tool_call>" in asked[case] and "**Available Tools**" not in asked[case]
    assert "Call in" not in asked[other], "API-Bank's own text asks for tags"
    # answers of two dialects never mix, and a template that shows no tools cannot be asked for its own calls
    command = ["eval", "run", str(folder), "--output", str(tmp_path / "auto"), *options, "--dialect"]
    assert main([*command, "toolrl"]) == 2 and "differs in settings.dialect" in capsys.readouterr().err
    assert main(["eval", "run", str(model), "--output", str(tmp_path / "no"), *options, "--dialect", "hermes"]) == 2
    error = capsys.readouterr().err
    assert "--dialect hermes: the chat template leaves out the tools" in error and len(error.splitlines()) == 1


def test_an_export_is_asked_as_its_run_was(model: Path, tmp_path: Path) -> None:
    """Its template may show calls in another form than it was trained on."""
    export = shutil.copytree(model, tmp_path / "run" / "hf")
    (export / "chat_template.jinja").write_text(SHOWN + CHATML)
    assert models.find_model(export).chat().dialect == "hermes"
    (tmp_path / "train").mkdir()
    manifest = {"schema_version": 2, "outputs": [], "tokenizer": {"dialect": "toolrl"}}
    (tmp_path / "train" / "manifest.json").write_text(json.dumps(manifest))
    config = {"data": {"train": str(tmp_path / "train")}, "warm_start": {"answers": ""}}
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(config))
    found = models.find_model(export)
    assert found.chat().dialect == "toolrl" and found.training_data == (str(tmp_path / "train"),)


def test_answers_survive_half_lines_and_any_text(tmp_path: Path) -> None:
    texts = {"a": 'line\u2028separator\x85 \ud800 "quoted"\n', "b": [["x", ""], []]}
    with AnswerLog(tmp_path / "answers.jsonl") as log:
        for case_id, answer in texts.items():
            log.add(case_id, answer)
    with open(tmp_path / "answers.jsonl", "ab") as file:
        file.write(b'{"case_id": "c", "ans')
    with AnswerLog(tmp_path / "answers.jsonl") as log:
        assert log.known == texts
        log.add("c", "again")
    assert read_answers(tmp_path / "answers.jsonl") == {**texts, "c": "again"}


def test_cases_are_drawn_by_seed() -> None:
    cases = load_cases("api-bank")
    few, more, other = draw(cases, 5, seed=1), draw(cases, 9, seed=1), draw(cases, 5, seed=2)
    assert [case.category for case in few] == ["level-1"] * 5 + ["level-2"] * 5 + ["level-3"] * 5
    assert {case.case_id for case in few} < {case.case_id for case in more}
    assert {case.case_id for case in few} != {case.case_id for case in other}
    assert draw(cases, 0, seed=1) == cases
    assert draw([case for case in cases if case.category == "level-2"], 5, seed=1) == few[5:10]
    assert find_categories(["multi_turn_base", "api-bank"]) == {
        "bfcl": ("multi_turn_base",),
        "api-bank": ("level-1", "level-2", "level-3"),
    }


def test_a_runs_model_is_its_export_or_a_newer_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which checkpoint is written as an HF folder; that it is written well is tested in tests/trainer/test_run.py."""
    wanted: list[str] = []

    def export(run_dir: Path, config: Path, checkpoint: Path) -> Path:
        wanted.append(checkpoint.name)
        return run_dir / "hf"

    monkeypatch.setattr(models, "_export", export)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(to_dict(RestConfig())))
    with pytest.raises(ValueError, match="no complete checkpoint: it has none"):
        models.find_model(tmp_path)
    for step in (2, 4):
        (tmp_path / f"checkpoints/step_{step:06d}").mkdir(parents=True)
        (tmp_path / f"checkpoints/step_{step:06d}/metadata.json").write_text("{}")
    (tmp_path / "checkpoints/step_000006.partial").mkdir()
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf/config.json").write_text("{}")
    assert models.find_model(tmp_path).folder == tmp_path / "hf" and wanted == ["step_000004"], "it is not finished"
    (tmp_path / "config.yaml").write_text("")
    assert models.find_model(tmp_path).folder == tmp_path / "hf" and len(wanted) == 1
    models.find_model(tmp_path, step=2)
    models.find_model(tmp_path / "checkpoints/step_000002")
    later = (tmp_path / "hf/config.json").stat().st_mtime_ns + 1
    os.utime(tmp_path / "checkpoints/step_000004/metadata.json", ns=(later, later))
    models.find_model(tmp_path)
    assert wanted[1:] == ["step_000002", "step_000002", "step_000004"], "it went on after its export"
    with pytest.raises(ValueError, match="no complete checkpoint of step 3: it has those of steps 2, 4"):
        models.find_model(tmp_path, step=3)
