"""Preparing data: rows per second beside ``datasets.map`` and a pandas loop, memory, opening and random access.

    python -m benchmarks.data [--rows 4000] [--processes 1] [--tokenizer DIR] [--open-mib 500] [--json out.json]
    python -m benchmarks.data --rows 1000000 --only-ours --processes 2 --open-mib 0       memory (16 GB of disk)
    python -m benchmarks.data --kills 20            kill a conversion at random moments and compare the bytes

Synthetic rows are the sample rows with unique tool names, descriptions, dialogues and thoughts; only the instruction
text repeats, as it does in real data.  Every contender runs in a process of its own, from the same Parquet file, with
the same tokenizer folder, one thread per process, and writes its result to disk; imports are not counted.  All make the
prompt's and the answer's token ids.  Ours also parses tools and calls, hashes, computes byte offsets and syncs to disk.
Processor seconds are printed beside the wall clock: on a shared machine only they can be compared.  Memory is that of
the parent plus that of the largest worker times the workers.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SAMPLES = Path(__file__).parents[1] / "data_tools" / "samples"
FRESH_ROWS = 20_000
TARGET_SPEEDUP, TARGET_OPEN_S, TARGET_ROW_MS, TARGET_RSS_MIB = 3.0, 0.2, 1.0, 1024
_WORD = re.compile(r"[a-z]{4,}")


def write_rows(path: Path, count: int, *, seed: int = 0) -> None:
    """``count`` synthetic rows in verl's layout as Parquet, a thousand at a time.

    Beyond :data:`FRESH_ROWS` rows only the names of tools are new: making text takes longer than converting it.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    chance = random.Random(seed)
    base = json.loads((SAMPLES / "rlla_sft.json").read_text())
    words = sorted({word for row in base for word in _WORD.findall(row["input"] + row["output"])})
    writer = None
    made: list[Any] = []
    for start in range(0, count, 1000):
        numbers = range(start, min(start + 1000, count))
        if start < FRESH_ROWS:
            table = pa.Table.from_pylist([_row(base[n % len(base)], n, words, chance) for n in numbers])
            made += [table] if count > FRESH_ROWS else []
        else:
            table = _renamed(made[start // 1000 % len(made)], start // FRESH_ROWS).slice(0, len(numbers))
        writer = writer or pq.ParquetWriter(path, table.schema)
        writer.write_table(table)
    assert writer is not None
    writer.close()


def _row(source: dict[str, str], number: int, words: list[str], chance: random.Random) -> dict[str, Any]:
    def vary(text: str) -> str:
        return _WORD.sub(lambda m: chance.choice(words) if chance.random() < 0.3 else m.group(), text)

    head, marker, instructions = source["instruction"].partition("\n\n**Steps for Each Turn**")
    tools = "\n".join(vary(line) if line.startswith("Description: ") else line for line in head.split("\n"))
    tools = re.sub(r"(Name: .*)", lambda m: f"{m.group(1)} {number}", tools)
    think, end, calls = source["output"].partition("</think>")
    messages = [
        {"role": "system", "content": tools + marker + instructions},
        {"role": "user", "content": vary(source["input"])},
    ]
    answer = "<think>" + vary(think.removeprefix("<think>")) + end + calls
    return {"data_source": "synthetic", "prompt": messages, "reward_model": {"style": "rule", "ground_truth": answer}}


def _renamed(table: Any, number: int) -> Any:
    """The same rows with other names of tools."""
    import pyarrow as pa
    import pyarrow.compute as pc

    [prompts] = table.column("prompt").chunks
    texts = prompts.values.field("content")
    texts = pc.replace_substring_regex(texts, r"(?m)^(\d+\. Name: .*)$", rf"\1 v{number}")
    messages = pa.StructArray.from_arrays([texts, prompts.values.field("role")], names=["content", "role"])
    place = table.schema.get_field_index("prompt")
    return table.set_column(place, "prompt", pa.ListArray.from_arrays(prompts.offsets, messages)).cast(table.schema)


def ours(rows: Path, output: Path, tokenizer: str, processes: int) -> Callable[[], int]:
    """``megatron-rest-data convert``."""
    import jinja2.sandbox
    import tokenizers

    from data_tools.convert import ConvertOptions, convert_rows

    with contextlib.suppress(ImportError):
        import pandas  # noqa: F401 - which pyarrow imports by itself at its first array
    assert jinja2.sandbox and tokenizers  # imports are not counted
    options = ConvertOptions(
        inputs=[str(rows)], output=output, tokenizer=Path(tokenizer), processes=processes, progress_bar=False
    )
    return lambda: int(convert_rows(options)["counts"]["rows_out"])


def datasets_map(
    rows: Path, output: Path, tokenizer: str, processes: int, *, batched: bool = False
) -> Callable[[], int]:
    """``datasets.map`` with the tokenizer's own chat template, one row at a time or in batches of 1000."""
    import datasets
    from transformers import AutoTokenizer

    datasets.disable_progress_bars()
    chat = AutoTokenizer.from_pretrained(tokenizer)

    def one(row: dict[str, Any]) -> dict[str, Any]:
        answer = row["reward_model"]["ground_truth"] + chat.eos_token
        ids = chat.apply_chat_template(row["prompt"], add_generation_prompt=True, tokenize=True, return_dict=False)
        return {"prompt_token_ids": ids, "answer_token_ids": chat(answer, add_special_tokens=False)["input_ids"]}

    def many(batch: dict[str, Any]) -> dict[str, Any]:
        texts = [chat.apply_chat_template(p, add_generation_prompt=True, tokenize=False) for p in batch["prompt"]]
        answers = [reward["ground_truth"] + chat.eos_token for reward in batch["reward_model"]]
        return {
            "prompt_token_ids": chat(texts, add_special_tokens=False)["input_ids"],
            "answer_token_ids": chat(answers, add_special_tokens=False)["input_ids"],
        }

    def run() -> int:
        data = datasets.Dataset.from_parquet(str(rows), cache_dir=str(output) + ".cache")
        workers = processes if processes > 1 else None
        result = data.map(many if batched else one, batched=batched, num_proc=workers)
        result.save_to_disk(str(output))
        return len(result)

    return run


def datasets_map_batched(rows: Path, output: Path, tokenizer: str, processes: int) -> Callable[[], int]:
    """``datasets.map(batched=True)``."""
    return datasets_map(rows, output, tokenizer, processes, batched=True)


def pandas_loop(rows: Path, output: Path, tokenizer: str, processes: int) -> Callable[[], int]:
    """The loop everybody writes first; one process."""
    import pandas as pd
    from transformers import AutoTokenizer

    chat = AutoTokenizer.from_pretrained(tokenizer)

    def run() -> int:
        frame, prompts, answers = pd.read_parquet(rows), [], []
        for _, row in frame.iterrows():
            ids = chat.apply_chat_template(
                list(row["prompt"]), add_generation_prompt=True, tokenize=True, return_dict=False
            )
            prompts.append(ids)
            text = row["reward_model"]["ground_truth"] + chat.eos_token
            answers.append(chat(text, add_special_tokens=False)["input_ids"])
        frame["prompt_token_ids"], frame["answer_token_ids"] = prompts, answers
        frame.to_parquet(output)
        return len(frame)

    return run


CONTENDERS: dict[str, Callable[..., Callable[[], int]]] = {
    "ours": ours,
    "datasets.map": datasets_map,
    "datasets.map batched": datasets_map_batched,
    "pandas loop": pandas_loop,
}


def worker(name: str, rows: str, output: str, tokenizer: str, *, processes: int) -> None:
    """One contender in this process; prints JSON."""
    run = CONTENDERS[name](Path(rows), Path(output), tokenizer, processes)
    start, cpu_start = time.perf_counter(), _cpu_seconds()
    count = run()
    seconds, cpu_seconds = time.perf_counter() - start, _cpu_seconds() - cpu_start
    own, child = (resource.getrusage(who).ru_maxrss / 1024 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    children = 0 if processes == 1 else processes - 1 if name == "ours" else processes  # ours: the parent encodes too
    peak = own + children * child  # all workers as large as the largest: an upper bound
    print(json.dumps({"rows": count, "seconds": seconds, "cpu_seconds": cpu_seconds, "peak_rss_mib": round(peak)}))


def _cpu_seconds() -> float:
    """Of this process and of the children it has waited for."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def compare(rows: Path, tokenizer: str, folder: Path, *, count: int, processes: int) -> list[dict[str, Any]]:
    """All contenders, one after the other."""
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    results = []
    for name in CONTENDERS:
        if name == "pandas loop" and processes > 1:
            continue
        output = folder / ("out-" + re.sub(r"\W", "-", name) + f"-{processes}")
        command = [sys.executable, "-m", "benchmarks.data", "--worker", name, str(rows), str(output), tokenizer]
        done = subprocess.run(
            [*command, "--processes", str(processes)], env=environment, capture_output=True, text=True, check=True
        )
        result = json.loads(done.stdout.splitlines()[-1])
        assert result["rows"] == count, f"{name} made {result['rows']} of {count} rows"
        print(f"{name}: {result}", file=sys.stderr, flush=True)
        results.append(
            {"name": name, "processes": processes, **result, "rows_per_s": result["rows"] / result["seconds"]}
        )
    for result in results:
        result["ours_is_faster_by"] = round(results[0]["rows_per_s"] / result["rows_per_s"], 2)
        result["ours_needs_less_cpu_by"] = round(result["cpu_seconds"] / results[0]["cpu_seconds"], 2)
    return results


def measure_open(prepared: Path, folder: Path, *, mebibytes: int) -> dict[str, float]:
    """Opening a large output and reading random rows; the output repeats the rows of a small one."""
    import numpy as np
    import pyarrow as pa

    from data_tools.encode import EncodedChunk
    from data_tools.folders import PreparedFolder
    from data_tools.writer import OutputFolder
    from megatron_rest.data.prompts import PromptDataset

    source = PreparedFolder(prepared)
    batches, size = list(source.batches()), 0
    with OutputFolder(folder / "large", fingerprint="", metadata={}, rows_per_shard=1 << 16, resume=False) as large:
        while size < mebibytes << 20:
            for batch in batches:
                large.add(EncodedChunk(batch.num_rows, batch))
                size += batch.nbytes
        large.finish(source.manifest, overwrite=True)
    allocated, start = pa.total_allocated_bytes(), time.perf_counter()
    dataset = PromptDataset.open(folder / "large")
    opened = time.perf_counter() - start
    copied = pa.total_allocated_bytes() - allocated
    rows = np.random.default_rng(0).integers(len(dataset), size=2000)
    start = time.perf_counter()
    tokens = sum(int(dataset[int(row)].token_ids[-1]) + len(dataset.reference_token_ids(int(row))) for row in rows)
    per_row = (time.perf_counter() - start) / len(rows)
    start = time.perf_counter()
    dataset.select(max_prompt_tokens=100_000)
    selected = time.perf_counter() - start
    bytes_on_disk = sum(entry["bytes"] for entry in source.manifest["outputs"]) and sum(
        path.stat().st_size for path in (folder / "large").glob("*.arrow")
    )
    return {
        "mib": bytes_on_disk / 2**20,
        "rows": len(dataset),
        "open_s": opened,
        "copied_mib": copied / 2**20,
        "row_ms": per_row * 1e3,
        "select_s": selected,
        "checksum": tokens,
    }


def measure_kills(rows: Path, tokenizer: str, folder: Path, *, kills: int, processes: int, seed: int) -> dict[str, Any]:
    """Kill a conversion again and again; what comes out in the end must be what comes out undisturbed."""
    from data_tools.writer import sha256_file

    def command(output: str) -> list[str]:
        base = [sys.executable, "-m", "data_tools", "convert", "--input", str(rows), "--output", str(folder / output)]
        return [*base, "--tokenizer", tokenizer, "--rows-per-shard", "512", "--processes", str(processes)]

    start = time.monotonic()
    subprocess.run(command("whole"), check=True, capture_output=True)
    seconds, chance, hits, finished, same = time.monotonic() - start, random.Random(seed), 0, 0, True
    expected = {path.name: sha256_file(path) for path in (folder / "whole").iterdir()}
    for point in range(kills):
        output = f"killed-{point}"
        process = subprocess.Popen(command(output), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(chance.uniform(0.1, seconds))
        hits += process.poll() is None
        process.kill()
        process.wait()
        if (folder / output).exists():
            finished += 1
        else:
            subprocess.run(command(output), check=True, capture_output=True)
        same = same and {path.name: sha256_file(path) for path in (folder / output).iterdir()} == expected
    return {"kills": kills, "hit_while_running": hits, "had_finished": finished, "same_bytes": same}


def main() -> int:
    """Run, print a table, write JSON; exit status 1 where a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4000, help="synthetic rows of the comparison")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument(
        "--tokenizer", default="", help="HF tokenizer folder; empty = 4,096 tokens trained on the samples"
    )
    parser.add_argument("--open-mib", type=int, default=500, help="size of the output to open; 0 = skip")
    parser.add_argument("--kills", type=int, default=0, help="kill a conversion so often instead")
    parser.add_argument("--seed", type=int, default=1, help="of the moments of the kills")
    parser.add_argument("--only-ours", action="store_true", help="no peers: for memory at large --rows")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", nargs=4, metavar=("NAME", "ROWS", "OUTPUT", "TOKENIZER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker(*arguments.worker, processes=arguments.processes)
        return 0
    with tempfile.TemporaryDirectory(prefix="data-bench-") as name:
        return _measure(arguments, Path(name))


def _measure(arguments: argparse.Namespace, folder: Path) -> int:
    from data_tools.train_tokenizer import texts_of, train_and_save

    tokenizer = arguments.tokenizer or str(folder / "tok")
    if not arguments.tokenizer:
        train_and_save(texts_of([str(SAMPLES)]), vocab_size=4096, output=tokenizer)
    write_rows(folder / "rows.parquet", arguments.rows)
    report: dict[str, Any] = {"rows": arguments.rows, "cpu_count": os.cpu_count(), "load_average": os.getloadavg()[0]}
    if arguments.kills:
        report["kills"] = measure_kills(
            folder / "rows.parquet",
            tokenizer,
            folder,
            kills=arguments.kills,
            processes=arguments.processes,
            seed=arguments.seed,
        )
        print(report["kills"])
    else:
        if arguments.only_ours:
            for name in list(CONTENDERS)[1:]:
                del CONTENDERS[name]
        report["compare"] = compare(
            folder / "rows.parquet", tokenizer, folder, count=arguments.rows, processes=arguments.processes
        )
        _print_table(report["compare"])
        if arguments.open_mib:
            prepared = folder / f"out-ours-{arguments.processes}"
            report["open"] = measure_open(prepared, folder, mebibytes=arguments.open_mib)
            print({key: round(value, 4) for key, value in report["open"].items()})
    missed = _missed(report)
    print("all targets reached" if not missed else "missed: " + "; ".join(missed))
    if arguments.json:
        arguments.json.write_text(json.dumps({**report, "missed": missed}, indent=2) + "\n")
    return 1 if missed else 0


def _print_table(results: list[dict[str, Any]]) -> None:
    print(
        f"{'contender':22} {'proc.':>5} {'rows/s':>7} {'wall s':>7} {'cpu s':>7} {'MiB':>5} {'wall x':>7} {'cpu x':>6}"
    )
    for r in results:
        print(
            f"{r['name']:22} {r['processes']:5} {r['rows_per_s']:7.0f} {r['seconds']:7.1f} {r['cpu_seconds']:7.1f} "
            f"{r['peak_rss_mib']:5} {r['ours_is_faster_by']:7} {r['ours_needs_less_cpu_by']:6}"
        )


def _missed(report: dict[str, Any]) -> list[str]:
    missed = []
    for result in report.get("compare", []):
        if result["name"].startswith("datasets.map") and result["ours_is_faster_by"] < TARGET_SPEEDUP:
            missed.append(f"{result['ours_is_faster_by']}x {result['name']}, target {TARGET_SPEEDUP}x")
        if result["name"] == "ours" and result["peak_rss_mib"] > TARGET_RSS_MIB:
            missed.append(f"peak RSS {result['peak_rss_mib']} MiB, target {TARGET_RSS_MIB}")
    opened = report.get("open")
    if opened and (opened["open_s"] > TARGET_OPEN_S or opened["row_ms"] > TARGET_ROW_MS or opened["copied_mib"] > 1):
        missed.append(f"opening {opened}, targets {TARGET_OPEN_S} s, {TARGET_ROW_MS} ms a row, no copy")
    if "kills" in report and not report["kills"]["same_bytes"]:
        missed.append("a killed conversion gave other bytes")
    return missed


if __name__ == "__main__":
    sys.exit(main())
