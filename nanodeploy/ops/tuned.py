"""What `nanodeploy tune` measured on this machine: a table per device, in the user's cache folder."""

import hashlib
import json
from pathlib import Path
from typing import Any

from nanodeploy.config import cache_dir

ROOMS = Path(__file__).parent

Rows = list[dict[str, Any]]  # as in choices/<device>.json


def path(device_key: str) -> Path:
    return cache_dir() / "choices" / f"{device_key}.json"


def read(device_key: str) -> dict[str, Rows]:
    """Op -> its rows, of the ops whose rooms are as they were when they were measured."""
    return {name: entry["rows"] for name, entry in _entries(device_key).items() if entry["room"] == room(name)}


def write(device_key: str, rows: dict[str, Rows]) -> Path:
    """Replace the rows of these ops; the other ops keep theirs."""
    entries = _entries(device_key) | {name: {"room": room(name), "rows": found} for name, found in rows.items()}
    file = path(device_key)
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(dict(sorted(entries.items())), indent=1) + "\n")
    partial.replace(file)
    return file


def room(op_name: str) -> str:
    """Hash of an op's room: a kernel that was edited since it was measured is another kernel."""
    digest = hashlib.sha256()
    for file in sorted((ROOMS / op_name).glob("*.py")):
        digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()


def _entries(device_key: str) -> dict[str, Any]:
    file = path(device_key)
    entries: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    return entries
