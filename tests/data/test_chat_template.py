"""Rendering: what transformers makes of a template, on the same day everywhere; the shipped append-only templates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_rest.data import chat_template as module
from megatron_rest.data.chat_template import (
    TEMPLATE_DATE,
    ChatTemplate,
    TemplateError,
    append_only_template,
    shipped_templates,
    template_of,
)
from megatron_rest.data.prompt_files import special_tokens
from tests.helpers.tiny_model import build_tokenizer

LOOP = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
SAY = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
TOOL = {
    "type": "function",
    "function": {"name": "w", "description": "Wetter für Zürich", "parameters": {"type": "object", "properties": {}}},
}
MESSAGES = [
    {"role": "user", "content": "Zürich?"},
    {"role": "assistant", "content": "a<b"},
    {"role": "user", "content": "q"},
]

# What templates of the hub use, one feature each.
FEATURES = {
    "plain": LOOP + SAY,
    "generation": LOOP + "{% if true %}{% generation %}a{{ messages[0].content }}{% endgeneration %}{% endif %}",
    "generation trims": "{%- generation -%}  x  {%- endgeneration -%}",
    "bos": "{{ bos_token }}" + LOOP + "{{ eos_token }}{{ pad_token }}",
    "undefined names": "{{ no_such_thing }}{{ enable_thinking is defined }}" + LOOP,
    "tojson": "{{ messages | tojson }}",
    "tojson sorted": "{{ messages | tojson(sort_keys=true, separators=(',', ':')) }}",
    "tojson ascii": "{{ messages | tojson(ensure_ascii=true) }}",
    "tojson by position": "{{ messages | tojson(false) }}",
    "tojson indented": "{{ tools | tojson(indent=4) }}",
    "tools": "{% if tools %}{{ tools | length }}{{ tools[0] | tojson }}{% endif %}" + LOOP + SAY,
    "break and continue": "{% for m in messages %}{% if loop.index == 3 %}{% break %}{% endif %}{{ m.role }}"
    "{% endfor %}{% for m in messages %}{% if m.role == 'user' %}{% continue %}{% endif %}{{ m.role }}{% endfor %}",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    "macro": "{% macro say(m) %}[{{ m.content }}]{% endmacro %}{% for m in messages %}{{ say(m) }}{% endfor %}",
    "neighbours": "{% for m in messages %}{{ loop.previtem.role if not loop.first }}{{ loop.last }}{% endfor %}",
    "trim": "  {%- for m in messages %}\n  {{- m.content | trim }}\n{%- endfor %}\n\n",
    "strings": "{{ messages[0].content.split('r') | join('-') }}{{ messages[0]['content'].startswith('Z') }}",
    "reversed": "{% for m in messages[::-1] %}{{ m.content }}{% endfor %}",
    "selectattr": "{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | list }}",
    "documents": "{% if documents %}d{% endif %}" + LOOP,
    "filters": "{{ messages[0].content | upper | replace('Z', 'z') }}{{ [1, 2] | sum }}{{ {'b': 1} | items | list }}",
    "is tests": "{{ messages is iterable and messages[0] is mapping and messages[0].content is string }}",
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    build_tokenizer(folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "bos_token": "<|endoftext|>"}))
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("name", FEATURES)
def test_the_same_text_as_transformers(tokenizer: Any, name: str) -> None:
    tokenizer.chat_template = FEATURES[name]
    ours = ChatTemplate.of_tokenizer(tokenizer)
    for tools in (None, [TOOL]):
        for prompt in (False, True):
            theirs = tokenizer.apply_chat_template(MESSAGES, tools=tools, tokenize=False, add_generation_prompt=prompt)
            assert ours.render(MESSAGES, tools, add_generation_prompt=prompt) == theirs


def test_the_date_is_the_same_every_day(tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }}"
    assert ChatTemplate.of_tokenizer(tokenizer).render(MESSAGES) == TEMPLATE_DATE.strftime("%d %b %Y") == "26 Jul 2024"


def test_templates_are_sandboxed_and_refuse_in_one_line() -> None:
    for text in ("{{ raise_exception('no system') }}", "{{ ''.__class__.__mro__ }}{{ messages.append(1) }}"):
        with pytest.raises(TemplateError):
            ChatTemplate(text).render(MESSAGES)
    with pytest.raises(TemplateError, match="does not compile"):
        ChatTemplate("{% for %}").render(MESSAGES)


@pytest.mark.parametrize(
    ("template", "end"),
    [
        (LOOP, "<|im_end|>"),
        ("{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}{% endfor %}", "<|user|>"),  # GLM's
        ("{% for m in messages %}{{ m.content + eos_token }}{% endfor %}", "</s>"),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", ""),
    ],
)
def test_the_end_of_a_turn_is_what_the_template_writes(template: str, end: str) -> None:
    tokens = ["<|im_end|>", "<|user|>", "</s>", "<|im_start|>"]
    assert ChatTemplate(template, {"eos_token": "</s>"}).end_of_turn(tokens) == end


def test_special_tokens_come_from_any_file(tmp_path: Path) -> None:
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"bos_token": {"content": "<b>"}, "eos_token": "<e>"}))
    assert special_tokens(tmp_path) == {"bos_token": "<b>", "eos_token": "<e>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<f>", "add_bos_token": True}))
    assert special_tokens(tmp_path) == {"bos_token": "<b>", "eos_token": "<e>"}, "as transformers reads old folders"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<f>", "added_tokens_decoder": {}}))
    assert special_tokens(tmp_path) == {"bos_token": "<b>", "eos_token": "<f>"}


# As Qwen3's and DeepSeek-R1's: thoughts of turns before the last request are cut out.
CUT = "(m.content if loop.last else m.content.split('</think>')[-1].lstrip('\\n'))"
DROPS = LOOP.replace("m.content", CUT)
R1 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% endif %}{% endfor %}"
    "{% for m in messages %}{% if m.role == 'user' %}{{ '<｜User｜>' + m.content }}{% elif m.role == 'assistant' %}"
    "{{ '<｜Assistant｜>' + m.content.split('</think>')[-1] + '<｜end▁of▁sentence｜>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\\n' }}{% endif %}"
)


def qwen_like(prompt: str) -> ChatTemplate:
    """First prompts, tools included, are those of the shipped file; later turns lose their thoughts."""
    text = shipped_templates()["qwen3"].replace(
        "{{- message.content }}", "{{- message.content.split('</think>')[-1].lstrip('\\n') }}"
    )
    return ChatTemplate(text.replace("<|im_start|>assistant\\n' }}\n{%- endif %}", prompt + "' }}\n{%- endif %}"))


@pytest.mark.parametrize(
    ("stock", "name"),
    [
        (qwen_like("<|im_start|>assistant\\n"), "qwen3"),
        (qwen_like("<|im_start|>assistant\\n<think>\\n"), "qwen3_thinking"),
        (ChatTemplate(R1, {"bos_token": "<b>"}), "deepseek_r1"),
    ],
    ids=["qwen3", "qwen3_thinking", "deepseek_r1"],
)
def test_a_family_that_drops_thoughts_gets_its_shipped_template(stock: ChatTemplate, name: str) -> None:
    assert not module.is_append_only(stock)
    found = append_only_template(stock)
    assert found.text == shipped_templates()[name] and module.is_append_only(found)
    for messages, tools in module._FIRST_TURNS:
        first = [t.render(messages, tools, add_generation_prompt=True) for t in (stock, found)]
        assert first[0] == first[1]


def test_what_is_append_only_stays_and_what_nobody_ships_is_refused(tmp_path: Path) -> None:
    stock = ChatTemplate(LOOP + SAY)
    assert append_only_template(stock) is stock
    with pytest.raises(ValueError, match="none of the shipped ones"):
        append_only_template(ChatTemplate("odd " + DROPS + SAY))
    own = tmp_path / "own.jinja"
    own.write_text(LOOP)
    assert template_of(stock, str(own)).text == LOOP
    with pytest.raises(ValueError, match=r"none.jinja cannot be read .* or one of deepseek_r1, .*qwen3_no_think"):
        template_of(stock, str(tmp_path / "none.jinja"))
    assert template_of(stock, "qwen3_no_think").text == shipped_templates()["qwen3_no_think"]


def test_the_templates_of_one_family_differ_where_an_answer_begins() -> None:
    """Each has to be whole in an exported folder; what they share is the same."""
    shared = {}
    for name, opened in {"": "", "_thinking": "<think>\\n", "_no_think": "<think>\\n\\n</think>\\n\\n"}.items():
        text = shipped_templates()[f"qwen3{name}"].partition("-#}")[2]
        assert text.count(f"'<|im_start|>assistant\\n{opened}' }}") == (2 if not opened else 1)
        shared[name] = text.replace(f"assistant\\n{opened}' }}", "assistant\\n' }")
    assert len(set(shared.values())) == 1


@pytest.mark.parametrize("name", sorted(shipped_templates()))
def test_shipped_templates_write_structured_messages_as_their_text(name: str) -> None:
    """A server that has parsed thoughts and calls renders what the policy wrote, in its dialect."""
    from megatron_rest.regions import DEEPSEEK, GLM45, HERMES, QWEN3_CODER

    dialect = {"deepseek_r1": DEEPSEEK, "glm45": GLM45}.get(name, QWEN3_CODER if "3_5" in name else HERMES)
    template = ChatTemplate(shipped_templates()[name], {"bos_token": "<b>"})
    calls = [("f", {"a": "ü"}), ("g", {})]
    said = {"role": "assistant", "content": dialect.write(calls, thought="hm")}
    told = {
        "role": "assistant",
        "content": "",
        "reasoning_content": "hm",
        "tool_calls": [{"type": "function", "function": {"name": n, "arguments": a}} for n, a in calls],
    }
    ask = {"role": "user", "content": "q"}
    assert template.render([ask, told]) == template.render([ask, said])
