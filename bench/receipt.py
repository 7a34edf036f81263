"""Receipts: which kernels passed the gate on a GPU, and which changed since. Imports no torch.

bench/results/<machine>/gate.json holds, for each kernel, the hashes of every file that its verdict depends on.
"""

import ast
import hashlib
import json
from pathlib import Path
from typing import Any

from bench.header import ROOT, write_json

RESULTS = ROOT / "bench" / "results"
OPS = ROOT / "nanodeploy" / "ops"
# What every room stands on; a change there changes no kernel.
GROUND = {OPS / name for name in ("__init__.py", "registry.py", "case.py", "machine.py", "layouts.py")}


def sources(kernel_file: Path) -> list[Path]:
    """The kernel's file, its room's reference and cases, and whatever these import from other rooms."""
    found: list[Path] = []
    todo = [kernel_file, kernel_file.parent / "reference.py", kernel_file.parent / "cases.py"]
    while todo:
        path = todo.pop()
        if path in found or path in GROUND or path.name == "__init__.py" or not path.exists():
            continue
        found.append(path)
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("nanodeploy.ops"):
                module = ROOT.joinpath(*node.module.split("."))
                todo += [module.with_suffix(".py"), *(module / f"{alias.name}.py" for alias in node.names)]
    return sorted(found)


def hashes(kernel_file: Path) -> dict[str, str]:
    """File, relative to the repository -> sha256."""
    return {str(p.relative_to(ROOT)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sources(kernel_file)}


def write(machine_key: str, device: str, verdicts: dict[str, dict[str, Any]]) -> Path:
    """Write the receipt of this machine. `verdicts`: "op/kernel" -> its Verdict as a dict, with its hashes."""
    path = RESULTS / machine_key / "gate.json"
    write_json(path, {"device": device, "kernels": verdicts})
    return path


def read(machine_key: str) -> dict[str, Any]:
    """The receipt of a machine; {} if it has none."""
    path = RESULTS / machine_key / "gate.json"
    return json.loads(path.read_text()) if path.exists() else {}


def newest() -> dict[str, Any]:
    receipts = [json.loads(path.read_text()) for path in RESULTS.glob("*/gate.json")]
    return max(receipts, key=lambda r: r["header"]["date"], default={})


def is_green(receipt: dict[str, Any], name: str, kernel_file: Path) -> bool:
    """Whether this receipt says that kernel "op/kernel", as it stands in the tree now, passed."""
    entry = receipt.get("kernels", {}).get(name)
    return bool(entry and entry["verdict"] == "green" and entry["hashes"] == hashes(kernel_file))


def changed() -> list[str]:
    """One line per kernel whose files differ from the newest receipt, or that no receipt names."""
    receipt = newest()
    lines, known = [], set()
    for name, entry in sorted(receipt.get("kernels", {}).items()):
        path = ROOT / entry["file"]
        known.add(path)
        if not path.exists():
            continue
        now = hashes(path)
        differing = [p for p in sorted({*now, *entry["hashes"]}) if now.get(p) != entry["hashes"].get(p)]
        if differing:
            lines.append(f"{name} changed since it was gated on {receipt['device']}: {', '.join(differing)}")
        elif entry["verdict"] == "red":
            lines.append(f"{name} was red on {receipt['device']}")
    for reference in sorted(OPS.glob("*/reference.py")):
        for path in sorted(reference.parent.glob("*.py")):
            if path not in known and ".kernel(" in path.read_text() and path.name not in ("reference.py", "cases.py"):
                lines.append(f"{path.relative_to(ROOT)} was never gated on a GPU")
    return lines
