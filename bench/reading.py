"""What a machine's results say: every kernel's time, decode speed by batch, and what was asked against what was got.

Reads the JSON files of bench/results/<machine>/ as the benches write them, and bench/peers.json. For bench.report.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.pictures import Dot, Line, Part
from nanodeploy import ops  # noqa: F401  loads every room into OPS
from nanodeploy.ops.registry import CHOICES, OPS, Op, matches

PEERS = Path(__file__).parent / "peers.json"
# Files by how their names begin, and what writes them.
KINDS = {
    "ops": "python -m bench.op --all",
    "gate": "python -m bench.gate --all",
    "offline-": "python -m bench.offline demo:random-qwen3-8b --json bench/results/MACHINE",
    "serve-": "python -m bench.serve --launch demo:random-qwen3-8b --json bench/results/MACHINE/serve-qwen3-8b.json",
    "startup-": "python -m bench.startup demo:random-qwen3-8b --json bench/results/MACHINE",
    "step-": "python -m bench.step demo:random-qwen3-8b --batch 1,64,256",
    "targets": "",
}
MOST_PARTS = 14  # bars of a waterfall; what is left is one
LOST, GAPS, UNEXPLAINED = "#D55E00", "#56B4E9", "#CC79A7"


class BadResults(Exception):
    """What cannot be read, in one line."""


# ---- reading


@dataclass
class Results:
    """The files of a machine, by name without ".json", and what the peers did on such a one."""

    machine: str
    files: dict[str, dict[str, Any]]
    peers: dict[str, Any]

    def of(self, kind: str) -> dict[str, dict[str, Any]]:
        return {name: found for name, found in self.files.items() if name.startswith(kind)}


def read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise BadResults(f"{path}: {error}") from error
    if not isinstance(found, dict):
        raise BadResults(f"{path}: wanted an object, got {type(found).__name__}")
    return found


def read(folder: Path, peers: Path = PEERS) -> Results:
    """All files of `folder` of the kinds that are known. Raises BadResults."""
    if not folder.is_dir():
        raise BadResults(f"{folder}: there is no such folder. The benches write it; {KINDS['ops']} does, on a GPU.")
    files = {path.stem: read_json(path) for path in sorted(folder.glob("*.json")) if path.stem.startswith(tuple(KINDS))}
    if not files:
        raise BadResults(f"{folder}: there are no results in it.")
    of_all = read_json(peers)
    return Results(folder.name, files, of_all if of_all.get("machine") == folder.name else {})


@contextmanager
def contents(name: str) -> Iterator[None]:
    """While open, a file's contents are looked into. Raises BadResults where they are not as the benches write them."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, ZeroDivisionError) as error:
        raise BadResults(f"{name}.json: not as the benches write it ({type(error).__name__}: {error})") from error


# ---- ops


@dataclass(frozen=True)
class Timed:
    """A kernel at a point."""

    op: str
    point: str
    kernel: str
    us: float
    rate: float  # per second
    unit: str  # "GB/s" or "TFLOP/s"
    percent: float  # of the machine's limit
    note: str
    amounts: tuple[float, float] | None = None  # bytes and flops of a call; None: neither file nor tree says
    chosen: bool = False

    def value(self, unit: str) -> float:
        """The time in "us", the share in "% of limit", or the rate."""
        if unit in ("us", "% of limit"):
            return self.us if unit == "us" else self.percent
        return self.rate / (1e9 if self.unit == "GB/s" else 1e12)


def chosen_kernel(op: Op, case: Any, machine: str) -> str | None:
    """What Op.choose takes on that machine: by the table that is shipped for it, else the first that fits."""
    path = CHOICES / f"{machine}.json"
    for row in read_json(path).get(op.name, ()) if path.exists() else ():
        kernel = op.kernels.get(row["kernel"])
        if kernel and matches(row.get("where", {}), case) and kernel.when(case):
            return kernel.name
    in_turn = sorted(op.kernels.values(), key=lambda k: k.order not in (None, k.name))
    return next((k.name for k in in_turn if k.needs != "cpu" and k.requires is None and k.when(case)), None)


def timed(results: Results) -> list[Timed]:
    """All rows of ops.json, and the peers' at the same points."""
    found = []
    for part in results.files.get("ops", {}).get("ops", ()):
        op = OPS.get(part["op"])
        for point in dict.fromkeys(row["point"] for row in part["rows"]):
            case = op.cases.POINTS.get(point) if op else None
            taken = chosen_kernel(op, case, results.machine) if op and case else None
            rows = [row for row in part["rows"] if row["point"] == point]
            for row in rows:
                how = (row["us"], row["rate"], row["unit"], row["percent"], row["note"])
                amounts = amounts_of(row, op.cases.cost(case) if op and case else None)
                found.append(Timed(part["op"], point, row["kernel"], *how, amounts, row["kernel"] == taken))
            for peer in results.peers.get("kernels", ()):
                if (peer["op"], peer["point"]) == (part["op"], point):
                    speed = rows[0]["us"] / peer["us"]
                    how = (peer["us"], rows[0]["rate"] * speed, rows[0]["unit"], rows[0]["percent"] * speed, "peer")
                    found.append(Timed(part["op"], point, peer["kernel"], *how))
    return found


def amounts_of(row: dict[str, Any], cost: Any) -> tuple[float, float] | None:
    """(bytes, flops) of a call: from the file, else from the room, if its case is still the one that was measured."""
    if row.get("num_bytes"):
        return row["num_bytes"], row["flops"]
    amount = row["rate"] * row["us"] / 1e6
    if cost and abs(amount - (cost.num_bytes if row["unit"] == "GB/s" else cost.flops)) < 1e-3 * amount:
        return cost.num_bytes, cost.flops
    return None


