"""bench.step and bench.timeline: a step's records as a table and a sum, and the steady state that brings them."""

import dataclasses
import itertools
import json
import types

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bench import offline, step, timeline
from bench.timeline import Call, Item, Record
from nanodeploy import ops  # noqa: F401  loads every room into OPS
from nanodeploy.config import Config
from nanodeploy.ops.registry import OPS
from nanodeploy.runtime.engine import Engine

LIMITS = types.SimpleNamespace(copy_bytes_per_s=4e12, bf16_flops_per_s=7e14)
SPIN = "at::cuda::(anonymous namespace)::spin_kernel(long)"
COPY = "Memcpy HtoD (Pinned -> Device)"


def timed(*spans):
    """Records from (name, start, end)."""
    return [Record(*span) for span in spans]


def test_records_of_a_trace():
    events = [
        {"cat": "kernel", "ph": "X", "name": "b", "ts": 20.0, "dur": 2.5, "args": {"stream": 7, "graph node id": 3}},
        {"cat": "gpu_memcpy", "ph": "X", "name": COPY, "ts": 10.0, "dur": 1.0},
        {"cat": "gpu_memset", "ph": "X", "name": "Memset (Device)", "ts": 12.0, "dur": 1.0},
        {"cat": "cuda_runtime", "ph": "X", "name": "cudaGraphLaunch", "ts": 0.0, "dur": 99.0},
        {"cat": "kernel", "ph": "s", "name": "flow", "ts": 0.0},
        {"ph": "M", "name": "process_name"},
    ]
    got = timeline.records({"traceEvents": events})
    assert [(r.name, r.start, r.end) for r in got] == [
        (COPY, 10, 11), ("Memset (Device)", 12, 13), ("b", 20, 22.5),
    ]  # fmt: skip


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 9), st.booleans()), min_size=1, max_size=12))
def test_the_time_line_gives_each_moment_to_one(spans):
    """Own times add up to the union, gaps to the rest, and the first to start owns what is shared."""
    ran = sorted(
        (Record(SPIN if is_mark else "k", s, s + n) for s, n, is_mark in spans), key=lambda r: (r.start, r.end)
    )
    covered = {t for r in ran for t in range(r.start, r.end)}
    marked = set()
    owner = {}
    for r in ran:
        for t in range(r.start, r.end):
            owner.setdefault(t, r)
    marked = {t for t, r in owner.items() if r.is_mark}
    line = timeline.time_line(ran)
    assert [t.record for t in line] == [r for r in ran if not r.is_mark]
    assert sum(t.own for t in line) == len(covered) - len(marked)
    if line and line[-1].record is ran[-1]:
        assert sum(t.gap for t in line) == max(r.end for r in ran) - ran[0].start - len(covered)
    assert all(t.own + t.overlap == pytest.approx(t.record.end - t.record.start) for t in line)


def test_a_kernel_that_waits_for_the_one_ahead_owns_what_follows():
    """As programmatic dependent launch has it: b is there from 2 on, and does its work from 10 on."""
    a, b, c = timeline.time_line(timed(("a", 0, 10), ("b", 2, 14), ("c", 15, 16)))
    assert (a.own, a.gap, a.overlap) == (10, 0, 0)
    assert (b.own, b.gap, b.overlap) == (4, 0, 8)
    assert (c.own, c.gap, c.overlap) == (1, 1, 0)


def test_steps_are_counted_from_the_end():
    """The first records of a session may be lost, and with them marks."""
    lost = [("k", 0, 1), (SPIN, 1, 2), ("k", 2, 3)]
    ran = timed(*lost, (SPIN, 4, 5), ("k", 5, 6), ("l", 6, 7), (SPIN, 8, 9), ("k", 9, 10), ("l", 10, 11))
    got = timeline.last_steps(ran, 2)
    assert [[r.name for r in part] for part in got] == [[SPIN, "k", "l"]] * 2
    (got,) = timeline.last_steps(ran, 1, marks_per_step=3)
    assert [r.start for r in got] == [1, 2, 4, 5, 6, 8, 9, 10]
    with pytest.raises(SystemExit, match="9 kernels and 3 marks; 4 marks were launched"):
        timeline.last_steps(ran, 4)


