"""``megatron-rest-data``: prepare and look at tool-use data."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from data_tools.errors import DataError

_DESCRIPTION = """\
Prepare tool-use data for training: whatever you have in, a folder that memory-maps out.

  megatron-rest-data train-tokenizer --vocab-size 4096 --output TOK FILES...   a small tokenizer (real models have one)
  megatron-rest-data convert --input FILES... --output OUT --tokenizer TOK     rows to token ids, ready for training
  megatron-rest-data inspect OUT                                               see rows as a person wants to see them

Inputs: Arrow IPC (stream and file), Feather v2, Parquet, JSON lines, JSON lists, Hugging Face save_to_disk folders,
folders of shards, globs in quotes; gzip, bzip2, zstd and lz4 around JSON.  The form is told by content, not by the
name's ending.  docs/data.md has the schema and an example of every layout.
"""
_CONVERT = """\
Convert rows into a folder of memory-mappable Arrow files (manifest.json, data-*.arrow, quarantine.jsonl).

Rows that cannot be used go to quarantine.jsonl with the reason; rows in = rows out + rows quarantined, always.  An
interrupted conversion goes on where it stopped when the same command is given again.  Same input, same bytes.

  megatron-rest-data convert --input data_tools/samples/test.parquet --output OUT --tokenizer TOK
  megatron-rest-data convert --input 'shards/*.jsonl.gz' --output OUT --tokenizer TOK \\
      --column user=question --column calls=answers
"""


def build_parser() -> argparse.ArgumentParser:
    """All subcommands."""
    parser = argparse.ArgumentParser(
        prog="megatron-rest-data", description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_convert(commands)
    _add_train_tokenizer(commands)
    return parser


def _add_convert(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    p = commands.add_parser(
        "convert",
        help="rows of any form to token ids that training memory-maps",
        description=_CONVERT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--input", nargs="+", required=True, metavar="PATH", help="files, folders or quoted globs")
    p.add_argument(
        "--output", required=True, type=Path, metavar="DIR", help="folder to write; appears when it is whole"
    )
    p.add_argument(
        "--tokenizer", required=True, type=Path, metavar="DIR", help="HF tokenizer folder with a chat template"
    )
    p.add_argument(
        "--prompt-style",
        choices=("original", "compact"),
        default="original",
        help="compact: for toy models on a CPU; drops the instruction blocks that are the same in every ToolRL row "
        "(Steps, Output Format, Important Notes) and shortens the headings; tools and dialogue stay (default original)",
    )
    p.add_argument(
        "--max-think-words",
        type=int,
        default=0,
        metavar="N",
        help="shorten reference thoughts to N words in answer_text, for warm starts of toy models; ground_truth keeps "
        "the original (default: 0, keep)",
    )
    _add_input_options(p)
    p.add_argument("--licence", default="", metavar="TEXT", help="licence and attribution, kept in the manifest")
    p.add_argument("--strict", action="store_true", help="stop at the first row that cannot be used")
    p.add_argument("--overwrite", action="store_true", help="replace an existing output folder")
    p.add_argument("--processes", type=int, default=0, metavar="N", help="worker processes (default: 0, all cores)")
    p.add_argument(
        "--rows-per-shard", type=int, default=1 << 16, metavar="N", help="rows of one output file (default 65536)"
    )
    p.set_defaults(run=_convert)


def _add_input_options(p: argparse.ArgumentParser) -> None:
    p.add_argument("--split", default="", metavar="NAME", help="only this split of a dataset folder (default: all)")
    p.add_argument(
        "--column",
        action="append",
        default=[],
        metavar="NAME=COLUMN",
        help="for an own layout: where system, user, messages, tools, answer, calls, response or think are",
    )
    p.add_argument("--map", default=None, metavar="FILE", help="the same as a YAML file of NAME: COLUMN lines")


def _add_train_tokenizer(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    p = commands.add_parser(
        "train-tokenizer",
        help="train a small byte-level BPE tokenizer on the rows",
        description="Train a byte-level BPE tokenizer on the texts of the rows and save it as a Hugging Face folder "
        "with a ChatML template.  The tags (<think>, <tool_call>, ...) are single tokens that decoding keeps.  For toy "
        "models: a real model brings its own tokenizer.",
    )
    p.add_argument("files", nargs="+", metavar="FILE", help="files, folders or quoted globs")
    p.add_argument("--vocab-size", type=int, required=True, metavar="N", help="tokens in all, at least 267")
    p.add_argument("--output", required=True, type=Path, metavar="DIR", help="folder to write")
    _add_input_options(p)
    p.set_defaults(run=_train_tokenizer)


def _convert(args: argparse.Namespace) -> int:
    from data_tools.convert import ConvertOptions, convert, describe
    from data_tools.encode import EncodeOptions
    from data_tools.layouts import load_columns

    manifest = convert(
        ConvertOptions(
            inputs=args.input,
            output=args.output,
            tokenizer=args.tokenizer,
            encode=EncodeOptions(
                prompt_style=args.prompt_style,
                max_think_words=args.max_think_words,
                columns=load_columns(args.map, args.column),
            ),
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


def _train_tokenizer(args: argparse.Namespace) -> int:
    from data_tools.layouts import load_columns
    from data_tools.train_tokenizer import texts_of, train_tokenizer

    texts = texts_of(args.files, columns=load_columns(args.map, args.column), split=args.split)
    size = train_tokenizer(texts, vocab_size=args.vocab_size, output=args.output)
    print(f"{args.output}: {size} tokens")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Entry of the console script; bad input ends in one line and exit status 1."""
    args = build_parser().parse_args(argv)
    try:
        return int(args.run(args))
    except DataError as error:
        print(f"megatron-rest-data {args.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted; give the same command again to go on", file=sys.stderr)
        return 130
