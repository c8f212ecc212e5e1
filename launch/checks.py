"""What a cluster's job would fail of, found before it is submitted: a fault ends the program, one line, status 2."""

import re
from pathlib import Path, PurePosixPath

from launch.compat import ensure_nemo_run_importable
from launch.recipe import GIVEN, stop
from megatron_rest.config import ConfigError, RestConfig
from megatron_rest.data.prompt_files import check_tokenizer, read_manifest
from megatron_rest.engine_gpus import why_not
from megatron_rest.model_fit import check_model
from megatron_rest.planner.shapes import find_shape

ensure_nemo_run_importable()
import nemo_run as run  # noqa: E402

__all__ = ["check_inputs_here", "check_request", "check_shape_of_job"]

_TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<clock>\d+(?::\d+){0,2})")
_SIGNAL = re.compile(r"(?:[RB]{1,2}:)?(?:SIG)?[A-Z]+\d*(?:@(?P<seconds>\d+))?|(?:[RB]{1,2}:)?\d+(?:@(?P<more>\d+))?")
_DEFAULT_WARNING = 60  # seconds before the limit, where the signal names none


def check_shape_of_job(executor: run.SlurmExecutor) -> None:
    """Refuse what says how many ranks there are, and how they see GPUs, in a way that nothing here can use."""
    for name in ("ntasks_per_node", "gpus_per_node"):
        value = getattr(executor, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            stop(f"run.executor.{name}={value!r}: a whole number, at least 1")


def check_inputs_here(config: RestConfig) -> None:
    """Refuse a model and prompts that the job could not use, as far as this machine has them."""
    _check_model(config)
    _check_prompts(config)


def _check_model(config: RestConfig) -> None:
    """Refuse what the model cannot be cut into, where this machine has its folder; else the plan may guess it."""
    if not (Path(config.model.path) / "config.json").is_file():
        return
    try:
        check_model(find_shape(config.model.path)[0], config)
    except ConfigError as error:
        stop(str(error))


def _check_prompts(config: RestConfig) -> None:
    """Refuse prompts that are damaged or that another tokenizer made, where this machine has them and the model."""
    if GIVEN.preprocess:  # a job before the training writes data.train
        return
    for name, path in (("data.train", config.data.train), ("warm_start.answers", config.warm_start.answers)):
        if not path or not Path(path).is_dir():
            continue
        try:
            manifest = read_manifest(Path(path))
            if (Path(config.model.path) / "tokenizer.json").is_file():
                check_tokenizer(Path(path), manifest, config.model.path)
        except ValueError as error:
            stop(f"{name}: {error}")


def check_request(executor: run.SlurmExecutor, config: RestConfig, *, world_size: int) -> None:
    """Refuse settings that contradict each other, the configuration, or the machine."""
    if executor.array is not None:
        stop("run.executor.array: the tasks of an array would share one run folder; submit one job a trainer.run_dir")
    if executor.gpus_per_task is not None:
        stop(
            "run.executor.gpus_per_task hides the node's other GPUs from a rank, and ranks choose theirs by number: "
            "say run.executor.gpus_per_node=N and ntasks_per_node=N"
        )
    if executor.heterogeneous or executor.het_group_indices:
        stop("run.executor.heterogeneous is the recipe's to decide: engines on nodes of their own are rollout.nodes=N")
    if executor.gres:
        stop("run.executor.gres beside gpus_per_node asks for GPUs twice: say run.executor.gpus_per_node=N alone")
    fault = why_not(
        config, world_size=world_size, ranks_per_node=executor.ntasks_per_node, gpus_per_node=executor.gpus_per_node
    )
    if fault:
        stop(fault)
    _check_time(executor)
    if executor.container_image:
        _check_mounts(executor.container_mounts, config)


def _check_time(executor: run.SlurmExecutor) -> None:
    seconds = _seconds(executor.time)
    if seconds is None:
        stop(f"run.executor.time={executor.time!r}: hours:minutes:seconds, or days-hours:minutes:seconds")
        return
    if not executor.signal:
        return
    found = _SIGNAL.fullmatch(executor.signal)
    if found is None:
        stop(f"run.executor.signal={executor.signal!r}: a signal and seconds before the limit, such as TERM@300")
        return
    before = int(found["seconds"] or found["more"] or _DEFAULT_WARNING)
    if seconds <= before:
        stop(
            f"run.executor.time={executor.time} is not longer than the {before} s before its end at which "
            f"run.executor.signal={executor.signal} asks the run to save and stop: give it more time, or say "
            "run.executor.signal=TERM@N with a smaller N"
        )


def _seconds(text: str) -> int | None:
    """Of a time limit as Slurm writes it: minutes[:seconds], hours:minutes:seconds, days-hours[:minutes[:seconds]]."""
    found = _TIME.fullmatch(str(text))
    if found is None:
        return None
    parts = [int(part) for part in found["clock"].split(":")]
    if any(part > 59 for part in parts[1:]):
        return None
    if found["days"] is not None:
        hours, minutes, seconds = [*parts, 0, 0][:3]
        return int(found["days"]) * 86400 + hours * 3600 + minutes * 60 + seconds
    if len(parts) == 3:
        return parts[0] * 3600 + parts[1] * 60 + parts[2]
    return parts[0] * 60 + (parts[1] if len(parts) == 2 else 0)


def _check_mounts(mounts: list[str], config: RestConfig) -> None:
    """What is read and written has to be outside of the container: inside it is lost when the job ends."""
    inside = [PurePosixPath(mount.split(":")[1] if ":" in mount else mount) for mount in mounts]
    paths = {
        "trainer.run_dir": config.trainer.run_dir,
        "model.path": config.model.path,
        "data.train": config.data.train,
        "checkpoint.load": config.checkpoint.load,
        "warm_start.answers": config.warm_start.answers,
        "preprocess": GIVEN.preprocess,
    }
    for name, path in paths.items():
        if path and not any(PurePosixPath(path).is_relative_to(mount) for mount in inside):
            stop(
                f"{name}={path} lies in none of the container's mounts ({', '.join(mounts) or 'there are none'}): "
                "export REST_MOUNTS=/outside:/inside,... or say run.executor.container_mounts=[...]"
            )
