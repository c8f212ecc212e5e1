"""GGUF in: files that the library itself writes come back as the model, values and tokens that they were made of."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_rest.commands.import_gguf import import_gguf, main
from megatron_rest.config import ConfigError
from tests.helpers.tiny_model import build_tiny_model

gguf = pytest.importorskip("gguf", reason="the library gguf is not installed (requirements/cpu.txt has it)")
transformers = pytest.importorskip("transformers")

HEADS, KV_HEADS = 4, 2
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
TEXTS = ("the theme: 2024 the", "Hello, wörld!\n\n  it's", "<|im_start|>user\nthe<|im_end|>")
QUANTISATIONS = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0", "MXFP4")
NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def vocabulary() -> tuple[list[str], list[int], list[str]]:
    """Tokens, their kinds and merges of a byte-level BPE."""
    from tokenizers import pre_tokenizers

    merges = ["t h", "th e", "Ġ the", "i t"]
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(m.replace(" ", "") for m in merges)]
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool_call>", "[PAD0]"]
    return [*tokens, *special], [1] * len(tokens) + [3, 3, 3, 4, 5], merges


def gguf_name(name: str) -> str:
    stem, kind = name.rsplit(".", 1)
    if stem in NAMES:
        return f"{NAMES[stem]}.{kind}"
    _, _, layer, part = stem.split(".", 3)
    return f"blk.{layer}.{NAMES[part]}.{kind}"


def permuted(weights: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's converter does to Q and K of Llama."""
    return weights.reshape(heads, 2, len(weights) // heads // 2, -1).swapaxes(1, 2).reshape(weights.shape)


def write(
    path: Path,
    model: Any,
    kind: str = "F32",
    *,
    arch: str = "",
    pre: str = "gpt-2",
    change: Callable[[Any], None] = lambda writer: None,
    tensors: Callable[[dict[str, np.ndarray]], None] = lambda tensors: None,
) -> Path:
    """``model`` (of transformers) as a GGUF file whose matrices are of ``kind``."""
    c, arch = model.config, arch or model.config.model_type
    writer = gguf.GGUFWriter(path, arch)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_key_length(getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_rope_freq_base(c.rope_parameters["rope_theta"])
    tokens, kinds, merges = vocabulary()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(tokens.index("<|im_start|>"))
    writer.add_eos_token_id(tokens.index("<|im_end|>"))
    writer.add_pad_token_id(tokens.index("<|endoftext|>"))
    writer.add_eot_token_id(tokens.index("<|endoftext|>"))
    writer.add_add_bos_token(False)
    writer.add_chat_template(TEMPLATE)
    change(writer)
    stored = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and c.tie_word_embeddings:
            continue
        values = tensor.float().numpy()
        if arch == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            values = permuted(values, HEADS if "q_proj" in name else KV_HEADS)
        stored[gguf_name(name)] = values
    tensors(stored)
    for name, values in stored.items():
        of = gguf.GGMLQuantizationType[kind if values.ndim == 2 and values.shape[1] >= 32 else "F32"]
        writer.add_tensor(name, gguf.quantize(np.ascontiguousarray(values), of), raw_dtype=of)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def tiny(folder: Path, arch: str, *, tied: bool = True, **overrides: Any) -> Any:
    settings = {"vocab_size": len(vocabulary()[0]), "eos_token_id": 1, "pad_token_id": None} | overrides
    if arch == "qwen2":
        settings |= {"head_dim": 64 // HEADS}  # not an option of its own there
    build_tiny_model(folder, arch=arch, tied=tied, with_tokenizer=False, **settings)
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return tiny(tmp_path_factory.mktemp("llama"), "llama")


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(torch.arange(40).view(2, 20) * 5 % 200).logits


def values_of_transformers(file: Path, model: Any) -> dict[str, torch.Tensor]:
    """What transformers' own loader makes of a file, by HF's names (its public door asks for accelerate)."""
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    found = load_gguf_checkpoint(file, return_tensors=True, model_to_load=model)["tensors"]
    assert {*found, "lm_head.weight"} >= model.state_dict().keys()
    return found


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
def test_a_model_comes_back_as_it_was(tmp_path: Path, arch: str, tied: bool) -> None:
    model = tiny(tmp_path / "model", arch, tied=tied)
    file = write(tmp_path / "m.gguf", model)
    text = import_gguf(file, tmp_path / "hf")
    assert f"{'tied' if tied else 'untied'} head" in text
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype="float32").eval()
    assert back.config.tie_word_embeddings is tied
    torch.testing.assert_close(logits(back), logits(model), rtol=0, atol=0)
    for name, tensor in values_of_transformers(file, back).items():
        assert torch.equal(back.state_dict()[name], tensor), name


def writable() -> list[str]:
    """Quantisations that the library can write; those it only reads have the same path through it."""
    found = []
    for kind in gguf.GGMLQuantizationType:
        try:
            gguf.quantize(np.ones((1, 256), np.float32), kind)
        except NotImplementedError:
            continue
        found.append(kind.name)
    return found


def test_the_list_of_quantisations_is_whole() -> None:
    assert set(writable()) <= {*QUANTISATIONS, "NVFP4"}


@pytest.mark.parametrize("kind", QUANTISATIONS)
def test_every_quantisation(tmp_path: Path, kind: str) -> None:
    model = tiny(tmp_path / "model", "llama", tied=False, hidden=256, layers=1, head_dim=64, intermediate_size=256)
    import_gguf(write(tmp_path / "m.gguf", model, kind), tmp_path / "hf")
    from safetensors.torch import load_file

    found = load_file(tmp_path / "hf" / "model.safetensors")
    of = gguf.GGMLQuantizationType[kind]
    for name, tensor in model.state_dict().items():
        wanted = tensor.numpy()
        if wanted.ndim == 2:  # rows are quantised each for itself, so their order does not matter
            wanted = gguf.dequantize(gguf.quantize(wanted, of), of)
        assert np.array_equal(found[name].numpy(), wanted), name


def test_tokens_template_and_ends(tmp_path: Path, llama: Any) -> None:
    import_gguf(write(tmp_path / "m.gguf", llama), tmp_path / "hf")
    from megatron_rest.hf_folder import load_tokenizer, stop_token_ids

    tokens, _, _ = vocabulary()
    tokenizer = load_tokenizer(tmp_path / "hf")
    assert tokenizer.tokenize(TEXTS[0]) == ["the", "Ġthe", "m", "e", ":", "Ġ", "2", "0", "2", "4", "Ġthe"]
    assert [tokenizer.decode(tokenizer(text).input_ids) for text in TEXTS] == list(TEXTS)
    assert tokenizer(TEXTS[2]).input_ids[0] == tokens.index("<|im_start|>")
    assert tokenizer.get_vocab() == {t: i for i, t in enumerate(tokens) if t != "[PAD0]"}
    assert "<tool_call>" not in tokenizer.all_special_tokens, "a token of the user's stays when specials are skipped"
    message = [{"role": "user", "content": "the"}]
    assert tokenizer.apply_chat_template(message, tokenize=False) == "<|im_start|>user\nthe<|im_end|>\n"
    generation = json.loads((tmp_path / "hf" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [tokens.index("<|im_end|>"), tokens.index("<|endoftext|>")]
    assert stop_token_ids(tmp_path / "hf")[0] == tokens.index("<|im_end|>")


@pytest.mark.parametrize(
    ("pre", "digits"), [("smollm", ["2", "0"]), ("qwen2", ["2", "0"]), ("llama-bpe", ["202", "4"])]
)
def test_words_are_cut_as_the_family_does(tmp_path: Path, llama: Any, pre: str, digits: list[str]) -> None:
    import_gguf(write(tmp_path / "m.gguf", llama, pre=pre), tmp_path / "hf")
    spec = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf").backend_tokenizer
    words = [word for word, _ in spec.pre_tokenizer.pre_tokenize_str("year 2024's")]
    assert words[0] == "year"
    assert [word for word in words if word.isdigit()][:2] == digits


def test_a_tokenizer_of_ones_own(tmp_path: Path, llama: Any) -> None:
    import_gguf(write(tmp_path / "a.gguf", llama), tmp_path / "hf")
    odd = write(tmp_path / "b.gguf", llama, pre="nobody-knows")
    with pytest.raises(ConfigError, match=r"'nobody-knows' is not supported .*--tokenizer"):
        import_gguf(odd, tmp_path / "other")
    import_gguf(odd, tmp_path / "other", tokenizer=tmp_path / "hf")
    assert (tmp_path / "other/tokenizer.json").read_text() == (tmp_path / "hf/tokenizer.json").read_text()
    build_tiny_model(tmp_path / "wrong")
    with pytest.raises(ConfigError, match="has the id"):
        import_gguf(odd, tmp_path / "third", tokenizer=tmp_path / "wrong")


def test_the_scaling_of_llama_3(tmp_path: Path) -> None:
    scaling = {
        "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192, "rope_theta": 500000.0,
    }  # fmt: skip
    model = tiny(tmp_path / "model", "llama", rope_parameters=scaling)
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](model.config, "cpu")
    plain = 500000.0 ** (-np.arange(0, 32, 2) / 32)
    factors = (plain / scaled.numpy()).astype(np.float32)
    assert factors.max() > 31
    file = write(tmp_path / "m.gguf", model, tensors=lambda t: t.update({"rope_freqs.weight": factors}))
    import_gguf(file, tmp_path / "hf")
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype="float32").eval()
    torch.testing.assert_close(logits(back), logits(model), rtol=0, atol=0)
    odd = write(tmp_path / "n.gguf", model, tensors=lambda t: t.update({"rope_freqs.weight": factors**0.5}))
    with pytest.raises(ConfigError, match=r"rope_freqs.weight is not the scaling of Llama 3.1"):
        import_gguf(odd, tmp_path / "other")


def test_bfloat16_is_rounded_once(tmp_path: Path, llama: Any) -> None:
    import_gguf(write(tmp_path / "m.gguf", llama), tmp_path / "hf", dtype="bfloat16")
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    for name, tensor in back.state_dict().items():
        assert torch.equal(tensor, llama.state_dict()[name].bfloat16()), name


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "architecture": ({"arch": "gemma2"}, "architecture 'gemma2' is not supported: known are llama, qwen2, qwen3"),
    "option": ({"change": lambda w: w.add_sliding_window(128)}, "llama.attention.sliding_window has no place"),
    "scaling": (
        {"change": lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.YARN)},
        "rope.scaling.type 'yarn' is not supported",
    ),
    "partial rotary": ({"change": lambda w: w.add_rope_dimension_count(8)}, "rope.dimension_count is 8, but a head"),
    "experts": ({"change": lambda w: w.add_expert_count(8)}, "models with experts are not supported"),
    "missing": ({"tensors": lambda t: t.pop("blk.1.ffn_up.weight")}, "blk.1.ffn_up.weight is missing"),
    "extra": ({"tensors": lambda t: t.update({"blk.0.attn_q.bias": np.ones(128, np.float32)})}, "has no place in a"),
    "shape": (
        {"tensors": lambda t: t.update({"blk.0.attn_k.weight": np.ones((32, 64), np.float32)})},
        "blk.0.attn_k.weight has the shape (32, 64)",
    ),
    "not finite": (
        {"tensors": lambda t: t.update({"output_norm.weight": np.full(64, np.nan, np.float32)})},
        "model.norm.weight holds values that are not finite",
    ),
    "big-endian": ({}, "big-endian"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_exact_form_is_refused(
    tmp_path: Path, llama: Any, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    settings, message = REFUSED[name]
    file = write(tmp_path / "m.gguf", llama, **settings)
    if name == "big-endian":
        data = bytearray(file.read_bytes())
        data[4:8] = data[4:8][::-1]
        file.write_bytes(data)
    assert main([str(file), "--output", str(tmp_path / "hf")]) == 1
    [line] = capsys.readouterr().err.splitlines()
    if name != "big-endian":  # the swapped numbers that follow may be what is noticed first
        assert message in line
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"], "nothing is left behind"


def test_an_output_is_never_overwritten(tmp_path: Path, llama: Any) -> None:
    (tmp_path / "hf").mkdir()
    with pytest.raises(ConfigError, match="exists already"):
        import_gguf(write(tmp_path / "m.gguf", llama), tmp_path / "hf")
    with pytest.raises(ConfigError, match=r"cannot read .*none\.gguf"):
        import_gguf(tmp_path / "none.gguf", tmp_path / "other")


def test_broken_files(tmp_path: Path, llama: Any) -> None:
    """Cut short, or with bytes changed in the header: refused, or the same kind of folder; nothing else, and soon."""
    whole = write(tmp_path / "m.gguf", llama, "Q4_0").read_bytes()
    random = np.random.default_rng(0)
    broken = tmp_path / "broken.gguf"
    for size in (0, 3, 4, 20, 24, 300, 2000, 6000, len(whole) // 2, len(whole) - 40):
        broken.write_bytes(whole[:size])
        with pytest.raises(ConfigError):
            import_gguf(broken, tmp_path / "hf")
    refused = 0
    for _ in range(60):
        data = bytearray(whole)
        at = int(random.integers(0, 2500))
        data[at : at + 4] = random.bytes(4)
        broken.write_bytes(data)
        output = tmp_path / f"hf-{at}"
        try:
            import_gguf(broken, output)
        except ConfigError:
            refused += 1
            assert not output.exists()
    assert refused > 20
    assert not list(tmp_path.glob("*.partial"))


def test_a_length_that_lies_ends_at_once(tmp_path: Path, llama: Any) -> None:
    file = write(tmp_path / "m.gguf", llama)
    data = bytearray(file.read_bytes())
    at = data.index(b"tokenizer.ggml.token_type") + len(b"tokenizer.ggml.token_type") + 8
    data[at : at + 8] = (1 << 60).to_bytes(8, "little")
    file.write_bytes(data)
    with pytest.raises(ConfigError, match="no GGUF file that can be read"):
        import_gguf(file, tmp_path / "hf")


@pytest.mark.extended
def test_the_demos_model(tmp_path: Path) -> None:
    """Values as transformers' own loader reads them, logits as it computes them in float32."""
    from launch.rest_demo import GGUF

    if not GGUF.is_file():
        pytest.skip(f"{GGUF} is not there: make .cache/smollm2 fetches it")
    print(import_gguf(GGUF, tmp_path / "hf"))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    ours = logits(model)
    theirs = values_of_transformers(GGUF, model)
    for name, tensor in theirs.items():
        assert torch.equal(model.state_dict()[name], tensor), name
    config = transformers.AutoConfig.from_pretrained(GGUF.parent, gguf_file=GGUF.name)
    other = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    other.load_state_dict(theirs | {"lm_head.weight": theirs["model.embed_tokens.weight"]})
    torch.testing.assert_close(ours, logits(other), rtol=0, atol=1e-4)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    other = transformers.AutoTokenizer.from_pretrained(GGUF.parent, gguf_file=GGUF.name)
    texts = [*TEXTS, "def f(x): return x * 1024  # résumé\n\t<tool_call>"]
    assert [tokenizer(t).input_ids for t in texts] == [other(t).input_ids for t in texts]
