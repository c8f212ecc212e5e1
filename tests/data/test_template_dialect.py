"""What a template says about calls is compared with what it renders: families' habits, one made-up template each."""

from __future__ import annotations

import pytest

from megatron_rest.data.chat_template import ChatTemplate, is_append_only
from megatron_rest.data.template_dialect import template_dialect, why_unfit
from megatron_rest.regions import HERMES, find_dialect

TOOLS = "{% if tools %}{{ '<|im_start|>system\\n' + tools | tojson + SAYS + '<|im_end|>\\n' }}{% endif %}"
LOOP = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + (m.content or '') }}"
    "{% for c in m.tool_calls or [] %}CALL{% endfor %}{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
HERMES_CALL = (
    '{{ \'<tool_call>\\n{"name": "\' + c.function.name + \'", "arguments": \' + c.function.arguments | tojson '
    "+ '}\\n</tool_call>' }}"
)
CODER_CALL = (
    "{{ '<tool_call>\\n<function=' + c.function.name + '>\\n' }}{% for k, v in c.function.arguments.items() %}"
    "{{ '<parameter=' + k + '>\\n' + v + '\\n</parameter>\\n' }}{% endfor %}{{ '</function>\\n</tool_call>' }}"
)
LLAMA_CALL = "{{ '{\"name\": \"' + c.function.name + '\", \"parameters\": ' + c.function.arguments | tojson + '}' }}"
SAID = {
    "hermes": ("<tool_call>", HERMES_CALL),
    "qwen3_coder": ("<tool_call><function=f><parameter=p>", CODER_CALL),
    "llama3_json": ("<|start_header_id|> parameters", LLAMA_CALL),
}


def template(says: str, call: str, *, tools: str = TOOLS) -> ChatTemplate:
    return ChatTemplate(tools.replace("SAYS", repr(says)) + LOOP.replace("CALL", call))


@pytest.mark.parametrize("name", SAID)
def test_a_template_that_writes_what_it_says(name: str) -> None:
    assert template_dialect(template(*SAID[name])) is find_dialect(name)


@pytest.mark.parametrize(
    ("says", "call"),
    [
        ("<|start_header_id|> parameters", "{{ '>>>' + c.function.name + '\\n' + c.function.arguments | tojson }}"),
        ("<tool_call><function=f><parameter=p>", CODER_CALL.replace("tool_call>", "seed:tool_call>")),
    ],
    ids=["Functionary", "Seed-OSS"],
)
def test_words_that_a_template_does_not_keep_are_no_dialect(says: str, call: str) -> None:
    found = template(says, call)
    assert template_dialect(found) is None
    assert "in another form than hermes" in why_unfit(found, HERMES)


def test_a_template_that_leaves_tools_out_asks_for_nothing() -> None:
    """DeepSeek's render no tools, SmolLM3's ask for them by another name; both show calls."""
    for tools in ("", TOOLS.replace("tools", "xml_tools")):
        found = template("<tool_call>", HERMES_CALL, tools=tools)
        assert template_dialect(found) is None and "leaves out the tools" in why_unfit(found, HERMES)


def test_arguments_as_text_and_an_opened_thought_are_no_other_form() -> None:
    """DeepSeek's want JSON text and no content; Qwen3-Thinking's prompt has a tag that an earlier turn has not."""
    text_only = HERMES_CALL.replace("c.function.arguments | tojson", "c.function.arguments")
    found = template("<tool_call>", text_only)
    assert template_dialect(found) is HERMES
    opened = ChatTemplate(found.text.replace("assistant\\n' }}{% endif %}", "assistant\\n<think>\\n' }}{% endif %}"))
    assert opened.generation_prompt().endswith("<think>\n") and template_dialect(opened) is HERMES


def test_tools_that_move_with_the_last_request_are_not_append_only() -> None:
    """Mistral's stand before the last user's message."""
    moved = (
        "{% set asked = messages | selectattr('role', 'equalto', 'user') | list %}{% for m in messages %}"
        "{% if tools and m == asked[-1] %}{{ tools | tojson }}{% endif %}{{ '[' + m.role + ']' + m.content }}"
        "{% endfor %}{{ '[assistant]' if add_generation_prompt }}"
    )
    assert not is_append_only(ChatTemplate(moved))
    assert is_append_only(ChatTemplate(moved.replace("tools and", "false and")))
