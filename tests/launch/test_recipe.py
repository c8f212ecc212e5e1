"""The run folder belongs to one configuration."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from launch.recipe import claim
from megatron_rest.config import OptimizerConfig, RestConfig, TrainerConfig, load


def configuration(folder: Path, **changes: object) -> RestConfig:
    return dataclasses.replace(RestConfig(trainer=TrainerConfig(run_dir=str(folder))), **changes)  # type: ignore[arg-type]


def test_the_configuration_is_written_whole(tmp_path: Path) -> None:
    config = configuration(tmp_path / "run")
    assert load(claim(config)) == config
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["run.yaml"]


def test_a_folder_with_checkpoints_of_another_configuration_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = configuration(tmp_path)
    other = configuration(tmp_path, optimizer=OptimizerConfig(lr=5e-6))
    claim(config)
    claim(other)  # nothing was trained yet
    (tmp_path / "checkpoints/step-5").mkdir(parents=True)
    with pytest.raises(SystemExit):
        claim(config)
    assert "differs in optimizer.lr: choose another trainer.run_dir=" in capsys.readouterr().err
    assert load(tmp_path / "run.yaml") == other


def test_a_longer_run_is_the_same_run(tmp_path: Path) -> None:
    config = configuration(tmp_path)
    claim(config)
    (tmp_path / "checkpoints/step-5").mkdir(parents=True)
    longer = dataclasses.replace(config, trainer=dataclasses.replace(config.trainer, steps=500))
    claim(longer)
    assert load(tmp_path / "run.yaml").trainer.steps == 500