def dots(rows: Iterable[Timed], by: str) -> list[Dot]:
    """For a roofline, coloured by "op" or by "kernel". References are left out: their rates tell nothing."""
    return [Dot(getattr(r, by), *r.amounts, r.us, r.chosen) for r in rows if r.amounts and r.kernel != "reference"]


# ---- decode speed


def engine_of(offline: dict[str, Any]) -> tuple[str, str]:
    """("qwen3-8b", what is special about how the engine ran it: "FP8 KV")."""
    config = offline["engine"]["config"]
    name = Path(config["model"].removeprefix("demo:").removeprefix("random-")).name.lower()
    special = ["FP8 KV"] if config.get("kv_cache_dtype") == "fp8" else []
    special += ["FP8 weights"] if config.get("quantization") == "fp8" else []
    return name, ", ".join([*special, *(["--deterministic"] if config.get("deterministic") else [])])


def decode_lines(results: Results) -> dict[str, list[Line]]:
    """Model -> decode steps by batch: ours, the floor of the plain engine, the peers'."""
    found: dict[str, list[Line]] = {}
    for name, offline in results.of("offline-").items():
        with contents(name):
            model, special = engine_of(offline)
            rows = [row for row in offline["rows"] if row["name"].startswith("TPOT, batch ")]
            steps = sorted((int(row["name"].split()[-1]), float(row["value"]), row["floor"]) for row in rows)
            if steps:
                lines = found.setdefault(model, [])
                lines.append(Line(named("nanodeploy", special), [(batch, ms) for batch, ms, _ in steps], "ours"))
                if not special and all(floor for _, _, floor in steps):
                    lines.append(Line("floor", [(batch, floor) for batch, _, floor in steps], "floor"))
    with contents("peers"):
        for model, lines in found.items():
            for suffix, special in (("", ""), ("-fp8", "FP8 KV")):
                for peer, figures in results.peers.get("models", {}).get(f"random-{model}{suffix}", {}).items():
                    at = [(int(batch), ms) for batch, ms in figures["tpot_ms"].items()]
                    lines.append(Line(named(peer, special), at, "peer"))
    return found


def named(who: str, special: str) -> str:
    return f"{who}, {special}" if special else who


# ---- steps


def waterfall_parts(step: dict[str, Any]) -> list[Part]:
    """What stands between the floor and the step: by kernels, over their floors; gaps; what nobody explains."""
    items = sorted(step["items"], key=lambda item: -abs(item["lost_us"]))
    parts = [Part(item_name(item), item["lost_us"], LOST) for item in items[:MOST_PARTS]]
    if rest := items[MOST_PARTS:]:
        parts.append(Part(f"{len(rest)} others", sum(item["lost_us"] for item in rest), LOST))
    parts.append(Part("gaps between kernels", step["sum"]["gaps_us"], GAPS))
    return [*parts, Part("unexplained", step["sum"]["unexplained_us"], UNEXPLAINED)]


def item_name(item: dict[str, Any]) -> str:
    return f"{item['name']} ({item['kernel']})" if item["op"] else item["name"]


# ---- targets


def number(value: float | None) -> str:
    """Three digits or so; "" for None."""
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


@dataclass(frozen=True)
class Goal:
    what: str
    unit: str
    wanted: float
    more_is_better: bool
    got: float | None
    source: str  # the file or document that `got` is from
    peer: float | None
    note: str

    @property
    def verdict(self) -> str:
        if self.got is None:
            return "not measured"
        ratio = self.got / self.wanted if self.more_is_better else self.wanted / self.got
        return "reached" if ratio >= 1 else f"missed by {1 - ratio:.1%}"

    def cells(self) -> list[str]:
        sign = "at least" if self.more_is_better else "at most"
        unit = "" if self.unit == "x" else f" {self.unit}"
        got = "" if self.got is None else number(self.got) + unit
        return [self.what, f"{sign} {number(self.wanted)}{unit}", got, number(self.peer), self.verdict, self.note]


GOAL_HEADS = ["", "asked", "got", "vLLM 0.24", "", "note"]


def goals(results: Results, rows: Sequence[Timed]) -> list[Goal]:
    found = []
    for target in results.files.get("targets", {}).get("targets", ()):
        got, source = look_up(target["from"], target["unit"], results, rows)
        if got is None and "logged" in target:
            got, source = target["logged"]["value"], target["logged"]["where"]
        more = {"more": True, "less": False}[target["better"]]
        how = (target["what"], target["unit"], float(target["wanted"]), more, got, source)
        found.append(Goal(*how, target.get("peer"), target.get("note", "")))
    return found


def look_up(where: dict[str, Any], unit: str, results: Results, rows: Sequence[Timed]) -> tuple[float | None, str]:
    """(a value that a target names, the file that it is from); None if it has not been measured."""
    if "over" in where:
        (a, source), (b, _) = (look_up(part, unit, results, rows) for part in where["over"])
        return (a / b if a and b else None), source
    name = where["file"]
    offered: Any = results.files.get(name.removesuffix(".json"), {})
    with contents(name.removesuffix(".json")):
        if "row" in where:
            return next((row["value"] for row in offered.get("rows", ()) if row["name"] == where["row"]), None), name
        if "key" in where:
            for key in where["key"]:
                offered = offered.get(key, {})
            return (float(offered) if offered else None), name
    by_point = {(row.op, row.point): row for row in rows if row.chosen}
    wanted = [by_point.get((op, point)) for op, point in where["points"]]
    there = [row for row in wanted if row]
    if len(there) < len(wanted):
        return None, name
    return min(there, key=lambda row: row.percent).value(unit), name