@given(st.lists(st.sampled_from("abcd"), max_size=12), st.data())
def test_alignment_keeps_the_order(marked, data):
    """Of a step that lost some kernels and has some others, those that it finds are in the marked step's order."""
    names = [n for n in marked if data.draw(st.booleans())]
    for _ in range(data.draw(st.integers(0, 3))):
        names.insert(data.draw(st.integers(0, len(names))), "x")
    found = timeline.align(names, marked)
    places = [i for i in found if i is not None]
    assert places == sorted(set(places)) and all(marked[i] == n for i, n in zip(found, names) if i is not None)
    assert timeline.align(marked, marked) == list(range(len(marked)))
    assert all(i is None for i, n in zip(found, names) if n == "x")


def test_names_are_shortened():
    assert timeline.short("void at::native::(anonymous namespace)::indexSelect<long, 4>(T*, int)") == "indexSelect"
    assert timeline.short("nvjet_tst_128x64_h_bz_TNT") == "nvjet_tst_128x64_h_bz_TNT"
    assert timeline.short("_attend") == "_attend"
    assert timeline.short(COPY) == COPY
    assert timeline.short("void cutlass::Kernel2<a::b<c>>(c::Params)") == "Kernel2"


# One layer of two ops, twice: `norm` is one kernel, `attend` is two; `_k` is used by both.
CALLS = [Call("norm", "one_row", "", 2.0, 8), Call("attend", "split", "", 5.0, 20, 40)] * 2


def marked_step():
    spans = [(SPIN, 0.0, 1.0), (COPY, 1.0, 2.0)]
    at = 2.0
    for names in (["_k"], ["_attend", "_k"]) * 2:
        for name, length in [(SPIN, 1), *((n, 4) for n in names), (SPIN, 1)]:
            spans.append((name, at, at + length))
            at += length
    return timed(*spans, ("void sampler<int>(int)", at, at + 3))


def graph_step(at, extra=()):
    """The same kernels as a graph runs them: there 1 us before the one ahead ends; 2 us idle after the copy."""
    spans = [(SPIN, at - 2, at - 1), (COPY, at - 1, at), *extra]
    at += 2
    for name in ("_k", "_attend", "_k", "_k", "_attend", "_k"):
        spans.append((name, at - (at > 2 and name != "_k"), at + 3))
        at += 3
    return timed(*spans, ("void sampler<int>(int)", at, at + 3))


def test_items_of_steps():
    steps = [graph_step(100.0), graph_step(200.0)]
    found, known = timeline.items(steps, marked_step(), CALLS)
    assert known == 1.0
    by_name = {item.name: item for item in found}
    assert list(by_name) == [COPY, "norm", "attend", "sampler"]
    norm, attend = by_name["norm"], by_name["attend"]
    assert (norm.calls, norm.us, norm.alone_us, norm.floor_us, norm.num_bytes) == (2, 6, 8, 4, 16)
    assert (attend.calls, attend.us, attend.alone_us, attend.floor_us, attend.flops) == (2, 12, 16, 10, 80)
    assert attend.launches == ["_attend", "_k"] and attend.kernel == "split"
    assert norm.gap_us == 2 and norm.lost_us == 2 and attend.gap_us == 0
    assert by_name[COPY].calls == 1 and by_name["sampler"].us == 3


def test_kernels_that_the_marked_step_has_not():
    """A name that means one thing there counts as that; another is a line of its own."""
    extra = [("_attend", 150.0, 151.0), ("void other()", 151.0, 152.0), ("_k", 152.0, 153.0)]
    step_ = sorted([*graph_step(100.0), *timed(*extra)], key=lambda r: r.start)
    found, known = timeline.items([step_], marked_step(), CALLS)
    by_name = {item.name: item for item in found}
    assert known == pytest.approx(8 / 11)
    assert by_name["attend"].us == 13 and by_name["other"].us == 1
    assert by_name["_k"].us == 1  # it may be either op's


def test_the_sum_adds_up():
    steps = [graph_step(100.0), graph_step(200.0)]
    found, _ = timeline.items(steps, marked_step(), CALLS)
    busy = sum(item.us for item in found)
    for step_us in (40.0, busy + 1.0, busy, busy / 2):
        total, scaled = timeline.add_up(found, steps, step_us)
        parts = total.floor_us + total.lost_us + total.gaps_us + total.unexplained_us
        assert parts == pytest.approx(step_us) and total.busy_us == pytest.approx(busy)
        assert sum(i.us for i in scaled) == pytest.approx(min(busy, step_us))
        assert sum(i.gap_us for i in scaled) == pytest.approx(total.gaps_us)
        assert total.largest_gap_before == "_k" and total.largest_gap_us == 2
    assert (total.scale, total.gaps_us) == (0.5, 0)


