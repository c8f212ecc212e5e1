"""The precision certificate: by hand, and with two real precisions of the same weights on real data.

FP8 does not run here, so BF16 stands against FP32: the same batch, the same scoring passes, the same arithmetic and the
same refusal as FP8 against BF16 (``tests/mcore/test_fp8_on_gpu.py``).
"""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_tools.convert import ConvertOptions, convert_rows
from data_tools.train_tokenizer import texts_of, train_and_save
from megatron_rest.config import AdvantageConfig, ConfigError, RewardConfig, load
from megatron_rest.data.batching import make_microbatch
from megatron_rest.data.prompts import PromptDataset
from megatron_rest.trainer.certificate import PrecisionMismatchError, canary_samples, measure_mismatch
from megatron_rest.trainer.judge import Judge
from megatron_rest.trainer.step_metrics import REGION_NAMES
from megatron_rest.types import MicroBatch, TokenRegion
from tests.helpers.delayed_scaling import DelayedLinear, StateManager
from tests.helpers.distributed import run_distributed
from tests.helpers.policies import layout_config, make_policy, random_samples
from tests.helpers.tiny_model import build_tiny_model

SAMPLES = Path(__file__).parents[2] / "data_tools" / "samples"
FORMAT, ARGS = int(TokenRegion.FORMAT), int(TokenRegion.TOOL_ARGS)


def microbatch(regions: list[int], mask: list[bool]) -> MicroBatch:
    one = make_microbatch(random_samples(50, count=1))
    n = len(regions)
    cut = {name: getattr(one, name)[:n] for name in one.__slots__ if isinstance(getattr(one, name), torch.Tensor)}
    cut |= {"region_ids": torch.tensor(regions), "loss_mask": torch.tensor(mask)}
    return replace(one, **{**cut, "cu_seqlens": torch.tensor([0, n], dtype=torch.int32)})


def test_means_and_maxima_by_hand() -> None:
    first = microbatch([FORMAT, FORMAT, ARGS, ARGS], [True, True, True, False])
    second = microbatch([ARGS, FORMAT], [True, False])
    certificate = measure_mismatch(
        "a against b",
        [first, second],
        [torch.tensor([-1.0, -2.0, -3.0, math.nan]), torch.tensor([-1.0, math.nan])],
        [torch.tensor([-1.5, -1.75, -3.0, 0.0]), torch.tensor([-4.0, 0.0])],
        group=None,
    )
    assert set(certificate.regions) == {"format", "args"}
    by_name = {name: (r.mean, r.largest, r.num_tokens) for name, r in certificate.regions.items()}
    assert by_name == {"format": (0.375, 0.5, 2), "args": (1.5, 3.0, 2)}
    certificate.check(1.5)
    with pytest.raises(
        PrecisionMismatchError, match=r"a against b: .* region args differ by 1.5 nats .*max_mismatch=1.4"
    ):
        certificate.check(1.4)
    title, header, *rows = certificate.lines()
    assert "a against b" in title and header.split() == ["region", "tokens", "mean", "largest"]
    assert rows[0].split() == ["format", "2", "0.37500", "0.50000"]


def test_not_a_number_is_above_every_bound() -> None:
    one = microbatch([FORMAT, ARGS], [True, True])
    certificate = measure_mismatch(
        "x", [one], [torch.tensor([-1.0, math.nan])], [torch.tensor([-1.0, -1.0])], group=None
    )
    with pytest.raises(PrecisionMismatchError, match="region args differ by inf nats"):
        certificate.check(1e9)


def test_nothing_to_compare_is_an_error() -> None:
    with pytest.raises(ConfigError, match="no token of the canary batch"):
        measure_mismatch("x", [microbatch([0], [False])], [torch.zeros(1)], [torch.zeros(1)], group=None)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """(tokenizer, prompts with reference answers, model of that vocabulary)"""
    root = tmp_path_factory.mktemp("certificate")
    train_and_save(texts_of([str(SAMPLES / "rlla_sft.json")]), vocab_size=1000, output=root / "tok")
    rows = json.loads((SAMPLES / "rlla_sft.json").read_text())[:24]
    (root / "rows.json").write_text(json.dumps(rows))
    options = {"inputs": [str(root / "rows.json")], "output": root / "data", "tokenizer": root / "tok"}
    convert_rows(ConvertOptions(**options, processes=1, progress_bar=False))
    model = build_tiny_model(
        root / "hf", vocab_size=1000, max_position_embeddings=8192, with_tokenizer=False, initializer_range=0.05
    )
    return root / "tok", root / "data", model


