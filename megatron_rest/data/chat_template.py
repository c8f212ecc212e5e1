"""A chat template as this package renders it: everywhere the same text, and the text that transformers would make.

Preparing data, conversations, validation and evaluation all go through :class:`ChatTemplate`.  What a template could
ask of the machine is fixed: ``strftime_now`` answers :data:`TEMPLATE_DATE`, which the manifest of prepared prompts
names.  Templates are programs of the model's folder: they run in Jinja's sandbox, as in transformers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from megatron_rest.data import prompt_files
from megatron_rest.regions import answer_prefix, is_thought_open

__all__ = [
    "APPEND_ONLY",
    "PROBE_TOOLS",
    "STOCK",
    "TEMPLATE_DATE",
    "ChatTemplate",
    "TemplateError",
    "append_only_template",
    "shipped_templates",
    "template_of",
]

TEMPLATE_DATE = datetime(2024, 7, 26)
"""What templates are told today is: the date that Llama 3's writes where nobody tells it one."""

STOCK, APPEND_ONLY = "stock", "append_only"
_SHIPPED = Path(__file__).parents[1] / "templates"
_PROBE = "q7Zx"


class TemplateError(ValueError):
    """A template does not compile, or refuses a conversation."""


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """A template and the special tokens that it may name.

    ``tool_text`` is the one for conversations with tools, where a folder brings two (Hermes 3).
    """

    text: str
    special_tokens: Mapping[str, Any] = field(default_factory=dict)
    tool_text: str = ""

    @classmethod
    def of_folder(cls, folder: str | Path, choice: str = STOCK) -> ChatTemplate:
        """The template of a Hugging Face folder, or the one that ``choice`` (:func:`template_of`) names for it.

        Raises ValueError for a folder without one.
        """
        special = prompt_files.special_tokens(folder)
        stock = cls(prompt_files.chat_template(folder), special, prompt_files.chat_template(folder, for_tools=True))
        return template_of(stock, choice)

    @classmethod
    def of_tokenizer(cls, tokenizer: Any, choice: str = STOCK) -> ChatTemplate:
        """The template of a tokenizer of transformers.  Raises ValueError for one without."""
        template = tokenizer.chat_template
        texts = template if isinstance(template, dict) else {"default": template}
        text = texts.get("default")
        if not isinstance(text, str) or not text:
            raise ValueError(f"the tokenizer {tokenizer.name_or_path} has no chat template: add chat_template.jinja")
        stock = cls(text, dict(tokenizer.special_tokens_map), texts.get("tool_use") or text)
        return template_of(stock, choice)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        add_generation_prompt: bool = False,
    ) -> str:
        """The conversation as text.  Raises :class:`TemplateError` for whatever the template does instead."""
        compiled = compiled_template(self.tool_text if tools and self.tool_text else self.text)
        try:
            return str(
                compiled.render(
                    messages=[dict(message) for message in messages],
                    tools=list(tools) if tools else None,
                    documents=None,
                    add_generation_prompt=add_generation_prompt,
                    **self.special_tokens,
                )
            )
        except Exception as error:  # a template is a program: whatever it raises
            raise TemplateError(str(error)) from error

    def behind_answer(self) -> str:
        """What the template writes behind an assistant's answer; where that is nothing, what begins the next turn."""
        asked = [{"role": "user", "content": "q"}, {"role": "assistant", "content": _PROBE}]
        for more in ([], [{"role": "user", "content": "r"}]):
            try:
                _, found, tail = self.render([*asked, *more]).rpartition(_PROBE)
            except TemplateError:
                continue
            if found and tail.strip():
                return tail
        return ""

    def end_of_turn(self, tokens: Sequence[str]) -> str:
        """The token of ``tokens`` (the vocabulary's added ones) that ends an assistant's turn; empty if none does."""
        tail = self.behind_answer().lstrip()
        return max((token for token in tokens if token and tail.startswith(token)), key=len, default="")

    def generation_prompt(self) -> str:
        """What the template writes for the model to go on from: an assistant's header, perhaps an opened thought."""
        asked = [{"role": "user", "content": _PROBE}]
        try:
            without, prompt = self.render(asked), self.render(asked, add_generation_prompt=True)
        except TemplateError:
            return ""
        return prompt[len(without) :] if prompt.startswith(without) else prompt.rpartition(_PROBE)[2]

    def shows_tools(self) -> bool:
        """Whether tools that it is given reach the prompt: some templates ignore them, or ask for another name."""
        try:
            return "get_weather" in self.render(
                [{"role": "user", "content": "q"}], PROBE_TOOLS, add_generation_prompt=True
            )
        except TemplateError:
            return False

    def for_tools(self) -> ChatTemplate:
        """The one that renders conversations with tools: itself, or a folder's own for them."""
        return ChatTemplate(self.tool_text, self.special_tokens, self.tool_text) if self.tool_text else self


