"""What the subcommands do with their arguments: call the modules, print, return an exit status.

Imports are inside: ``--help`` and a wrong option answer at once.
"""

from __future__ import annotations

import argparse
import json
import sys
from itertools import islice
from pathlib import Path

from data_tools.errors import DataError


def inspect(args: argparse.Namespace) -> int:
    """Show rows."""
    from data_tools.layouts import load_columns
    from data_tools.show import show_rows

    colour = args.color == "always" or (args.color == "auto" and sys.stdout.isatty())
    columns = load_columns(args.map, args.column)
    if args.row < 0 or args.count < 1:
        raise DataError(f"--row must be at least 0 and --count at least 1, got {args.row} and {args.count}")
    for text in show_rows(
        args.path, first=args.row, count=args.count, colour=colour, columns=columns, split=args.split
    ):
        print(text)
    return 0


def validate(args: argparse.Namespace) -> int:
    """Check a prepared folder, or try raw rows."""
    from data_tools.folders import is_prepared
    from data_tools.layouts import load_columns
    from data_tools.validate import MOST_FINDINGS, open_as_prepared, validate_prepared, validate_raw

    if len(args.path) == 1 and is_prepared(args.path[0]):
        tokenizer = open_as_prepared(args.path[0], args.tokenizer) if args.tokenizer else None
        findings = list(islice(validate_prepared(args.path[0], tokenizer=tokenizer), MOST_FINDINGS))
        print("\n".join(findings) or f"{args.path[0]}: good")
        return 1 if findings else 0
    columns = load_columns(args.map, args.column)
    num_rows, reasons, findings = validate_raw(args.path, columns=columns, split=args.split)
    print("\n".join([*findings, f"{num_rows} rows, {reasons.total()} of them cannot be used"]))
    return 1 if reasons else 0


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
    print(describe(manifest, args.output))
    return 0


def convert(args: argparse.Namespace) -> int:
    """Rows to a prepared folder."""
    from data_tools.convert import ConvertOptions, convert_rows, describe
    from data_tools.encode import EncodeOptions
    from data_tools.layouts import load_columns

    manifest = convert_rows(
        ConvertOptions(
            inputs=args.input,
            output=args.output,
            tokenizer=args.tokenizer,
            encode=EncodeOptions(
                prompt_style=args.prompt_style,
                max_think_words=args.max_think_words,
                columns=load_columns(args.map, args.column),
                dialect=args.dialect,
            ),
            chat_template=args.chat_template,
            split=args.split,
            licence=args.licence,
            strict=args.strict,
            overwrite=args.overwrite,
            processes=args.processes,
            rows_per_shard=args.rows_per_shard,
        )
    )
    print(describe(manifest, args.output))
    return 0


def train_tokenizer(args: argparse.Namespace) -> int:
    """A small tokenizer from the rows."""
    from data_tools.layouts import load_columns
    from data_tools.train_tokenizer import texts_of, train_and_save

    texts = texts_of(args.files, columns=load_columns(args.map, args.column), split=args.split)
    size = train_and_save(texts, vocab_size=args.vocab_size, output=args.output)
    print(f"{args.output}: {size} tokens")
    return 0