def real_judge(tokenizer: Path | str) -> Judge:
    from megatron_rest.hf_folder import load_tokenizer
    from megatron_rest.regions import token_bytes_table

    return Judge(token_bytes_table(load_tokenizer(tokenizer)), reward=RewardConfig(), advantage=AdvantageConfig())


def real_samples(tokenizer: Path | str, data: Path | str, *, count: int, max_tokens: int) -> list[Any]:
    prompts = PromptDataset.open(str(data), tokenizer_path=str(tokenizer))
    return canary_samples(prompts, real_judge(tokenizer), count=count, max_tokens=max_tokens)


def test_canary_is_prompts_with_reference_answers(folders: tuple[Path, Path, Path]) -> None:
    tokenizer, data, _ = folders
    prompts = PromptDataset.open(str(data), tokenizer_path=str(tokenizer))
    samples = real_samples(tokenizer, data, count=5, max_tokens=8192)
    assert len(samples) == 5
    for row, sample in enumerate(samples):
        prompt, answer = prompts[row].token_ids, prompts.reference_token_ids(row)
        assert sample.token_ids.tolist() == [*prompt.tolist(), *answer.tolist()]
        assert sample.loss_mask.sum() == len(answer) and sample.loss_mask[len(prompt) :].all()
    seen = set(np.concatenate([s.region_ids[s.loss_mask] for s in samples]).tolist())
    assert {int(TokenRegion.FORMAT), int(TokenRegion.THINK), int(TokenRegion.TOOL_NAME), ARGS} <= seen
    lengths = sorted(len(s.token_ids) for s in real_samples(tokenizer, data, count=24, max_tokens=8192))
    assert len(real_samples(tokenizer, data, count=24, max_tokens=lengths[3])) == 4
    with pytest.raises(ConfigError, match="fits into 10 tokens"):
        real_samples(tokenizer, data, count=1, max_tokens=10)


def compare(rank: int, world_size: int, tokenizer: str, data: str, model: str) -> dict[str, Any]:
    """BF16 against FP32 over two replicas, then delayed scales (the stand-in's) through the policy's own passes."""
    from megatron.core import parallel_state

    from megatron_rest.trainer.setup import make_batch

    sizes = ("model.max_sequence_length=8192", "trainer.max_tokens_per_microbatch=8192")
    samples = real_samples(tokenizer, data, count=4, max_tokens=8192)
    scores = {}
    for dtype in ("bfloat16", "float32"):
        parts = make_policy(layout_config(model, overrides=(*sizes, f"model.dtype={dtype}")))
        batch = make_batch(parts, samples, max_tokens=8192)
        scores[dtype] = [s.log_probs for s in parts.policy.score(batch.microbatches)]
        if dtype == "bfloat16":
            parallel_state.destroy_model_parallel()
    certificate = measure_mismatch(
        "bf16 against fp32", batch.microbatches, scores["bfloat16"], scores["float32"], group=parts.context.dp_group
    )
    same = [s.log_probs for s in parts.policy.score(batch.microbatches, in_bf16=True)]
    tokens = [
        (int(region), float(abs(a - b)))
        for m, low, high in zip(batch.microbatches, scores["bfloat16"], scores["float32"], strict=True)
        for region, a, b, has_loss in zip(m.region_ids, low.double(), high.double(), m.loss_mask, strict=True)
        if has_loss
    ]
    return {
        "certificate": certificate,
        "printed": through_the_trainer(parts, tokenizer, data),
        "tokens": tokens,
        "is_same": all(torch.equal(a, b) for a, b in zip(same, scores["float32"], strict=True)),
        "scales": scales_through_the_policy(parts),
    }


