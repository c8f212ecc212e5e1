"""Sample prepared prompts from trained policies and judge them as training does, without its schedule.

python -m megatron_rest.eval.prompt_sets RUN_DIR [RUN_DIR ...] --config RUN.yaml --set heldout=PROMPTS [PROMPTS ...]

The weights are in ``RUN_DIR/hf``, as training and warm start leave them; sampling and reward settings come from the one
configuration.  The result is ``RUN_DIR/prompt_sets.json``; a policy that has it, from the same weights and settings, is
not asked again.  Every policy answers the same prompts with the same sampling seeds.  With ``--compare`` the last one
is also set beside the first (``RUN_DIR/prompt_sets_compared.json``), and ``megatron-rest report`` shows it.
"""

from __future__ import annotations

from megatron_rest.rollout.process import cpu_share, has_gpu_driver, prepare_process

prepare_process(cpu=not has_gpu_driver(), allow_late=True)

import argparse  # noqa: E402
import dataclasses  # noqa: E402
import hashlib  # noqa: E402
import json  # noqa: E402
import sys  # noqa: E402
from collections.abc import Sequence  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

from megatron_rest.analysis.before_after import COMPARED_FILE, Compared, Example, Measure, as_json  # noqa: E402
from megatron_rest.analysis.groups import PROMPT_SETS_FILE  # noqa: E402
from megatron_rest.analysis.statistics import paired_bootstrap  # noqa: E402
from megatron_rest.config import ConfigError, RestConfig, RewardConfig, load, to_dict  # noqa: E402
from megatron_rest.data.prompts import PromptDataset  # noqa: E402
from megatron_rest.eval.scoring import write_json  # noqa: E402
from megatron_rest.hf_folder import load_tokenizer  # noqa: E402
from megatron_rest.regions import TOOLRL, Dialect, answer_prefix, region_spans  # noqa: E402
from megatron_rest.rewards import tool_call_reward  # noqa: E402
from megatron_rest.rollout.chat import ChatSettings, dialect_name  # noqa: E402
from megatron_rest.types import PromptSample, RolloutGroup  # noqa: E402

__all__ = ["RESULT_FILE", "compare_policies", "judge_group", "main", "sample_run"]

RESULT_FILE = PROMPT_SETS_FILE
_SEED = 20_250_921  # of the sampling; any, but the same for every policy
_LAYOUT = 2  # of the result file; one of another layout is written anew
_EXAMPLES = 5  # prompts of a comparison that are shown, evenly spread over a set
_MEASURES = ("reward", "accuracy", "format_valid", "length")


def judge_group(
    group: RolloutGroup, table: Sequence[bytes], reward: RewardConfig, dialect: Dialect = TOOLRL
) -> dict[str, Any]:
    """Rewards of one prompt's answers, one entry an answer; the schedule is switched off, so steps do not matter."""
    static = dataclasses.replace(reward, schedule=False)
    prefix = answer_prefix(b"".join(table[i] for i in group.prompt.token_ids[-32:]), dialect)
    answers = [b"".join(table[i] for i in r.token_ids).decode("utf-8", errors="replace") for r in group.rollouts]
    truth = group.prompt.ground_truth
    judged = [
        tool_call_reward(answer, truth, step=0, config=static, prefix=prefix, dialect=dialect) for answer in answers
    ]
    return {
        "prompt_id": group.prompt.prompt_id,
        "prompt": b"".join(table[i] for i in group.prompt.token_ids).decode("utf-8", errors="replace"),
        "answer": answers,
        "first_answer_regions": _regions(prefix.encode(), answers[0].encode(), dialect),
        "reward": [r.total for r in judged],
        "accuracy": [r.accuracy for r in judged],
        "format_valid": [float(bool(r.is_format_valid)) for r in judged],
        "length": [len(rollout.token_ids) for rollout in group.rollouts],
    }


