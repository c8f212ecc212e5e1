"""The guides do what they say: blocks run, or are read by the real parsers; docs/reference is as the code is; messages
in the troubleshooting page are those of the program."""

from __future__ import annotations

import ast
import importlib.util
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from data_tools.cli import main as data_tools
from launch.cli import _ALWAYS, _FLAGS
from megatron_rest import cli
from megatron_rest.analysis import compare, report
from megatron_rest.config import load, validate
from megatron_rest.help_topics import Topic
from megatron_rest.rollout.environments.base import Answer, Observation
from megatron_rest.rollout.environments.calls import parse_calls
from megatron_rest.rollout.environments.guest import checked_observation, checked_reward
from megatron_rest.types import PromptSample
from tests.analysis.runs import draw_only, make_run
from tests.helpers.forked import run_module

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [*sorted(DOCS.glob("guides/*.md")), *sorted(DOCS.glob("concepts/*.md")), DOCS / "troubleshooting.md"]
HERE_DOCUMENT = re.compile(r"^cat > (\S+) <<'EOF'\n(.*?)^EOF\n", re.MULTILINE | re.DOTALL)


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


def commands(page: Path) -> Iterator[list[str]]:
    """Words of every command of a page, files that it writes and comments left out."""
    for block in blocks(page, "bash"):
        for line in HERE_DOCUMENT.sub("", block).splitlines():
            words = shlex.split(line, comments=True)
            if words:
                yield words


@pytest.fixture(scope="module")
def reference() -> ModuleType:
    return docs_module("make_reference")


