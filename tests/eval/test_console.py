"""``megatron-rest eval`` on stored answers: files, table, comparison, and what a user gets wrong."""

from __future__ import annotations

import json

import pytest

from megatron_rest.cli import main
from megatron_rest.eval import api_bank


def reference_answers(path, num_right):
    rows = []
    for i, case in enumerate(api_bank.load(categories=("level-2",))):
        call = case.score.keywords["reference"]
        answer = f"<tool_call>\n{json.dumps(call)}\n</tool_call>" if i < num_right else "no"
        rows.append({"case_id": case.case_id, "answer": answer})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def scored(tmp_path):
    for name, right in (("a", 30), ("b", 40)):
        answers = reference_answers(tmp_path / f"{name}.jsonl", right)
        output = str(tmp_path / name)
        assert main(["eval", "score", "api-bank", str(answers), "--categories", "level-2", "--output", output]) == 0
    return tmp_path


def test_scores_are_written(scored):
    summary = json.loads((scored / "a" / "summary.json").read_text())
    assert summary["all"]["cases"] == 67
    assert summary["all"]["correct"] == 30
    assert summary["categories"]["level-2"]["outcomes"] == {"no call": 37, "correct": 30}
    verdicts = [json.loads(line) for line in (scored / "a" / "verdicts.jsonl").read_text().splitlines()]
    assert sum(row["score"]["is_correct"] for row in verdicts) == 30


def test_two_runs_are_compared_case_by_case(scored, capsys):
    assert main(["eval", "compare", str(scored / "a"), str(scored / "b")]) == 0
    line = capsys.readouterr().out.splitlines()[-3]
    assert line.startswith("all")
    assert "+14.9%" in line
    assert "0 / 10" in line
    assert "0.00195" in line  # 2 / 2^10


def test_cases_without_an_answer_count_as_wrong(scored, capsys):
    lines = (scored / "a.jsonl").read_text().splitlines(keepends=True)
    (scored / "half.jsonl").write_text("".join(lines[:30]))
    arguments = [str(scored / "half.jsonl"), "--categories", "level-2", "--output", str(scored / "half")]
    assert main(["eval", "score", "api-bank", *arguments]) == 0
    summary = json.loads((scored / "half" / "summary.json").read_text())
    assert summary["all"]["outcomes"] == {"no answer": 37, "correct": 30}
    assert summary["all"]["soft_accuracy"]["estimate"] == pytest.approx(30 / 67)
    assert "44.8%  33.5% to 56.6%" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 68: not an answer"),
        ('{"case_id": "level-2/0", "answer": "x"}', "answered twice"),
        ('{"case_id": "level-9/0", "answer": "x"}', "cases that were not asked for"),
        ('{"case_id": "level-2/0"}', "line 68"),
    ],
)
def test_bad_answers_are_one_clear_line(scored, capsys, line, message):
    bad = scored / "bad.jsonl"
    bad.write_text((scored / "a.jsonl").read_text() + line + "\n")
    arguments = ["eval", "score", "api-bank", str(bad), "--categories", "level-2", "--output", str(scored / "new")]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
    assert not (scored / "new").exists()


def test_a_folder_of_another_run_is_never_written_over(scored, capsys):
    answers = str(scored / "a.jsonl")
    assert main(["eval", "score", "api-bank", answers, "--categories", "level-2", "--output", str(scored / "b")]) == 2
    assert "exists" in capsys.readouterr().err


def test_prompts_are_printed_as_json_lines(capsys):
    assert main(["eval", "prompts", "bfcl", "--categories", "simple_python", "--limit", "2"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["case_id"] for row in rows] == ["simple_python_0", "simple_python_1"]
    assert rows[0]["messages"][0]["role"] == "system"
