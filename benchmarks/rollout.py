"""Throughput of our rollout loop against bare ``vllm.LLM.generate`` on the same prompts.

    python -m benchmarks.rollout [--prompts 16] [--siblings 8] [--tokens 64] [--rounds 5] [--process] [--json FILE]

Both use one and the same engine object, the same sampling parameters (seed, log-prob of the sampled token, nothing
detokenised) and an empty prefix cache; they take turns, and the median of the rounds counts, so that load from beside
hits both.  ``--process`` adds an engine in a process of its own (rollout.replicas), compared by wall time only.
"""

from __future__ import annotations

from megatron_rest.rollout.process import has_gpu_driver, prepare_process

prepare_process(cpu=not has_gpu_driver())

import argparse  # noqa: E402
import json  # noqa: E402
import tempfile  # noqa: E402
import time  # noqa: E402
from collections.abc import Callable  # noqa: E402
from pathlib import Path  # noqa: E402
from statistics import median  # noqa: E402
from typing import Any  # noqa: E402

import numpy as np  # noqa: E402

from megatron_rest.config import RolloutConfig  # noqa: E402
from megatron_rest.rollout.engine import make_requests  # noqa: E402
from megatron_rest.rollout.remote import RemoteEngine  # noqa: E402
from megatron_rest.rollout.vllm_engine import VllmEngine  # noqa: E402
from megatron_rest.types import PromptSample  # noqa: E402

VOCABULARY = 2048


def build_model(folder: Path) -> Path:
    """A random model of the demo's size (3.7 million parameters)."""
    import transformers

    config = transformers.Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    )
    transformers.Qwen3ForCausalLM(config).save_pretrained(folder)
    return folder


def make_prompts(count: int) -> list[PromptSample]:
    rng = np.random.default_rng(0)
    return [
        PromptSample(
            prompt_id=f"p{i}",
            token_ids=rng.integers(0, VOCABULARY, int(rng.integers(64, 224))).astype(np.int32),
            ground_truth="",
        )
        for i in range(count)
    ]


def measure(ways: dict[str, Callable[[], int]], rounds: int) -> dict[str, dict[str, float]]:
    """Tokens a second of wall and of CPU time, medians over ``rounds`` in which the ways take turns."""
    wall: dict[str, list[float]] = {name: [] for name in ways}
    cpu: dict[str, list[float]] = {name: [] for name in ways}
    for way in ways.values():
        way()  # first call: kernels, caches
    for index in range(rounds):
        order = list(ways) if index % 2 == 0 else list(ways)[::-1]
        for name in order:
            started, cpu_started = time.perf_counter(), time.process_time()
            tokens = ways[name]()
            cpu[name].append(tokens / (time.process_time() - cpu_started))
            wall[name].append(tokens / (time.perf_counter() - started))
    return {name: {"wall": median(wall[name]), "cpu": median(cpu[name])} for name in ways}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--siblings", type=int, default=8, help="rollouts of each prompt")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of each rollout")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--process", action="store_true", help="also an engine in a process of its own")
    parser.add_argument("--json", help="write the numbers here")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = build_model(Path(name))
        config = RolloutConfig(kv_cache_bytes=256 << 20, max_concurrent=64)
        engine = VllmEngine(folder, config, seed=0, max_model_len=512)
        prompts = make_prompts(args.prompts)
        ways: dict[str, Callable[[], int]] = {
            "vllm.LLM.generate": lambda: bare(engine, prompts, args),
            "rollout loop": lambda: ours(engine, prompts, args),
        }
        remote = RemoteEngine(folder, config, seed=0, max_model_len=512) if args.process else None
        if remote is not None:
            remote.policy_version = 0  # random weights do for this
            ways["engine process"] = lambda: of_process(remote, prompts, args)
        numbers = measure(ways, args.rounds)
        engine.close()
        if remote is not None:
            remote.close()
    base = numbers["vllm.LLM.generate"]
    print(f"{args.prompts} prompts x {args.siblings} rollouts x {args.tokens} tokens, median of {args.rounds} rounds")
    print("| way | tokens/s | of bare | tokens/s of CPU | of bare |\n|---|---|---|---|---|")
    for way, row in numbers.items():
        cpu = f"{row['cpu']:.0f} | {row['cpu'] / base['cpu']:.1%}" if way != "engine process" else "- | -"
        print(f"| {way} | {row['wall']:.0f} | {row['wall'] / base['wall']:.1%} | {cpu} |")
    if args.json:
        Path(args.json).write_text(json.dumps(numbers, indent=1), encoding="utf-8")


def bare(engine: VllmEngine, prompts: list[PromptSample], args: Any) -> int:
    """What anyone would write: ``n`` siblings of every prompt."""
    from vllm import SamplingParams

    engine.reset_prefix_cache()
    params = [
        SamplingParams(n=args.siblings, max_tokens=args.tokens, seed=100 * i, ignore_eos=True, logprobs=0,
                       detokenize=False, temperature=1.0)
        for i, _ in enumerate(prompts)
    ]  # fmt: skip
    requests = [{"prompt_token_ids": p.token_ids.tolist()} for p in prompts]
    outputs = engine._open().generate(requests, params, use_tqdm=False)
    return sum(len(o.token_ids) for output in outputs for o in output.outputs)


def ours(engine: VllmEngine, prompts: list[PromptSample], args: Any) -> int:
    engine.reset_prefix_cache()
    groups = engine.generate(prompts, rollouts_per_prompt=args.siblings, seed=1, max_response_tokens=args.tokens)
    return sum(len(r.token_ids) for group in groups for r in group.rollouts)


def of_process(engine: RemoteEngine, prompts: list[PromptSample], args: Any) -> int:
    engine.reset_prefix_cache()
    tokens: list[int] = []
    requests = make_requests(prompts, rollouts_per_prompt=args.siblings, seed=1)
    engine.run(requests, max_response_tokens=args.tokens, on_rollout=lambda _, r: tokens.append(len(r.token_ids)))
    return sum(tokens)


if __name__ == "__main__":
    main()
