"""What a user names as a model: an HF folder, the folder of a run, or a Megatron checkpoint of one."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_rest.data.chat_template import STOCK, ChatTemplate
from megatron_rest.data.template_dialect import template_dialect, why_unfit
from megatron_rest.eval.decontamination import Decontamination, decontamination_of
from megatron_rest.hf_folder import load_tokenizer
from megatron_rest.regions import TOOLRL, find_dialect
from megatron_rest.rollout.chat import AUTO, ChatSettings, dialect_name

__all__ = ["Model", "find_model"]

_CONFIGS = ("run.yaml", "config.yaml")  # what was submitted, what was finished


@dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    """An HF folder, and what is known of its training."""

    folder: Path
    training_data: tuple[str, ...] = ()  # prepared folders it was trained on
    prompt_style: str = ""  # of that data; empty: not known

    @property
    def max_positions(self) -> int:
        """Longest sequence it was made for, tokens."""
        return int(self._config().get("max_position_embeddings") or 1 << 20)

    @property
    def dtype(self) -> str:
        """Of its weights, as ``config.json`` says."""
        config = self._config()
        return str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")

    def tokenizer(self) -> Any:
        """Of transformers; only local files, no remote code."""
        return load_tokenizer(self.folder)

    def chat(self, dialect: str = AUTO, chat_template: str = STOCK) -> ChatSettings:
        """How it is asked and read: as in training, where its prompts are known; else as its chat template shows.

        An exported folder brings its template.  Raises ValueError for a dialect that its prompts were not prepared in,
        or in which its template cannot ask.
        """
        if self.training_data:
            return ChatSettings(dialect=dialect_name(dialect, self.training_data[0]), chat_template=chat_template)
        template = ChatTemplate.of_folder(self.folder, chat_template)
        if dialect == AUTO:
            return ChatSettings(dialect=(template_dialect(template) or TOOLRL).name, chat_template=chat_template)
        reads = find_dialect(dialect)
        why = "" if reads is TOOLRL else why_unfit(template, reads)
        if why:
            raise ValueError(f"--dialect {dialect}: {why}; toolrl asks in the system message, whatever the template")
        return ChatSettings(dialect=dialect, chat_template=chat_template)

    def identity(self) -> dict[str, Any]:
        """Changes when the weights do: other files, sizes or times."""
        files = sorted(self.folder.glob("*.safetensors"))
        weights = [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files]
        return {"folder": str(self.folder.absolute()), "weights": weights}

    def decontamination(self) -> list[Decontamination]:
        """What was removed from its training data, by folder."""
        return [decontamination_of(folder) for folder in self.training_data]

    def _config(self) -> dict[str, Any]:
        return dict(json.loads((self.folder / "config.json").read_text(encoding="utf-8")))


def find_model(path: str | Path, *, step: int | None = None, training_data: str = "") -> Model:
    """The model of ``path``; a checkpoint that has no HF folder yet gets one beside it.

    Args:
        path: HF folder; folder of a run (its HF export, or its newest checkpoint); ``<run>/checkpoints/step_000010``.
        step: of a run, the checkpoint of this step.
        training_data: prepared folder; of a run its own.

    Raises ValueError for a folder that is none of these, with what it lacks.
    """
    folder = Path(path)
    if folder.parent.name == "checkpoints" and folder.name.startswith("step_"):
        folder, step = folder.parents[1], int(folder.name.removeprefix("step_"))
    if (folder / "config.json").is_file():
        if step is not None:
            raise ValueError(f"--step: {folder} is an HF folder, not that of a run")
        if training_data or not folder.name.startswith("hf"):
            return _model(folder, (training_data,) if training_data else ())
        return _model(folder, _data_of_run(folder.absolute().parent))  # a run's export, named itself
    config = next((folder / name for name in _CONFIGS if (folder / name).is_file()), None)
    if config is None:
        raise ValueError(
            f"{folder} is neither an HF folder (no config.json) nor the folder of a run (no {' or '.join(_CONFIGS)})"
        )
    data = tuple(dict.fromkeys([*([training_data] if training_data else []), *_data_of_run(folder)]))
    checkpoints = _checkpoints(folder)
    newest = checkpoints[max(checkpoints)] if checkpoints else None
    if step is None and (folder / "config.yaml").is_file() and _is_fresh(folder / "hf", newest):
        return _model(folder / "hf", data)
    if not checkpoints or (step is not None and step not in checkpoints):
        wanted = "" if step is None else f" of step {step}"
        there = f"those of steps {', '.join(map(str, checkpoints))}" if checkpoints else "none"
        raise ValueError(f"{folder} has no complete checkpoint{wanted}: it has {there}")
    return _model(_export(folder, config, checkpoints[max(checkpoints) if step is None else step]), data)


def _model(folder: Path, data: tuple[str, ...]) -> Model:
    return Model(folder=folder, training_data=data, prompt_style=_prompt_style(data))


def _data_of_run(run_dir: Path) -> tuple[str, ...]:
    """The prepared folders that a run was trained on; none where there is no run."""
    config = next((run_dir / name for name in _CONFIGS if (run_dir / name).is_file()), None)
    if config is None:
        return ()
    values = yaml.safe_load(config.read_text(encoding="utf-8"))
    return tuple(dict.fromkeys(name for name in (values["data"]["train"], values["warm_start"]["answers"]) if name))


def _prompt_style(data: tuple[str, ...]) -> str:
    from megatron_rest.data.prompt_files import read_manifest

    return str(read_manifest(Path(data[0])).get("options", {}).get("prompt_style", "")) if data else ""


def _checkpoints(run_dir: Path) -> dict[int, Path]:
    """The complete ones, by step."""
    names = sorted((run_dir / "checkpoints").glob("step_*"))
    complete = [path for path in names if path.suffix == "" and (path / "metadata.json").is_file()]
    return {int(path.name.removeprefix("step_")): path for path in complete}


def _is_fresh(export: Path, checkpoint: Path | None) -> bool:
    """Whether an HF folder is there and not older than a checkpoint: a run may have gone on, or begun anew."""
    if not (export / "config.json").is_file():
        return False
    made = (export / "config.json").stat().st_mtime_ns
    return checkpoint is None or (checkpoint / "metadata.json").stat().st_mtime_ns <= made


def _export(run_dir: Path, config: Path, checkpoint: Path) -> Path:
    """HF folder of a checkpoint, made in a process of its own (this one must not become a rank of Megatron's)."""
    output = run_dir / f"hf_{checkpoint.name}"
    if not _is_fresh(output, checkpoint):
        arguments = ["megatron_rest.commands.export", "--config", str(config)]
        arguments += [f"trainer.run_dir={run_dir}", f"checkpoint.load={checkpoint}"]
        done = subprocess.run([sys.executable, "-m", *arguments], check=False)
        if done.returncode:
            raise ValueError(
                f"{checkpoint} could not be written as an HF folder on one rank; on several: "
                f"torchrun -m {' '.join(arguments)}"
            )
    return output
