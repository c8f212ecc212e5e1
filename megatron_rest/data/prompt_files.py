"""What a folder of prepared prompts looks like: the contract between ``data_tools`` (writer) and ``prompts`` (reader).

    OUTPUT/
      manifest.json        counts, hashes, identities, options
      data-00000.arrow     Arrow IPC file, schema below
      quarantine.jsonl     rows that were refused, with the reason

Needs numpy and pyarrow only, so that both sides can import it on a machine without torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

SCHEMA_VERSION = 3
"""Of what is written.  Version 2, which had no column metadata, is read as well."""
_READ_VERSIONS = (2, SCHEMA_VERSION)
MANIFEST_NAME = "manifest.json"
QUARANTINE_NAME = "quarantine.jsonl"

PROMPT_SCHEMA = pa.schema(
    [
        pa.field("prompt_id", pa.string(), nullable=False),  # content hash of the row, independent of the tokenizer
        pa.field("prompt_token_ids", pa.list_(pa.int32()), nullable=False),  # template and generation prompt included
        pa.field("messages", pa.string(), nullable=False),  # JSON list of {"role", "content"}: the prompt as text
        pa.field("answer_text", pa.string(), nullable=False),  # reference answer to imitate
        pa.field("answer_token_ids", pa.list_(pa.int32()), nullable=False),  # answer_text + end of turn
        pa.field("answer_token_starts", pa.list_(pa.int32())),  # byte of answer_text where each token starts
        pa.field("answer_region_ends", pa.list_(pa.int32()), nullable=False),  # byte of answer_text where a run ends
        pa.field("answer_region_ids", pa.list_(pa.int8()), nullable=False),  # TokenRegion of each run
        pa.field("ground_truth", pa.string(), nullable=False),  # the reference as it came, for the reward
        pa.field("tools", pa.string(), nullable=False),  # JSON list of {"name", "description", "parameters"}
        pa.field("calls", pa.string(), nullable=False),  # JSON list of {"name", "parameters"}
        pa.field("metadata", pa.string(), nullable=False),  # JSON object: columns of the row that nothing above is from
        pa.field("source_file", pa.string(), nullable=False),
        pa.field("source_row", pa.int64(), nullable=False),
    ]
)


def tokenizer_identity(folder: str | Path) -> str:
    """Hash of what decides token ids in an HF tokenizer folder; saving the folder again does not change it."""
    if not (Path(folder) / "tokenizer.json").is_file():
        raise ValueError(f"{folder} has no tokenizer.json: give a Hugging Face tokenizer folder (fast tokenizer)")
    spec = tokenizer_spec(folder)
    model = spec["model"]
    merges = [pair.split(" ", 1) if isinstance(pair, str) else list(pair) for pair in model.get("merges") or []]
    added = sorted(
        (
            token["id"],
            token["content"],
            token.get("normalized", False),
            token.get("lstrip", False),
            token.get("rstrip", False),
        )
        for token in spec["added_tokens"]
    )
    parts = [model.get("type"), model.get("vocab"), merges, added, spec.get("normalizer"), spec.get("pre_tokenizer")]
    return _digest(json.dumps(parts, sort_keys=True, ensure_ascii=True))


def chat_template(folder: str | Path, *, for_tools: bool = False) -> str:
    """The chat template of an HF tokenizer folder (``chat_template.jinja`` first, then ``tokenizer_config.json``).

    Where a folder has several by name (a list or an object in ``tokenizer_config.json``, files in
    ``additional_chat_templates``) it is the one called default, or ``for_tools`` the one called tool_use.
    """
    folder = Path(folder)
    jinja = folder / "chat_template.jinja"
    named = folder / "additional_chat_templates" / "tool_use.jinja"
    if for_tools and named.is_file():
        return named.read_text(encoding="utf-8")
    if jinja.is_file():
        return jinja.read_text(encoding="utf-8")
    template: Any = tokenizer_config(folder).get("chat_template")
    if isinstance(template, list):
        template = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
    by_name = template if isinstance(template, dict) else {"default": template}
    text = (by_name.get("tool_use") if for_tools else None) or by_name.get("default")
    if not isinstance(text, str) or not text:
        others = ", ".join(str(name) for name in by_name if name != "default")
        what = f"no chat template called default (it has {others})" if others else "no chat template"
        raise ValueError(f"{folder} has {what}: add chat_template.jinja to the tokenizer folder")
    return text


_ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def special_tokens(folder: str | Path) -> dict[str, Any]:
    """Tokens with a role (``bos_token`` ...) as templates may name them: from any file of the folder that says.

    ``tokenizer_config.json`` goes first where it lists the added tokens, as it does for transformers.
    """
    found: dict[str, Any] = {}
    values = json_object(Path(folder) / "special_tokens_map.json")
    config = tokenizer_config(folder)
    for source in (values, config) if "added_tokens_decoder" in config else (config, values):
        extra = source.get("extra_special_tokens")
        for name, token in {**(extra if isinstance(extra, dict) else {}), **source}.items():
            text = _token_text(token)
            if (name in _ROLES or (name.endswith("_token") and not name.startswith("add_"))) and text is not None:
                found[name] = text
    return found


def why_ids_differ(folder: str | Path) -> str:
    """Why ids by ``tokenizer.json`` alone are not those of transformers and vLLM, with the remedy; empty if they are.

    Both follow the files beside it as well: these may add tokens (numbered behind the others), make special what was
    text, trim spaces around tokens, or switch special tokens off.
    """
    folder = Path(folder)
    spec = tokenizer_spec(folder)
    vocabulary = spec["model"].get("vocab")
    known = set(vocabulary) if isinstance(vocabulary, dict) else set()
    added = {token["content"]: token for token in spec["added_tokens"]}
    config = tokenizer_config(folder)
    decoder = config.get("added_tokens_decoder")
    beside = decoder.values() if isinstance(decoder, dict) else ()
    flags = {text: token for token in beside if (text := _token_text(token)) is not None}
    named: list[Any] = [*flags, *special_tokens(folder).values()]
    for source in (config, json_object(folder / "special_tokens_map.json")):
        for key in ("additional_special_tokens", "extra_special_tokens"):
            extra = source.get(key)
            named += extra.values() if isinstance(extra, dict) else extra if isinstance(extra, list) else ()
    named += json_object(folder / "added_tokens.json")
    texts = [text for text in dict.fromkeys(map(_token_text, named)) if text is not None and text not in added]
    trims = [
        text
        for text, token in flags.items()
        if text in added
        and any(bool(token.get(side)) != bool(added[text].get(side)) for side in ("lstrip", "rstrip", "single_word"))
    ]
    for found, does in (
        ([text for text in texts if text not in known], "adds tokens beside tokenizer.json"),
        ([text for text in texts if text in known], "makes tokens special that are none in tokenizer.json"),
        (trims, "trims spaces around tokens otherwise than tokenizer.json"),
    ):
        if found:
            return (
                f"{folder} {does} ({', '.join(found[:5])}), so ids would not be an engine's: save it again with "
                "PreTrainedTokenizerFast.from_pretrained(FOLDER).save_pretrained(FOLDER) of transformers"
            )
    if config.get("split_special_tokens"):
        return (
            f"{folder} has special tokens spelled out (split_special_tokens), so no turn would ever end: set it to "
            "false in tokenizer_config.json"
        )
    return ""


def _token_text(token: Any) -> str | None:
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def tokenizer_config(folder: str | Path) -> dict[str, Any]:
    """``tokenizer_config.json`` of an HF tokenizer folder; empty where there is none."""
    return json_object(Path(folder) / "tokenizer_config.json")


def tokenizer_spec(folder: str | Path) -> dict[str, Any]:
    """``tokenizer.json`` with ``model`` and ``added_tokens`` as its readers rely on them, empty where there is no file.

    Raises ValueError for one that is damaged or of another shape.
    """
    path = Path(folder) / "tokenizer.json"
    spec = json_object(path)
    model, added = spec.get("model"), spec.get("added_tokens")
    model, added = {} if model is None else model, [] if added is None else added
    fault = _fault_of_spec(model, added)
    if fault:
        raise ValueError(f"{path} is damaged ({fault}): copy it again")
    return {**spec, "model": model, "added_tokens": added}


def _fault_of_spec(model: Any, added: Any) -> str:
    if not isinstance(model, dict):
        return "model is no object"
    merges = model.get("merges") or []
    if not isinstance(merges, list) or not all(isinstance(pair, str | list) for pair in merges):
        return "merges are no list of pairs"
    if not isinstance(added, list):
        return "added_tokens is no list"
    for token in added:
        if not isinstance(token, dict) or not isinstance(token.get("content"), str) or type(token.get("id")) is not int:
            return "an added token without content and id"
    return ""


def json_object(path: Path) -> dict[str, Any]:
    """What is in a JSON file, empty where there is none.  Raises ValueError for one that is damaged."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}): copy it again") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} is not a JSON object")
    return values