def through_the_trainer(parts: Any, tokenizer: str, data: str) -> str:
    """What a run prints at its start.  The recipe is a name here: both passes are FP32, so nothing may differ."""
    from megatron_rest.trainer import trainer as trainer_module
    from megatron_rest.trainer.console import Console
    from megatron_rest.trainer.run import _certify
    from megatron_rest.weighting import RestWeighting

    trainer_module._CERTIFICATE_PROMPTS = 4  # in this rank's process: what is printed does not depend on it

    config = load(
        overrides=[
            "precision.recipe=tensorwise",
            "model.max_sequence_length=8192",
            "trainer.max_tokens_per_microbatch=8192",
        ]
    )
    judge, prompts = real_judge(tokenizer), PromptDataset.open(data, tokenizer_path=tokenizer)
    nothing: Any = None  # engines and transfer are not asked
    trainer = trainer_module.RestTrainer(
        config, parts=parts, prompts=prompts, fleet=nothing, source=nothing, judge=judge,
        weighting=RestWeighting.from_config(config.weighting),
    )  # fmt: skip
    trainer.settle_precision()
    printed = io.StringIO()
    _certify(trainer, Console(printed))
    return printed.getvalue()


def scales_through_the_policy(parts: Any) -> dict[str, Any]:
    """A delayed layer hangs on the model's output layer: it casts the same hidden states."""
    from tests.helpers.policies import batch_of
    from tests.mcore.test_policy import smooth_loss, with_weights

    manager = StateManager()
    [module] = parts.policy.modules
    watcher = module.add_module("watcher", DelayedLinear(64, manager)) or module.watcher
    watcher.weight.requires_grad_(False)

    def cast(_: Any, arguments: tuple[torch.Tensor, ...]) -> None:
        with manager.autocast():
            watcher(arguments[0].detach().float())

    module.output_layer.register_forward_pre_hook(cast)
    batch = with_weights(batch_of(parts, random_samples(parts.shape.vocab_size)))
    parts.policy.update(batch, smooth_loss)
    state = watcher.fp8_meta["scaling_fwd"]
    trained = (state.scale.clone(), state.amax_history.clone())
    parts.policy.score(batch.microbatches, temperature=0.5)
    scored = (state.scale.clone(), state.amax_history.clone())
    parts.policy.update(batch, smooth_loss)
    return {
        "is_untouched": all(torch.equal(a, b) for a, b in zip(trained, scored, strict=True)),
        "has_moved": not torch.equal(state.amax_history, trained[1]),
    }


def test_two_real_precisions_on_two_replicas(folders: tuple[Path, Path, Path]) -> None:
    results = run_distributed(compare, 2, *map(str, folders))
    certificate = results[0]["certificate"]
    assert certificate == results[1]["certificate"]
    tokens = np.array([pair for result in results for pair in result["tokens"]])
    assert set(certificate.regions) >= {"format", "name", "args", "think"}
    for region, name in REGION_NAMES.items():
        gaps = tokens[tokens[:, 0] == int(region), 1]
        if not len(gaps):
            assert name not in certificate.regions
            continue
        got = certificate.regions[name]
        assert got.num_tokens == len(gaps)
        assert got.mean == pytest.approx(gaps.mean(), rel=1e-12)
        assert got.largest == gaps.max()
        assert 1e-5 < got.mean < 0.1  # BF16 rounds, and does not do more
    certificate.check(0.1)
    with pytest.raises(PrecisionMismatchError, match="bf16 against fp32: log-probs of region"):
        certificate.check(1e-5)
    for result in results:
        assert result["is_same"], "without FP8 there is nothing to leave out"
        title, _, *rows = result["printed"].splitlines()
        assert title == "precision certificate, tensorwise against bf16: |log-prob difference| in nats"
        assert {row.split()[0] for row in rows} >= {"format", "name", "args", "think"}
        assert all(row.split()[2:] == ["0.00000", "0.00000"] for row in rows)
        assert result["scales"] == {"is_untouched": True, "has_moved": True}
