"""Files beside ``tokenizer.json``: what they change is followed or refused, by one rule everywhere."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_tools.chat import ChatTokenizer
from data_tools.errors import DataError
from megatron_rest.config import ConfigError, DataConfig, ModelConfig, RestConfig
from megatron_rest.data.chat_template import ChatTemplate
from megatron_rest.data.prompt_files import SCHEMA_VERSION, template_identity
from megatron_rest.hf_folder import load_tokenizer, stop_token_ids
from megatron_rest.trainer.setup import chat_settings
from tests.helpers.tiny_model import EOS_ID, VOCAB_SIZE, build_tokenizer

TEXT = "Hi <pad> [tool] 'x'.\n<|im_end|> \n<|im_start|>user"
CHATML = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"


def edit(folder: Path, name: str, **values: Any) -> None:
    path = folder / name
    before = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(before | values))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    build_tokenizer(tmp_path)
    edit(tmp_path, "tokenizer_config.json", chat_template=CHATML)
    return tmp_path


def our_ids(folder: Path) -> list[int]:
    """Of data preparation and of the run, which must be one."""
    ids = load_tokenizer(folder)(TEXT, add_special_tokens=False)["input_ids"]
    assert ChatTokenizer(folder).encode([TEXT])[0].tolist() == ids
    return list(ids)


def as_piece(folder: Path) -> None:
    """A token of the vocabulary that is no added one, made special beside it."""
    spec = json.loads((folder / "tokenizer.json").read_text())
    spec["model"]["vocab"]["[tool]"] = 400
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    edit(folder, "tokenizer_config.json", extra_special_tokens=["[tool]"])


def trims(folder: Path) -> None:
    spec = json.loads((folder / "tokenizer.json").read_text())
    decoder = {str(token.pop("id")): token for token in spec["added_tokens"]}
    decoder[str(EOS_ID)]["rstrip"] = True
    edit(folder, "tokenizer_config.json", added_tokens_decoder=decoder)


CHANGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "pad token": (lambda f: edit(f, "tokenizer_config.json", pad_token="<pad>"), "adds tokens .*<pad>"),
    "pad token, an object": (
        lambda f: edit(f, "tokenizer_config.json", pad_token={"__type": "AddedToken", "content": "<pad>"}),
        "adds tokens .*<pad>",
    ),
    "pad token of the map": (lambda f: edit(f, "special_tokens_map.json", pad_token="<pad>"), "adds tokens .*<pad>"),
    "eos token": (lambda f: edit(f, "tokenizer_config.json", eos_token="</s>"), "adds tokens .*</s>"),
    "specials, a list": (
        lambda f: edit(f, "tokenizer_config.json", extra_special_tokens=["[tool]"]), r"adds tokens .*\[tool\]",
    ),
    "specials of the map": (
        lambda f: edit(f, "special_tokens_map.json", additional_special_tokens=["[tool]"]), r"adds tokens .*\[tool\]",
    ),
    "added_tokens.json": (lambda f: edit(f, "added_tokens.json", **{"[tool]": 400}), r"adds tokens .*\[tool\]"),
    "added_tokens_decoder": (
        lambda f: edit(f, "tokenizer_config.json", added_tokens_decoder={"400": {"content": "[tool]"}}),
        r"adds tokens .*\[tool\]",
    ),
    "special that was a piece": (as_piece, r"makes tokens special .*\[tool\]"),
    "spaces": (trims, r"trims spaces .*<\|im_end\|>"),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_side_files_that_change_ids_are_refused_and_saving_again_mends_them(name: str, folder: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    change, words = CHANGES[name]
    change(folder)
    for opens, error in ((load_tokenizer, ConfigError), (ChatTokenizer, DataError)):
        with pytest.raises(error, match=rf"{words}.*save it again with PreTrainedTokenizerFast"):
            opens(folder)
    PreTrainedTokenizerFast.from_pretrained(folder).save_pretrained(folder)
    assert our_ids(folder)


def test_special_tokens_that_are_spelled_out_are_refused(folder: Path) -> None:
    edit(folder, "tokenizer_config.json", split_special_tokens=True)
    for opens, error in ((load_tokenizer, ConfigError), (ChatTokenizer, DataError)):
        with pytest.raises(error, match=r"split_special_tokens.* set it to false in tokenizer_config.json"):
            opens(folder)


def with_bos(folder: Path) -> None:
    """A processor that writes a token in front of every text, as Llama's does: templates write it themselves."""
    spec = json.loads((folder / "tokenizer.json").read_text())
    bos = {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    tokens = {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [256], "tokens": ["<|endoftext|>"]}}
    pair = [bos, text, {"Sequence": {"id": "B", "type_id": 1}}]
    spec["post_processor"] = {
        "type": "TemplateProcessing", "single": [bos, text], "pair": pair, "special_tokens": tokens,
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(spec))


def cut(folder: Path) -> None:
    """As somebody's fine-tuning left it."""
    spec = json.loads((folder / "tokenizer.json").read_text())
    spec["truncation"] = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
    spec["padding"] = {
        "strategy": {"Fixed": 99}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0,
        "pad_token": "!",
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(spec))


