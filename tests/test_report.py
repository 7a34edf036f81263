"""bench.report: a page from a small folder of results, and from the one that is committed."""

import html.parser
import json
import re
import subprocess
import sys
from xml.etree import ElementTree

import pytest

from bench import pictures, reading, report
from bench.header import ROOT

NASTY = '<script>alert("x")</script> & $b$ "q"'
LIMITS = {"copy_bytes_per_s": 4e12, "bf16_flops_per_s": 8e14}


def head(**changes):
    gpu = {"name": "NVIDIA H200", "driver_version": "580.1"}
    return {
        "date": "2026-11-24T01:02:03+00:00",
        "commit": "0123456789abcdef",
        "dirty": False,
        "sources_sha256": "f" * 64,
        "gpus": [gpu],
        "versions": {"torch": "2.11.0", "triton": "3.6.0"},
        **changes,
    }


def op_row(point, kernel, us, *, num_bytes=None, flops=0, unit="GB/s", percent=50.0, note="", rate=None):
    row = {"point": point, "kernel": kernel, "us": us, "spread_us": 0.1, "unit": unit, "percent": percent, "note": note}
    amount = num_bytes if unit == "GB/s" else flops
    row["rate"] = rate if rate is not None else amount / us * 1e6
    return row if num_bytes is None else row | {"num_bytes": num_bytes, "flops": flops}


DECODE = "32/8 d128 B64 ctx4096"


def make_ops():
    attention = [
        op_row(DECODE, "planned", 300.0, num_bytes=1_074_000_000, flops=4_294_967_296, percent=89.5),
        op_row(DECODE, "split_kv", 400.0, num_bytes=1_074_000_000, flops=4_294_967_296, percent=67.1),
        op_row(DECODE, "reference", 9000.0, num_bytes=1_074_000_000, flops=4_294_967_296, note="launched from Python"),
        op_row("a point that is gone", "split_kv", 10.0, rate=1e12),
    ]
    sample = [op_row("qwen3 S1 greedy", "two_pass", 11.5, num_bytes=303_916, percent=0.6)]
    unknown = [op_row(NASTY, NASTY, 3.0, num_bytes=3000, flops=3000, percent=1.0, note=NASTY)]
    parts = {"decode_attention": attention, "sample": sample, NASTY: unknown}
    return {"header": head(), "limits": LIMITS, "ops": [{"op": op, "rows": rows} for op, rows in parts.items()]}


def make_offline(model="demo:random-qwen3-8b", w=9000.0, **config):
    rows = [
        {"name": "W (256 requests)", "value": w, "unit": "tok/s", "floor": 12000.0, "peer_key": ["w_output_tok_s"]},
        {"name": "TPOT, batch 1", "value": 4.0, "unit": "ms", "floor": 3.5, "peer_key": ["tpot_ms", "1"]},
        {"name": "TPOT, batch 64", "value": 7.0, "unit": "ms", "floor": 5.6, "peer_key": ["tpot_ms", "64"]},
        {"name": "GPU idle, batch 256", "value": 1.5, "unit": "%", "floor": None, "peer_key": []},
    ]
    engine = {"config": {"model": model, "kv_cache_dtype": "auto", "deterministic": False, **config}}
    return {"header": head(), "engine": engine, "rows": rows, "limits": LIMITS}


def make_step(name="64 decodes at 1024 tokens"):
    items = [
        {
            "op": "linear",
            "shape": "6144x4096",
            "kernel": "streamed",
            "name": "linear 6144x4096",
            "calls": 36,
            "us": 500.0,
        },
        {"op": None, "shape": "", "kernel": NASTY, "name": NASTY, "calls": 1, "us": 3.0},
    ]
    for item, floor in zip(items, (450.0, 0.0)):
        item |= {"alone_us": 1.1 * item["us"], "floor_us": floor, "lost_us": item["us"] - floor, "gap_us": 0.5}
    total = {"step_us": 520.0, "floor_us": 450.0, "lost_us": 53.0, "gaps_us": 10.0, "unexplained_us": 7.0}
    return {"header": head(), "scenario": {"name": name}, "sum": total, "items": items, "whole_floor_us": 440.0}