def template_identity(folder: str | Path) -> str:
    """Hash of the chat template's text, and of that for conversations with tools where it is another."""
    text, for_tools = chat_template(folder), chat_template(folder, for_tools=True)
    return _digest(text if text == for_tools else json.dumps([text, for_tools]))


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder of prepared prompts, checked for what a reader relies on."""
    path = folder / MANIFEST_NAME
    if not path.is_file():
        raise ValueError(
            f"{folder} has no {MANIFEST_NAME}: prepare it with `megatron-rest-data convert --output {folder} ...`"
        )
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        version, outputs = manifest["schema_version"], manifest["outputs"]
        for part in ("counts", "tokenizer", "quarantine"):
            if not isinstance(manifest.get(part, {}), dict):
                raise ValueError(f"{part} is not an object")
        numbers = [entry[key] for entry in outputs for key in ("rows", "bytes")]
        if not all(isinstance(number, int) and number >= 0 for number in numbers):
            raise ValueError("rows and bytes must be whole numbers")
        names = [entry["name"] for entry in outputs] + [manifest.get("quarantine", {}).get("name", QUARANTINE_NAME)]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({type(error).__name__}: {error}): convert the data again") from error
    if version not in _READ_VERSIONS:
        raise ValueError(
            f"{folder} has schema version {version}, this release reads {SCHEMA_VERSION}: convert the data again"
        )
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or name in ("", ".", ".."):
            raise ValueError(f"{path}: {name!r} is not a plain file name")
    return dict(manifest)


def check_tokenizer(folder: Path, manifest: dict[str, Any], tokenizer_path: str) -> None:
    """Raise ValueError for prompts that another tokenizer or chat template than the model's has made."""
    stored = manifest.get("tokenizer", {})
    for what, key, actual in (
        ("tokenizer", "identity", tokenizer_identity(tokenizer_path)),
        ("chat template", "chat_template_identity", template_identity(tokenizer_path)),
    ):
        if stored.get(key) != actual:
            raise ValueError(
                f"{folder} was prepared with another {what} ({str(stored.get(key))[:12]}) than {tokenizer_path} "
                f"({actual[:12]}): "
                f"its token ids mean something else; convert the data again with --tokenizer {tokenizer_path}"
            )


