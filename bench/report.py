"""One HTML page of a machine's results: targets, decode speed, steps, rooflines, and where each number comes from.

    python -m bench.report --machine h200
    python -m bench.report --machine h200 --pictures docs/pictures     the pictures as files of their own, too
    python -m bench.report --machine h200 --markdown                   the table of targets, for README

It reads what the other benches left in bench/results/<machine>/ (ops.json, gate.json, offline-*.json, serve-*.json,
step-*.json, startup-*.json), what was to be reached (targets.json) and what others reach (bench/peers.json). It needs
no GPU, and the page loads nothing from elsewhere. Results that cannot be read end it with one line and exit code 2.
"""

import argparse
import html
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from bench import pictures
from bench.reading import (
    GOAL_HEADS,
    KINDS,
    BadResults,
    Results,
    Timed,
    contents,
    decode_lines,
    dots,
    engine_of,
    goals,
    item_name,
    named,
    number,
    read,
    timed,
    waterfall_parts,
)
from bench.receipt import RESULTS


class Raw(str):
    """HTML; every other string is text, and is escaped."""


def text(value: object) -> str:
    return value if isinstance(value, Raw) else html.escape(str(value))


def tag(name: str, *inner: object, **attributes: str) -> Raw:
    """An element. `class_` stands for class."""
    given = "".join(f' {key.rstrip("_")}="{html.escape(value)}"' for key, value in attributes.items())
    return Raw(f"<{name}{given}>{''.join(text(part) for part in inner)}</{name}>")


def table(heads: Sequence[object], rows: Iterable[Sequence[object]]) -> Raw:
    """The first column is text, and so is whatever holds a letter first; numbers stand to the right."""

    def cell(value: object) -> Raw:
        is_number = str(value)[:1] in "0123456789-+±" and not isinstance(value, Raw)
        return tag("td", value, class_="n") if is_number else tag("td", value)

    head = tag("tr", *(tag("th", h) for h in heads))
    body = [tag("tr", *map(cell, row)) for row in rows]
    return tag("div", tag("table", tag("thead", head), tag("tbody", *body)), class_="wide")


def missing(kind: str, machine: str) -> Raw:
    command = KINDS[kind].replace("MACHINE", machine)
    return tag("p", "Not measured yet: run ", tag("code", command), ".", class_="missing")


def targets_section(results: Results, rows: Sequence[Timed]) -> list[Raw]:
    found = goals(results, rows)
    if not found:
        return [tag("p", "Nothing was asked of this machine.")]
    looks = {"reached": "good", "not measured": "open"}
    lines = []
    for goal in found:
        *cells, verdict, note = goal.cells()
        shown = tag("span", verdict, class_=looks.get(verdict, "bad"))
        lines.append([*cells, shown, goal.source if goal.got is not None else "", note])
    counts = [sum(goal.verdict.startswith(word) for goal in found) for word in ("reached", "missed", "not")]
    said = f"{counts[0]} reached, {counts[1]} missed, {counts[2]} not measured. "
    heads = [*GOAL_HEADS[:-1], "from", GOAL_HEADS[-1]]
    return [tag("p", said + results.files["targets"].get("source", "")), table(heads, lines)]


def speed_section(results: Results, drawn: dict[str, str]) -> list[Raw]:
    found: list[Raw] = []
    for model, lines in decode_lines(results).items():
        drawn[f"decode-{model}"] = picture = pictures.latency(lines, f"Decode of {model}: throughput over latency")
        found += [tag("h3", f"{model}: decode"), tag("figure", Raw(picture), tag("figcaption", DECODE_CAPTION))]
    for name, offline in results.of("offline-").items():
        with contents(name):
            model, special = engine_of(offline)
            peers = results.peers.get("models", {})
            peers = peers.get(f"random-{model}{'-fp8' if 'FP8' in special else ''}", {})
            lines_ = []
            for row in offline["rows"]:
                floor = f"{distance(row['value'], row['floor'], row['unit']):.2f}x" if row["floor"] else ""
                theirs = [peer_value(figures, row["peer_key"]) for figures in peers.values()]
                shown = [number(row["value"]), row["unit"], number(row["floor"]), floor, *map(number, theirs)]
                lines_.append([row["name"], *shown])
            heads = ["", named("nanodeploy", special), "", "floor", "of floor", *peers]
            found += [tag("h4", f"{named(model, special)} ({name}.json)"), table(heads, lines_)]
    if not found:
        found.append(missing("offline-", results.machine))
    if "source" in results.peers:
        found.append(tag("p", f"Peers: {results.peers['source']}."))
    serve = []
    for name, run in results.of("serve-").items():
        with contents(name):
            rate = run["arguments"]["request_rate"]
            latencies = [number(run[f"{what}_ms"][kind]) for what in ("ttft", "tpot") for kind in ("median", "p99")]
            done = f"{run['successful']} of {run['successful'] + run['failed']}"
            serve.append([f"{name}.json", rate, done, *latencies, number(run["output_tokens_per_s"])])
    heads = ["", "requests/s", "served", "TTFT ms, median", "p99", "ms a token, median", "p99", "output tokens/s"]
    return [*found, tag("h3", "Over HTTP"), table(heads, serve) if serve else missing("serve-", results.machine)]