def make_targets():
    def target(what, wanted, unit, better, source, **more):
        return {"what": what, "wanted": wanted, "unit": unit, "better": better, "from": source, **more}

    offline = {"file": "offline-qwen3-8b.json", "row": "W (256 requests)"}
    return {
        "source": "what was asked",
        "targets": [
            target("W", 10000, "tok/s", "more", offline, peer=9065),
            target("batch 1", 4.2, "ms", "less", {"file": "offline-qwen3-8b.json", "row": "TPOT, batch 1"}),
            target("decode", 3500, "GB/s", "more", {"file": "ops.json", "points": [["decode_attention", DECODE]]}),
            target("share", 90, "% of limit", "more", {"file": "ops.json", "points": [["decode_attention", DECODE]]}),
            target("time", 299, "us", "less", {"file": "ops.json", "points": [["decode_attention", DECODE]]}),
            target("fp8 over bf16", 1.1, "x", "more", {"over": [{**offline, "file": "offline-fp8.json"}, offline]}),
            target("start", 8, "s", "less", {"file": "startup-x.json", "key": ["runs", "cold", "s"]},
                   logged={"value": 5, "where": "LOG.md"}),
            target(NASTY, 1, "x", "more", {"file": "ops.json", "points": [["linear", "nowhere"]]}, note=NASTY),
        ],
    }  # fmt: skip


def make_serve():
    latency = {"median": 95.0, "mean": 100.0, "p99": 200.0}
    return {
        "header": head(), "arguments": {"request_rate": 16.0}, "successful": 255, "failed": 1,
        "ttft_ms": latency, "tpot_ms": latency, "output_tokens_per_s": 5890.0,
    }  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    """A machine called h200, so that its shipped table of choices and the peers are used."""
    made = tmp_path / "h200"
    made.mkdir()
    files = {
        "ops": make_ops(),
        "gate": {"header": head(), "kernels": {"decode_attention/planned": {"verdict": "green"}}},
        "offline-qwen3-8b": make_offline(),
        "offline-fp8": make_offline(w=10800.0, kv_cache_dtype="fp8"),
        "serve-qwen3-8b": make_serve(),
        "step-qwen3-8b-b64-c1024": make_step(),
        "targets": make_targets(),
        "notes": {"not": "ours"},
    }
    for name, what in files.items():
        (made / f"{name}.json").write_text(json.dumps(what))
    return made


class Page(html.parser.HTMLParser):
    """Rows of tables as lists of texts, every attribute, every tag, all text."""

    def __init__(self, page):
        super().__init__()
        self.rows, self.attributes, self.tags, self.text = [], [], [], ""
        self.in_cell = False
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attributes]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self.in_cell = True

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self.in_cell = False

    def handle_data(self, data):
        self.text += data
        if self.in_cell:
            self.rows[-1][-1] += data

    def row(self, *begin):
        (found,) = [row for row in self.rows if row[: len(begin)] == list(begin)]
        return found


@pytest.fixture
def page(folder):
    return Page(report.build(reading.read(folder))[0])


def check_it_stands_alone(text):
    """Nothing is loaded, nothing runs, and no two elements share an id."""
    page = Page(text)
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids)), [id for id in set(ids) if ids.count(id) > 1]
    assert not {"script", "link", "iframe", "img", "object", "embed", "base"} & set(page.tags)
    assert not [a for _, a, _ in page.attributes if a.startswith("on")]
    for _, name, value in page.attributes:
        if name in ("href", "src", "xlink:href", "action", "data"):
            assert value.startswith("#"), (name, value)
        assert name.startswith("xmlns") or "http" not in (value or ""), (name, value)
    assert not re.findall(r"url\((?!#)|@import", text)


def test_the_page_stands_alone_and_is_escaped(folder):
    text, _ = report.build(reading.read(folder))
    check_it_stands_alone(text)
    assert "<script" not in text and NASTY in Page(text).text
    assert text.startswith("<!doctype html>") and text.count("<html") == text.count("</html>") == 1


