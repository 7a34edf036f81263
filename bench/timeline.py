"""From the profiler's records of a step to a table and a sum. Pure: no torch, no device.

With programmatic dependent launch a kernel is there, waiting, before the one ahead has ended. So each moment belongs to
the kernel that was started first among those running, and busy time is the union of all. Which op launched a kernel is
learnt from a step that ran with a mark (`MARK`) before and after each call of an op.
"""

import dataclasses
import difflib
import itertools
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

MARK = "spin_kernel"  # what torch.cuda._sleep launches
WORTH_MARKING = 0.03  # of the step
WORTH_A_LINE = 0.003
Key = tuple[str | None, str, str]  # op (None: launched by none), shape, kernel


@dataclass(frozen=True)
class Record:
    """One kernel, copy or fill on the device; microseconds."""

    name: str
    start: float
    end: float

    @property
    def is_mark(self) -> bool:
        return MARK in self.name


@dataclass(frozen=True)
class Call:
    """One call of an op within a step."""

    op: str
    kernel: str  # its name in the registry
    shape: str  # "" or what tells it from the op's other calls: "4096x12288"
    floor_us: float
    num_bytes: int = 0
    flops: int = 0

    @property
    def key(self) -> Key:
        return self.op, self.shape, self.kernel


@dataclass(frozen=True)
class Time:
    """What of the time line falls to one record; microseconds."""

    record: Record
    own: float  # from when all that were started before it had ended
    gap: float  # before it, nothing ran
    overlap: float  # it was there while others, started before, still ran


@dataclass
class Item:
    """One line: all calls of an op with one shape and kernel, or all launches of a kernel by no op. Of one step."""

    op: str | None
    shape: str
    kernel: str
    calls: float = 0.0
    us: float = 0.0
    alone_us: float = 0.0  # in the marked step, where nothing overlaps
    floor_us: float = 0.0
    gap_us: float = 0.0
    num_bytes: int = 0
    flops: int = 0
    launches: list[str] = field(default_factory=list)  # names of its kernels on the device

    @property
    def name(self) -> str:
        return " ".join(filter(None, (self.op, self.shape))) if self.op else self.kernel

    @property
    def lost_us(self) -> float:
        return self.us - self.floor_us


@dataclass
class Sum:
    """A step as a sum, microseconds: step = floor + lost + gaps + unexplained."""

    step_us: float  # by the clock
    floor_us: float
    lost_us: float  # by kernels, over their floors
    gaps_us: float
    unexplained_us: float
    scale: float  # of the kernels' times; below 1 where they took longer under the profiler than the step without
    busy_us: float  # union of the kernels under the profiler
    profiled_gaps_us: float
    overlap_us: float
    largest_gap_us: float
    largest_gap_before: str


def records(trace: dict[str, Any]) -> list[Record]:
    """Everything that ran on the device, in order of start, from a Chrome trace."""
    kinds = ("kernel", "gpu_memcpy", "gpu_memset")
    events = [e for e in trace["traceEvents"] if e.get("cat") in kinds and e.get("ph") == "X"]
    return sorted((Record(e["name"], e["ts"], e["ts"] + e["dur"]) for e in events), key=lambda r: (r.start, r.end))


def last_steps(ran: Sequence[Record], num_steps: int, marks_per_step: int = 1) -> list[list[Record]]:
    """The last so many steps. Each begins with a mark and holds so many. Raises SystemExit if marks are missing.

    They are counted from the end, for records of a session's first kernels may be lost (pytorch issue 192021).
    """
    marks = [i for i, record in enumerate(ran) if record.is_mark]
    wanted = num_steps * marks_per_step
    if len(marks) < wanted:
        sys.exit(f"The profiler recorded {len(ran)} kernels and {len(marks)} marks; {wanted} marks were launched.")
    begins = marks[-wanted::marks_per_step]
    return [list(ran[a:b]) for a, b in itertools.pairwise([*begins, len(ran)])]


