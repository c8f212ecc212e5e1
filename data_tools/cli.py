"""``megatron-rest-data``: prepare and look at tool-use data."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from data_tools import commands
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
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_convert(subparsers)
    _add_inspect(subparsers)
    _add_validate(subparsers)
    _add_stats(subparsers)
    _add_split(subparsers)
    _add_decontaminate(subparsers)
    _add_train_tokenizer(subparsers)
    return parser


def _add_convert(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    p = subparsers.add_parser(
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
        choices=("original", "compact", "slim"),
        default="original",
        help="compact: for toy models on a CPU; drops the instruction blocks that are the same in every ToolRL row "
        "(Steps, Output Format, Important Notes) and shortens the headings; tools and dialogue stay.  slim: the role "
        "sentence goes too, and each tool is one line with name, parameter types and description (default original)",
    )
    p.add_argument(
        "--max-think-words",
        type=int,
        default=0,
        metavar="N",
        help="shorten reference thoughts to N words in answer_text, for warm starts of toy models; ground_truth keeps "
        "the original (default: 0, keep)",
    )
    p.add_argument(
        "--dialect",
        default="auto",
        metavar="NAME",
        help="how prompts ask for calls and answers write them: toolrl (tags in the text), or the model's own, by its "
        "chat template: hermes, llama3_json, qwen3_coder, harmony, glm45, mistral, mistral_v11, deepseek, "
        "deepseek_v31, pythonic.  auto (default): toolrl where the rows' own system message asks for its tags or the "
        "template shows no calls, else the template's; the manifest says which",
    )
    p.add_argument(
        "--chat-template",
        default="stock",
        metavar="NAME",
        help="stock (default), append_only or a path: as model.chat_template of the run",
    )
    _add_input_options(p)
    p.add_argument("--licence", default="", metavar="TEXT", help="licence and attribution, kept in the manifest")
    p.add_argument("--strict", action="store_true", help="stop at the first row that cannot be used")
    p.add_argument("--overwrite", action="store_true", help="replace an existing output folder")
    p.add_argument(
        "--processes", type=int, default=0, metavar="N", help="worker processes (default: 0, all cores up to 16)"
    )
    p.add_argument(
        "--rows-per-shard", type=int, default=1 << 16, metavar="N", help="rows of one output file (default 65536)"
    )
    p.set_defaults(run=commands.convert)


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


def _add_train_tokenizer(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    p = subparsers.add_parser(
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
    p.set_defaults(run=commands.train_tokenizer)


def _add_inspect(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    p = subparsers.add_parser(
        "inspect",
        help="show rows: messages, tools, answer coloured by regions",
        description="Show rows of a prepared folder, or of any input before it is converted.",
    )
    p.add_argument("path", metavar="PATH", help="prepared folder, or an input of any form")
    p.add_argument("--row", type=int, default=0, metavar="N", help="first row to show (default 0)")
    p.add_argument("--count", type=int, default=1, metavar="N", help="how many rows (default 1)")
    p.add_argument("--color", choices=("auto", "always", "never"), default="auto", help="default: on a terminal")
    _add_input_options(p)
    p.set_defaults(run=commands.inspect)


def _add_validate(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    p = subparsers.add_parser(
        "validate",
        help="check a prepared folder in full, or try raw rows without writing",
        description="Prepared folder: hashes, counts, schema, token ids, JSON columns; with --tokenizer also identity "
        "and decoding.  Raw input: which rows could not be used, and why.  Exit status 1 if anything is wrong.",
    )
    p.add_argument("path", nargs="+", metavar="PATH", help="one prepared folder, or inputs of any form")
    p.add_argument("--tokenizer", type=Path, metavar="DIR", help="HF tokenizer folder to compare with")
    _add_input_options(p)
    p.set_defaults(run=commands.validate)


def _add_stats(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    p = subparsers.add_parser(
        "stats",
        help="token lengths, calls per row, duplicates, over-long prompts",
        description="Numbers of a prepared folder.  Prompts above --max-prompt-tokens are listed; nothing is ever cut.",
    )
    p.add_argument("path", metavar="DIR", help="prepared folder")
    p.add_argument("--max-prompt-tokens", type=int, default=0, metavar="N", help="list longer prompts")
    p.add_argument("--json", type=Path, metavar="FILE", help="write the numbers, all over-long prompts included")
    p.add_argument("--png", type=Path, metavar="FILE", help="write histograms")
    p.set_defaults(run=commands.stats)


def _add_split(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    p = subparsers.add_parser(
        "split",
        help="divide a prepared folder, equal prompts (or tools) on one side",
        description="Divide by a hash of the prompt, or of the tools on offer, and the seed: adding rows moves none; "
        "the same prompt (the same set of tools) never lands on both sides, also of two folders that are divided "
        "alike.  megatron-rest-data split OUT --output PARTS --parts train=0.98 test=0.02",
    )
    p.add_argument("path", metavar="DIR", help="prepared folder")
    p.add_argument("--output", required=True, type=Path, metavar="DIR", help="folder of the parts")
    p.add_argument("--parts", nargs="+", required=True, metavar="NAME=FRACTION", help="fractions that add up to 1")
    p.add_argument("--seed", type=int, default=1, metavar="N", help="another seed, another division (default 1)")
    p.add_argument(
        "--by", choices=("prompt", "tools"), default="prompt", help="what stays together (default %(default)s)"
    )
    p.add_argument("--overwrite", action="store_true", help="replace existing parts")
    p.set_defaults(run=commands.split)


def _add_decontaminate(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    p = subparsers.add_parser(
        "decontaminate",
        help="remove rows that are (nearly) in a benchmark",
        description="Remove rows whose dialogue holds at least --min-overlap of the word n-grams of a benchmark item.  "
        "Removed rows are listed in quarantine.jsonl with the item.  Benchmarks: files of any form that convert reads, "
        "and BFCL's JSON lines with `question`.",
    )
    p.add_argument("path", metavar="DIR", help="prepared folder")
    p.add_argument("--against", nargs="+", required=True, metavar="PATH", help="benchmark files")
    p.add_argument("--output", required=True, type=Path, metavar="DIR", help="folder to write")
    p.add_argument("--ngram", type=int, default=8, metavar="N", help="words of an n-gram (default 8)")
    p.add_argument(
        "--min-overlap", type=float, default=0.5, metavar="F", help="share of an item's n-grams (default 0.5)"
    )
    p.add_argument("--overwrite", action="store_true", help="replace an existing output folder")
    p.set_defaults(run=commands.decontaminate)


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