DECODE_CAPTION = (
    "Up is more tokens a second of all sequences together, left is a shorter wait of each. Numbers are sequences; the "
    "dashed line is the least time for the bytes of the same step at this machine's measured copy bandwidth."
)


def distance(value: float, floor: float, unit: str) -> float:
    """How many times the floor's time it takes."""
    return floor / value if unit == "tok/s" else value / floor


def peer_value(figures: dict[str, Any], key: Sequence[str]) -> float | None:
    value: Any = figures if key else None
    for part in key:
        value = value.get(part) if value else None
    return value


def steps_section(results: Results, drawn: dict[str, str]) -> list[Raw]:
    found: list[Raw] = []
    for name, step in results.of("step-").items():
        with contents(name):
            total, title = step["sum"], step["scenario"]["name"]
            parts = waterfall_parts(step)
            drawn[name] = picture = pictures.waterfall(
                parts, total["floor_us"], total["step_us"], f"{name}: {title}, from its floor to the step"
            )
            said = (
                f"{total['step_us']:,.0f} us by the clock, {total['step_us'] / step['whole_floor_us']:.2f} times the "
                f"floor of the whole step ({step['whole_floor_us']:,.0f} us). Kernels' floors "
                f"{total['floor_us']:,.0f} us, lost in kernels {total['lost_us']:,.0f}, gaps {total['gaps_us']:,.0f}, "
                f"unexplained {total['unexplained_us']:,.0f}."
            )
            names = ("us", "alone_us", "floor_us", "lost_us", "gap_us")
            lines = [
                [
                    item_name(i),
                    number(i["calls"]),
                    *(f"{i[n]:,.1f}" for n in names),
                    f"{i['us'] / total['step_us']:.1%}",
                ]
                for i in step["items"]
            ]
            heads = ["", "calls", "us", "alone", "floor", "lost", "gaps before", "of step"]
            found += [tag("h3", f"{title} ({name}.json)"), tag("p", said), tag("figure", Raw(picture))]
            found.append(table(heads, lines))
    return found or [missing("step-", results.machine)]


def ops_section(results: Results, rows: Sequence[Timed], drawn: dict[str, str]) -> list[Raw]:
    if "ops" not in results.files:
        return [missing("ops", results.machine)]
    limits = results.files["ops"]["limits"]
    ceilings = limits["copy_bytes_per_s"], limits["bf16_flops_per_s"]
    verdicts = results.files.get("gate", {}).get("kernels", {})
    drawn["roofline"] = picture = pictures.roofline(dots(rows, "op"), *ceilings, "Every op on the roofline")
    found = [tag("figure", Raw(picture), tag("figcaption", ROOFLINE_CAPTION))]
    for op in dict.fromkeys(row.op for row in rows):
        here = [row for row in rows if row.op == op]
        known = dots(here, "kernel")
        found.append(tag("h3", op, id=f"op-{op}"))
        if known:
            found.append(tag("figure", Raw(pictures.roofline(known, *ceilings, f"{op} on the roofline", 3.4))))
        if left_out := len(
            {row.point for row in here if row.kernel != "reference" and not row.amounts}
            - {row.point for row in here if row.amounts}
        ):
            found.append(tag("p", f"{left_out} points are not drawn: this tree no longer has the case that was timed."))
        lines = []
        for row in here:
            gated = verdicts.get(f"{op}/{row.kernel}", {}).get("verdict", "")
            share = tag("span", f"{row.percent:.0f} %", class_="bar", style=f"--share:{min(100, row.percent):.1f}%")
            how = [f"{row.us:.2f}", f"{number(row.value(row.unit))} {row.unit}", share, gated, row.note]
            lines.append([row.point, tag("b", f"{row.kernel} (chosen)") if row.chosen else row.kernel, *how])
        found.append(table(["point", "kernel", "us", "rate", "of the limit", "gate", ""], lines))
    return found


