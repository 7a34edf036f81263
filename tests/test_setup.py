"""How the project is set up: what a wheel holds, what the Makefile does, what README promises."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from nanodeploy import catalog, flags
from nanodeploy.config import Config

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
NOT_ON_PYPI = ("flash_mla", "deep_gemm", "deep_ep")  # the names there belong to other projects


def test_a_wheel_holds_every_data_file():
    """pyproject.toml's globs, without building: each file beside the code, and each folder of code, is in a package."""
    find, globs = (PROJECT["tool"]["setuptools"][key] for key in ("packages", "package-data"))
    held = {path for package in globs for glob in globs[package] for path in (ROOT / package).glob(glob)}
    base = ROOT / "nanodeploy"
    there = {path for path in base.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert there - held == set(), "package-data in pyproject.toml misses files"
    assert {p.name for p in held} >= {"model.safetensors", "tokenizer.json", "Qwen3-8B.json", "py.typed", "peers.json"}
    code = {path.parent for path in base.rglob("*.py")}
    assert all((folder / "__init__.py").is_file() for folder in code), "a folder without __init__.py is left out"
    assert {"nanodeploy*", "bench*"} <= set(find["find"]["include"])


@pytest.mark.parametrize("demo", sorted(p for p in catalog.DEMOS.iterdir() if p.is_dir()), ids=lambda p: p.name)
def test_a_demo_is_small_and_safe(demo):
    files = [p for p in demo.rglob("*") if p.is_file()]
    assert 2**20 < sum(p.stat().st_size for p in files) <= 6 * 2**20
    assert not [p for p in files if p.suffix in (".bin", ".pt", ".pkl", ".pth")]


def test_vendor_packages_are_extras_and_never_pypi_namesakes():
    required = PROJECT["project"]["dependencies"]
    extras = [d for group in PROJECT["project"]["optional-dependencies"].values() for d in group]
    names = {re.split(r"[\s\[<>=;]", d)[0].lower().replace("-", "_") for d in [*required, *extras]}
    assert not names & set(NOT_ON_PYPI)
    assert not any("flashinfer" in d for d in required)
    assert any("flashinfer-python" in d for d in extras)


def test_what_the_project_needs():
    assert PROJECT["project"]["requires-python"] == ">=3.11"
    wanted = {"torch>=2.10", "transformers>=5.17"}
    assert wanted <= {d.split(";")[0].strip() for d in PROJECT["project"]["dependencies"]}
    assert any(d.startswith("triton>=3.6") for d in PROJECT["project"]["dependencies"])


def make(*args, cwd=ROOT):
    return subprocess.run(["make", "--no-print-directory", *args], cwd=cwd, capture_output=True, text=True, timeout=60)


@pytest.fixture
def made(tmp_path):
    """A copy of the project's set-up files, with an environment that is made already."""
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path / name)
    venv = tmp_path / ".venv"
    venv.mkdir()
    for stamp in (".torch", ".user", ".dev"):
        (venv / stamp).touch()
    return tmp_path


def test_a_made_environment_is_left_alone(made):
    """The second call installs nothing, so it needs no network."""
    for verb, command in [
        ("serve", ".venv/bin/nanodeploy serve demo:qwen3"),
        ("test", ".venv/bin/python -m pytest"),
        ("bench", ".venv/bin/python -m bench.offline demo:"),
        ("check", ".venv/bin/ruff format --check ."),
    ]:
        planned = make("-n", verb, cwd=made)
        assert planned.returncode == 0, planned.stderr
        assert command in planned.stdout and "pip" not in planned.stdout and "venv " not in planned.stdout


def test_make_takes_a_model_and_flags(made):
    planned = make("-n", "serve", "MODEL=/models/Qwen3-8B", "ARGS=--port 9000", cwd=made)
    assert planned.stdout.strip() == ".venv/bin/nanodeploy serve /models/Qwen3-8B --port 9000"
    assert make("-n", "bench", "MODEL=mine", cwd=made).stdout.strip().endswith("bench.offline mine")


def test_changed_dependencies_are_installed(made):
    os.utime(made / "pyproject.toml", (2**31, 2**31))
    planned = make("-n", "test", cwd=made).stdout
    assert "pip install --editable '.[dev]'" in planned and "torch==" not in planned