def test_targets(page):
    assert page.row("W")[1:6] == [
        "at least 10,000 tok/s",
        "9,000 tok/s",
        "9,065",
        "missed by 10.0%",
        "offline-qwen3-8b.json",
    ]
    assert page.row("batch 1")[1:5] == ["at most 4.2 ms", "4 ms", "", "reached"]
    assert page.row("decode")[2:5] == ["3,580 GB/s", "", "reached"]
    assert page.row("share")[2:5] == ["89.5 % of limit", "", "missed by 0.6%"]
    assert page.row("time")[2:5] == ["300 us", "", "missed by 0.3%"]
    assert page.row("fp8 over bf16")[1:5] == ["at least 1.1", "1.2", "", "reached"]
    assert page.row("start")[2:6] == ["5 s", "", "reached", "LOG.md"]
    assert page.row(NASTY, "at least 1")[2:] == ["", "", "not measured", "", NASTY]
    assert "4 reached, 3 missed, 1 not measured. what was asked" in page.text


def test_ops(page):
    """Each kernel at each point has its row; the one that the shipped table chooses is marked."""
    assert page.row(DECODE, "planned (chosen)")[2:] == ["300.00", "3,580 GB/s", "90 %", "green", ""]
    assert page.row(DECODE, "split_kv")[2:] == ["400.00", "2,685 GB/s", "67 %", "", ""]
    assert page.row(DECODE, "FA3 of vLLM 0.24.0")[2:4] == ["257.00", "4,179 GB/s"]
    assert page.row(NASTY, NASTY)[2:] == ["3.00", "1 GB/s", "1 %", "", NASTY]
    assert "1 points are not drawn" in page.text
    heads = [value for tag, name, value in page.attributes if (tag, name) == ("h3", "id") and value.startswith("op-")]
    assert heads == ["op-decode_attention", "op-sample", f"op-{NASTY}"]


def test_dots_are_where_the_numbers_put_them(folder, monkeypatch):
    drawn = []
    monkeypatch.setattr(pictures, "roofline", lambda dots, *rest: drawn.append((dots, *rest)) or "<svg></svg>")
    report.build(reading.read(folder))
    every, bandwidth, rate, _ = drawn[0]
    assert (bandwidth, rate) == (4e12, 8e14)
    assert [(d.group, d.us, d.chosen) for d in every] == [
        ("decode_attention", 300.0, True), ("decode_attention", 400.0, False), ("sample", 11.5, True),
        (NASTY, 3.0, False),
    ]  # fmt: skip
    assert (every[0].num_bytes, every[0].flops) == (1_074_000_000, 4_294_967_296)
    assert [d.group for d in drawn[1][0]] == ["planned", "split_kv"]


def figure_of(monkeypatch, draw):
    """The figure behind a picture."""
    with monkeypatch.context() as patched:
        patched.setattr(pictures, "svg", lambda figure, title: figure)
        return draw()


def points(axes):
    return {(x, y) for line in axes.lines for x, y in zip(line.get_xdata(), line.get_ydata())}


def test_a_roofline(monkeypatch):
    """10 flops a byte at half the bandwidth; and 1 GB in 500 us, which has no flops to count."""
    dots = [pictures.Dot("a", 1e9, 1e10, 500.0, True), pictures.Dot("_b$", 1e9, 0, 500.0, False)]
    plain, axes = figure_of(monkeypatch, lambda: pictures.roofline(dots, 4e12, 8e14, "")).axes
    assert (1000.0, 2000.0) in points(plain) and (10.0, 20.0) in points(axes)
    assert {(200.0, 800.0), (5.0, 20.0)} <= points(axes), "the ridge, and the slope's lower end"
    svg = pictures.roofline(dots, 4e12, 8e14, "title & more")
    assert "<title>title &amp; more</title>" in svg and "4,000 GB/s" in svg and "_b$" in svg
    assert svg == pictures.roofline(dots, 4e12, 8e14, "title & more"), "the same numbers give the same bytes"
    for some in (dots[:1], dots[1:]):
        assert len(figure_of(monkeypatch, lambda some=some: pictures.roofline(some, 4e12, 8e14, "")).axes) == 1


