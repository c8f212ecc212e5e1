"""What a run was: configuration, commit and machine, from the files of its folder; and what differs between runs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from megatron_rest.analysis.summary import table_lines
from megatron_rest.config import RESOLVED, ConfigError, RestConfig, load, to_dict

__all__ = ["configuration_lines", "different_settings", "settings_of"]

_FILES = ("config.yaml", "run.yaml")
_NOT_A_DIFFERENCE = ("trainer.run_dir",)
_MOST = 200  # characters of a value


def settings_of(run_dir: str | Path) -> dict[str, Any] | None:
    """Every setting of a run by ``section.key``, and its code; None if the folder has no configuration."""
    for name in _FILES:
        path = Path(run_dir) / name
        try:
            settings = _flat(to_dict(load(path)))
            record = yaml.safe_load(path.read_text(encoding="utf-8")).get(RESOLVED) or {}
        except (ConfigError, OSError, AttributeError):
            continue
        for key, code in (record.get("user_code") or {}).items():
            settings[f"the code of {key}"] = code.get("package_digest")
        starts = _starts(run_dir)
        if starts:
            settings["code"] = starts[-1].get("code")
            settings["world size"] = starts[-1].get("world_size")
        return settings
    return None


def configuration_lines(run_dir: str | Path) -> list[str]:
    """Commit, machine, and the settings that are not the defaults; nothing where the folder says nothing."""
    settings = settings_of(run_dir)
    if settings is None:
        return []
    lines = []
    starts = _starts(run_dir)
    if starts:
        last = starts[-1]
        packages = ", ".join(f"{name} {version}" for name, version in (last.get("packages") or {}).items())
        lines += [
            f"commit {last.get('code')}, {last.get('world_size')} ranks on {last.get('gpu') or 'CPU'}, started "
            f"{len(starts)} time{'s' if len(starts) > 1 else ''}, last {last.get('time')} on {last.get('host')}",
            packages,
            "",
        ]
    defaults = _flat(to_dict(RestConfig()))
    rows = [[key, _shown(value)] for key, value in settings.items() if key in defaults and value != defaults[key]]
    rows += [[key, _shown(value)] for key, value in settings.items() if key.startswith("the code of")]
    return [*lines, *table_lines(["setting that is not the default", "value"], rows)]


def different_settings(run_dirs: Sequence[str | Path]) -> list[tuple[str, list[str]]]:
    """Settings in which runs differ, each with its value in every run ("-": not known); seeds and folders aside."""
    found = [settings_of(path) for path in run_dirs]
    keys = dict.fromkeys(key for settings in found if settings is not None for key in settings)
    rows = []
    for key in keys:
        values = ["-" if settings is None else _shown(settings.get(key)) for settings in found]
        if key not in _NOT_A_DIFFERENCE and len(set(values)) > 1:
            rows.append((key, values))
    return rows


def _flat(config: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{section}.{key}": value for section, values in config.items() for key, value in values.items()}


def _starts(run_dir: str | Path) -> list[dict[str, Any]]:
    path = Path(run_dir) / "starts.jsonl"
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    text = text or '""'
    return text if len(text) <= _MOST else f"{text[:_MOST]} ..."