def _regions(prefix: bytes, answer: bytes, dialect: Dialect) -> list[tuple[str, int]]:
    """(text, region) of the runs of one answer; ``prefix`` is what the prompt has written of it."""
    ends, regions = region_spans(prefix + answer, dialect=dialect)
    starts = [0, *ends[:-1]]
    cut = [
        (answer[max(start - len(prefix), 0) : max(end - len(prefix), 0)], int(region))
        for start, end, region in zip(starts, ends, regions, strict=True)
    ]
    return [(text.decode("utf-8", errors="replace"), region) for text, region in cut if text]


def sample_run(
    run_dir: Path, config: RestConfig, sets: dict[str, list[str]], *, samples: int, limit: int = 0
) -> dict[str, Any]:
    """Sample every set from ``run_dir/hf`` and write the result; returns it.

    ``config`` gives sampling (temperature, lengths), reward and which prompts are usable; ``limit`` keeps the first so
    many of each folder (0 = all).  Raises ConfigError when a prompt set is not made for the policy's tokenizer,
    FileNotFoundError without weights.
    """
    import torch

    from megatron_rest.regions import token_bytes_table
    from megatron_rest.rollout.vllm_engine import VllmEngine

    model = run_dir / "hf"
    settings = {**_settings(config, model, sets), "samples": samples, "limit": limit}
    known = _stored(run_dir)
    if known is not None and known["settings"] == settings:
        return known
    prompts = {name: _prompts(folders, config, model, limit) for name, folders in sets.items()}
    tokenizer = load_tokenizer(model)
    table = token_bytes_table(tokenizer)
    first = next(iter(sets.values()))[0]
    chat = ChatSettings(dialect=dialect_name(config.model.dialect, first))
    torch.set_num_threads(config.trainer.threads or cpu_share())
    engine = VllmEngine(
        model,
        dataclasses.replace(config.rollout, replicas=0, tensor_parallel=1, environment=""),
        seed=_SEED,
        max_model_len=config.model.max_sequence_length,
        stop_token_ids=chat.stop_token_ids(model),
    )
    try:
        results = {}
        for name, asked in prompts.items():
            groups = engine.generate(
                asked,
                rollouts_per_prompt=samples,
                seed=_SEED,
                max_response_tokens=config.rollout.max_response_tokens,
            )
            results[name] = [judge_group(group, table, config.reward, chat.reads) for group in groups]
    finally:
        engine.close()
    result = {"settings": settings, "sets": results}
    write_json(run_dir / RESULT_FILE, result)
    return result


def _settings(config: RestConfig, model: Path, sets: dict[str, list[str]]) -> dict[str, Any]:
    """What the result depends on."""
    digest = hashlib.sha256()
    for path in sorted(model.glob("*.safetensors")):
        digest.update(path.read_bytes())
    return {
        "layout": _LAYOUT,
        "weights_sha256": digest.hexdigest(),
        "sets": {name: [_manifest(folder) for folder in folders] for name, folders in sets.items()},
        "seed": _SEED,
        "reward": to_dict(config.reward),
        "temperature": config.rollout.temperature,
        "max_prompt_tokens": config.data.max_prompt_tokens,
        "max_response_tokens": config.rollout.max_response_tokens,
    }


def _manifest(folder: str) -> str:
    path = Path(folder) / "manifest.json"
    if not path.is_file():
        raise ConfigError(
            f"{folder} is no prompt folder (no manifest.json): megatron-rest-data convert or split makes one"
        )
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _prompts(folders: Sequence[str], config: RestConfig, model: Path, limit: int) -> list[PromptSample]:
    """The usable prompts of a set: as in training, no longer than the policy takes, with reachable references."""
    found: list[PromptSample] = []
    for folder in folders:
        try:
            usable = PromptDataset.open(folder, tokenizer_path=str(model)).select(
                max_prompt_tokens=config.data.max_prompt_tokens, max_answer_tokens=config.rollout.max_response_tokens
            )
        except ValueError as error:
            raise ConfigError(f"prompt set {folder}: {error}") from error
        found += [usable[i] for i in range(min(len(usable), limit or len(usable)))]
    return found


