"""Sampled tokens -> regions: what each token of a tool-use answer is for.

    >>> label_regions([b"<think>", b"hm", b"</think>", b"\\n"]).tolist()
    [1, 2, 1, 1]

Labels are computed on the bytes of the *sampled* tokens.  Nothing is decoded and tokenised again, so a non-canonical
split, half a UTF-8 character or a tokenizer that cleans up spaces cannot shift a label.  Dialects (which tags, which
JSON keys) are data: one small file each under ``dialects/``.
"""

from megatron_rest.regions.dialect import Dialect, Section
from megatron_rest.regions.dialects.hermes import HERMES
from megatron_rest.regions.dialects.llama3 import LLAMA3_JSON
from megatron_rest.regions.dialects.toolrl import TOOLRL, TOOLRL_TAGS_ONLY
from megatron_rest.regions.label import label_regions, label_rollout, region_spans
from megatron_rest.regions.tokens import token_bytes_table
from megatron_rest.token_region import TokenRegion

__all__ = [
    "HERMES",
    "LLAMA3_JSON",
    "TOOLRL",
    "TOOLRL_TAGS_ONLY",
    "Dialect",
    "Section",
    "TokenRegion",
    "label_regions",
    "label_rollout",
    "region_spans",
    "token_bytes_table",
]
