"""Make ``import nemo_run`` work where its DGX Cloud Lepton part cannot be imported.

nemo-run 0.11.1 imports ``leptonai.api.v1`` at the top of ``core/execution/lepton.py``, which plain ``import nemo_run``
reaches.  leptonai 0.47, the one pip installs, no longer has it; older ones contradict vLLM's pins.  Nothing here uses
Lepton, so stand-ins for the missing names are enough.  A real ``leptonai.api.v1`` always wins: the stand-ins are served
by the last finder on ``sys.meta_path``, which is asked only for what nobody else has.
"""

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Sequence
from typing import Any

__all__ = ["ensure_nemo_run_importable"]

_MISSING = ("leptonai.api.v1", "leptonai.api.v2", "leptonai.cli.raycluster")


class _Unavailable(type):
    """Class of the stand-in classes: attributes are hashable values (upstream builds tables of them), calls raise."""

    def __getattr__(cls, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        setattr(cls, name, f"{cls.__name__}.{name}")
        return str(getattr(cls, name))

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(
            f"leptonai's {cls.__name__} is not available: DGX Cloud Lepton needs leptonai>=0.26.6,<0.47 "
            "in an environment without vLLM"
        )


class _StandIn(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value = _Unavailable(name, (), {"__module__": self.__name__})
        setattr(self, name, value)
        return value


class _LastFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        for root in _MISSING:
            # the module itself, what lies below it and, where leptonai is absent, the packages above it
            if f"{fullname}.".startswith(f"{root}.") or root.startswith(f"{fullname}."):
                return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _StandIn(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        module.__path__ = []


def ensure_nemo_run_importable() -> bool:
    """Call before the first ``import nemo_run``.  True if stand-ins are in place, False if the real package serves."""
    stands_in = _stand_in()
    if "nemo_run" not in sys.modules:
        _import_without_torch()
    return stands_in


def _import_without_torch() -> None:
    """NeMo-Run imports torch where it is installed, only to write torch dtypes as YAML: 1.5 seconds at every start."""
    hide = "torch" not in sys.modules
    if hide:
        sys.modules["torch"] = None  # type: ignore[assignment]  # import torch -> ModuleNotFoundError, which is caught
    try:
        importlib.import_module("nemo_run")
    finally:
        if hide:
            del sys.modules["torch"]


def _stand_in() -> bool:
    if any(isinstance(finder, _LastFinder) for finder in sys.meta_path):
        return True
    if "nemo_run" in sys.modules:
        return False
    try:
        if importlib.util.find_spec("leptonai.api.v1") is not None:
            return False
    except ImportError:  # leptonai is absent, or broken by somebody else's pin
        pass
    sys.meta_path.append(_LastFinder())
    return True