def test_an_old_python_is_told(made):
    shutil.rmtree(made / ".venv")
    old = made / "python3.9"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 3.9.18 && exit 0\nexit 1\n')
    old.chmod(0o755)
    told = make("serve", f"PYTHON={old}", cwd=made)
    assert told.returncode != 0 and "nanodeploy needs Python 3.11 or later" in told.stdout
    assert "3.9.18" in told.stdout and not (made / ".venv").exists()


def test_help_lists_the_verbs():
    text = make().stdout
    assert all(f"make {verb}" in text for verb in ("serve", "test", "check", "bench"))


def test_ci_calls_the_makefile():
    script = ROOT / ".ci" / "run"
    text = script.read_text()
    assert os.access(script, os.X_OK) and "set -euo pipefail" in text
    assert text.splitlines()[-2:] == ["make check", "make test"]


def test_importing_the_package_is_light():
    code = "import sys, nanodeploy; assert 'torch' not in sys.modules; nanodeploy.nonsense"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "AttributeError: module 'nanodeploy' has no attribute 'nonsense'" in done.stderr


# The documents


def documents():
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("path", documents(), ids=lambda p: p.name)
def test_documents_name_what_exists(path):
    """Files, and flags of `nanodeploy serve`, that a document mentions are there."""
    text = path.read_text()
    for named in re.findall(r"`((?:nanodeploy|bench|tests|docs|examples)/[\w./-]+)`", text):
        if "mine.py" not in named:
            assert (ROOT / named).exists(), f"{path.name} names {named}"
    for module in re.findall(r"python -m (bench(?:\.\w+)+)", text):
        assert (ROOT / (module.replace(".", "/") + ".py")).exists(), f"{path.name} names {module}"
    for command in re.findall(r"nanodeploy serve [^\n`]*", text):
        for flag in re.findall(r"--([\w-]+)", command):
            assert flag.replace("-", "_") in {*flags.FIELDS, "help", "config"}, f"{path.name}: --{flag}"


def test_readmes_flags_exist():
    rows = [line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("|") and "`--" in line]
    named = [flag for row in rows for flag in re.findall(r"--([a-z]\w+)", row)]
    assert len(named) >= 5 and set(named) <= {*Config.__dataclass_fields__, "all", "tests", "launch", "batch"}


@pytest.mark.parametrize("name", ["README.md", "docs/LAB.md"])
def test_a_kernel_edit_changes_something(name):
    """The researcher's loop: each substitution made in the copied kernel finds what it replaces."""
    text = (ROOT / name).read_text()
    ((copied, script),) = re.findall(r"cp (\S+) \S+mine\.py\nsed -i '(.+)' \S+mine\.py", text)
    kernel = (ROOT / copied).read_text()
    edits = [edit.split("|")[1:3] for edit in script.split("; ")]
    assert len(edits) == 2
    for old, new in edits:
        assert kernel.count(old) == 1 and old != new


def test_the_kernel_is_shown_as_it_is():
    (shown,) = re.findall(r"```python\n(@triton.jit.+?)```", (ROOT / "README.md").read_text(), re.S)
    assert shown in (ROOT / "nanodeploy/ops/add_rms_norm/one_row.py").read_text()


@pytest.mark.parametrize("path", documents(), ids=lambda p: p.name)
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        assert target.startswith("http") or (path.parent / target.partition("#")[0]).exists(), f"{path.name}: {target}"


def test_readme_names_kernels_that_exist():
    """The table of what a step is made of: ops, and kernels of theirs."""
    rows = re.findall(r"^\| `(\w+)` \| (`.+) \| .+ \|$", (ROOT / "README.md").read_text(), re.M)
    assert len(rows) >= 8
    for op, kernels in rows:
        for kernel in re.findall(r"`(\w+)`", re.sub(r"\(.*?\)", "", kernels)):
            assert (ROOT / "nanodeploy/ops" / op / f"{kernel}.py").exists(), f"{op} has no kernel {kernel}"


def test_readme_warns_of_the_namesakes():
    text = (ROOT / "README.md").read_text()
    assert all(name in text for name in NOT_ON_PYPI) and "PyPI" in text


def test_the_loop_is_shown_as_it_is():
    """ARCHITECTURE.md quotes engine.step, without its docstring."""
    quoted = re.findall(r"```python\n(def step.+?)```", (ROOT / "docs/ARCHITECTURE.md").read_text(), re.S)[0]
    code = (ROOT / "nanodeploy/runtime/engine.py").read_text()
    source = [line.strip() for line in code[code.index("def step(") :].splitlines()]
    assert [line.strip() for line in quoted.splitlines()] == [source[0], *source[2 : len(quoted.splitlines()) + 1]]