def test_the_table_marks_what_loses():
    found = [
        Item("linear", "24576x4096", "streamed", 36, 1000, 1010, 900, 3, launches=["_stream"]),
        Item("rope", "", "one_pass", 36, 70, 80, 5, 0),
        Item(None, "", "gather", 1, 1, 1, 0, 0),
        Item(None, "", "scatter", 2, 1, 1, 0, 0),
    ]
    steps = [timed(("a", 0, 1072), ("b", 1075, 1076))]
    total, scaled = timeline.add_up(found, steps, 1080.0)
    lines = timeline.table(scaled, total).splitlines()
    assert lines[1].split() == [
        "*", "linear", "24576x4096", "streamed", "36", "1000.0", "1010.0", "900.0", "100.0", "92.6%", "3.0",
    ]  # fmt: skip
    assert lines[2].startswith("* rope") and "one_pass" in lines[2]
    assert lines[3].split()[:5] == ["2", "small", "ones", "3", "2.0"] and len(lines) == 4
    told = timeline.sum_lines(total, 900.0)
    assert "step by the clock 1080 us = floor 905 (83.8%) + lost in kernels 168 (15.6%)" in told and "1.20x" in told


# ---- floors


@pytest.mark.parametrize("name", ["decode_attention", "prefill_attention", "plan_decode", "linear", "linear_silu_mul"])
@given(data=st.data())
def test_a_floor_knows_the_lengths_that_the_case_leaves_out(name, data):
    op = OPS[name]
    case = data.draw(op.cases.strategy(st, small=True))
    if getattr(case, "has_prefixes", False):
        case = dataclasses.replace(case, has_prefixes=False)
    args = op.cases.make(case, torch.device("cpu"), 0)
    names = list(step.inspect.signature(op.reference).parameters)
    lens = {n: a for n, a in zip(names, args) if n.endswith("_lens")}
    call = step.call_of(op, "mine", op.cases.of(*args), lens, LIMITS)
    if name in ("decode_attention", "plan_decode"):
        lengths = {"kv_lens": tuple(lens["kv_lens"].tolist())}
    elif name == "prefill_attention":
        cu = lens["cu_q_lens"].tolist()
        q_lens = tuple(b - a for a, b in itertools.pairwise(cu))
        lengths = {"kv_lens": tuple(lens["kv_lens"].tolist()), "q_lens": q_lens, "num_before": cu[0]}
    else:
        lengths = {}
    wanted = op.cases.cost(dataclasses.replace(case, **lengths))
    assert (call.num_bytes, call.flops) == (wanted.num_bytes, wanted.flops)
    assert call.floor_us == pytest.approx(wanted.floor_s(4e12, 7e14) * 1e6)
    assert call.shape == (f"{case.out_dim}x{case.in_dim}" if name.startswith("linear") else "")


def test_the_floor_of_a_whole_step_is_the_offline_benchs():
    work = offline.Work.of(Config(model="demo:random-qwen3-8b"), torch.bfloat16)
    decode = step.whole_floor_us(work, step.Scenario(64, 1000), LIMITS)
    assert decode == pytest.approx(work.decode_floor_s(64, 1000, LIMITS) * 1e6)
    prefill = step.whole_floor_us(work, step.Scenario(0, 0, 8, 960), LIMITS)
    assert prefill == pytest.approx(work.prefill_floor_s([960] * 8, LIMITS) * 1e6)


# ---- a steady state: a real engine on the CPU, on a device whose clock the test keeps


class Device:
    """Notes what is launched: a mark takes 1 us, a kernel 10, and between two launches 1 us goes by."""

    def __init__(self):
        self.ran, self.now = [], 0.0

    def launch(self, name, us):
        self.now += 1
        self.ran.append(Record(name, self.now, self.now + us))
        self.now += us

    def profiled(self, work):
        self.ran.clear()
        work()
        return list(self.ran)


@pytest.fixture
def device(monkeypatch):
    """--deterministic has kernels on the CPU too: each launches one kernel of its op's name."""
    made = Device()

    def launching(op, kernel):
        def fn(*args):
            made.launch(f"_{op.name}", 10)
            return kernel.fn(*args)

        return dataclasses.replace(kernel, fn=fn)

    before = [(op, kernel) for op in OPS.values() for kernel in op.kernels.values() if kernel.needs == "cpu"]
    for op, kernel in before:
        op.put(kernel.name, launching(op, kernel))
    monkeypatch.setattr(step, "mark", lambda: made.launch(SPIN, 1))
    monkeypatch.setattr(step, "profiled", made.profiled)
    yield made
    for op, kernel in before:
        op.put(kernel.name, kernel)


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 16, "vocab_size": 300}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 200}
    config = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "rope_theta": 1e4, **sizes, **heads}
    (folder / "config.json").write_text(json.dumps(config))
    flags = {"max_num_seqs": 8, "max_num_batched_tokens": 64, "kvcache_block_size": 16, "load_format": "dummy"}
    return Engine(Config(model=str(folder), device="cpu", deterministic=True, num_kvcache_blocks=60, **flags))


