"""What the subcommands do with their arguments: call the modules, print, return an exit status.

Imports are inside: ``--help`` and a wrong option answer at once.
"""

from __future__ import annotations

import argparse
import json
import sys
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from data_tools.errors import DataError

if TYPE_CHECKING:
    from data_tools.examples import Reading


def reading_of(args: argparse.Namespace) -> Reading:
    """How the options say that rows are read."""
    from data_tools.adapter import load_adapter
    from data_tools.columns import load_columns
    from data_tools.examples import Reading
    from data_tools.layouts import find_layout

    if args.layout:
        find_layout(args.layout)
    if args.adapter:
        load_adapter(args.adapter)
    columns = load_columns(args.mapping, args.column)
    return Reading(columns=columns, layout=args.layout, reference=args.reference, adapter=args.adapter)


def inspect(args: argparse.Namespace) -> int:
    """Show rows."""
    from data_tools.show import show_rows

    colour = args.color == "always" or (args.color == "auto" and sys.stdout.isatty())
    if args.row < 0 or args.count < 1:
        raise DataError(f"--row must be at least 0 and --count at least 1, got {args.row} and {args.count}")
    reading = reading_of(args)
    rows = show_rows(
        args.path,
        first=args.row,
        count=args.count,
        colour=colour,
        reading=reading,
        split=args.split,
        sources=args.source,
    )
    for text in rows:
        print(text)
    return 0


def validate(args: argparse.Namespace) -> int:
    """Check a prepared folder, or try raw rows."""
    from data_tools.encode import EncodeOptions
    from data_tools.folders import is_prepared
    from data_tools.validate import MOST_FINDINGS, open_as_prepared, open_for_raw, validate_prepared, validate_raw

    if len(args.path) == 1 and is_prepared(args.path[0]):
        tokenizer = open_as_prepared(args.path[0], args.tokenizer) if args.tokenizer else None
        findings = list(islice(validate_prepared(args.path[0], tokenizer=tokenizer), MOST_FINDINGS))
        print("\n".join(findings) or f"{args.path[0]}: good")
        return 1 if findings else 0
    options = EncodeOptions(reading=reading_of(args))
    tokenizer = open_for_raw(args.path, args.tokenizer, options, args.split) if args.tokenizer else None
    found = validate_raw(args.path, options=options, split=args.split, tokenizer=tokenizer)
    print("\n".join(found.lines()))
    if not args.tokenizer:
        print("(control tokens and the chat template are checked with --tokenizer only)")
    return 1 if found.num_refused else 0


def stats(args: argparse.Namespace) -> int:
    """Numbers of a prepared folder."""
    from data_tools.stats import describe, measure, plot
    from data_tools.writer import write_atomically

    stats = measure(args.path, max_prompt_tokens=args.max_prompt_tokens)
    print(describe(stats, max_prompt_tokens=args.max_prompt_tokens))
    if args.json:
        write_atomically(args.json, (json.dumps(stats.to_dict(), indent=2) + "\n").encode())
    if args.png:
        limits = [args.max_prompt_tokens] if args.max_prompt_tokens else []
        plot(stats, args.png, title=Path(args.path).name, limits=limits)
    return 0


def split(args: argparse.Namespace) -> int:
    """Divide a prepared folder."""
    from data_tools.split import parse_parts, split_folder

    counts = split_folder(
        args.path, args.output, parse_parts(args.parts), seed=args.seed, by=args.by, overwrite=args.overwrite
    )
    print("\n".join(f"{args.output / name}: {number} rows" for name, number in counts.items()))
    return 0


def decontaminate(args: argparse.Namespace) -> int:
    """Remove what is in a benchmark."""
    from data_tools.convert import describe
    from data_tools.decontaminate import build_index, decontaminate_folder

    index = build_index(args.against, ngram=args.ngram, min_overlap=args.min_overlap)
    manifest = decontaminate_folder(args.path, args.output, index, against=args.against, overwrite=args.overwrite)
    print(f"{len(index.names)} benchmark items, {index.num_ignored} too short or all boilerplate")
    for file, number in index.unreadable.items():
        print(f"  {file}: {number} rows are no items and were left out ({index.first_unreadable})")
    print(describe(manifest, args.output))
    return 0


def convert(args: argparse.Namespace) -> int:
    """Rows to a prepared folder."""
    from data_tools.convert import ConvertOptions, convert_rows, describe, lost_share
    from data_tools.encode import EncodeOptions

    options = ConvertOptions(
        inputs=args.input,
        output=args.output,
        tokenizer=args.tokenizer,
        encode=EncodeOptions(
            prompt_style=args.prompt_style,
            max_think_words=args.max_think_words,
            reading=reading_of(args),
            on_problem=args.on_problem,
            dialect=args.dialect,
        ),
        chat_template=args.chat_template,
        split=args.split,
        licence=args.licence,
        strict=args.strict,
        max_lost=args.max_lost,
        overwrite=args.overwrite,
        processes=args.processes,
        rows_per_shard=args.rows_per_shard,
    )
    examples: dict[str, str] = {}
    manifest = convert_rows(options, examples)
    print(describe(manifest, args.output, examples))
    lost = lost_share(manifest)
    if lost > args.max_lost:
        print(
            f"megatron-rest-data convert: {lost:.0%} of the rows are lost, more than --max-lost {args.max_lost:g} "
            f"allows: mend them ({args.output}/quarantine.jsonl has rows and reasons), or give --max-lost 1",
            file=sys.stderr,
        )
        return 1
    return 0


def train_tokenizer(args: argparse.Namespace) -> int:
    """A small tokenizer from the rows."""
    from data_tools.train_tokenizer import texts_of, train_and_save

    texts = texts_of(args.files, reading=reading_of(args), split=args.split)
    size = train_and_save(texts, vocab_size=args.vocab_size, output=args.output)
    print(f"{args.output}: {size} tokens")
    return 0
