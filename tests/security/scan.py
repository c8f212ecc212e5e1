"""Calls that can turn data into code, found in the syntax tree of a source file.

    findings("x = eval(text)")  ->  [Finding(line=1, what="eval")]

Not a proof (Python has more ways than a list can hold), but the ways people really take: each one in the packages
stands in ``test_scan.ALLOWED`` with the reason why it is harmless there.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from typing import NamedTuple

__all__ = ["Finding", "findings"]

_BUILTINS = {"eval", "exec", "compile", "__import__"}
_MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib", "jsonpickle", "code",
            "runpy", "ctypes", "pty"}  # fmt: skip
_CALLS = {  # by the end of the dotted name
    "os.system", "os.popen", "os.execv", "os.execve", "os.execvp", "os.spawnv", "os.spawnl", "importlib.import_module",
    "yaml.load", "yaml.unsafe_load", "yaml.full_load", "yaml.load_all", "subprocess.getoutput",
    "subprocess.getstatusoutput", "tempfile.mktemp", "torch.hub.load", "torch.jit.load", "torch.export.load",
    "jinja2.Environment", "jinja2.Template", "pandas.read_pickle", "inspect.getattr_static",
}  # fmt: skip
_METHODS = {  # whatever they are called on
    "all_gather_object": "pickle between ranks", "gather_object": "pickle between ranks",
    "broadcast_object_list": "pickle between ranks", "scatter_object_list": "pickle between ranks",
    "send_object_list": "pickle between ranks", "recv_object_list": "pickle between ranks",
    "collective_rpc": "RPC of vLLM", "exec_module": "exec_module", "extractall": "extractall",
    "spec_from_file_location": "spec_from_file_location",
}  # fmt: skip
_SUBPROCESS = {"run", "Popen", "call", "check_call", "check_output"}
_ANYWHERE = ("", "0.0.0.0", "::")


class Finding(NamedTuple):
    """One place."""

    line: int
    what: str


def findings(source: str) -> list[Finding]:
    """All places of ``source``, in order."""
    tree = ast.parse(source)
    names = dict(_imported_names(tree))
    found: list[Finding] = []
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=aliases):
                found += [Finding(node.lineno, f"import {a.name}") for a in aliases if a.name.split(".")[0] in _MODULES]
            case ast.ImportFrom(module=str() as module) if module.split(".")[0] in _MODULES:
                found.append(Finding(node.lineno, f"import {module}"))
            case ast.Call():
                found += [Finding(node.lineno, what) for what in _of_call(node, names)]
            case ast.Constant(value="trust_remote_code") | ast.keyword(arg="trust_remote_code"):
                pass  # judged where it is passed
    return sorted(found)


def _imported_names(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """Local name -> what it stands for, of all imports of the file."""
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=aliases):
                for alias in aliases:
                    local = alias.asname or alias.name.split(".")[0]
                    yield local, alias.name if alias.asname else local
            case ast.ImportFrom(module=str() as module, names=aliases):
                for alias in aliases:
                    yield alias.asname or alias.name, f"{module}.{alias.name}"


def _dotted(node: ast.expr, names: dict[str, str]) -> str:
    match node:
        case ast.Name(id=name):
            return names.get(name, name)
        case ast.Attribute(value=value, attr=attribute):
            return f"{_dotted(value, names)}.{attribute}"
    return "?"


def _of_call(call: ast.Call, names: dict[str, str]) -> Iterator[str]:
    name = _dotted(call.func, names).removeprefix("builtins.")
    last = name.rpartition(".")[2]
    keywords = {k.arg: k.value for k in call.keywords}
    if name in _BUILTINS:
        yield name
    if name in _CALLS:
        yield name
    if "." in name and last in _METHODS:
        yield _METHODS[last]
    if name == "torch.load" and not _is(keywords.get("weights_only"), True):
        yield "torch.load without weights_only"
    if name in ("numpy.load", "np.load") and not _is(keywords.get("allow_pickle"), False):
        yield "np.load without allow_pickle=False"
    if name.startswith("subprocess.") and last in _SUBPROCESS:
        command = call.args[0] if call.args else keywords.get("args")
        if isinstance(command, ast.Constant | ast.JoinedStr | ast.BinOp):
            yield "subprocess of a string"
        if "shell" in keywords and not _is(keywords["shell"], False):
            yield "subprocess with a shell"
    if last == "from_pretrained" and not _is(keywords.get("trust_remote_code"), False):
        yield "from_pretrained without trust_remote_code=False"
    if "trust_remote_code" in keywords and not _is(keywords["trust_remote_code"], False):
        yield "trust_remote_code"
    if last in ("create_server", "bind") and _listens_everywhere(call):
        yield "listens on every address"


def _is(node: ast.expr | None, value: object) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


def _listens_everywhere(call: ast.Call) -> bool:
    match call.args[:1]:
        case [ast.Tuple(elts=[ast.Constant(value=address), *_])]:
            return address in _ANYWHERE
    return False