def test_a_waterfall(monkeypatch):
    """Each bar begins where the one above ended, one that gains goes back, and the last two ends meet."""
    parts = [pictures.Part("a", 10.0, "red"), pictures.Part("b", -4.0, "red"), pictures.Part("gaps", 6.0, "blue")]
    (axes,) = figure_of(monkeypatch, lambda: pictures.waterfall(parts, 100.0, 112.0, "")).axes
    assert [(bar.get_x(), bar.get_width()) for bar in axes.patches] == [
        (0, 100), (100, 10), (110, -4), (106, 6), (0, 112),
    ]  # fmt: skip


def test_latency(monkeypatch):
    lines = [pictures.Line("us", [(1, 4.0), (64, 8.0)], "ours"), pictures.Line("floor", [(1, 2.0)], "floor")]
    (axes,) = figure_of(monkeypatch, lambda: pictures.latency(lines, "")).axes
    assert points(axes) == {(4.0, 250.0), (8.0, 8000.0), (2.0, 500.0)}


def test_decode_beside_others(folder, monkeypatch):
    drawn = {}
    monkeypatch.setattr(pictures, "latency", lambda lines, title: drawn.setdefault(title, lines) and "<svg></svg>")
    page = Page(report.build(reading.read(folder))[0])
    (lines,) = drawn.values()
    by_name = {line.name: line for line in lines}
    assert list(by_name) == [
        "nanodeploy, FP8 KV", "nanodeploy", "floor", "vllm 0.24.0", "nano-vllm bb823b3", "vllm 0.24.0, FP8 KV",
    ]  # fmt: skip
    assert by_name["nanodeploy"].steps == [(1, 4.0), (64, 7.0)] and by_name["floor"].steps == [(1, 3.5), (64, 5.6)]
    assert by_name["vllm 0.24.0"].steps == [(1, 5.24), (8, 5.73), (64, 8.0), (256, 18.7)]
    assert [r for r in page.rows if r[0] == "W (256 requests)"] == [
        ["W (256 requests)", "10,800", "tok/s", "12,000", "1.11x", "9,635"],
        ["W (256 requests)", "9,000", "tok/s", "12,000", "1.33x", "9,065", "8,596"],
    ]
    assert page.row("serve-qwen3-8b.json", "16.0")[2:] == ["255 of 256", "95", "200", "95", "200", "5,890"]


def test_a_step_is_a_waterfall(folder, page):
    assert page.row("linear 6144x4096 (streamed)")[1:] == ["36", "500.0", "550.0", "450.0", "50.0", "0.5", "96.2%"]
    assert "520 us by the clock, 1.18 times the floor of the whole step (440 us)" in page.text
    step = make_step()
    parts = reading.waterfall_parts(step)
    assert [(p.name, p.us) for p in parts] == [
        ("linear 6144x4096 (streamed)", 50.0), (NASTY, 3.0), ("gaps between kernels", 10.0), ("unexplained", 7.0),
    ]  # fmt: skip
    assert step["sum"]["floor_us"] + sum(p.us for p in parts) == step["sum"]["step_us"]
    step["items"] = step["items"][:1] * (reading.MOST_PARTS + 3)
    assert [p.us for p in reading.waterfall_parts(step) if p.name == "3 others"] == [150.0]


def test_the_files_that_were_used(page):
    assert page.row("ops.json")[1:] == [
        "2026-11-24T01:02:03+00:00", "0123456789abcdef", "f" * 10, "NVIDIA H200, driver 580.1",
        "torch 2.11.0, triton 3.6.0",
    ]  # fmt: skip
    assert not [row for row in page.rows if row[0] == "notes.json"]


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("step-*", "Not measured yet: run python -m bench.step"),
        ("ops", "Not measured yet: run python -m bench.op --all"),
        ("offline-*", "Not measured yet: run python -m bench.offline"),
        ("serve-*", "Not measured yet: run python -m bench.serve"),
        ("targets", "Nothing was asked of this machine."),
    ],
)
def test_what_is_missing_is_said(folder, kind, said):
    for path in folder.glob(f"{kind}.json"):
        path.unlink()
    assert said in Page(report.build(reading.read(folder))[0]).text


def test_peers_are_of_the_same_machine(folder):
    page = Page(report.build(reading.read(folder.rename(folder.parent / "gb10")))[0])
    assert "FA3" not in page.text and "vllm 0.24.0" not in page.text


