"""Mutate the sample rows in every stored form and read them: an error by name or rows that add up, nothing else.

python -m tests.data_tools.fuzzing --cases 10000        (prints JSON; exit status 1 on anything unexpected)

Targets are the files of ``test_forms.WRITERS``, a ``save_to_disk`` folder and a prepared folder; every tenth mutated
input that can be read is converted and validated as well.  A case that takes a minute ends all with a traceback.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import json
import pickle
import random
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data_tools.convert import ConvertOptions, convert_rows
from data_tools.errors import DataError, RowError
from data_tools.examples import normalise
from data_tools.readers import count_rows, read_chunks, resolve_inputs
from data_tools.validate import validate_prepared
from megatron_rest.data.prompts import PromptDataset

HANG_S = 60
CONVERT_EVERY = 10
Check = Callable[[Path], None]


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


def flip(data: bytes, chance: random.Random) -> bytes:
    """One to three changes that keep the size, which is the first thing a reader of prepared folders looks at."""
    out = bytearray(data)
    for _ in range(chance.randint(1, 3)):
        at, size = chance.randrange(len(out)), chance.choice((1, 2, 8, 64))
        for index in range(at, min(at + size, len(out))):
            out[index] = chance.choice((0, 0xFF, chance.randrange(256)))
    return bytes(out)


def read_raw(path: Path) -> int:
    """Read and normalise everything; returns the number of rows."""
    sources = resolve_inputs([path])
    stated, rows = sum(count_rows(source) for source in sources), 0
    for source in sources:
        of_source = 0
        for read in read_chunks([source]):
            chunk = pickle.loads(pickle.dumps(read))  # the way to a worker process
            assert chunk.first_row == of_source, "row numbers have gaps"
            for number, row in chunk.rows():
                assert number == of_source
                of_source += 1
                try:
                    if not isinstance(row, RowError):
                        normalise(row)
                except RowError:
                    pass
            assert of_source == chunk.first_row + chunk.num_rows, "a chunk lost a row"
        rows += of_source
    assert rows == stated, f"{stated} rows were announced, {rows} were read"
    return rows


class RawCheck:
    """Reads; converts every tenth input that can be read."""

    def __init__(self, tokenizer: Path, scratch: Path) -> None:
        self._tokenizer, self._output, self._read = tokenizer, scratch / "converted", 0

    def __call__(self, path: Path) -> None:
        rows = read_raw(path)
        self._read += 1
        if self._read % CONVERT_EVERY == 0:
            self._convert(path, rows)

    def _convert(self, path: Path, rows: int) -> None:
        options = ConvertOptions(
            inputs=[str(path)],
            output=self._output,
            tokenizer=self._tokenizer,
            processes=1,
            progress_bar=False,
            overwrite=True,
        )
        manifest = convert_rows(options)
        assert manifest["counts"]["rows_in"] == rows, "rows are missing in the manifest"
        assert (findings := list(validate_prepared(self._output))) == [], findings
        assert len(PromptDataset.open(self._output)) == manifest["counts"]["rows_out"]


def read_prepared(folder: Path) -> None:
    """What ``validate`` and training do with a prepared folder."""
    list(validate_prepared(folder))
    dataset = PromptDataset.open(folder)
    for index in range(len(dataset)):
        with contextlib.suppress(ValueError):
            dataset[index], dataset.reference_token_ids(index), dataset.record(index)


def fuzz(
    original: Path, check: Check, scratch: Path, *, cases: int, seed: int, change: Callable[..., bytes] = mutate
) -> dict[str, Any]:
    """Check ``cases`` mutations of a file, or of one file of a folder; whatever is not a ValueError is unexpected."""
    chance, start = random.Random(seed), time.monotonic()
    outcome: dict[str, Any] = {"cases": cases, "read": 0, "refused": 0, "slowest_s": 0.0, "unexpected": []}
    mutated = scratch / f"mutated-{original.name}"
    shutil.copytree(original, mutated) if original.is_dir() else shutil.copy(original, mutated)
    files = sorted(path for path in [mutated, *mutated.rglob("*")] if path.is_file() and path.stat().st_size)
    contents = {path: path.read_bytes() for path in files}
    for case in range(cases):
        file, start = chance.choice(files), time.monotonic()
        file.unlink()  # what is still mapped keeps its bytes
        file.write_bytes(change(contents[file], chance))
        faulthandler.dump_traceback_later(HANG_S, exit=True)
        try:
            check(mutated)
            outcome["read"] += 1
        except (DataError, ValueError) as error:
            outcome["refused"] += 1
            if not str(error) or isinstance(error, UnicodeError):
                outcome["unexpected"].append(f"case {case}: {error!r} names nothing")
        except Exception:  # noqa: BLE001 - finding these is the purpose
            outcome["unexpected"].append(f"case {case}: {traceback.format_exc(limit=-3)}")
        faulthandler.cancel_dump_traceback_later()
        file.write_bytes(contents[file])
        outcome["slowest_s"] = max(outcome["slowest_s"], round(time.monotonic() - start, 3))
    return outcome


def write_targets(folder: Path, tokenizer: Path) -> dict[str, Path]:
    """Every form, a ``save_to_disk`` folder and a prepared folder."""
    import datasets

    from tests.data_tools.test_forms import TABLE, WRITERS

    for name, write in WRITERS.items():
        write(folder / name)
    datasets.Dataset(TABLE).save_to_disk(folder / "save_to_disk", num_shards=2)
    options = {"tokenizer": tokenizer, "processes": 1, "progress_bar": False}
    convert_rows(ConvertOptions(inputs=[str(folder / "lines.jsonl")], output=folder / "prepared", **options))
    return {name: folder / name for name in (*WRITERS, "save_to_disk", "prepared")}


def fuzz_target(target: Path, tokenizer: Path, scratch: Path, *, cases: int, seed: int) -> dict[str, Any]:
    """:func:`fuzz` with the check that belongs to the target."""
    scratch.mkdir()
    if target.name == "prepared":
        return fuzz(target, read_prepared, scratch, cases=cases, seed=seed, change=flip)
    return fuzz(target, RawCheck(tokenizer, scratch), scratch, cases=cases, seed=seed)


def main() -> int:
    """All forms in turn."""
    from data_tools.train_tokenizer import texts_of, train_and_save
    from tests.data_tools.conftest import SAMPLES

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    results = {}
    with tempfile.TemporaryDirectory() as name:
        folder, tokenizer = Path(name), Path(name) / "tokenizer"
        train_and_save(texts_of([str(SAMPLES / "test.parquet")]), vocab_size=600, output=tokenizer)
        (folder / "targets").mkdir()
        targets = write_targets(folder / "targets", tokenizer)
        cases = -(-arguments.cases // len(targets))
        for form, target in targets.items():
            scratch = folder / f"scratch-{form}"
            results[form] = fuzz_target(target, tokenizer, scratch, cases=cases, seed=arguments.seed)
            print(form, json.dumps(results[form])[:2000], file=sys.stderr, flush=True)
    total = {key: sum(result[key] for result in results.values()) for key in ("cases", "read", "refused")}
    print(json.dumps({**total, "unexpected": sum(len(result["unexpected"]) for result in results.values())}))
    return 1 if any(result["unexpected"] for result in results.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