def compare_policies(before: Path, after: Path) -> list[Compared]:
    """Every set of two policies that :func:`sample_run` has asked; writes ``prompt_sets_compared.json`` into ``after``.

    Intervals are over prompts, each the mean of its answers.  ConfigError if the two were asked something else.
    """
    first, second = _stored(before), _stored(after)
    if first is None or second is None:
        raise ConfigError(f"{before if first is None else after} has no {RESULT_FILE}")
    if {**first["settings"], "weights_sha256": ""} != {**second["settings"], "weights_sha256": ""}:
        raise ConfigError(f"{before} and {after} were asked other prompts, or in another way: sample them together")
    found = []
    for name, rows in first["sets"].items():
        others = second["sets"][name]
        measures = []
        for measure in _MEASURES:
            a, b = ([sum(row[measure]) / len(row[measure]) for row in side] for side in (rows, others))
            interval = paired_bootstrap(a, b)
            measures.append(
                Measure(
                    name=measure,
                    before=sum(a) / len(a),
                    after=sum(b) / len(b),
                    difference=interval.estimate,
                    low=interval.low,
                    high=interval.high,
                )
            )
        shown = sorted({i * len(rows) // _EXAMPLES for i in range(_EXAMPLES)})
        examples = [Example.of_rows(rows[i], others[i]) for i in shown]
        answers = len(rows[0]["reward"])
        found.append(Compared(name=name, prompts=len(rows), answers=answers, measures=measures, examples=examples))
    write_json(after / COMPARED_FILE, {"before": str(before), "after": str(after), "sets": as_json(found)})
    return found


def _stored(run_dir: Path) -> dict[str, Any] | None:
    path = run_dir / RESULT_FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0, or 2 with one line that says what is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dirs", nargs="+", type=Path, metavar="RUN_DIR", help="holds hf, the weights")
    parser.add_argument("--config", type=Path, required=True, help="YAML file of a run: how to sample and to judge")
    parser.add_argument(
        "--set",
        dest="sets",
        nargs="+",
        action="append",
        required=True,
        metavar="NAME=PROMPTS",
        help="a set and the folders that megatron-rest-data wrote for it: --set heldout=A B",
    )
    parser.add_argument("--samples", type=int, default=8, help="answers to each prompt (%(default)s)")
    parser.add_argument("--limit", type=int, default=0, help="first so many prompts of each folder (0 = all)")
    parser.add_argument("--compare", action="store_true", help="set the last RUN_DIR beside the first")
    args = parser.parse_args(argv)
    try:
        if args.compare and len(args.run_dirs) < 2:
            raise ConfigError("--compare needs two RUN_DIRs: before and after")
        sets, config = dict(_named(words) for words in args.sets), load(args.config)
        from tqdm import tqdm

        for run_dir in tqdm(args.run_dirs, desc="policies", disable=not sys.stderr.isatty()):
            result = sample_run(run_dir, config, sets, samples=args.samples, limit=args.limit)
            print(f"{run_dir}: {', '.join(_mean(name, rows) for name, rows in result['sets'].items())}", flush=True)
        if args.compare:
            for compared in compare_policies(args.run_dirs[0], args.run_dirs[-1]):
                print("\n".join(compared.lines()), flush=True)
    except (ConfigError, FileNotFoundError) as error:
        print(f"megatron_rest.eval.prompt_sets: {error}", file=sys.stderr)
        return 2
    return 0


def _named(words: Sequence[str]) -> tuple[str, list[str]]:
    name, equals, first = words[0].partition("=")
    if not name or not equals or not first:
        raise ConfigError(f"--set {words[0]!r} is not of the form NAME=PROMPTS")
    return name, [first, *words[1:]]


def _mean(name: str, rows: Sequence[dict[str, Any]]) -> str:
    values = [value for row in rows for value in row["reward"]]
    return f"{name} {sum(values) / len(values):.3f} ({len(rows)} prompts)"


if __name__ == "__main__":
    sys.exit(main())
