"""Where the minutes of a test run went: ``python -m tests.times REPORT.xml...`` (pytest's ``--junitxml``).

Prints the seconds of every folder and the ten slowest tests, set-up and teardown counted, and names every test over 20
seconds that is not marked as long.  With ``--limit MINUTES --took SECONDS`` the status is 1 when the whole check took
longer.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

LONG = 20.0  # seconds; more than this wants the marker "slow" or "extended"


def read(reports: list[Path]) -> dict[str, float]:
    """Test id -> seconds."""
    seconds: dict[str, float] = {}
    for report in reports:
        for case in ElementTree.parse(report).iter("testcase"):
            name = f"{case.get('classname')}::{case.get('name')}"
            seconds[name] = seconds.get(name, 0.0) + float(case.get("time", 0))
    return seconds


def marked(reports: list[Path]) -> set[str]:
    """Ids of the tests that say themselves that they are long."""
    return {
        f"{case.get('classname')}::{case.get('name')}"
        for report in reports
        for case in ElementTree.parse(report).iter("testcase")
        for entry in case.iter("property")
        if entry.get("name") == "is_long"
    }


def folder_of(test: str) -> str:
    parts = test.split("::")[0].split(".")
    return "/".join(parts[:2]) if len(parts) > 2 else "/".join(parts[:1])


def page(seconds: dict[str, float], long: set[str]) -> str:
    folders: Counter[str] = Counter()
    for test, time in seconds.items():
        folders[folder_of(test)] += time
    slowest = sorted(seconds.items(), key=lambda entry: -entry[1])
    lines = [f"{sum(seconds.values()):8.0f} s  all {len(seconds)} tests"]
    lines += [f"{time:8.0f} s  {folder}" for folder, time in folders.most_common()]
    lines += ["the ten slowest:", *(f"{time:8.1f} s  {test}" for test, time in slowest[:10])]
    unmarked = [f"{time:8.1f} s  {test}" for test, time in slowest if time > LONG and test not in long]
    if unmarked:
        lines += [f"over {LONG:.0f} s and not marked slow or extended (CONTRIBUTING.md):", *unmarked]
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reports", nargs="+", type=Path)
    parser.add_argument("--limit", type=float, metavar="MINUTES", help="fail if --took is more than this")
    parser.add_argument("--took", type=float, metavar="SECONDS", default=0.0, help="time of the whole check")
    arguments = parser.parse_args(argv)
    there = [report for report in arguments.reports if report.is_file()]
    if not there:
        raise SystemExit(f"no report among {', '.join(map(str, arguments.reports))}: pytest was not run or did not end")
    print(page(read(there), marked(there)))
    if arguments.limit is not None and arguments.took > 60 * arguments.limit:
        print(f"the check took {arguments.took / 60:.0f} min, the limit is {arguments.limit:.0f}: see the list above")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
