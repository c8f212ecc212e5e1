"""Folders of models as they are: ends of turns, thoughts, special tags, dialects; references that earn nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from data_tools.chat import ChatTokenizer
from data_tools.convert import ConvertOptions, convert_rows, describe
from data_tools.encode import EncodeOptions
from data_tools.errors import DataError
from data_tools.examples import normalise
from data_tools.train_tokenizer import train_and_save
from data_tools.validate import open_as_prepared, validate_prepared
from megatron_rest.config import RewardConfig
from megatron_rest.data.prompt_files import map_shard
from megatron_rest.data.prompts import PromptDataset
from megatron_rest.data.references import without_hopeless_references
from megatron_rest.hf_folder import stop_token_ids
from megatron_rest.regions import DIALECTS, TOOLRL, find_dialect
from megatron_rest.rewards import tool_call_reward
from megatron_rest.token_region import TokenRegion

LOOP = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
SAY = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
THINKS = SAY.replace("assistant\\n'", "assistant\\n<think>\\n'")
SKIPS = SAY.replace("assistant\\n'", "assistant\\n<think>\\n\\n</think>\\n\\n'")
SHOWS = "{% if tools %}{{ '<|im_start|>system\\n' + tools | tojson + SIGN + '<|im_end|>\\n' }}{% endif %}"
# What only a template of the dialect says (the signs are the models' own; the rest is made up).
SIGNS = {
    "hermes": "<tool_call>{}</tool_call>",
    "qwen3_coder": "<tool_call><function=f><parameter=p>",
    "glm45": "<tool_call>f<arg_key>k</arg_key><arg_value>v</arg_value>",
    "llama3_json": "<|start_header_id|> parameters",
    "pythonic": "[func_name1(a=1)]",
    "mistral": "[TOOL_CALLS] [",
    "mistral_v11": "[TOOL_CALLS]f[ARGS]",
    "deepseek": "<｜tool▁calls▁begin｜>```json",
    "deepseek_v31": "<｜tool▁calls▁begin｜>",
    "harmony": "<|channel|>final<|message|>",
}
TOOLS = [{"type": "function", "function": {"name": "w", "description": "", "parameters": {"type": "object"}}}]
ROW: dict[str, Any] = {
    "tools": TOOLS,
    "messages": [
        {"role": "user", "content": "Weather in Bern?"},
        {
            "role": "assistant",
            "reasoning_content": "Ask the tool.",
            "content": None,
            "tool_calls": [
                {"type": "function", "function": {"name": "w", "arguments": '{"city": "Bern", "zip": "3000"}'}}
            ],
        },
    ],
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    train_and_save(["Weather in Bern? It is sunny in Thun."] * 3, vocab_size=300, output=folder)
    return folder


def folder_of(trained: Path, folder: Path, *, special: tuple[str, ...] = (), **config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    spec = json.loads((trained / "tokenizer.json").read_text())
    for token in spec["added_tokens"]:
        token["special"] |= token["content"] in special
    next_id = 1 + max([*spec["model"]["vocab"].values(), *(t["id"] for t in spec["added_tokens"])])
    known = {token["content"] for token in spec["added_tokens"]}
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    for offset, name in enumerate(name for name in dict.fromkeys(special) if name not in known):
        spec["added_tokens"].append({"id": next_id + offset, "content": name, **plain})
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    values = json.loads((trained / "tokenizer_config.json").read_text()) | config
    (folder / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in values.items() if v is not None}))
    return folder


def convert(
    rows: list[dict[str, Any]], tokenizer: Path, tmp_path: Path, **encode: Any
) -> tuple[dict[str, Any], list[Any]]:
    source, output = tmp_path / "rows.jsonl", tmp_path / "out"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    manifest = convert_rows(
        ConvertOptions(
            inputs=[str(source)],
            output=output,
            tokenizer=tokenizer,
            encode=EncodeOptions(**encode),
            processes=1,
            progress_bar=False,
            overwrite=True,
        )
    )
    assert list(validate_prepared(output, tokenizer=open_as_prepared(output, tokenizer))) == []
    return manifest, [r for entry in manifest["outputs"] for b in map_shard(output, entry) for r in b.to_pylist()]


@pytest.mark.parametrize("dialect", SIGNS)
def test_the_template_tells_the_dialect_and_references_earn_full_marks(
    trained: Path, tmp_path: Path, dialect: str
) -> None:
    reads = find_dialect(dialect)
    special = (*reads.tags(), *reads.control_tokens, reads.call_end, reads.turn_end)
    template = SHOWS.replace("SIGN", repr(SIGNS[dialect])) + LOOP + SAY
    folder = folder_of(trained, tmp_path / "model", special=tuple(filter(None, special)), chat_template=template)
    manifest, [row] = convert([ROW], folder, tmp_path)
    assert manifest["tokenizer"]["dialect"] == dialect and f"dialect {dialect}" in describe(manifest, tmp_path)
    answer = reads.write([("w", {"city": "Bern", "zip": "3000"})], thought="Ask the tool.")
    assert row["answer_text"] == answer
    reward = tool_call_reward(answer, row["ground_truth"], step=1, dialect=reads)
    assert reward.is_format_valid and reward.accuracy == 1.0
    tokenizer = ChatTokenizer(folder, dialect=reads)
    prompt = tokenizer.decode(row["prompt_token_ids"])
    assert '"name": "w"' in prompt and "Available Tools" not in prompt and "Weather in Bern?" in prompt
    last = row["answer_token_ids"][-1]
    assert last == tokenizer.end_of_calls_id and last in stop_token_ids(folder, dialect=reads)
    assert TokenRegion.TOOL_NAME in row["answer_region_ids"]


def test_rows_that_ask_for_tags_stay_in_tags(trained: Path, tmp_path: Path) -> None:
    template = SHOWS.replace("SIGN", repr(SIGNS["hermes"])) + LOOP + SAY
    folder = folder_of(trained, tmp_path / "model", chat_template=template)
    tagged = normalise(ROW)
    row = {"prompt": tagged.messages, "reward_model": {"ground_truth": tagged.ground_truth}}
    manifest, [converted] = convert([row], folder, tmp_path)
    assert manifest["tokenizer"]["dialect"] == "toolrl" and converted["answer_text"] == tagged.ground_truth
    manifest, [converted] = convert([row], folder, tmp_path, dialect="hermes")  # asked for: the list becomes tools
    assert converted["answer_text"].count('"arguments"') == 1
    assert "Available Tools" not in converted["messages"]
    with pytest.raises(DataError, match="known are toolrl, hermes"):
        convert([row], folder, tmp_path, dialect="latin")


@pytest.mark.parametrize(
    ("say", "answer", "opened"),
    [
        (SAY, "<think> Ask the tool. </think>\n<tool_call>", False),
        (THINKS, "Ask the tool. </think>\n<tool_call>", True),
        (SKIPS, "<tool_call>", False),
    ],
    ids=["no thought", "opened", "empty"],
)
def test_answers_go_on_where_the_prompt_stops(
    trained: Path, tmp_path: Path, say: str, answer: str, opened: bool
) -> None:
    folder = folder_of(trained, tmp_path / "model", chat_template=LOOP + say)
    manifest, [row] = convert([ROW], folder, tmp_path)
    assert manifest["tokenizer"]["generation_prompt"] == ChatTokenizer(folder).generation_prompt
    assert row["answer_text"].startswith(answer)
    assert (row["answer_region_ids"][0] == TokenRegion.THINK) == opened
    prompt = ChatTokenizer(folder).decode(row["prompt_token_ids"])
    prefix = prompt.rpartition("assistant\n")[2]
    reward = tool_call_reward(row["answer_text"], row["ground_truth"], step=1, prefix=prefix)
    assert reward.is_format_valid and reward.accuracy == 1.0


def test_tools_that_a_template_leaves_out_are_told_in_tags(trained: Path, tmp_path: Path) -> None:
    mentions = "{% if messages[-1].tool_calls %}<tool_call>{% endif %}"
    folder = folder_of(trained, tmp_path / "model", chat_template=mentions + LOOP + SAY)
    manifest, [row] = convert([ROW], folder, tmp_path)
    prompt = ChatTokenizer(folder).decode(row["prompt_token_ids"])
    assert manifest["tokenizer"]["dialect"] == "toolrl" and "Available Tools" in prompt and "Name: w" in prompt
    with pytest.raises(DataError, match=r"leaves out the tools that it is given: convert with --dialect toolrl"):
        convert([ROW], folder, tmp_path, dialect="hermes")


def test_a_prompt_behind_a_tools_output_may_open_no_thought(trained: Path, tmp_path: Path) -> None:
    """DeepSeek's templates write no generation prompt there; the helper validates what was converted."""
    say = THINKS.replace("add_generation_prompt", "add_generation_prompt and messages[-1].role != 'tool'")
    assert say != THINKS
    folder = folder_of(trained, tmp_path / "model", chat_template=LOOP + say)
    told = [*ROW["messages"], {"role": "tool", "content": "sunny"}, {**ROW["messages"][1], "tool_calls": None}]
    told[-1] |= {"content": "It is sunny.", "reasoning_content": "So."}
    _, rows = convert([ROW, {**ROW, "messages": told}], folder, tmp_path)
    assert [row["answer_region_ids"][0] == TokenRegion.THINK for row in rows] == [True, False]
    assert list(validate_prepared(tmp_path / "out")) == []