def places(marked: Sequence[Record], calls: Sequence[Call]) -> list[tuple[str, Key]]:
    """(name, key) of each kernel of the marked step: after its own mark come two for each call, around its kernels."""
    found: list[tuple[str, Key]] = []
    num_marks = 0
    for record in marked:
        if record.is_mark:
            num_marks += 1
        else:
            inside = num_marks and num_marks % 2 == 0
            key = calls[num_marks // 2 - 1].key if inside else (None, "", short(record.name))
            found.append((record.name, key))
    return found


def align(names: Sequence[str], marked: Sequence[str]) -> list[int | None]:
    """For each name of a step, its index in the marked step; None for one that is not there in this order."""
    if list(names) == list(marked):
        return list(range(len(names)))
    found: list[int | None] = [None] * len(names)
    for block in difflib.SequenceMatcher(None, marked, names, autojunk=False).get_matching_blocks():
        for i in range(block.size):
            found[block.b + i] = block.a + i
    return found


def time_line(ran: Sequence[Record]) -> list[Time]:
    """Share out the time: each moment to the record that was started first among those running. In order of start.

    Marks are left out, and of a gap in which one stands what is left of it counts.
    """
    found: list[Time] = []
    reached, idle = ran[0].start if ran else 0.0, 0.0
    for record in ran:
        own = max(0.0, record.end - max(record.start, reached))
        overlap = max(0.0, min(reached, record.end) - record.start)
        idle += max(0.0, record.start - reached)
        reached = max(reached, record.end)
        if not record.is_mark:
            found.append(Time(record, own, idle, overlap))
            idle = 0.0
    return found


def items(
    steps: Sequence[Sequence[Record]], marked: Sequence[Record], calls: Sequence[Call]
) -> tuple[list[Item], float]:
    """(all kernels of these steps by op, shape and kernel, averaged over the steps, in the order of the marked step;
    share of the kernels that the marked step has in the same order). A kernel that it has not is taken for what a
    kernel of that name is in it, if that is one thing.
    """
    known = places(marked, calls)
    by_name: dict[str, set[Key]] = {}
    for name, key in known:
        by_name.setdefault(name, set()).add(key)
    found = {key: Item(*key) for _, key in known} | {call.key: Item(*call.key) for call in calls}
    for call in calls:
        item = found[call.key]
        item.calls += 1
        item.floor_us += call.floor_us
        item.num_bytes += call.num_bytes
        item.flops += call.flops
    for time_, (name, key) in zip(time_line(marked), known, strict=True):
        found[key].alone_us += time_.own
        if short(name) not in found[key].launches:
            found[key].launches.append(short(name))
    num_known = num_ran = 0
    for step in steps:
        line = time_line(step)
        num_ran += len(line)
        for time_, index in zip(line, align([t.record.name for t in line], [name for name, _ in known]), strict=True):
            num_known += index is not None
            if index is not None:
                key = known[index][1]
            else:
                keys = by_name.get(time_.record.name, set())
                key = next(iter(keys)) if len(keys) == 1 else (None, "", short(time_.record.name))
            item = found.setdefault(key, Item(*key))
            item.us += time_.own / len(steps)
            item.gap_us += time_.gap / len(steps)
            item.calls += 0 if item.op else 1 / len(steps)
    return list(found.values()), num_known / max(1, num_ran)


def add_up(found: Sequence[Item], steps: Sequence[Sequence[Record]], step_us: float) -> tuple[Sum, list[Item]]:
    """The step by the clock as a sum, and the items with their times on the clock's scale.

    Kernels take as long as under the profiler, unless all together take longer than the step: then each is scaled
    down. Gaps get what the step then has left, up to what they were under the profiler.
    """
    line = [time_ for step in steps for time_ in time_line(step)]
    busy_us, profiled_gaps_us, overlap_us = (
        sum(getattr(time_, name) for time_ in line) / len(steps) for name in ("own", "gap", "overlap")
    )
    largest = max(line, key=lambda time_: time_.gap)
    scale = min(1.0, step_us / busy_us)
    gaps_us = min(profiled_gaps_us, step_us - scale * busy_us)
    shrink = gaps_us / profiled_gaps_us if profiled_gaps_us else 1.0
    scaled = [dataclasses.replace(i, us=i.us * scale, gap_us=i.gap_us * shrink) for i in found]
    floor_us = sum(i.floor_us for i in scaled)
    return Sum(
        step_us=step_us,
        floor_us=floor_us,
        lost_us=scale * busy_us - floor_us,
        gaps_us=gaps_us,
        unexplained_us=step_us - scale * busy_us - gaps_us,
        scale=scale,
        busy_us=busy_us,
        profiled_gaps_us=profiled_gaps_us,
        overlap_us=overlap_us,
        largest_gap_us=largest.gap,
        largest_gap_before=short(largest.record.name),
    ), scaled


def short(name: str) -> str:
    """A kernel's name without what its compiler added: return type, namespaces, template and call arguments."""
    text = name.replace("(anonymous namespace)::", "").removeprefix("void ")
    head = text if text.startswith(("Memcpy", "Memset")) else re.split(r"[<(]", text, maxsplit=1)[0].strip()
    return head.rpartition("::")[2] or text


def table(found: Sequence[Item], total: Sum) -> str:
    """The items of a step, those under 0.3 % of it as one line; * marks what loses over 3 % of it."""
    heads = ["", "kernel", "calls", "us/step", "alone", "floor", "lost", "of step", "gaps before"]
    lines = [heads]
    small = [i for i in found if i.us + i.gap_us < WORTH_A_LINE * total.step_us]
    rest = Item(None, "", f"{len(small)} small ones")
    for item in small:
        for name in ("calls", "us", "alone_us", "floor_us", "gap_us"):
            setattr(rest, name, getattr(rest, name) + getattr(item, name))
    for item in [*(i for i in found if i not in small), *([rest] if small else [])]:
        over = max(item.lost_us, item.gap_us) > WORTH_MARKING * total.step_us
        name, kernel = ("* " if over else "  ") + item.name[:40], item.kernel[:24] if item.op else ""
        times = [item.us, item.alone_us, item.floor_us, item.lost_us]
        share = f"{item.us / total.step_us:.1%}"
        lines.append([name, kernel, f"{item.calls:g}", *(f"{us:.1f}" for us in times), share, f"{item.gap_us:.1f}"])
    widths = [max(len(line[i]) for line in lines) for i in range(len(heads))]
    pads = [str.ljust] * 2 + [str.rjust] * (len(heads) - 2)
    return "\n".join("  ".join(pad(c, w) for pad, c, w in zip(pads, line, widths)).rstrip() for line in lines)


def sum_lines(total: Sum, whole_floor_us: float) -> str:
    """The sum and what to know about it."""
    step = total.step_us
    parts = {"floor": total.floor_us, "lost in kernels": total.lost_us, "gaps": total.gaps_us}
    parts["unexplained"] = total.unexplained_us
    line = " + ".join(f"{name} {us:.0f} ({us / step:.1%})" for name, us in parts.items())
    scaled = f"; kernel times scaled by {total.scale:.3f} to fit the clock's step" if total.scale < 1 else ""
    return (
        f"step by the clock {step:.0f} us = {line}\n"
        f"floor of the whole step's bytes and flops {whole_floor_us:.0f} us: {step / whole_floor_us:.2f}x\n"
        f"under the profiler: busy {total.busy_us:.0f} us (union), gaps {total.profiled_gaps_us:.0f}, the largest "
        f"{total.largest_gap_us:.1f} before {total.largest_gap_before}; overlap {total.overlap_us:.0f}{scaled}"
    )
