"""The rules of the house, read from the syntax trees of nanodeploy/, router/ and bench/. Nothing is imported.

Who may import whom, no cycles, no import inside a function, environment variables in config.py only, a broad except at
two places, and nothing that runs code out of data.
"""

import ast
import functools
import re
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("nanodeploy", "router", "bench")

# Part of the tree -> the parts it may import. Longest prefix wins; a part may always import itself.
GROUND = (
    *(
        "nanodeploy.config",
        "nanodeploy.errors",
        "nanodeploy.sampling",
        "nanodeploy.catalog",
        "nanodeploy.flags",
        "nanodeploy.phases",
    ),
    "nanodeploy.phases",
    "nanodeploy.matcher",
)
SERVE = (*GROUND, "nanodeploy.wire", "nanodeploy.serve")
RUNTIME = (*GROUND, "nanodeploy.wire", "nanodeploy.ops", "nanodeploy.models", "nanodeploy.runtime")
ARROWS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(GROUND, GROUND),
    "nanodeploy.wire": GROUND,
    "nanodeploy.ops": GROUND,
    "nanodeploy.models": (*GROUND, "nanodeploy.ops"),
    "nanodeploy.runtime": RUNTIME,
    "nanodeploy.serve": SERVE,
    "nanodeploy.llm": (*RUNTIME, *SERVE),
    "nanodeploy.serve.__main__": ("nanodeploy.cli",),
    "nanodeploy": ("nanodeploy",),  # the public names, the command line
    "router": (*SERVE, "router"),
    "bench": ("nanodeploy", "router", "bench"),
}
# Part -> third-party packages that must not come in, not even through what it imports.
TORCH = ("torch", "triton", "transformers", "safetensors")
HTTP_AND_TEXT = ("starlette", "uvicorn", "httpx", "tokenizers", "jinja2", "transformers")
FORBIDDEN: dict[str, tuple[str, ...]] = {
    **dict.fromkeys((*GROUND, "nanodeploy.wire", "nanodeploy.cli", "nanodeploy.__main__"), TORCH),
    "nanodeploy.serve": TORCH,
    "router": TORCH,
    "nanodeploy.runtime": HTTP_AND_TEXT,
    "nanodeploy.runtime.scheduler": (*TORCH, "numpy", *HTTP_AND_TEXT),
    "nanodeploy.runtime.pages": (*TORCH, "numpy", *HTTP_AND_TEXT),
    "nanodeploy.models": HTTP_AND_TEXT,
    "nanodeploy": ("transformers",),  # for tests and the demo's trainer only
}
OPS_THIRD_PARTY = {"torch", "triton", "numpy"}  # and vendors: ops can be lent to other engines

# Built from their own sources, so no extra names them.
UNPUBLISHED_VENDORS = {"flash_mla", "deep_gemm", "deep_ep"}
LAZY_IMPORTS = {"nanodeploy/cli.py"}  # `nanodeploy --help` must answer at once
DYNAMIC_IMPORTS = {
    "nanodeploy/__init__.py",  # LLM on first use
    "nanodeploy/ops/registry.py",  # a room is whatever files lie in it
    "nanodeploy/models/registry.py",  # a family is a file
    "nanodeploy/runtime/process.py",  # the engine to build, by name
    "bench/op.py",  # a kernel's file at another revision
}
BROAD_EXCEPT = {
    "nanodeploy/serve/app.py",  # the HTTP edge
    "nanodeploy/runtime/process.py",  # the top of the engine process
    "nanodeploy/runtime/lab.py",  # a kernel that was saved a moment ago must not end the server
    "bench/gate.py",  # the top of the gate: whatever a kernel does wrong is its verdict
}


@dataclass(frozen=True)
class Import:
    module: str  # "nanodeploy.ops.case", "torch.nn"
    line: int
    inside: str | None  # the function it stands in
    typing_only: bool


@dataclass(frozen=True)
class Module:
    name: str
    path: str
    tree: ast.Module
    imports: tuple[Import, ...]
    is_package: bool = False