HARMLESS: dict[str, Callable[[Path], None]] = {
    "bos in front of every text": with_bos,
    "bos and eos are asked for": lambda f: edit(f, "tokenizer_config.json", add_bos_token=True, add_eos_token=True),
    "cut and padded": cut,
    "shorter than the text": lambda f: edit(f, "tokenizer_config.json", model_max_length=4),
    "spaces are cleaned up": lambda f: edit(f, "tokenizer_config.json", clean_up_tokenization_spaces=True),
    "a space in front": lambda f: edit(f, "tokenizer_config.json", add_prefix_space=True),
    "converted from slow": lambda f: edit(f, "tokenizer_config.json", from_slow=True, legacy=False),
}


@pytest.mark.parametrize("name", HARMLESS)
def test_side_files_that_change_no_ids(name: str, folder: Path) -> None:
    before = our_ids(folder)
    HARMLESS[name](folder)
    assert our_ids(folder) == before


def test_tokens_without_rows_are_refused(folder: Path) -> None:
    """Somebody added tokens and did not resize the embedding; more rows than tokens are the rule."""
    for rows in (VOCAB_SIZE, VOCAB_SIZE + 55):
        edit(folder, "config.json", vocab_size=rows)
        assert our_ids(folder)
    edit(folder, "config.json", vocab_size=VOCAB_SIZE - 1)
    with pytest.raises(ConfigError, match=rf"tokens up to id {VOCAB_SIZE - 1}, but rows for {VOCAB_SIZE - 1}"):
        load_tokenizer(folder)


def test_ends_of_generation_config_are_ids(folder: Path) -> None:
    for wrong in ("261", 261.0, -1, True, [1, None]):
        edit(folder, "generation_config.json", eos_token_id=wrong)
        with pytest.raises(ConfigError, match=r"eos_token_id of .*generation_config.json is .* expected a token id"):
            stop_token_ids(folder)
    edit(folder, "generation_config.json", eos_token_id=[7, EOS_ID])
    assert stop_token_ids(folder) == [EOS_ID, 7]
    edit(folder, "generation_config.json", eos_token_id=None)
    assert stop_token_ids(folder) == [EOS_ID]


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json", "generation_config.json"])
@pytest.mark.parametrize("text", ['{"eos_token_id": [1,', "[1]", '\ufeff{"eos_token_id": 1}'])
def test_a_damaged_file_is_named(name: str, text: str, folder: Path) -> None:
    (folder / name).write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=rf"model.path: .*{name} is (damaged|not a JSON object)"):
        stop_token_ids(folder)
    if name != "generation_config.json":
        with pytest.raises(DataError, match=rf"{name} is (damaged|not a JSON object)"):
            ChatTokenizer(folder)
        with pytest.raises(ConfigError, match=rf"{name} is (damaged|not a JSON object)"):
            load_tokenizer(folder)


def test_templates_by_name_in_every_form(folder: Path) -> None:
    """A list, an object, and files: each as transformers reads it."""
    tools = "{{ tools | tojson }}" + CHATML
    by_name = {"default": CHATML, "tool_use": tools}
    entries = [{"name": name, "template": text} for name, text in by_name.items()]
    identities = []
    for value in (entries, by_name):
        edit(folder, "tokenizer_config.json", chat_template=value)
        assert load_tokenizer(folder).chat_template == by_name
        found = ChatTemplate.of_folder(folder)
        assert (found.text, found.for_tools().text) == (CHATML, tools)
        assert ChatTemplate.of_tokenizer(load_tokenizer(folder)) == found
        identities.append(template_identity(folder))
    edit(folder, "tokenizer_config.json", chat_template={**by_name, "tool_use": tools + " "})
    assert identities[0] == identities[1] != template_identity(folder), "prompts with tools would be others"
    edit(folder, "tokenizer_config.json", chat_template={"tool_use": tools})
    with pytest.raises(DataError, match=r"no chat template called default \(it has tool_use\)"):
        ChatTokenizer(folder)


def test_a_run_goes_on_where_its_prompts_stop(folder: Path, tmp_path: Path) -> None:
    """Prompts of another template than the run's, unless both begin an answer alike (append_only does)."""
    say = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    edit(folder, "tokenizer_config.json", chat_template=CHATML + say)
    tokenizer = ChatTokenizer(folder)
    made = {"chat_template": "stock", "generation_prompt": tokenizer.generation_prompt, "dialect": "hermes"}
    (tmp_path / "data").mkdir()
    edit(tmp_path / "data", "manifest.json", schema_version=SCHEMA_VERSION, outputs=[], tokenizer=made)
    data = DataConfig(train=str(tmp_path / "data"))
    for name in ("stock", "append_only", "qwen3"):
        chat = chat_settings(RestConfig(model=ModelConfig(path=str(folder), chat_template=name), data=data))
        assert (chat.chat_template, chat.dialect) == (name, "hermes")
    for name in ("qwen3_no_think", "qwen3_thinking"):
        with pytest.raises(
            ConfigError, match=r"were prepared with --chat-template stock: set model.chat_template=stock"
        ):
            chat_settings(RestConfig(model=ModelConfig(path=str(folder), chat_template=name), data=data))