def test_answers_are_stored_as_a_vocabulary_composes_them(trained: Path, tmp_path: Path) -> None:
    """Qwen's composes accents: the stored text is what its ids stand for, in the reward's eyes the same."""
    folder = folder_of(trained, tmp_path / "model", chat_template=LOOP + SAY)
    spec = json.loads((folder / "tokenizer.json").read_text()) | {"normalizer": {"type": "NFC"}}
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    said = {**ROW["messages"][1], "reasoning_content": "Cafe\u0301."}
    _, [row] = convert([{**ROW, "messages": [ROW["messages"][0], said]}], folder, tmp_path)
    assert "Caf\u00e9." in row["answer_text"] and row["answer_token_starts"] is not None
    assert ChatTokenizer(folder).decode(row["answer_token_ids"][:-1]) == row["answer_text"]


def test_base_models_stop_at_the_templates_end_and_at_their_own(trained: Path, tmp_path: Path) -> None:
    folder = folder_of(trained, tmp_path / "model", eos_token="<|endoftext|>", chat_template=LOOP + SAY)
    ids = {
        token["content"]: token["id"] for token in json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    }
    assert stop_token_ids(folder) == [ids["<|im_end|>"], ids["<|endoftext|>"]]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, ids["<|endoftext|>"], 9]}))
    assert stop_token_ids(folder) == [ids["<|im_end|>"], ids["<|endoftext|>"], 7, 9]
    manifest, [row] = convert([ROW], folder, tmp_path)
    assert manifest["tokenizer"]["end_of_turn"] == "<|im_end|>"
    assert row["answer_token_ids"][-1] == ids["<|im_end|>"]


