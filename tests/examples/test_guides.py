"""Code of the documents runs as it stands there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from tests.helpers.distributed import run_distributed
from tests.helpers.tiny_model import VOCAB_SIZE, build_tokenizer

DOCS = Path(__file__).parents[2] / "docs"


def code_under(page: str, heading: str) -> str:
    """The Python block below a heading."""
    section = (DOCS / page).read_text(encoding="utf-8").partition(f"{heading}\n")[2]
    found = re.search(r"```python\n(.*?)```", section, re.DOTALL)
    assert found, f"{page} has no code under {heading}"
    return found[1]


def from_ids_to_the_loss(rank: int, world_size: int, folder: str) -> dict[str, Any]:
    import torch
    from megatron.core import parallel_state
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.transformer_config import TransformerConfig
    from transformers import AutoTokenizer

    from megatron_rest.mcore import cpu
    from megatron_rest.mcore.output import attach

    cpu.enable()
    parallel_state.initialize_model_parallel()
    cpu.seed_model_parallel(0, tp_rank=0)
    config = TransformerConfig(
        num_layers=1, hidden_size=16, num_attention_heads=2, use_cpu_initialization=True, masked_softmax_fusion=False,
        calculate_per_token_loss=True, hidden_dropout=0.0, attention_dropout=0.0,
    )  # fmt: skip
    model = GPTModel(
        config,
        get_gpt_layer_local_spec(),
        vocab_size=VOCAB_SIZE,
        max_sequence_length=128,
        position_embedding_type="rope",
    )
    attach(model, vocab_size=VOCAB_SIZE)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    right = '<think>look</think><tool_call>{"name": "f", "parameters": {"a": 1}}</tool_call><|im_end|>'
    prompts = [tokenizer.encode(text) for text in ("hello", "hello", "you", "you")]
    answers = [tokenizer.encode(text) for text in (right, "no<|im_end|>", right, "never<|im_end|>")]
    names = {
        "tokenizer": tokenizer, "model": model, "prompts": prompts, "answers": answers,
        "rewards": torch.tensor([[1.0, 0.0], [1.0, 0.0]]), "step": 1, "total_steps": 4,
    }  # fmt: skip
    exec(compile(code_under("embedding.md", "### From sampled ids to the loss"), "embedding.md", "exec"), names)
    names["loss_sum"].backward()
    weights, mask = names["batch"]["token_weights"], names["batch"]["loss_mask"]
    gradients = [p.grad for p in model.parameters()]
    return {
        "means": [float(w[m].mean()) for w, m in zip(weights, mask, strict=True)],
        "distinct": len(weights[0][mask[0]].unique()),
        "sampled": [int(m.sum()) - len(a) for m, a in zip(mask, answers, strict=True)],
        "clipped": float(names["metrics"]["clip_fraction"][0]),
        "gradient": sum(float(g.norm()) for g in gradients if g is not None),
        "count": int(names["count"]),
    }


def test_the_loop_of_the_embedding_page(tmp_path: Path) -> None:
    build_tokenizer(tmp_path)
    [found] = run_distributed(from_ids_to_the_loss, 1, str(tmp_path))
    assert all(abs(mean - 1.0) < 1e-5 for mean in found["means"]), found
    assert found["distinct"] >= 3, "regions weigh differently"
    assert found["sampled"] == [0, 0, 0, 0]
    assert found["clipped"] == 0 and found["gradient"] > 0 and found["count"] == 4
