"""Dialects, one file each, and the table by which ``model.dialect`` finds them."""

from __future__ import annotations

from functools import lru_cache

from megatron_rest.regions.dialect import Dialect
from megatron_rest.regions.dialects.deepseek import DEEPSEEK, DEEPSEEK_V31
from megatron_rest.regions.dialects.glm45 import GLM45
from megatron_rest.regions.dialects.harmony import HARMONY
from megatron_rest.regions.dialects.hermes import HERMES
from megatron_rest.regions.dialects.llama3 import LLAMA3_JSON
from megatron_rest.regions.dialects.mistral import MISTRAL, MISTRAL_V11
from megatron_rest.regions.dialects.pythonic import PYTHONIC
from megatron_rest.regions.dialects.qwen3_coder import QWEN3_CODER
from megatron_rest.regions.dialects.toolrl import TOOLRL

__all__ = ["DIALECTS", "dialects_named_in", "find_dialect"]

DIALECTS: dict[str, Dialect] = {
    dialect.name: dialect
    for dialect in (
        TOOLRL,
        HERMES,
        LLAMA3_JSON,
        QWEN3_CODER,
        HARMONY,
        GLM45,
        MISTRAL,
        MISTRAL_V11,
        DEEPSEEK,
        DEEPSEEK_V31,
        PYTHONIC,
    )
}

# What only a template of the dialect says, the most particular first.
_SIGNS: tuple[tuple[Dialect, tuple[str, ...]], ...] = (
    (HARMONY, ("<|channel|>", "<|message|>")),
    (GLM45, ("<arg_key>", "<arg_value>")),
    (QWEN3_CODER, ("<function=", "<parameter=")),
    (DEEPSEEK, ("<｜tool▁call", "```json")),
    (DEEPSEEK_V31, ("<｜tool▁call",)),
    (MISTRAL_V11, ("[TOOL_CALLS]", "[ARGS]")),
    (MISTRAL, ("[TOOL_CALLS]",)),
    (TOOLRL, ("<tool_call>", "<response>")),
    (HERMES, ("<tool_call>",)),
    (PYTHONIC, ("func_name1(",)),
    (PYTHONIC, ("func_name_1(",)),
    (LLAMA3_JSON, ("<|start_header_id|>", "parameters")),
)


def find_dialect(name: str) -> Dialect:
    """The dialect of ``model.dialect``: of the table, or ``package.module:DIALECT``; ValueError for what is neither."""
    if ":" in name:
        return _own_dialect(name)
    if name not in DIALECTS:
        known = ", ".join(DIALECTS)
        raise ValueError(f"dialect {name!r} is not known: known are {known}, and package.module:DIALECT of your own")
    return DIALECTS[name]


@lru_cache(maxsize=8)
def _own_dialect(reference: str) -> Dialect:
    from megatron_rest.user_code import load_object

    found = load_object("model.dialect", reference)
    if not isinstance(found, Dialect):
        raise ValueError(
            f"model.dialect {reference!r} is {type(found).__name__}, expected a megatron_rest.regions.Dialect"
        )
    return found


def dialects_named_in(template: str) -> tuple[Dialect, ...]:
    """The dialects whose own words stand in a chat template's text, the most particular first.

    Words are a hint only: :func:`megatron_rest.data.template_dialect.template_dialect` looks at what it renders.
    """
    found = (dialect for dialect, signs in _SIGNS if all(sign in template for sign in signs))
    return tuple({dialect.name: dialect for dialect in found}.values())