def template_of(stock: ChatTemplate, choice: str) -> ChatTemplate:
    """The template that ``model.chat_template`` names: ``stock``, ``append_only``, a shipped one's name or a path.

    Raises ValueError for what is none of them.
    """
    if choice in ("", STOCK):
        return stock
    if choice == APPEND_ONLY:
        return append_only_template(stock)
    shipped = shipped_templates()
    try:
        text = shipped[choice] if choice in shipped else Path(choice).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"model.chat_template: {choice} cannot be read ({error}); it is stock, append_only, a path, or one of "
            f"{', '.join(shipped)}"
        ) from error
    return ChatTemplate(text, stock.special_tokens, text)


@cache
def shipped_templates() -> dict[str, str]:
    """Texts of the append-only templates of this package, by name."""
    return {path.stem: path.read_text(encoding="utf-8") for path in sorted(_SHIPPED.glob("*.jinja"))}


PROBE_TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Say the weather.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "description": "Which one."}},
                "required": ["city"],
            },
        },
    }
]
"""A tool to show a template what it makes of tools."""
_FIRST_TURNS: tuple[tuple[list[dict[str, str]], list[Any] | None], ...] = tuple(
    (messages, tools)
    for messages in (
        [{"role": "user", "content": "Weather in Bern?"}],
        [{"role": "user", "content": "\n Weather in Bern? \n"}],  # some families' own trim
        [{"role": "system", "content": "You help."}, {"role": "user", "content": "Weather in Zürich?"}],
        [{"role": "system", "content": " You help.\n"}, {"role": "user", "content": "Weather in Zürich?"}],
    )
    for tools in (None, PROBE_TOOLS)
)


def append_only_template(stock: ChatTemplate) -> ChatTemplate:
    """A template that writes the first prompt of a conversation as ``stock`` does, and never rewrites what was said.

    It is ``stock`` itself if that is one; else the first of the shipped ones that agrees with it on first prompts.
    Raises ValueError if none does.
    """
    if is_append_only(stock):
        return stock
    for text in shipped_templates().values():
        shipped = ChatTemplate(text, stock.special_tokens, text)
        try:
            if all(_first(shipped, *asked) == _first(stock, *asked) for asked in _FIRST_TURNS) and is_append_only(
                shipped
            ):
                return shipped
        except TemplateError:
            continue
    raise ValueError(
        "model.chat_template=append_only: the folder's template rewrites earlier turns, and none of the shipped ones "
        f"({', '.join(shipped_templates())}) begins a conversation as it does: name the one of the model's family, or "
        "the path of one that you write"
    )


def _first(template: ChatTemplate, messages: list[dict[str, str]], tools: list[Any] | None) -> str:
    return template.render(messages, tools, add_generation_prompt=True)


def is_append_only(template: ChatTemplate) -> bool:
    """Whether what was said stays as it was when tools or users speak after it: thoughts, calls and tools stay."""
    try:
        return all(
            _only_grows(template, role, tools)
            for role in ("tool", "user")
            for tools in ((None, PROBE_TOOLS) if template.shows_tools() else (None,))
        )
    except TemplateError:
        return False


def _only_grows(template: ChatTemplate, role: str, tools: list[Any] | None) -> bool:
    prefix = answer_prefix(template.generation_prompt().encode())
    first = "hm\n</think>\n\n" if is_thought_open(prefix) else "" if prefix else "<think>\nhm\n</think>\n\n"
    then = "\n</think>\n\n" if is_thought_open(prefix) else ""
    call = '<tool_call>\n{"name": "w", "arguments": {}}\n</tool_call>'
    messages: list[dict[str, str]] = [{"role": "user", "content": "Go."}]
    whole = _first(template, messages, tools)
    for said in (first + "One.", first + call, then + "Two."):
        messages = [*messages, {"role": "assistant", "content": prefix + said}, {"role": role, "content": "ok"}]
        now = _first(template, messages, tools)
        if not now.startswith(whole + said):
            return False
        whole = now
    return True


@lru_cache(maxsize=64)
def compiled_template(text: str) -> Any:
    """Compile as transformers does (sandboxed, with its extensions and filters), but for the date, which is fixed."""
    import jinja2
    from jinja2 import nodes
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """``{% generation %}`` marks what a model wrote, for masks; it renders as its body."""

        tags = {"generation"}  # noqa: RUF012  Jinja reads the class attribute

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

        def _body(self, caller: Any) -> str:
            return str(caller())

    def refuse(message: str) -> None:
        raise jinja2.exceptions.TemplateError(message)

    def tojson(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = TEMPLATE_DATE.strftime
    try:
        template = environment.from_string(text)
    except jinja2.TemplateError as error:
        raise TemplateError(f"the chat template does not compile: {error}") from error
    template.globals = dict(template.globals)  # a chain of dictionaries, which every rendering would copy key by key
    return template
