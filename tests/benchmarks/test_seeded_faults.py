"""Every seeded fault still has its place in the code: one that has lost it would prove nothing."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from benchmarks.seeded_faults import FAULTS, ROOT, Fault, plant


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.what)
def test_the_place_is_there_and_the_tests_are(fault: Fault, tmp_path: Path) -> None:
    target = tmp_path / fault.file
    target.parent.mkdir(parents=True)
    shutil.copy(ROOT / fault.file, target)
    plant(fault, tmp_path)
    compile(target.read_text(), fault.file, "exec")
    assert target.read_text() != (ROOT / fault.file).read_text()
    assert all((ROOT / name).exists() for name in fault.tests.split())


def test_a_lost_place_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("x = 1\n")
    with pytest.raises(ValueError, match=r"stands 0 times in a.py"):
        plant(Fault(what="w", file="a.py", old="y", new="z", tests="tests"), tmp_path)