ROOFLINE_CAPTION = (
    "A dot for each kernel at each point; filled dots are the kernels that this tree chooses there. Grey are the "
    "limits, measured in the same run. References are left out."
)


def files_section(results: Results) -> list[Raw]:
    lines = []
    for name, found in results.files.items():
        with contents(name):
            if head := found.get("header"):
                gpus = ", ".join(sorted({f"{g['name']}, driver {g['driver_version']}" for g in head["gpus"]}))
                versions = ", ".join(f"{key} {head['versions'].get(key, '?')}" for key in ("torch", "triton"))
                commit = (head["commit"] or "not known")[:20] + (" and changes" if head["dirty"] else "")
                lines.append(
                    [f"{name}.json", head["date"], commit, head["sources_sha256"][:10], gpus or "no GPU", versions]
                )
    heads = ["file", "measured", "commit", "sources", "machine", "versions"]
    return [tag("p", "Commits and versions of the runs, not of this page."), table(heads, lines)]


META = Raw('<meta charset="utf-8"><meta name="viewport" content="width=device-width">')
STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:70rem;margin:auto;padding:1rem;color:#111;background:#fff}
h2{border-top:1px solid #ccc;padding-top:1rem}
nav a{margin-right:1rem}
figure{margin:1rem 0}
figure svg{max-width:100%;height:auto}
figcaption,.missing{color:#555}
.wide{overflow-x:auto}
table{border-collapse:collapse;font-size:13px}
th,td{padding:.15rem .6rem .15rem 0;text-align:left;border-bottom:1px solid #eee;vertical-align:top}
.n{text-align:right;font-variant-numeric:tabular-nums}
.good{color:#00664b}
.bad{color:#a33c00}
.open{color:#555}
.bar{display:block;min-width:7rem;background:linear-gradient(90deg,#b7d7ea var(--share),transparent var(--share))}
code{background:#f3f3f3}
"""


def build(results: Results) -> tuple[str, dict[str, str]]:
    """(the page, its pictures by name). Raises BadResults."""
    drawn: dict[str, str] = {}
    with contents("ops"):
        rows = timed(results)
    with contents("targets"):
        targets = targets_section(results, rows)
    speed, steps = speed_section(results, drawn), steps_section(results, drawn)
    with contents("ops"):
        rooflines = ops_section(results, rows, drawn)
    sections = {
        "Targets": targets,
        "Speed beside others": speed,
        "Where a step's time goes": steps,
        "Every op": rooflines,
        "Files": files_section(results),
    }
    ids = {title: title.split()[0].lower() for title in sections}
    links = [tag("a", title, href=f"#{ids[title]}") for title in sections]
    title = f"nanodeploy on {results.machine}"
    body = [tag("h1", title), tag("nav", *links)]
    for name, parts in sections.items():
        body += [tag("h2", name, id=ids[name]), *parts]
    page = tag("html", tag("head", META, tag("title", title), tag("style", Raw(STYLE))), tag("body", *body), lang="en")
    return f"<!doctype html>\n{page}\n", drawn


def markdown(results: Results) -> str:
    """The table of targets."""
    with contents("ops"):
        rows = timed(results)
    with contents("targets"):
        lines = [GOAL_HEADS, ["---"] * len(GOAL_HEADS), *(goal.cells() for goal in goals(results, rows))]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--machine", default="h200", help="a folder of bench/results, or a path to one [%(default)s]")
    parser.add_argument("--out", type=Path, help="the page [report.html beside the results]")
    parser.add_argument("--pictures", type=Path, metavar="DIR", help="also write each picture there, as SVG")
    parser.add_argument("--markdown", action="store_true", help="print the table of targets, and write nothing")
    args = parser.parse_args(argv)
    folder = RESULTS / args.machine  # a path that begins at the root stands for itself
    try:
        results = read(folder)
        if args.markdown:
            print(markdown(results))
            return 0
        page, drawn = build(results)
        out = args.out or folder / "report.html"
        out.write_text(page)
        for name, picture in drawn.items() if args.pictures else ():
            args.pictures.mkdir(parents=True, exist_ok=True)
            (args.pictures / f"{name}.svg").write_text(picture)
    except (BadResults, OSError) as error:
        print(f"bench.report: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(f"wrote {out} ({out.stat().st_size / 1e3:.0f} kB) from {len(results.files)} files")
    return 0


if __name__ == "__main__":
    sys.exit(main())
