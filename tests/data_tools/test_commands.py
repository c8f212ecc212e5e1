"""The command line: what a user types, what he sees, and the exit status."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import termios
from collections import Counter
from pathlib import Path

import pytest

from data_tools.cli import main
from data_tools.decontaminate import build_index
from data_tools.errors import DataError
from data_tools.folders import PreparedFolder
from megatron_rest.eval.decontamination import decontamination_lines, decontamination_of
from tests.data_tools.conftest import SAMPLES


@pytest.fixture(scope="module")
def prepared(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("prepared") / "sft"
    command = ["convert", "--input", str(SAMPLES / "rlla_sft.json"), "--output", str(output), "--processes", "1"]
    assert main([*command, "--tokenizer", str(tokenizer_folder), "--licence", "Apache-2.0"]) == 0
    return output


def test_nothing_heavy_is_imported(tokenizer_folder: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from data_tools.cli import main; "
        f"main(['convert', '--input', {str(SAMPLES)!r}, '--output', {str(tmp_path / 'o')!r}, "
        f"'--tokenizer', {str(tokenizer_folder)!r}, '--processes', '1']); "
        "print(sorted({'torch', 'transformers', 'megatron', 'vllm', 'datasets'} & sys.modules.keys()))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "[]"
    assert "279 rows in, 279 out, 0 quarantined" in result.stdout


def test_a_terminal_sees_rows_a_second_and_time_left(tokenizer_folder: Path, tmp_path: Path) -> None:
    ours, theirs = os.openpty()
    termios.tcsetwinsize(theirs, (24, 100))
    command = [sys.executable, "-m", "data_tools", "convert", "--input", str(SAMPLES / "rlla_sft.json")]
    command += ["--output", str(tmp_path / "o"), "--tokenizer", str(tokenizer_folder), "--processes", "1"]
    subprocess.run(command, stdout=subprocess.DEVNULL, stderr=theirs, check=True)
    os.close(theirs)
    shown = os.read(ours, 1 << 16).decode()
    os.close(ours)
    assert re.search(r"convert: 100%.* 229/229 \[\d\d:\d\d<00:00, *[\d.]+row/s\]", shown), shown


@pytest.mark.parametrize(
    "command", ["", "convert", "inspect", "validate", "stats", "split", "decontaminate", "train-tokenizer"]
)
def test_help_is_there(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([*([command] if command else []), "--help"])
    assert caught.value.code == 0
    assert "usage: megatron-rest-data" in capsys.readouterr().out


def test_bad_input_is_one_line_and_status_1(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["convert", "--input", "nowhere", "--output", str(tmp_path / "o"), "--tokenizer", "t"]) == 1
    error = capsys.readouterr().err
    assert error == "megatron-rest-data convert: input nowhere does not exist\n"


def test_train_tokenizer_writes_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["train-tokenizer", "--vocab-size", "300", "--output", str(tmp_path / "t"), str(SAMPLES / "test.parquet")]
    assert main(command) == 0
    assert "300 tokens" in capsys.readouterr().out


def test_inspect_shows_prepared_and_raw_rows(prepared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(prepared), "--row", "1", "--count", "2", "--color", "never"]) == 0
    out = capsys.readouterr().out
    assert "rlla_sft.json row 1 " in out
    assert "rlla_sft.json row 2 " in out
    assert "\x1b" not in out
    assert main(["inspect", str(SAMPLES / "test.parquet"), "--row", "3", "--color", "never"]) == 0
    out = capsys.readouterr().out
    assert "calculate_investment_return(initial_amount, interest_rate, num_years)" in out
    assert main(["inspect", str(prepared), "--row", "229"]) == 1


def test_inspect_colours_regions(prepared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(SAMPLES / "test.parquet"), "--row", "3", "--color", "always"]) == 0
    raw = capsys.readouterr().out
    assert '\x1b[1;33mcalculate_investment_return\x1b[0m\x1b[90m", "parameters":' in raw
    assert main(["inspect", str(prepared), "--row", "3", "--color", "always"]) == 0
    out = capsys.readouterr().out
    stored = out[out.index("[reference answer]") :]
    assert "\x1b[90m<think>\x1b[0m\x1b[36m" in stored
    assert stored.count("\x1b[1;33m") == 1 + stored.count("\x1b[32m{") > 1, "a name for every arguments object; legend"


def test_validate_accepts_what_convert_wrote(
    prepared: Path, tokenizer_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["validate", str(prepared), "--tokenizer", str(tokenizer_folder)]) == 0
    assert "good" in capsys.readouterr().out
    assert main(["validate", str(SAMPLES)]) == 0
    assert "279 rows, 0 of them cannot be used" in capsys.readouterr().out


def test_validate_notices_every_kind_of_damage(
    prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in prepared.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    data = bytearray((prepared / "data-00000.arrow").read_bytes())
    data[len(data) // 2] ^= 1
    (copy / "data-00000.arrow").write_bytes(data)
    (copy / "quarantine.jsonl").write_text("{}\n")
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["counts"]["rows_out"] = 7
    (copy / "manifest.json").write_text(json.dumps(manifest))
    assert main(["validate", str(copy)]) == 1
    out = capsys.readouterr().out
    for message in (
        "data-00000.arrow was changed",
        "quarantine.jsonl holds 1 rows",
        "are not rows out",
        "rows out is 7",
    ):
        assert message in out
    (copy / "data-00000.arrow").unlink()
    assert main(["validate", str(copy)]) == 1
    assert "data-00000.arrow is missing" in capsys.readouterr().out


def test_stats_are_right_and_list_over_long_prompts(
    prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lengths = [len(row) for b in PreparedFolder(prepared).batches() for row in b.column("prompt_token_ids").to_pylist()]
    limit = sorted(lengths)[-30]
    command = ["stats", str(prepared), "--max-prompt-tokens", str(limit), "--json", str(tmp_path / "s.json")]
    assert main([*command, "--png", str(tmp_path / "s.png")]) == 0
    assert f"prompts are longer than {limit}" in capsys.readouterr().out
    stats = json.loads((tmp_path / "s.json").read_text())
    assert len(stats["over_long"]) == sum(length > limit for length in lengths)
    assert stats["prompt_tokens"]["p100"] == max(lengths)
    assert sum(stats["calls_per_row"].values()) == stats["rows"] == 229
    assert (tmp_path / "s.png").read_bytes().startswith(b"\x89PNG")


def test_stats_list_duplicates(tokenizer_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = json.loads((SAMPLES / "rlla_sft.json").read_text())[:3]
    other_answer = {**rows[1], "output": rows[1]["output"].replace("<think>", "<think> Well.")}
    for name, some in (("a.json", [rows[0], rows[1], rows[0]]), ("b.json", [rows[2], rows[1], other_answer])):
        (tmp_path / name).write_text(json.dumps(some))
    command = [
        "convert",
        "--input",
        str(tmp_path / "a.json"),
        str(tmp_path / "b.json"),
        "--output",
        str(tmp_path / "o"),
    ]
    assert main([*command, "--tokenizer", str(tokenizer_folder)]) == 0
    capsys.readouterr()
    assert main(["stats", str(tmp_path / "o"), "--json", str(tmp_path / "s.json")]) == 0
    out = capsys.readouterr().out
    assert "6 rows: 2 exact duplicates, 3 prompts repeated" in out
    assert "  a.json row 2 = a.json row 0\n  b.json row 1 = a.json row 1\n" in out
    duplicates = json.loads((tmp_path / "s.json").read_text())["duplicates"]
    assert duplicates[1] == {"file": "b.json", "row": 1, "same_as_file": "a.json", "same_as_row": 1}


def test_split_is_a_partition_by_prompt(prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["split", str(prepared), "--output", str(tmp_path), "--parts", "train=0.8", "test=0.2"]
    assert main([*command, "--seed", "3"]) == 0
    parts = {
        name: [i for b in PreparedFolder(tmp_path / name).batches() for i in b.column("prompt_id").to_pylist()]
        for name in ("train", "test")
    }
    whole = [i for b in PreparedFolder(prepared).batches() for i in b.column("prompt_id").to_pylist()]
    assert sorted(parts["train"] + parts["test"]) == sorted(whole)
    assert 20 < len(parts["test"]) < 75
    assert [i for i in whole if i in set(parts["test"])] == parts["test"], "the order is kept"
    for name in parts:
        assert main(["validate", str(tmp_path / name)]) == 0
    assert main(["split", str(prepared), "--output", str(tmp_path / "x"), "--parts", "a=0.5", "b=0.6"]) == 1
    assert "add up to 1.1" in capsys.readouterr().err


def test_split_by_tools_shares_no_set_of_tools(tokenizer_folder: Path, tmp_path: Path) -> None:
    rows = json.loads((SAMPLES / "rlla_sft.json").read_text())[:60]
    again = [{**row, "input": row["input"].replace("<user>", "<user> Please:")} for row in rows]  # other prompts
    (tmp_path / "rows.json").write_text(json.dumps(rows + again))
    convert = ["convert", "--input", str(tmp_path / "rows.json"), "--output", str(tmp_path / "whole")]
    assert main([*convert, "--tokenizer", str(tokenizer_folder), "--processes", "1"]) == 0

    def tools_of(path: Path) -> Counter[frozenset[str]]:
        texts = [text for b in PreparedFolder(path).batches() for text in b.column("tools").to_pylist()]
        return Counter(frozenset(tool["name"] for tool in json.loads(text)) for text in texts)

    def split(*options: str) -> list[Counter[frozenset[str]]]:
        command = ["split", str(tmp_path / "whole"), "--output", str(tmp_path), "--parts", "a=0.4", "b=0.6"]
        assert main([*command, "--overwrite", *options]) == 0
        parts = [tools_of(tmp_path / name) for name in "ab"]
        assert parts[0] + parts[1] == tools_of(tmp_path / "whole")
        assert all(part.total() > 20 for part in parts)
        return parts

    one, other = split("--by", "tools")
    assert not one.keys() & other.keys()
    one, other = split()
    assert one.keys() & other.keys(), "by prompt the same tools are on both sides"


def test_decontaminate_removes_benchmark_rows_only(
    prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = json.loads((SAMPLES / "rlla_sft.json").read_text())
    question = rows[5]["input"].replace("<user>", "").replace("</user>", "!!").upper()
    bench = [
        {"id": "bfcl_0", "question": [[{"role": "user", "content": question}]], "function": []},
        {
            "id": "bfcl_1",
            "question": [[{"role": "user", "content": "What is the airspeed of an unladen swallow today?"}]],
        },
        {"id": "bfcl_2", "question": [[{"role": "user", "content": "Hi there"}]]},
    ]
    (tmp_path / "bench.json").write_text("".join(json.dumps(item) + "\n" for item in bench))
    command = ["decontaminate", str(prepared), "--against", str(tmp_path / "bench.json")]
    assert main([*command, "--output", str(tmp_path / "clean")]) == 0
    assert "2 benchmark items, 1 too short" in capsys.readouterr().out
    manifest = json.loads((tmp_path / "clean" / "manifest.json").read_text())
    assert manifest["counts"]["rows_in"] == 229
    removed = [json.loads(line) for line in (tmp_path / "clean" / "quarantine.jsonl").read_text().splitlines()]
    assert 5 in [entry["row"] for entry in removed]
    assert len(removed) == manifest["counts"]["rows_quarantined"] < 4
    assert all("bench.json:0 (overlap" in entry["reason"] for entry in removed)
    assert manifest["derived_from"]["operation"]["command"] == "decontaminate"
    assert main(["validate", str(tmp_path / "clean")]) == 0
    # a part of it says so, too, and an evaluation shows it beside its scores
    assert main(["split", str(tmp_path / "clean"), "--output", str(tmp_path), "--parts", "a=0.5", "b=0.5"]) == 0
    for name in ("clean", "a"):
        report = decontamination_of(tmp_path / name)
        [done] = report["passes"]
        assert (done["against"], done["rows_removed"], done["ngram"]) == (["bench.json"], len(removed), 8)
        [line] = decontamination_lines([report])
        assert f"decontaminated against bench.json ({len(removed)} rows removed" in line
    assert "NOT decontaminated" in decontamination_lines([decontamination_of(prepared)])[0]
    assert "prepare it with" in decontamination_lines([decontamination_of(tmp_path / "nowhere")])[0]


def test_decontaminate_against_the_files_of_bfcl(tokenizer_folder: Path, tmp_path: Path) -> None:
    package = importlib.util.find_spec("bfcl_eval")
    if package is None or not package.submodule_search_locations:
        pytest.skip("bfcl-eval is not installed (requirements/cpu.txt has it)")
    data = Path(package.submodule_search_locations[0]) / "data"
    files = [
        data / f"BFCL_v4_{name}.json" for name in ("simple_python", "parallel", "live_multiple", "multi_turn_base")
    ]
    rows = json.loads((SAMPLES / "rlla_sft.json").read_text())[:20]
    for file in files:
        turns = json.loads(file.read_text().splitlines()[7])["question"]
        said = "\n".join(f"<user> {message['content']} </user>" for turn in turns for message in turn)
        rows.append({"input": said, "output": "<think> t </think>\n<response> r </response>"})
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    command = ["convert", "--input", str(tmp_path / "rows.json"), "--output", str(tmp_path / "out")]
    assert main([*command, "--tokenizer", str(tokenizer_folder)]) == 0
    command = [
        "decontaminate",
        str(tmp_path / "out"),
        "--against",
        *map(str, files),
        "--output",
        str(tmp_path / "clean"),
    ]
    assert main(command) == 0
    removed = [json.loads(line) for line in (tmp_path / "clean" / "quarantine.jsonl").read_text().splitlines()]
    assert [(entry["row"], entry["reason"].split(": ")[1]) for entry in removed] == [
        (20 + number, f"{file.name}:7 (overlap 1.00)") for number, file in enumerate(files)
    ]


def test_boilerplate_of_a_benchmark_says_nothing(tmp_path: Path) -> None:
    rows = [{"question": f"Based on our conversation above please only make one call number {n}"} for n in range(100)]
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    index = build_index([str(tmp_path / "b.jsonl")], ngram=8, min_overlap=0.5)
    assert index.find("Based on our conversation above please only make one call number of mine") is None
    assert index.find("based on our conversation above, please only make one call: number 42") is not None
    with pytest.raises(DataError, match="--ngram"):
        build_index([str(tmp_path / "b.jsonl")], ngram=2, min_overlap=0.5)