def run(capsys, *arguments):
    """(exit code, stdout, stderr lines)"""
    code = report.main([*map(str, arguments)])
    said = capsys.readouterr()
    return code, said.out, said.err.splitlines()


def test_the_command_writes_the_page_and_its_pictures(folder, capsys, tmp_path):
    code, out, _ = run(capsys, "--machine", folder, "--pictures", tmp_path / "pictures")
    assert code == 0 and "report.html" in out and "from 7 files" in out
    check_it_stands_alone((folder / "report.html").read_text())
    names = {path.name for path in (tmp_path / "pictures").iterdir()}
    assert names == {"roofline.svg", "decode-qwen3-8b.svg", "step-qwen3-8b-b64-c1024.svg"}
    for name in names:
        assert ElementTree.fromstring((tmp_path / "pictures" / name).read_text()).tag.endswith("}svg")
    code, out, _ = run(capsys, "--machine", folder, "--out", tmp_path / "other.html")
    assert code == 0 and (tmp_path / "other.html").read_text() == (folder / "report.html").read_text()
    code, out, _ = run(capsys, "--machine", folder, "--markdown")
    assert code == 0 and "| W | at least 10,000 tok/s | 9,000 tok/s | 9,065 | missed by 10.0% |  |" in out.splitlines()


def broken(name, what):
    def do(folder):
        (folder / f"{name}.json").write_text(what if isinstance(what, str) else json.dumps(what))

    return do


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda folder: folder.rename(folder.parent / "elsewhere"), "there is no such folder"),
        (lambda folder: [path.unlink() for path in folder.iterdir()], "there are no results in it"),
        (broken("ops", '{"header": '), "ops.json: Expecting value"),
        (broken("ops", "[1]"), "ops.json: wanted an object, got list"),
        (broken("ops", {"header": head(), "ops": [{"op": "sample", "rows": [{"point": "x"}]}]}), "ops.json: not as"),
        (broken("ops", {"header": head(), "ops": 7, "limits": LIMITS}), "ops.json: not as the benches write it"),
        (broken("offline-qwen3-8b", {"header": head(), "rows": None}), "offline-qwen3-8b.json: not as"),
        (broken("step-x", {"header": head()}), "step-x.json: not as the benches write it (KeyError: 'sum')"),
        (broken("serve-x", {"header": head(), "arguments": []}), "serve-x.json: not as"),
        (broken("targets", {"targets": [{"what": "x"}]}), "targets.json: not as"),
        (broken("gate", {"header": {"date": 1}}), "gate.json: not as"),
        (lambda folder: (folder / "ops.json").write_bytes(b"\xff\xfe"), "ops.json: 'utf-8' codec"),
        (lambda folder: (folder / "report.html").mkdir(), "Is a directory"),
    ],
)  # fmt: skip
def test_bad_results_get_one_line(folder, capsys, spoil, said):
    spoil(folder)
    code, out, lines = run(capsys, "--machine", folder)
    assert code == 2 and out == "" and len(lines) == 1 and said in lines[0], lines


def test_from_the_committed_results():
    results = reading.read(ROOT / "bench/results/h200")
    text, drawn = report.build(results)
    check_it_stands_alone(text)
    page = Page(text)
    assert len(text) < 500_000
    assert {"roofline", "decode-qwen3-8b", "decode-qwen3-0.6b"} <= set(drawn)
    assert page.row("offline-qwen3-8b.json")[4:] == ["NVIDIA H200, driver 580.159.04", "torch 2.11.0, triton 3.6.0"]
    asked = results.files["targets"]["targets"]
    assert len(asked) >= 20 and all(len(page.row(target["what"])) == 7 for target in asked)
    known = {(row["op"], point["point"]) for row in results.files["ops"]["ops"] for point in row["rows"]}
    for target in asked:  # a misspelt point would never be measured
        for op, point in target["from"].get("points", ()):
            assert (op, point) in known or point in reading.OPS[op].cases.POINTS, (op, point)
    for peer in results.peers["kernels"]:
        assert peer["point"] in reading.OPS[peer["op"]].cases.POINTS, peer


def test_as_a_program():
    done = subprocess.run(
        [sys.executable, "-m", "bench.report", "--machine", "no-such"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "no such folder" in done.stderr
