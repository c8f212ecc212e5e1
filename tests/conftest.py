"""What holds for all tests: their tiers (see CONTRIBUTING.md), and the time that each folder takes."""

from __future__ import annotations

from megatron_rest.rollout.process import prepare_process

# Before any test imports torch: its threads would spin for one another, and an engine in this process would decode
# twenty times slower beside any other load.
prepare_process()

from collections.abc import Iterable  # noqa: E402

import pytest  # noqa: E402


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--part",
        metavar="K/N",
        help="only part K (0 to N - 1) of N of the tests that are left after -m: modules are dealt one by one, "
        "and so are tests that are marked alone",
    )


@pytest.hookimpl(trylast=True)  # after -m and -k
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("slow") or item.get_closest_marker("extended"):
            item.user_properties.append(("is_long", True))  # for tests/times.py, through the JUnit report
    # Modules with long tests first: what begins last is what one process does while the other has nothing left.
    long = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in long)
    if config.getoption("--part") is None:
        return
    kept = set(units_of_part(config.getoption("--part"), map(_unit_of, items)))
    left_out = [item for item in items if _unit_of(item) not in kept]
    items[:] = [item for item in items if _unit_of(item) in kept]
    config.hook.pytest_deselected(items=left_out)
    print("this part:", ", ".join(sorted(kept)) or "empty")


def _unit_of(item: pytest.Item) -> str:
    """A module stays whole, since its tests share what they made, unless they say that they do not."""
    return item.nodeid if item.get_closest_marker("alone") else item.nodeid.split("::")[0]


def units_of_part(part: str, units: Iterable[str]) -> list[str]:
    """Part "K/N" of what is dealt."""
    try:
        k, n = (int(number) for number in part.split("/"))
    except ValueError:
        raise pytest.UsageError(f"--part wants K/N, for example 0/7, not {part!r}") from None
    if not 0 <= k < n:
        raise pytest.UsageError(f"--part {part}: K goes from 0 to N - 1")
    return sorted(set(units))[k::n]
