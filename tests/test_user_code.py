"""Code that a configuration names: refused where it cannot be called, imported from where it is recorded."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import yaml

from megatron_rest import run_folder
from megatron_rest.config import ConfigError, ModelConfig, RestConfig, RewardConfig, RolloutConfig, TrainerConfig
from megatron_rest.regions import find_dialect
from megatron_rest.rollout.conversations import find_environment
from megatron_rest.user_code import NamedCode, examine, load_named, load_object, named_code, recorded

MODULE = """
import functools
from dataclasses import dataclass, replace
from megatron_rest.regions import HERMES

raise_if_imported = RAISE

def plain(answer, *, target=1): return 0.0
def greedy(answer, needed): return 0.0
@functools.lru_cache
def decorated(answer): return 0.0
class Made:
    def __init__(self, prompt, size=1): self.size = size
    def __call__(self): return 0.0
number = 3
MINE = replace(HERMES, name="mine", end_markers=(b"<end>",))
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package ``usercode`` in the current folder, which is not on Python's path."""
    folder = tmp_path / "here"
    (folder / "usercode").mkdir(parents=True)
    (folder / "usercode" / "__init__.py").write_text("")
    (folder / "usercode" / "a.py").write_text(MODULE.replace("RAISE", "False"))
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", str(folder))])
    for name in [name for name in sys.modules if name.startswith("usercode")]:
        monkeypatch.delitem(sys.modules, name)
    yield folder / "usercode"
    for name in [name for name in sys.modules if name.startswith("usercode")]:
        del sys.modules[name]


def named(attribute: str, **arguments: object) -> NamedCode:
    return NamedCode(
        key="reward.function", reference=f"usercode.a:{attribute}", called_with=("answer",), arguments=arguments
    )


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (named("plain", aim=1), r"called as plain\(answer, aim=1\), and it is plain\(answer, \*, target=.*'aim'"),
        (named("greedy"), "missing a required argument: 'needed'"),
        (named("Made", colour=1), "'colour'"),
    ],
)
def test_a_call_that_cannot_work_is_seen_in_the_source(package: Path, code: NamedCode, message: str) -> None:
    (package / "a.py").write_text(MODULE.replace("RAISE", "1 / 0"))  # a login node may not have what it imports
    with pytest.raises(ConfigError, match=message):
        examine(code)
    assert examine(named("plain", target=2)) == package and examine(named("decorated")) == package
    with pytest.raises(ConfigError, match="cannot be imported: ZeroDivisionError"):
        load_named(code)


def test_what_is_imported_is_what_is_recorded(package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = tmp_path / "installed" / "usercode"
    installed.mkdir(parents=True)
    (installed / "__init__.py").write_text("")
    (installed / "a.py").write_text("def plain(answer): return 1.0\n")
    monkeypatch.syspath_prepend(str(installed.parent))
    assert load_named(named("plain", target=2)).__code__.co_filename == str(package / "a.py")
    for name in ("usercode", "usercode.a"):
        del sys.modules[name]
    monkeypatch.setattr(sys, "path", [str(installed.parent), *sys.path])
    import usercode.a  # noqa: F401  as something else of the process may have done

    with pytest.raises(ConfigError, match=f"has usercode from {installed} already, and what is recorded is {package}"):
        load_object("reward.function", "usercode.a:plain")


def test_values_and_what_cannot_be_called(package: Path) -> None:
    assert load_named(NamedCode(key="model.dialect", reference="usercode.a:MINE")).name == "mine"
    with pytest.raises(ConfigError, match="is int, expected something to call"):
        load_named(named("number"))
    assert find_dialect("usercode.a:MINE").end_markers == (b"<end>",)
    with pytest.raises(ValueError, match=r"is int, expected a megatron_rest\.regions\.Dialect"):
        find_dialect("usercode.a:number")
    assert find_environment("usercode.a:Made", {"size": 4})(None).size == 4
    with pytest.raises(ConfigError, match="'length'"):
        find_environment("usercode.a:Made", {"length": 4})


def test_everything_named_is_found(package: Path) -> None:
    terms = {"one": "usercode.a:plain", "two": {"function": "usercode.a:decorated"}, "tool_call": {}}
    config = RestConfig(
        model=ModelConfig(dialect="usercode.a:MINE"),
        rollout=RolloutConfig(environment="usercode.a:Made"),
        reward=RewardConfig(terms={**terms, "far": "https://judge/x"}),
        trainer=TrainerConfig(loggers="tensorboard, usercode.a:plain", logger_arguments={"plain": {"target": 1}}),
    )
    assert [(n.key, n.reference.partition(":")[2]) for n in named_code(config)] == [
        ("model.dialect", "MINE"),
        ("rollout.environment", "Made"),
        ("reward.terms.one.function", "plain"),
        ("reward.terms.two.function", "decorated"),
        ("trainer.loggers", "plain"),
    ]
    record = recorded(config)["reward.terms.one.function"]
    assert record["file"] == str(package / "a.py") and len(record["sha256"]) == 64
    assert load_named(named_code(config)[-1]) is not None


def test_a_run_with_other_code_is_another_run(package: Path, tmp_path: Path) -> None:
    config = RestConfig(
        reward=RewardConfig(function="usercode.a:plain"), trainer=TrainerConfig(run_dir=str(tmp_path / "run"))
    )
    path = run_folder.claim(config)
    (tmp_path / "run" / "checkpoints" / "step_1").mkdir(parents=True)
    stored = yaml.safe_load(path.read_text())["resolved"]["user_code"]["reward.function"]
    assert stored == recorded(config)["reward.function"]
    run_folder.claim(config)
    run_folder.finish(config, {"user_code": recorded(config)})
    assert run_folder.is_finished(config)
    (package / "a.py").write_text(MODULE.replace("RAISE", "None"))
    with pytest.raises(ConfigError, match=r"differs in the code of reward.function \(usercode.a:plain: \w+ -> \w+\)"):
        run_folder.claim(config)
    assert not run_folder.is_finished(config)