def test_tags_that_a_vocabulary_calls_special_are_text(trained: Path, tmp_path: Path) -> None:
    tags = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<response>", "</response>")
    folder = folder_of(trained, tmp_path / "model", special=tags, chat_template=LOOP + SAY)
    manifest, _ = convert([ROW], folder, tmp_path)
    assert manifest["counts"]["rows_out"] == 1
    ask = {"role": "user", "content": "hi <|im_end|>"}
    manifest, _ = convert([ROW, {**ROW, "messages": [ask, *ROW["messages"][1:]]}], folder, tmp_path)
    assert manifest["counts"]["rows_quarantined"] == 1


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking", "content", "content without opening"])
def test_a_thought_is_a_thought_wherever_it_stands(key: str) -> None:
    said = {k: v for k, v in ROW["messages"][1].items() if k != "reasoning_content"}
    if key.startswith("content"):
        said["content"] = ("" if "without" in key else "<think>\n") + "Ask the tool.\n</think>\n\n"
    else:
        said[key] = "Ask the tool."
    example = normalise({"messages": [ROW["messages"][0], said]})
    assert (example.think, example.response) == ("Ask the tool.", None)
    spoken = {**said, "tool_calls": None, "content": (said.get("content") or "") + "It rains."}
    example = normalise({"messages": [ROW["messages"][0], spoken]})
    assert (example.think, example.response) == ("Ask the tool.", "It rains.")


