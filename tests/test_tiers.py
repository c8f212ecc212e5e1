"""The tiers of the tests: parts are disjoint and complete, and the page of times names what is too long."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests import times
from tests.conftest import units_of_part

REPORT = """<testsuites><testsuite>
<testcase classname="tests.ops.test_a" name="test_long" time="31.5"/>
<testcase classname="tests.ops.test_a" name="test_known[x]" time="40.0">
  <properties><property name="is_long" value="True"/></properties></testcase>
<testcase classname="tests.test_b" name="test_short" time="0.25"/>
</testsuite></testsuites>"""


def test_parts_are_disjoint_and_together_all() -> None:
    modules = [f"test_{i % 17}.py" for i in range(100)]
    parts = [units_of_part(f"{k}/7", modules) for k in range(7)]
    assert Counter(module for part in parts for module in part) == Counter(set(modules))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_modules_stay_whole_and_tests_that_are_alone_do_not(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text((Path(__file__).parent / "conftest.py").read_text())
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n    alone\n")
    alone = "@pytest.mark.alone\n@pytest.mark.parametrize('x', range(2))\n"
    (tmp_path / "test_a.py").write_text(f"import pytest\n{alone}def test_it(x): pass\ndef test_one(): pass\n")
    (tmp_path / "test_b.py").write_text("def test_one(): pass\ndef test_two(): pass\n")

    def collected(part: str) -> list[str]:
        command = [sys.executable, "-m", "pytest", "--co", "-q", "-p", "no:cacheprovider", "--part", part]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
        return [line for line in done.stdout.splitlines() if line.startswith("test_")]

    assert collected("0/2") == ["test_a.py::test_it[1]", "test_a.py::test_one"]
    assert collected("1/2") == ["test_a.py::test_it[0]", "test_b.py::test_one", "test_b.py::test_two"]


@pytest.mark.parametrize("part", ["7/7", "-1/7", "one", "1/2/3"])
def test_a_part_that_is_none_is_refused(part: str) -> None:
    with pytest.raises(pytest.UsageError, match="--part"):
        units_of_part(part, [])


def test_the_page_of_times(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = tmp_path / "report.xml"
    report.write_text(REPORT)
    assert times.main([str(report), str(tmp_path / "absent.xml"), "--limit", "45", "--took", "2699"]) == 0
    page = capsys.readouterr().out
    assert "      72 s  all 3 tests\n      72 s  tests/ops\n       0 s  tests\n" in page
    first, unmarked = page.split("over 20 s and not marked")
    assert first.index("test_known") < first.index("test_long") < first.index("test_short")
    assert "test_long" in unmarked and "test_known" not in unmarked
    assert times.main([str(report), "--limit", "45", "--took", "2701"]) == 1
    assert "took 45 min, the limit is 45" in capsys.readouterr().out


def test_no_report_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        times.main([])
    with pytest.raises(SystemExit, match="no report"):
        times.main([str(tmp_path / "absent.xml")])