WORK = offline.Work(1000, 10, 100, 100, 1)


@pytest.mark.parametrize("scenario", [step.Scenario(4, 40), step.Scenario(0, 0, 2, 20), step.Scenario(3, 30, 1, 16)])
def test_a_study(engine, device, scenario, capsys):
    results = step.study(types.SimpleNamespace(engine=engine), WORK, scenario, LIMITS, num_steps=3)
    assert not engine.busy() and engine.stats().num_free_pages == engine.num_pages
    assert (results["known"], results["num_profiled"]) == (1.0, 3)
    by_name = {(item["name"], item["kernel"]): item for item in results["items"]}
    layers, is_decode = 2, bool(scenario.batch)
    qkv = by_name["linear 64x32", "rows"]  # 2 heads, 1 key and 1 value head of 16
    assert qkv["calls"] == layers and qkv["us"] * max(1.0, 1 / results["sum"]["scale"]) >= 10 * layers - 1e-6
    assert qkv["alone_us"] == 10 * layers and qkv["floor_us"] > 0
    assert (("decode_attention", "rows") in by_name) == is_decode
    assert (("prefill_attention", "rows") in by_name) == bool(scenario.chunks)
    if is_decode:  # the lengths are the device's: the scenario's context, to within the steps that were marked
        per_token = 2 * 1 * 16 * 4
        one = by_name["decode_attention", "rows"]["num_bytes"] / layers / scenario.batch
        assert one == pytest.approx(scenario.context * per_token, rel=0.25)
    total = results["sum"]
    assert total["floor_us"] + total["lost_us"] + total["gaps_us"] + total["unexplained_us"] == pytest.approx(
        total["step_us"]
    )
    json.dumps(results)
    told = capsys.readouterr().out
    assert str(scenario) in told and "step by the clock" in told and "100.0% known" in told


def test_kernels_are_what_they_were_after_a_study(engine, device):
    before = {name: dict(op.kernels) for name, op in OPS.items()}
    steady = step.Steady(engine, step.Scenario(2, 20), 6, seed=3)
    last, calls = steady.marked(LIMITS)
    steady.close()
    assert {name: dict(op.kernels) for name, op in OPS.items()} == before
    # Per layer: qkv, attention, o, gate_up, down; then the output layer.
    assert len(calls) == 2 * 5 + 1 and sum(r.is_mark for r in last) == 1 + 2 * len(calls)
    assert [call.op for call in calls[:5]] == ["linear", "decode_attention", "linear", "linear_silu_mul", "linear"]
    assert calls[-1].shape == "300x32"


@pytest.mark.parametrize(
    ("scenario", "why"),
    [
        (step.Scenario(9, 10), r"takes 9 rows .*; this engine has 8"),
        (step.Scenario(0, 0, 1, 65), "takes 65 tokens a step; this engine has 64"),
        (step.Scenario(1, 190), "tokens of a sequence; this engine has 200"),
        (step.Scenario(8, 110), "tokens of cache; this engine has 960"),
    ],
    ids=str,
)
def test_what_the_engine_has_no_room_for(engine, scenario, why):
    with pytest.raises(SystemExit, match=why):
        step.Steady(engine, scenario, 8, seed=0)
    assert not engine.busy()


def test_a_lost_token_is_noticed(engine):
    steady = step.Steady(engine, step.Scenario(2, 20), 6, seed=4)
    engine.abort(steady.ids[0])
    with pytest.raises(AssertionError, match="a steady step brings 2"):
        for _ in range(3):
            steady.step()
    steady.close()


def test_the_command(monkeypatch, capsys, tmp_path):
    assert step.parser().parse_args(["--batch", "1,64", "--prefill", "8x960"]).prefill == (8, 960)
    with pytest.raises(SystemExit):
        step.main(["demo:qwen3", "--batch", "1,2", "--json", "one.json"])
    assert "Name a folder" in capsys.readouterr().err
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit, match="no GPU here"):
            step.main(["demo:qwen3"])
    config = Config(model="demo:random-qwen3-8b")
    path = offline.result_path(tmp_path, "step", config, step.Scenario(64, 1024, 1, 2048).key)
    assert path.name == "step-qwen3-8b-b64-c1024-p1x2048.json"