def docs_module(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ------------------------------------------------------------------------------------------------------- commands


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_are_what_the_parsers_take(page, reference):
    for words in commands(page):
        check(words, reference)


@pytest.mark.parametrize(
    "line",
    [
        "make dmeo",
        "megatron-rest train run.yaml trainer.stps=3",
        "megatron-rest report",
        "megatron-rest plan run.yaml --gpuz 3",
        "megatron-rest-data convert --input rows.jsonl",
        "nemo-run launch/rest_9b.py --dryrun",
        "nemo-run launch/rest_8b.py --dryrn",
        "nemo-run launch/rest_8b.py link=3",
        "export REST_IMAG=a",
        "torchrun -m megatron_rest.trane",
        "frobnicate now",
    ],
)
def test_a_wrong_command_is_noticed(line, reference):
    with pytest.raises((AssertionError, SystemExit, ValueError)):
        check(shlex.split(line), reference)


def check(words: list[str], reference: ModuleType) -> None:
    """Raises for a command that would be refused for what is written in it."""
    words = words[: words.index(">")] if ">" in words else words
    program, *rest = words
    match Path(program).name:
        case "make":
            check_make(rest)
        case "megatron-rest" if rest[0] in ("train", "warm-start"):
            load(None, [word for word in rest[1:] if "=" in word])
        case "megatron-rest":
            parser = reference._parser_of(cli.commands()[rest[0]][0])
            options = (parser.parse_args if parser._subparsers else parser.parse_intermixed_args)(rest[1:])
            load(None, list(getattr(options, "overrides", ())))
        case "megatron-rest-data":
            reference._parser_of("data_tools.cli").parse_args(rest)
        case "nemo-run":
            check_recipe(*rest, reference=reference)
        case "torchrun":
            assert importlib.util.find_spec(rest[rest.index("-m") + 1]), words
        case "export":
            assert {word.partition("=")[0] for word in rest} <= {*reference.YOURS}, words
        case "sed":
            assert rest[0] == "-n", "the one of the page on scaling up"
        case _:
            raise AssertionError(f"no parser is known for: {shlex.join(words)}")


def check_make(words: list[str]) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for word in words:
        name, equals, _ = word.partition("=")
        assert f"$({name})" in makefile if equals else f"\n{name}: " in makefile, word


def check_recipe(file: str, *words: str, reference: ModuleType) -> None:
    assert (ROOT / file).is_file(), f"no recipe {file}"
    own = {name for name, _, _ in reference._recipe(ROOT / file)[1]} | set(_ALWAYS)
    for word in words:
        key, equals, _ = word.partition("=")
        if not equals:
            assert key in _FLAGS, word
        elif "." not in key:
            assert key in own, word
        elif not key.startswith("run.executor"):
            load(None, [word])


# ----------------------------------------------------------------------------------------------------------- guides

EXECUTED = {"own_reward": 2, "read_a_run": 1}  # Python blocks of each guide that a test below executes


@pytest.mark.parametrize("page", sorted(DOCS.glob("guides/*.md")), ids=lambda page: page.stem)
def test_every_block_is_run_or_the_guide_says_why_not(page):
    """Commands are read by the real parsers (above); what runs and what does not, a guide says at its end."""
    text = page.read_text(encoding="utf-8")
    languages = re.findall(r"^\s*```(\S*)$", text, re.MULTILINE)[::2]
    assert set(languages) <= {"bash", "python", "text"} and len(languages) > 2
    assert languages.count("python") == EXECUTED.get(page.stem, 0)
    assert re.search(r"\btests?\b", text.rstrip().split("\n\n")[-1]), "the last paragraph says what is tested"


def test_the_first_own_data_set(tmp_path, monkeypatch, capsys):
    """Parts 1 to 3 as they stand there; the configuration of part 4 is loaded and checked."""
    monkeypatch.chdir(tmp_path)
    page = DOCS / "guides" / "own_data.md"
    expected = "".join(blocks(page, "text")).splitlines()[:3]
    for block in blocks(page, "bash"):
        for name, text in HERE_DOCUMENT.findall(block):
            (tmp_path / name).write_text(text)
        for line in HERE_DOCUMENT.sub("", block).splitlines():
            program, *arguments = shlex.split(line)
            if program == "megatron-rest-data":
                assert data_tools(arguments) == 0, capsys.readouterr()
    printed = capsys.readouterr().out
    assert len(expected) == 3 and all(line in printed for line in expected)
    config = load(tmp_path / "my" / "run.yaml")
    validate(config, world_size=1)
    assert (tmp_path / config.data.train / "manifest.json").is_file()


def test_environments_of_the_reward_page():
    countdown, short = blocks(DOCS / "guides" / "own_reward.md", "python")
    prompt = PromptSample(prompt_id="a", token_ids=np.array([1], np.int32), ground_truth="")
    tick = '<tool_call>{"name": "tick", "parameters": {}}</tool_call>'
    assert play(countdown, "factory", prompt, [tick, tick, tick]) == (["2 left", "1 left"], 1.0)
    assert play(countdown, "factory", prompt, ["no"]) == ([], 0.0)
    assert play(short, "short", prompt, ["one two three"]) == ([], 0.25)


def play(code: str, factory: str, prompt: PromptSample, texts: list[str]) -> tuple[list[str], float | None]:
    """What the environment said, and its reward; it has to end with the last text."""
    names: dict[str, Any] = {}
    exec(compile(code, "own_reward.md", "exec"), names)
    environment = names[factory](prompt)
    environment.reset()
    said, seen = [], Observation(done=True)
    for turn, text in enumerate(texts):
        seen = checked_observation(environment.step(Answer(text=text, calls=parse_calls(text), turn=turn)))
        said += [message.content for message in seen.messages]
    assert seen.done
    reward = checked_reward(environment.reward())
    environment.close()
    return said, reward


def test_reading_a_run(tmp_path, monkeypatch, capsys):
    draw_only(monkeypatch, "reward")
    runs = {name: make_run(tmp_path / name, 4, slope=slope) for name, slope in (("demo-rest", 0.2), ("demo-grpo", 0.1))}
    for words in commands(DOCS / "guides" / "read_a_run.md"):
        main = {"report": report.main, "compare": compare.main}.get(words[1])
        if main:
            assert main([str(runs[Path(w).name]) if w.startswith("runs/") else w for w in words[2:]]) == 0
    [code] = blocks(DOCS / "guides" / "read_a_run.md", "python")
    exec(compile(code, "read_a_run.md", "exec"), {"run_dir": runs["demo-rest"]})
    assert capsys.readouterr().out.splitlines()[-1].startswith("4 ")
    assert (runs["demo-rest"] / "report.html").is_file()


# -------------------------------------------------------------------------------------------- reference and messages


@pytest.mark.parametrize("page", sorted(ROOT.glob("*.md")), ids=lambda page: page.stem)
def test_links_of_the_top_pages(page):
    """Those of docs/ are checked by make site."""
    targets = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    assert [target for target in targets if not (ROOT / target).exists()] == []


def test_every_page_is_listed():
    """`make site` refuses the others, but in CI alone; a report that a command writes into docs/ is a page too."""
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:\n")[2]
    listed_pages = re.findall(r": (\S+\.md)$", nav, re.MULTILINE)
    assert sorted(listed_pages) == sorted(page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md"))


def test_lines_are_within_the_width():
    wrap = docs_module("wrap")
    pages = {page: page.read_text(encoding="utf-8") for page in wrap.pages()}
    assert len(pages) > 30
    assert {page.name: wrap.too_long(text) for page, text in pages.items() if wrap.too_long(text)} == {}


def test_what_the_wrapping_breaks_and_what_it_leaves():
    wrap = docs_module("wrap")
    sentence = "word " * 40
    table = f"| a | b | c |\n| - | - | - |\n| `x` | y | {sentence.strip()} |\n"
    code = f"```\n{sentence}\n```"
    narrow = "| a | b |\n| - | - |\n| c | d |"
    text = f"# A\n\n{sentence}\n\n* {sentence}\n\n{code}\n\n    {sentence}\n\n{narrow}\n\n{table}"
    new = wrap.wrapped(text)
    assert len(wrap.too_long(text)) == 3 and wrap.too_long(new) == [] and wrap.wrapped(new) == new
    assert new.split() == [*text.replace(table, "").split(), *f"* `x`: _b_: y; _c_: {sentence}".split()]
    assert code in new and f"    {sentence}\n" in new and narrow in new and "\n  word" in new


def test_the_reference_is_current():
    done = run_module("docs.make_reference", "--check")
    assert done.returncode == 0, done.stderr


def test_messages_are_those_of_the_program():
    """Every fixed piece of each quoted line is in a string of ours."""
    strings = "\n".join(ours())
    page = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    lines = [line for block in blocks(DOCS / "troubleshooting.md", "text") for line in block.splitlines()]
    lines += listed(page)
    messages = [line for line in lines if not line.startswith("torch.")]
    missing = [piece for line in messages for piece in fixed_pieces(line) if piece not in strings]
    assert len(messages) > 15 and not missing, missing
    assert fixed_pieces("engines were lost 4 times in a rwo while ...")[1] not in strings, "a slip is noticed"


SYMPTOMS = {"flat-reward", "growing-answers", "zero-groups"}  # seen in metrics; nothing is printed


def test_every_name_that_a_message_ends_with_is_a_heading():
    """And every heading but those of symptoms is such a name, which the messages quoted below it end with."""
    page = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    sections = re.split(r"^## ", page, flags=re.MULTILINE)[1:]
    named = {section.partition("\n")[0].lower().replace(" ", "-"): section for section in sections}
    assert {*Topic, *SYMPTOMS} == set(named) and not SYMPTOMS & set(Topic)
    functions = list(functions_of("megatron_rest", "launch"))
    for topic in Topic:
        texts = [text for text in functions if f"Topic.{topic.name}" in text]
        assert texts, f"nothing ends with [help: {topic}]"
        for line in quoted(named[topic]):
            assert any(longest_piece(line) in text for text in texts), f"no message with [help: {topic}] says: {line}"


def quoted(section: str) -> list[str]:
    """First lines of the messages that a section quotes, PyTorch's own left out."""
    lines = [line for block in re.findall(r"```text\n(.*?)```", section, re.DOTALL) for line in block.splitlines()]
    lines += listed(section)
    return [line for line in lines if not line.startswith(("torch.", "  "))]


def listed(text: str) -> list[str]:
    """Messages at the head of the items of a list, or of the rows of a table."""
    found = re.findall(r"^(?:\* `([^`]+)`:|\| `([^`]+)` \|)", text, re.MULTILINE)
    return [" ".join((item or row).split()) for item, row in found]


def functions_of(*packages: str) -> Iterator[str]:
    """Each function with its strings in one piece; a value that is put in ends a piece."""
    for package in packages:
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_bytes())):
                if isinstance(node, ast.FunctionDef):
                    inside = list(ast.walk(node))
                    pieces = [n.value for n in inside if isinstance(n, ast.Constant) and isinstance(n.value, str)]
                    yield "\n".join([*pieces, *(f"Topic.{n.attr}" for n in inside if isinstance(n, ast.Attribute))])


def longest_piece(line: str) -> str:
    return max(_pieces(line), key=len)


def fixed_pieces(line: str) -> list[str]:
    """Of some length; what the operating system says is not ours."""
    return [piece for piece in _pieces(line) if len(piece) > 7 and piece != "No space left on device"]


def _pieces(line: str) -> list[str]:
    return [piece.strip(" -") for piece in re.split(r"\.\.\.|[\d.]*\d", line)]  # the hyphen of a list


def ours() -> Iterator[str]:
    """Every string of the packages; a value that is put in ends a piece."""
    for package in ("megatron_rest", "launch"):
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_bytes())):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    yield node.value
