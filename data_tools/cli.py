"""``megatron-rest-data``: prepare and look at tool-use data."""

from __future__ import annotations

import argparse
import os
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
folders of shards, globs in quotes; gzip, bzip2, xz, zstd and lz4 around JSON.  The form is told by content, not by the
name's ending, and so is the layout of the rows.  docs/data.md is a guide, with an example of every layout.
"""
_CONVERT = """\
Convert rows into a folder of memory-mappable Arrow files (manifest.json, data-*.arrow, quarantine.jsonl).

Rows that cannot be used go to quarantine.jsonl with the reason; rows in = rows out + rows quarantined, always.  More
than 5 % of them there is exit status 1 (--max-lost).  An interrupted conversion goes on where it stopped when the same
command is given again.  Same input, same bytes.

  megatron-rest-data convert --input data_tools/samples/test.parquet --output OUT --tokenizer TOK
  megatron-rest-data convert --input 'shards/*.jsonl.gz' --output OUT --tokenizer TOK \\
      --column user=question --column calls=answers

Rows of an own layout, from the shell (a mapping names places, an adapter is a function of yours):

  printf '%s\\n' 'user: chat.question' 'calls: gold' 'tools: meta.tools[0]' 'roles: {customer: user}' > map.yaml
  megatron-rest-data convert --input rows.jsonl --output OUT --tokenizer TOK --mapping map.yaml

  printf '%s\\n' 'def convert(row):' '    call = {"name": row["tool"], "arguments": row["args"]}' \\
      '    return {"query": row["q"], "answers": [call], "tools": row["tools"]}' > rows.py
  megatron-rest-data convert --input rows.jsonl --output OUT --tokenizer TOK --adapter rows.py:convert
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
    _add_input_options(p)
    _add_convert_options(p)
    p.set_defaults(run=commands.convert)


def _add_convert_options(p: argparse.ArgumentParser) -> None:
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
        "deepseek_v31, pythonic, or package.module:DIALECT of your own.  auto (default): "
        "toolrl where the rows' own system message asks for its tags or the "
        "template shows no calls, else the template's; the manifest says which",
    )
    p.add_argument(
        "--chat-template",
        default="stock",
        metavar="NAME",
        help="stock (default), append_only, the name of a shipped one (say qwen3_no_think) or a path",
    )
    p.add_argument("--licence", default="", metavar="TEXT", help="licence and attribution, kept in the manifest")
    p.add_argument("--strict", action="store_true", help="stop at the first row that cannot be used")
    p.add_argument(
        "--on-problem",
        choices=("keep", "quarantine", "stop"),
        default="keep",
        help="rows whose reference calls tools that the row does not list, or with arguments that do not fit their "
        "schema (default keep: they are counted, printed and kept)",
    )
    p.add_argument(
        "--max-lost",
        type=float,
        default=0.05,
        metavar="SHARE",
        help="exit status 1 where more rows than this share are quarantined; the folder is written all the same "
        "(default 0.05; 1 allows all)",
    )
    p.add_argument("--overwrite", action="store_true", help="replace an existing output folder")
    p.add_argument(
        "--processes", type=int, default=0, metavar="N", help="worker processes (default: 0, all cores up to 16)"
    )
    p.add_argument(
        "--rows-per-shard", type=int, default=1 << 16, metavar="N", help="rows of one output file (default 65536)"
    )


def _add_input_options(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--split", default="", metavar="NAME", help="only this split of a folder that has several; all takes them all"
    )
    p.add_argument(
        "--layout",
        default="",
        metavar="NAME",
        help="layout of the rows by name (default: by content); docs/data.md lists them",
    )
    p.add_argument(
        "--reference",
        default="",
        metavar="WHICH",
        help="of a conversation: last (its last message, default), each (a row for every turn of the assistant), "
        "last-call (the last turn that makes a call), or a column that holds the reference",
    )
    p.add_argument(
        "--column",
        action="append",
        default=[],
        metavar="NAME=COLUMN",
        help="for an own layout: where system, user, messages, tools, answer, calls, response or think are (a path "
        "goes through JSON text: tools=metadata.tools[0])",
    )
    p.add_argument(
        "--mapping",
        default=None,
        metavar="FILE",
        help="the same and more as a YAML file of NAME: COLUMN lines (docs/data.md)",
    )
    p.add_argument(
        "--adapter",
        default="",
        metavar="FILE.py:FUNCTION",
        help="a function of yours that rows go through first: row -> row of any layout, list of rows, or None to "
        "leave it out",
    )


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
    with_convert = argparse.ArgumentParser(add_help=False)
    _add_convert_options(with_convert)
    for action in with_convert._actions:  # so that one list of options serves both commands, as in `make preprocess`
        action.help = argparse.SUPPRESS
        p._add_action(action)
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
    p.add_argument(
        "--source",
        nargs="+",
        default=[],
        metavar="FILE",
        help="inputs of a prepared folder: their rows are shown beside",
    )
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
    except BrokenPipeError:  # `inspect ... | head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("\ninterrupted; give the same command again to go on", file=sys.stderr)
        return 130
