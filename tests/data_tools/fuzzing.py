"""Mutate the sample rows in every stored form and read them: an error by name or rows that add up, nothing else.

python -m tests.data_tools.fuzzing --cases 10000        (prints JSON; exit status 1 on anything unexpected)
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

from data_tools.errors import DataError, RowError
from data_tools.layouts import normalise
from data_tools.readers import Form, count_rows, read_chunks, resolve_inputs


def mutate(data: bytes, chance: random.Random) -> bytes:
    """One to three random changes: flipped bytes, cut, removed, repeated, zeroed or inserted pieces."""
    out = bytearray(data)
    for _ in range(chance.randint(1, 3)):
        at = chance.randrange(len(out) + 1) if chance.random() < 0.7 else chance.choice((0, len(out)))
        size = chance.choice((1, 2, 8, 64, 1000))
        kind = chance.randrange(6)
        if kind == 0:
            for index in range(at, min(at + size, len(out))):
                out[index] = chance.randrange(256)
        elif kind == 1:
            del out[at:]
        elif kind == 2:
            del out[at : at + size]
        elif kind == 3:
            out[at:at] = out[at : at + size]
        elif kind == 4:
            out[at : at + size] = bytes(min(size, max(len(out) - at, 0)))
        else:
            out[at:at] = chance.randbytes(size)
    return bytes(out)


def read_case(path: Path) -> int:
    """Read everything; returns the number of rows.  Raises DataError, or AssertionError where rows do not add up."""
    (source,) = resolve_inputs([path])
    stated, rows = count_rows(source), 0
    for chunk in read_chunks([source]):
        assert chunk.first_row == rows, "row numbers have gaps"
        for number, row in chunk.rows():
            assert number == rows
            rows += 1
            try:
                if not isinstance(row, RowError):
                    normalise(row)
            except RowError:
                pass
        assert rows == chunk.first_row + chunk.num_rows, "a chunk lost a row"
    if source.form in (Form.PARQUET, Form.IPC_FILE, Form.IPC_STREAM) and stated is not None:
        assert rows == stated, f"{stated} rows were announced, {rows} were read"
    return rows


def fuzz(data: bytes, path: Path, *, cases: int, seed: int) -> dict[str, Any]:
    """Read ``cases`` mutations of a file; whatever is neither rows nor a DataError is unexpected."""
    chance = random.Random(seed)
    outcome: dict[str, Any] = {"cases": cases, "read": 0, "refused": 0, "slowest_s": 0.0, "unexpected": []}
    for case in range(cases):
        path.write_bytes(mutate(data, chance))
        start = time.monotonic()
        try:
            read_case(path)
            outcome["read"] += 1
        except DataError:
            outcome["refused"] += 1
        except Exception:  # noqa: BLE001 - finding these is the purpose
            outcome["unexpected"].append(f"case {case}: {traceback.format_exc(limit=-3)}")
        outcome["slowest_s"] = max(outcome["slowest_s"], round(time.monotonic() - start, 3))
    return outcome


def main() -> int:
    """All forms in turn."""
    from tests.data_tools.test_forms import WRITERS

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, write in WRITERS.items():
            write(Path(folder) / name)
            data = (Path(folder) / name).read_bytes()
            cases = -(-arguments.cases // len(WRITERS))
            results[name] = fuzz(data, Path(folder) / f"mutated-{name}", cases=cases, seed=arguments.seed)
            print(name, json.dumps(results[name])[:2000], file=sys.stderr, flush=True)
    print(json.dumps({key: sum(r[key] for r in results.values()) for key in ("cases", "read", "refused")}))
    return 1 if any(result["unexpected"] for result in results.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