def name_of(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def read(path: str, text: str, known: set[str]) -> Module:
    """Parse one file. `known`: all module names, which tell `from package import module` from a name in it."""
    tree = ast.parse(text, path)
    name, is_package = name_of(path), path.endswith("__init__.py")

    def visit(node: ast.AST, inside: str | None, typing_only: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                for alias in child.names:
                    yield Import(alias.name, child.lineno, inside, typing_only)
            elif isinstance(child, ast.ImportFrom):
                base = child.module or ""
                if child.level:
                    parents = name.split(".")[: len(name.split(".")) - child.level + is_package]
                    base = ".".join([*parents, *filter(None, [base])])
                for alias in child.names:
                    full = f"{base}.{alias.name}"
                    yield Import(full if full in known else base, child.lineno, inside, typing_only)
            elif isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
                yield from visit(child, getattr(child, "name", "lambda"), typing_only)
            elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                for part in child.body:
                    yield from visit(ast.Module([part], []), inside, True)
                for part in child.orelse:
                    yield from visit(ast.Module([part], []), inside, typing_only)
            else:
                yield from visit(child, inside, typing_only)

    return Module(name, path, tree, tuple(visit(tree, None, False)), is_package)


def modules_of(files: dict[str, str]) -> dict[str, Module]:
    """Path -> text, as modules by name."""
    known = {name_of(path) for path in files}
    return {name_of(path): read(path, text, known) for path, text in files.items()}


@functools.cache
def house() -> dict[str, Module]:
    files = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    return modules_of({path.relative_to(ROOT).as_posix(): path.read_text() for path in files})


@functools.cache
def vendors() -> frozenset[str]:
    """Import names of the optional packages: pyproject's extras but for dev."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    packages = [
        re.split(r"[^\w-]", package)[0] for extra, listed in extras.items() if extra != "dev" for package in listed
    ]
    return frozenset(p.removesuffix("-python").replace("-", "_") for p in packages) | UNPUBLISHED_VENDORS


def rule_for(name: str, table: dict[str, tuple[str, ...]]) -> tuple[str, tuple[str, ...]] | None:
    """The entry of the longest prefix of a module's name."""
    fitting = [part for part in table if name == part or name.startswith(part + ".")]
    return (longest := max(fitting, key=len), table[longest]) if fitting else None


def lies_in(name: str, parts: tuple[str, ...]) -> bool:
    return any(name == part or name.startswith(part + ".") for part in parts)


# The rules: modules -> complaints, each with the place and what to do.


def wrong_arrows(modules: dict[str, Module]) -> list[str]:
    found = []
    for module in modules.values():
        part, allowed = rule_for(module.name, ARROWS) or ("", ())
        for i in module.imports:
            if i.module.split(".")[0] in PACKAGES and not lies_in(i.module, (*allowed, part)):
                found.append(f"{module.path}:{i.line}: {part} may not import {i.module}; it may: {', '.join(allowed)}")
    return found


def reached(name: str, modules: dict[str, Module]) -> dict[str, list[str]]:
    """Third-party package -> the chain of modules that brings it in when `name` is imported."""
    found: dict[str, list[str]] = {}
    seen = set()
    todo = [(name, [name])]
    while todo:
        current, chain = todo.pop(0)
        if current in seen or current not in modules:
            continue
        seen.add(current)
        if "." in current:  # Python runs the packages above it, too
            parent = current.rpartition(".")[0]
            todo.append((parent, [*chain, parent]))
        for i in modules[current].imports:
            if i.inside or i.typing_only:
                continue
            if i.module.split(".")[0] in PACKAGES:
                todo.append((i.module, [*chain, i.module]))
            else:
                found.setdefault(i.module.split(".")[0], [*chain, i.module])
    return found


def forbidden_packages(modules: dict[str, Module]) -> list[str]:
    found = []
    for module in modules.values():
        rules = [(part, packages) for part, packages in FORBIDDEN.items() if lies_in(module.name, (part,))]
        for package, chain in reached(module.name, modules).items():
            part = next((part for part, packages in rules if package in packages), None)
            if part and not (part == "nanodeploy" and len(chain) > 2):  # said where it is imported
                found.append(f"{module.path}: {part} must work without {package}, but: {' -> '.join(chain)}")
        for i in module.imports:  # inside functions, too: not now is not never
            part = next((part for part, packages in rules if i.module.split(".")[0] in packages), None)
            if part and i.inside:
                found.append(
                    f"{module.path}:{i.line}: {part} must work without {i.module}, but {i.inside}() imports it"
                )
    return found


def guests_in_ops(modules: dict[str, Module]) -> list[str]:
    return [
        f"{module.path}:{i.line}: ops imports torch, triton, numpy and optional vendors only; this is {i.module}"
        for module in modules.values()
        if lies_in(module.name, ("nanodeploy.ops",))
        for i in module.imports
        if (top := i.module.split(".")[0]) not in PACKAGES
        and top not in OPS_THIRD_PARTY | vendors()
        and top not in sys.stdlib_module_names
    ]


def cycles(modules: dict[str, Module]) -> list[str]:
    """Each cycle of imports at module level, once. A package's own __init__ importing its modules is none."""
    edges = {
        name: sorted(
            {i.module for i in m.imports if not i.inside and not i.typing_only and i.module in modules} - {name}
        )
        for name, m in modules.items()
    }
    found: dict[frozenset[str], str] = {}
    done: set[str] = set()

    def walk(name: str, path: list[str]) -> None:
        if name in path:
            loop = [*path[path.index(name) :], name]
            found.setdefault(frozenset(loop), f"{' -> '.join(loop)}: cut one of these imports")
        elif name not in done:
            for other in edges[name]:
                walk(other, [*path, name])
            done.add(name)

    for name in edges:
        walk(name, [])
    return list(found.values())


def imports_in_functions(modules: dict[str, Module]) -> list[str]:
    found = []
    for module in modules.values():
        if module.path in LAZY_IMPORTS:
            continue
        for i in module.imports:
            if i.inside and i.module.split(".")[0] not in vendors():
                found.append(
                    f"{module.path}:{i.line}: {i.inside}() imports {i.module}; import it at the top of the file"
                )
        if module.path not in DYNAMIC_IMPORTS:
            for node in ast.walk(module.tree):
                if called(node) in ("importlib.import_module", "import_module", "__import__"):
                    found.append(f"{module.path}:{node.lineno}: an import that no reader sees; write it as one")
    return found


def called(node: ast.AST) -> str:
    """What a call calls, as written; "" for anything else."""
    return ast.unparse(node.func) if isinstance(node, ast.Call) else ""


def environment_variables(modules: dict[str, Module]) -> list[str]:
    return [
        f"{module.path}:{node.lineno}: environment variables are read in nanodeploy/config.py; ask it"
        for module in modules.values()
        if module.path != "nanodeploy/config.py" and not module.name.startswith("bench")
        for node in ast.walk(module.tree)
        if (
            isinstance(node, ast.Attribute)
            and ast.unparse(node) in ("os.environ", "os.getenv", "os.putenv", "os.environb")
        )
        or (
            isinstance(node, ast.ImportFrom)
            and node.module == "os"
            and {a.name for a in node.names} & {"environ", "getenv"}
        )
    ]


def broad_excepts(modules: dict[str, Module]) -> list[str]:
    found = []
    for module in modules.values():
        if module.path in BROAD_EXCEPT:
            continue
        for node in ast.walk(module.tree):
            if isinstance(node, ast.ExceptHandler):
                caught = ["everything"] if node.type is None else re.findall(r"\w+", ast.unparse(node.type))
                if {"everything", "Exception", "BaseException"} & set(caught):
                    found.append(
                        f"{module.path}:{node.lineno}: catches {caught[0]}; name the errors that you can handle"
                    )
            if called(node) in ("contextlib.suppress", "suppress"):
                if {"Exception", "BaseException"} & {ast.unparse(a) for a in node.args}:
                    found.append(f"{module.path}:{node.lineno}: suppresses everything; name the errors")
    return found


CODE_OUT_OF_DATA = {
    "eval": "eval runs whatever it is given",
    "exec": "exec runs whatever it is given",
    "torch.load": "torch.load unpickles; read safetensors",
    "yaml.load": "yaml.load builds any object; use yaml.safe_load",
    "os.system": "a shell reads the string; use subprocess.run with a list",
}
PICKLES = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
DANGEROUS_KEYWORDS = {"allow_pickle", "trust_remote_code", "shell"}


def code_out_of_data(modules: dict[str, Module]) -> list[str]:
    found = []
    for module in modules.values():
        for i in module.imports:
            if i.module.split(".")[0] in PICKLES:
                found.append(
                    f"{module.path}:{i.line}: {i.module} runs code out of data; use msgspec, JSON or safetensors"
                )
        for node in ast.walk(module.tree):
            if why := CODE_OUT_OF_DATA.get(called(node)):
                found.append(f"{module.path}:{node.lineno}: {why}")
            if isinstance(node, ast.Call) and called(node).endswith(("send_pyobj", "recv_pyobj")):
                found.append(f"{module.path}:{node.lineno}: {called(node)} pickles; encode with msgspec")
            if isinstance(node, ast.keyword) and node.arg in DANGEROUS_KEYWORDS and ast.unparse(node.value) != "False":
                found.append(f"{module.path}:{node.value.lineno}: {node.arg} = {ast.unparse(node.value)}")
    return found


RULES = [
    wrong_arrows,
    forbidden_packages,
    guests_in_ops,
    cycles,
    imports_in_functions,
    environment_variables,
    broad_excepts,
    code_out_of_data,
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_house_keeps_its_rules(rule):
    complaints = rule(house())
    assert not complaints, "\n" + "\n".join(complaints)


def test_the_lists_of_exceptions_name_files_that_exist():
    paths = {module.path for module in house().values()}
    assert paths >= LAZY_IMPORTS | DYNAMIC_IMPORTS | BROAD_EXCEPT


# The rules themselves: each finds what it is for.


@pytest.mark.parametrize(
    ("rule", "files", "words"),
    [
        (wrong_arrows, {"nanodeploy/ops/x.py": "from nanodeploy.models import batch"}, "ops may not import"),
        (wrong_arrows, {"nanodeploy/serve/x.py": "def f():\n    import nanodeploy.runtime.engine"}, "x.py:2"),
        (wrong_arrows, {"nanodeploy/runtime/x.py": "from router import y"}, "may not import router"),
        (wrong_arrows, {"nanodeploy/wire.py": "from .runtime import request"}, "may not import nanodeploy.runtime"),
        (wrong_arrows, {"nanodeploy/cli.py": "import bench.op"}, "may not import bench.op"),
        (
            forbidden_packages,
            {"nanodeploy/serve/x.py": "from nanodeploy import wire", "nanodeploy/wire.py": "import torch.nn"},
            "nanodeploy.serve.x -> nanodeploy.wire -> torch.nn",
        ),
        (
            forbidden_packages,
            {"nanodeploy/serve/x.py": "", "nanodeploy/serve/__init__.py": "", "nanodeploy/__init__.py": "import torch"},
            "nanodeploy.serve must work without torch",
        ),
        (forbidden_packages, {"nanodeploy/runtime/pages.py": "import numpy as np"}, "must work without numpy"),
        (forbidden_packages, {"nanodeploy/serve/x.py": "def f():\n    import torch"}, "f() imports it"),
        (forbidden_packages, {"nanodeploy/llm.py": "import transformers"}, "nanodeploy must work without transformers"),
        (guests_in_ops, {"nanodeploy/ops/x/y.py": "import msgspec"}, "this is msgspec"),
        (
            cycles,
            {"nanodeploy/a.py": "import nanodeploy.b", "nanodeploy/b.py": "from nanodeploy import a"},
            "nanodeploy.a -> nanodeploy.b -> nanodeploy.a",
        ),
        (imports_in_functions, {"bench/x.py": "class A:\n    def f(self):\n        import json"}, "f() imports json"),
        (imports_in_functions, {"bench/x.py": "import importlib\nimportlib.import_module('json')"}, "no reader sees"),
        (environment_variables, {"nanodeploy/x.py": "import os\nos.environ['A'] = '1'"}, "x.py:2"),
        (environment_variables, {"router/x.py": "from os import getenv"}, "router/x.py:1"),
        (broad_excepts, {"router/x.py": "try:\n    pass\nexcept (OSError, Exception):\n    pass"}, "x.py:3"),
        (broad_excepts, {"router/x.py": "try:\n    pass\nexcept:\n    pass"}, "catches everything"),
        (
            broad_excepts,
            {"router/x.py": "from contextlib import suppress\nwith suppress(Exception):\n    pass"},
            "x.py:2",
        ),
        (code_out_of_data, {"bench/x.py": "from pickle import loads"}, "pickle runs code"),
        (code_out_of_data, {"bench/x.py": "import torch\ntorch.load('x')"}, "unpickles"),
        (code_out_of_data, {"bench/x.py": "eval('1')"}, "eval runs"),
        (code_out_of_data, {"bench/x.py": "f(trust_remote_code=True)"}, "trust_remote_code"),
        (code_out_of_data, {"bench/x.py": "socket.recv_pyobj()"}, "msgspec"),
    ],
)
def test_a_broken_rule_is_found(rule, files, words):
    known = {"nanodeploy/models/batch.py": "", "nanodeploy/runtime/engine.py": "", "router/y.py": "", "bench/op.py": ""}
    complaints = rule(modules_of(known | {"nanodeploy/runtime/request.py": ""} | files))
    assert any(words in complaint for complaint in complaints), complaints


@pytest.mark.parametrize(
    ("rule", "files"),
    [
        (imports_in_functions, {"nanodeploy/ops/x/y.py": "def f():\n    import flashinfer"}),
        (guests_in_ops, {"nanodeploy/ops/x/y.py": "import math, torch\nfrom flashinfer import z"}),
        (cycles, {"nanodeploy/ops/__init__.py": "from nanodeploy.ops import a", "nanodeploy/ops/a.py": "import torch"}),
        (
            cycles,
            {
                "nanodeploy/a.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import nanodeploy.b",
                "nanodeploy/b.py": "import nanodeploy.a",
            },
        ),
        (broad_excepts, {"router/x.py": "try:\n    pass\nexcept (OSError, ValueError):\n    pass"}),
        (code_out_of_data, {"bench/x.py": "model.eval()\nf(shell=False)"}),
        (environment_variables, {"nanodeploy/config.py": "import os\nos.environ.get('A')", "bench/x.py": "os.environ"}),
        (wrong_arrows, {"router/x.py": "from nanodeploy.serve import y", "bench/x.py": "import nanodeploy.runtime.z"}),
    ],
)
def test_what_the_house_allows_is_not_complained_about(rule, files):
    assert rule(modules_of(files)) == []
