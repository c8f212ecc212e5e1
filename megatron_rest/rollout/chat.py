"""How a run talks with its model: which chat template, which dialect, which tokens end a turn.

Decided once, from the configuration, the prepared prompts and the model's folder, and given to everybody who reads or
writes a turn: engines, judge, environments, validation.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_rest.config import ConfigError
from megatron_rest.data.chat_template import STOCK, ChatTemplate, TemplateError
from megatron_rest.data.prompt_files import read_manifest
from megatron_rest.hf_folder import stop_token_ids
from megatron_rest.regions import TOOLRL, Dialect, find_dialect

__all__ = ["AUTO", "ChatSettings", "dialect_name"]

AUTO = "auto"


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatSettings:
    """By value, so that it travels to an engine's process."""

    dialect: str = TOOLRL.name
    chat_template: str = STOCK
    """stock, append_only, a shipped one's name or a path."""

    @property
    def reads(self) -> Dialect:
        """The dialect itself."""
        return find_dialect(self.dialect)

    def stop_token_ids(self, folder: str | Path, *, end_of_turn: str = "") -> list[int]:
        """Ids that end a turn of the model in ``folder``; see :func:`megatron_rest.hf_folder.stop_token_ids`."""
        return stop_token_ids(folder, dialect=self.reads, chat_template=self.chat_template, end_of_turn=end_of_turn)

    def template(self, tokenizer: Any) -> ChatTemplate:
        """The template by which a tokenizer of transformers renders conversations."""
        try:
            return ChatTemplate.of_tokenizer(tokenizer, self.chat_template)
        except TemplateError as error:
            raise ConfigError(f"model.chat_template: {error}") from error

    def to_dict(self) -> dict[str, str]:
        return asdict(self)


def dialect_name(configured: str, data: str) -> str:
    """``model.dialect``, where ``auto`` is what the prompts in the folder ``data`` were prepared in.

    Raises ConfigError for a dialect that they were not: they would ask for one form, and rewards read another.
    """
    prepared = ""
    if data:
        try:
            prepared = str(read_manifest(Path(data)).get("tokenizer", {}).get("dialect") or TOOLRL.name)
        except ValueError as error:
            raise ConfigError(f"data.train: {error}") from error
    if configured == AUTO:
        return prepared or TOOLRL.name
    if prepared and prepared != configured:
        raise ConfigError(
            f"model.dialect is {configured}, but the prompts of {data} were prepared in {prepared}: convert them again "
            f"with --dialect {configured}, or set model.dialect=auto"
        )
    return configured
