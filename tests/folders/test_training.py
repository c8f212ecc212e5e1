"""A warm start and two RL steps from the folder of each family, as its user starts them.

Answers end at the family's own end of turn, their tokens have the regions of what they are for, and a policy that has
seen its references earns more than the least reward: templates, dialects, stop ids, regions and rewards agree.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megatron_rest.data.rollout_file import SavedRollouts, read_rollouts, rollout_path
from megatron_rest.hf_folder import load_tokenizer
from megatron_rest.regions import find_dialect, is_thought_open, read_turn
from megatron_rest.token_region import TokenRegion
from tests.folders.families import FAMILIES, MISSING, ROWS, convert, write_model
from tests.trainer.test_run import call

pytestmark = [pytest.mark.extended, pytest.mark.skipif(bool(MISSING), reason=MISSING)]
TRAINED = ("Qwen2.5 base", "Qwen3", "Qwen3 Thinking", "Llama 3.1", "SmolLM2", "DeepSeek-R1 distill", "GLM-4.5")


def arguments(model: Path, data: Path, run_dir: Path) -> list[str]:
    return [
        f"model.path={model}",
        f"data.train={data}",
        f"trainer.run_dir={run_dir}",
        "model.max_sequence_length=1024",
        "data.max_prompt_tokens=960",
        "rollout.max_response_tokens=64",
        "trainer.max_tokens_per_microbatch=4096",
    ]


def train(name: str, folder: Path) -> Path:
    """Warm start, then two steps; returns the run's folder."""
    model = write_model(FAMILIES[name], folder / "model")
    convert(ROWS, model, folder / "train")
    learn = ["warm_start.epochs=160", "warm_start.batch_size=8", "warm_start.lr=5e-3", "warm_start.target_loss=0.02"]
    call("megatron_rest.commands.warm_start", *arguments(model, folder / "train", folder / "warm"), *learn, ranks=1)
    run = ["data.prompts_per_step=4", "rollout.rollouts_per_prompt=4", "trainer.steps=2", "optimizer.lr=1e-4"]
    run += ["loss.entropy_coef=0.01", "trainer.save_rollouts_every=1"]
    call("megatron_rest.trainer", *arguments(folder / "warm" / "hf", folder / "train", folder / "run"), *run, ranks=1)
    return folder / "run"


def answers(saved: SavedRollouts) -> list[tuple[float, np.ndarray, np.ndarray]]:
    """Reward, ids and regions of each answer."""
    found = []
    for number, at in enumerate(saved.slices):
        mask = saved.loss_mask[at]
        found.append((float(saved.rewards[number]), saved.token_ids[at][mask], saved.region_ids[at][mask]))
    return found


@pytest.mark.alone
@pytest.mark.parametrize("name", TRAINED)
def test_a_warm_start_and_two_steps(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    run_dir = train(name, tmp_path)
    tokenizer = load_tokenizer(tmp_path / "model")
    ends = {tokenizer.convert_tokens_to_ids(token) for token in family.ends}
    judged = sorted(answers(read_rollouts(rollout_path(run_dir, 1))), key=lambda answer: -answer[0])
    print(f"{name}: rewards {[round(reward, 2) for reward, _, _ in judged]}")
    best, ids, regions = judged[0]
    for token, part in zip(ids, regions, strict=True):
        print(f"  {TokenRegion(part).name:12s} {tokenizer.decode([token])!r}")
    assert len(judged) == 16 and best > 0, "a policy that has seen its references earns something"
    for _, tokens, _ in judged:  # nothing stands behind an end of turn
        assert not ends & {int(i) for i in tokens[:-1]}
    assert int(ids[-1]) in ends and regions[-1] == TokenRegion.FORMAT
    dialect = find_dialect(family.dialect)
    turn = read_turn(tokenizer.decode(ids), dialect=dialect, starts_in_think=is_thought_open(family.prefix, dialect))
    painted = {region: tokenizer.decode(ids[regions == region]).strip() for region in TokenRegion}
    assert [call.name for call in turn.calls] == [painted[TokenRegion.TOOL_NAME]] == ["weather_of"]
    assert (turn.thought or "") == painted[TokenRegion.THINK]
