"""How long labelling and weighting take on one core, beside the published function on the same texts.

    python -m benchmarks.regions [--sequences 64] [--tokens 2048] [--with-reference] [--json out.json]

Texts are answers with a long thought and several tool calls, cut into byte-level-BPE-like pieces (a word with its
leading space, or one other character) until each has the wanted number of tokens.  The target is 64 sequences of 2,048
tokens, labelled and weighted, in at most 50 ms.

``--coverage`` compares where the weights go on the repository's sample answers (needs the tokenizers package): a
byte-level BPE is trained on them, and the weight mass by region is set beside the published function's.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_rest.regions import label_regions, token_bytes_table
from megatron_rest.types import TokenRegion
from megatron_rest.weighting import RestWeighting

__all__ = ["main", "measure", "synthetic_batch"]

_PIECE = re.compile(r" ?[^\W\d_]+| ?\d| ?[^\w\s]+|\s+|_")
_TARGET_MS = 50.0
_WORDS = ("the", "user", "wants", "a", "forecast", "for", "Paris", "so", "I", "call", "get_weather", "with", "city")


def synthetic_batch(num_sequences: int, num_tokens: int, *, num_calls: int = 4, seed: int = 0) -> list[list[bytes]]:
    """Sampled tokens of ``num_sequences`` answers of exactly ``num_tokens`` tokens each."""
    rng = np.random.default_rng(seed)
    batch = []
    for _ in range(num_sequences):
        lines = [
            json.dumps({"name": f"tool {i}", "parameters": {"city": "Paris", "days": int(days), "units": ["C"]}})
            for i, days in enumerate(rng.integers(9, size=num_calls))
        ]
        tail = "</think>\n<tool_call>\n" + "\n".join(lines) + "\n</tool_call><|im_end|>"
        tail_tokens = _PIECE.findall(tail)
        words = [" " + str(word) for word in rng.choice(_WORDS, size=num_tokens)]
        thought = [piece for word in words for piece in _PIECE.findall(word)][: num_tokens - len(tail_tokens) - 3]
        batch.append([piece.encode() for piece in ["<", "think", ">", *thought, *tail_tokens]])
    return batch


def measure(function: Callable[[], Any], *, repeats: int) -> dict[str, float]:
    """Milliseconds of ``function`` after one warm-up: best and median wall time, median CPU time.

    CPU time is what one core needs when the machine is shared; on an idle one the two agree.
    """
    function()
    wall, cpu = [], []
    for _ in range(repeats):
        start = time.perf_counter(), time.process_time()
        function()
        wall.append(time.perf_counter() - start[0])
        cpu.append(time.process_time() - start[1])
    middle = repeats // 2
    return {"best_ms": 1e3 * min(wall), "median_ms": 1e3 * sorted(wall)[middle], "cpu_ms": 1e3 * sorted(cpu)[middle]}


def _label_and_weigh(batch: list[list[bytes]], weighting: RestWeighting) -> np.ndarray:
    region_ids = [label_regions(tokens) for tokens in batch]
    sequence_ids = np.repeat(np.arange(len(batch)), [len(ids) for ids in region_ids])
    return weighting.packed(np.concatenate(region_ids), sequence_ids, progress=0.5)


def _reference(batch: list[list[bytes]]) -> Any:
    from benchmarks.reference_code import build_token_weight, piece_tokenizer

    texts = [b"".join(tokens).decode() for tokens in batch]
    tokenizer = piece_tokenizer(_PIECE)
    width = max(len(tokens) for tokens in batch)
    return build_token_weight(texts, torch.ones(len(texts), width), tokenizer, step=0)


def coverage() -> dict[str, Any]:
    """Share of tokens and of weight by region on the sample's SFT answers, and how many names are weighted."""
    import tokenizers as hf

    from benchmarks.reference_code import build_token_weight

    rows = json.loads((Path(__file__).parents[1] / "data_tools" / "samples" / "rlla_sft.json").read_text())
    texts = [row["output"] + "<|im_end|>" for row in rows]
    tokenizer = hf.Tokenizer(hf.models.BPE())
    tokenizer.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = hf.pre_tokenizers.ByteLevel.alphabet()
    trainer = hf.trainers.BpeTrainer(
        vocab_size=6000, initial_alphabet=alphabet, special_tokens=["<|im_end|>"], show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    table = token_bytes_table(tokenizer)
    ids = [tokenizer.encode(text).ids for text in texts]
    region_ids = np.concatenate([label_regions([table[i] for i in row]) for row in ids])
    sequence_ids = np.repeat(np.arange(len(ids)), [len(row) for row in ids])
    paper = RestWeighting.paper()
    weights = {f"paper, progress {p:g}": paper.packed(region_ids, sequence_ids, progress=p) for p in (0.0, 1.0)}
    start = time.process_time()
    published = [
        build_token_weight([text], torch.ones(1, len(row)), lambda t: tokenizer.encode(t).offsets, step=1)[0].numpy()
        for text, row in zip(texts, ids, strict=True)
    ]
    published_seconds = time.process_time() - start
    weights["published, step 1"] = np.concatenate(published)
    share = {
        region.name: {name: float(w[region_ids == region].sum() / w.sum()) for name, w in weights.items()}
        | {"tokens": float((region_ids == region).mean())}
        for region in list(TokenRegion)[1:]
    }
    inside = np.concatenate(([0], (region_ids == TokenRegion.TOOL_NAME).astype(int), [0]))
    names = [weights["published, step 1"][a:b] > 0 for a, b in np.flatnonzero(np.diff(inside)).reshape(-1, 2)]
    whole, none = sum(bool(n.all()) for n in names), sum(not n.any() for n in names)
    return {
        "tokens": len(region_ids),
        "published_cpu_seconds": published_seconds,
        "share": share,
        "published_names": {"whole": whole, "partly": len(names) - whole - none, "not_at_all": none},
    }


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Print a table, write JSON if asked, return the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--with-reference", action="store_true", help="also time the published function (seconds)")
    parser.add_argument("--coverage", action="store_true", help="where the weights go on the sample answers")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    batch = synthetic_batch(args.sequences, args.tokens)
    weighting = RestWeighting.paper()
    call_heavy = synthetic_batch(args.sequences, args.tokens, num_calls=args.tokens // 40)  # the scanner's worst case
    region_ids = np.concatenate([label_regions(tokens) for tokens in batch])
    results: dict[str, Any] = {
        "sequences": args.sequences,
        "tokens": sum(map(len, batch)),
        "region_tokens": {region.name: int((region_ids == region).sum()) for region in TokenRegion},
        "label": measure(lambda: [label_regions(tokens) for tokens in batch], repeats=args.repeats),
        "label_and_weigh": measure(lambda: _label_and_weigh(batch, weighting), repeats=args.repeats),
        "call_heavy_label_and_weigh": measure(lambda: _label_and_weigh(call_heavy, weighting), repeats=args.repeats),
    }
    if args.with_reference:
        results["published_function"] = measure(lambda: _reference(batch), repeats=1)
    results["target_ms"] = _TARGET_MS
    print(f"{args.sequences} sequences, {results['tokens']} tokens, one thread; regions {results['region_tokens']}")
    for name in ("label", "label_and_weigh", "call_heavy_label_and_weigh", "published_function"):
        if name in results:
            ms = results[name]
            print(
                f"{name:28s} best {ms['best_ms']:8.2f} ms, median {ms['median_ms']:8.2f} ms, CPU {ms['cpu_ms']:8.2f} ms"
            )
    if args.coverage:
        results["coverage"] = coverage()
        print(json.dumps(results["coverage"], indent=2))
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n")
    return results


if __name__ == "__main__":
    main()
