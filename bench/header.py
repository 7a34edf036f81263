"""What every bench writes above its numbers: when, on which machine, with which versions, from which sources.

Imports no torch, so that a load generator can use it: the GPU's facts come from nvidia-smi, versions from metadata.
"""

import datetime
import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "triton", "transformers", "tokenizers", "numpy", "flashinfer-python", "nanodeploy")
GPU_FIELDS = ("name", "driver_version", "compute_cap", "memory.total", "power.limit", "clocks.sm", "temperature.gpu")


def header(*, commit: str | None = None) -> dict[str, Any]:
    """JSON-able facts of this run. `commit` overrides git's answer where the tree travelled without its history."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "commit": commit or git("rev-parse", "HEAD"),
        "dirty": dirty(),
        "sources_sha256": sources_sha256(),
        "gpus": gpus(),
        "cpu": {"model": cpu_model(), "cores": os.cpu_count()},
        "os": platform.platform(),
        "python": platform.python_version(),
        "versions": versions(),
    }


def write_json(path: str | Path, results: dict[str, Any], *, commit: str | None = None) -> None:
    """Write {"header": ..., **results} to `path`, making its folder; a half-written file never stays behind."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(path.suffix + ".partial")
    partial.write_text(json.dumps({"header": header(commit=commit), **results}, indent=1, default=str) + "\n")
    partial.replace(path)


def one_line(head: dict[str, Any]) -> str:
    """The header as one line to print above a table."""
    gpu = ", ".join(g["name"] for g in head["gpus"]) or f"no GPU, {head['cpu']['model']}"
    wanted = [f"{name} {head['versions'][name]}" for name in ("torch", "triton") if name in head["versions"]]
    commit = (head["commit"] or "no git")[:10] + (" + changes" if head["dirty"] else "")
    return " · ".join([gpu, *wanted, f"sources {head['sources_sha256'][:10]}", commit, head["date"]])


def git(*args: str) -> str | None:
    """Output of a git command on this tree, None where there is no git or no repository."""
    if shutil.which("git") is None:
        return None
    done = subprocess.run(["git", "-C", str(ROOT), *args], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None


def dirty() -> bool | None:
    """Whether tracked files differ from the commit; None without git."""
    changes = git("status", "--porcelain", "--untracked-files=no")
    return None if changes is None else bool(changes)


def sources_sha256() -> str:
    """Hash of every Python file of nanodeploy/ and bench/: the same sources give the same hash, git or not."""
    digest = hashlib.sha256()
    for path in sorted([*(ROOT / "nanodeploy").rglob("*.py"), *(ROOT / "bench").rglob("*.py")]):
        digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """Installed versions; a package that is absent is left out."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def gpus() -> list[dict[str, str]]:
    """One dict of GPU_FIELDS per visible GPU, in nvidia-smi's own words; empty without nvidia-smi."""
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", f"--query-gpu={','.join(GPU_FIELDS)}", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, timeout=30)
    if done.returncode != 0:
        return []
    rows = [line.split(",") for line in done.stdout.strip().splitlines()]
    return [{field: value.strip() for field, value in zip(GPU_FIELDS, row)} for row in rows]


@functools.cache
def cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