def map_shard(folder: Path, entry: dict[str, Any]) -> list[pa.RecordBatch]:
    """Map one shard of the manifest; the batches' buffers are the mapped file."""
    path = folder / entry["name"]
    if not path.is_file() or path.stat().st_size != entry["bytes"]:
        raise ValueError(
            f"{path} is missing or does not have the {entry['bytes']} bytes of the manifest: copy it again"
        )
    try:
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if reader.schema.equals(_WITHOUT_METADATA, check_metadata=False):
        batches = [_with_metadata(batch) for batch in batches]
    elif not reader.schema.equals(PROMPT_SCHEMA, check_metadata=False):
        raise ValueError(f"{path} does not have the schema of prepared prompts: convert the data again")
    if sum(batch.num_rows for batch in batches) != entry["rows"]:
        raise ValueError(f"{path} does not hold the {entry['rows']} rows of the manifest: copy it again")
    return batches


_WITHOUT_METADATA = pa.schema([field for field in PROMPT_SCHEMA if field.name != "metadata"])


def _with_metadata(batch: pa.RecordBatch) -> pa.RecordBatch:
    """A batch of version 2 with a column that says nothing."""
    columns = dict(zip(batch.schema.names, batch.columns, strict=True))
    columns["metadata"] = pa.repeat(pa.scalar("{}"), batch.num_rows)
    return pa.RecordBatch.from_arrays([columns[name] for name in PROMPT_SCHEMA.names], schema=PROMPT_SCHEMA)


def offsets(column: pa.ListArray) -> np.ndarray:
    """int32 [rows + 1]: where each row's list begins among the values."""
    return np.asarray(column.offsets.to_numpy(zero_copy_only=True))


def token_counts(batches: Sequence[pa.RecordBatch], column: str) -> np.ndarray:
    """int64 [rows]: length of each row's list in ``column``; no value is read."""
    lengths = [np.diff(offsets(batch.column(column))) for batch in batches]
    return np.concatenate(lengths).astype(np.int64) if lengths else np.zeros(0, dtype=np.int64)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