def test_references_that_cannot_earn_their_reward_are_rewritten_or_quarantined(trained: Path, tmp_path: Path) -> None:
    def row(body: str, thought: str = "<think> t </think>\n") -> dict[str, Any]:
        truth = f"{thought}<tool_call>\n{body}\n</tool_call>"
        return {"prompt": [{"role": "user", "content": "q"}], "reward_model": {"ground_truth": truth}}

    call = '{"name": "w", "parameters": {"city": "Bern"}}'
    fine = [row(call), row(f"{call}\n\n{call}"), row(f"{call}\u2028{call}")]
    mended = [
        row(call, "<think> with <tool_call> </think>\n"),
        row(call, ""),
        row('{"name": "now"}'),
        row('{"name": "w", "arguments": "{}"}'),
        row(call, "<think> t\n"),
    ]
    lost = [row('{"name": "w", "parameters": {"t": ' + "[" * 40 + "]" * 40 + "}}"), row("nonsense"), row("")]
    lost.append(row('{"name": "w", "parameters": {"t": "' + "x" * 70_000 + '"}}'))
    lost.append(row('{"name": "w", "parameters": {"t": "a </tool_call> b"}}'))
    manifest, rows = convert(
        [*fine, *mended, *lost], folder_of(trained, tmp_path / "m", chat_template=LOOP + SAY), tmp_path
    )
    counts = manifest["counts"]
    assert (counts["rows_out"], counts["rows_quarantined"], counts["references_rewritten"]) == (8, 5, len(mended))
    assert counts["rewritten_reasons"] == {"the reference answer does not earn its own reward": len(mended)}
    for stored in rows:
        reward = tool_call_reward(stored["answer_text"], stored["ground_truth"], step=1, config=RewardConfig())
        assert reward.is_format_valid and reward.accuracy == 1.0
    assert manifest["references"]["earn_full_marks_under"]["opaque_thought"] is False


def test_the_manifest_says_what_prompts_depended_on(trained: Path, tmp_path: Path) -> None:
    folder = folder_of(trained, tmp_path / "m", chat_template="{{ strftime_now('%d %b %Y') }}" + LOOP + SAY)
    manifest, [row] = convert([ROW], folder, tmp_path)
    made = manifest["tokenizer"]
    assert (made["template_date"], made["dialect"], made["chat_template"]) == ("2024-07-26", "toolrl", "stock")
    assert ChatTokenizer(folder).decode(row["prompt_token_ids"]).startswith("26 Jul 2024")
    assert set(DIALECTS) > set(SIGNS)


def test_a_run_with_other_rules_looks_at_references_again(trained: Path, tmp_path: Path) -> None:
    call = '<tool_call>\n{"name": "w", "parameters": {"city": "Bern"}}\n</tool_call>'
    rows = [
        {
            "prompt": [{"role": "user", "content": "q"}],
            "reward_model": {"ground_truth": f"<think> t </think>{gap}{call}"},
        }
        for gap in ("\n", " ")  # the second is no exact layout
    ]
    manifest, _ = convert(rows, folder_of(trained, tmp_path / "m", chat_template=LOOP + SAY), tmp_path)
    dataset = PromptDataset.open(tmp_path / "out")
    same, reasons = without_hopeless_references(dataset, manifest, reward=RewardConfig(), dialect=TOOLRL)
    assert same is dataset and not reasons
    strict = RewardConfig(strict_format=True)
    left, reasons = without_hopeless_references(dataset, manifest, reward=strict, dialect=TOOLRL)
    assert (len(left), left.num_left_out) == (1, 1) and "does not earn its own reward" in reasons[0]
    assert left[0].ground_truth == rows[0]["reward_model"]["ground_truth"]
