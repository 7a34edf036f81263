"""The pictures of bench.report, as SVG: the roofline, decode speed beside others', a step against its floor.

Figures are drawn by matplotlib (a development dependency). A picture holds text as text, no date, and nothing that is
loaded from elsewhere; the same numbers give the same bytes.
"""

import io
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib import lines as artists
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart by the colour-blind too; then greys of blue and red for more than seven.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#7F7F9F", "#9F5F5F", "#5F7F5F")
MARKERS = "osD^vP*Xh"  # not as many as colours: the pairs come round late
GREY = "#888888"
STYLE: Any = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.parse_math": False,  # names are names, whatever signs are in them
}


@dataclass(frozen=True)
class Dot:
    """One kernel at one point."""

    group: str  # what its colour tells: the op, or the kernel
    num_bytes: float
    flops: float
    us: float
    chosen: bool


@dataclass(frozen=True)
class Line:
    """Decode steps of one engine: (sequences, milliseconds a token)."""

    name: str
    steps: Sequence[tuple[int, float]]
    kind: str  # "ours", "peer" or "floor"


@dataclass(frozen=True)
class Part:
    """A bar of a waterfall; microseconds."""

    name: str
    us: float
    colour: str


def svg(figure: Figure, title: str) -> str:
    """The figure as an <svg> element to stand inside a page or in a file of its own. `title` is read out aloud."""
    text = io.StringIO()
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": title}):
        figure.savefig(text, format="svg", facecolor="white", metadata={"Date": None, "Title": title})
    body = re.sub(r"<metadata>.*?</metadata>", "", text.getvalue(), flags=re.S)
    body = re.sub(r"\s*\n\s*", " ", re.sub(r'<g id="[^"]*"', "<g", body))  # ids that several pictures would share
    body = re.sub(r"<[^>]*>", lambda found: re.sub(r"(\.\d\d)\d+", r"\1", found[0]), body)  # places, not labels
    return body[body.index("<svg") :].replace("<svg", '<svg role="img"', 1)


def roofline(dots: Sequence[Dot], bytes_per_s: float, flops_per_s: float, title: str, height: float = 4.6) -> str:
    """Achieved rate over arithmetic intensity, logarithmic, under the two limits.

    Filled dots are chosen kernels. What has no flops to count stands in a panel of its own, over the bytes of a call.
    """
    with matplotlib.rc_context(STYLE):
        groups = list(dict.fromkeys(dot.group for dot in dots))
        looks = dict(zip(groups, zip(itertools.cycle(COLOURS), itertools.cycle(MARKERS))))
        plain, others = [dot for dot in dots if not dot.flops], [dot for dot in dots if dot.flops]
        figure = Figure(figsize=(9.0, height), layout="constrained")
        widths = [1] * bool(plain) + [3] * bool(others)
        panels = figure.subplots(1, len(widths), width_ratios=widths, squeeze=False)[0]
        if plain:
            _scatter(panels[0], plain, [(d.num_bytes / 1e6, d.num_bytes / d.us / 1e3) for d in plain], looks)
            panels[0].axhline(bytes_per_s / 1e9, color=GREY)
            panels[0].set(xlabel="MB a call (no flops counted)", ylabel="GB/s")
        if others:
            axes, ridge = panels[-1], flops_per_s / bytes_per_s
            places = [(d.flops / d.num_bytes, d.flops / d.us / 1e6) for d in others]
            low, high = min(*(x for x, _ in places), ridge) / 2, max(*(x for x, _ in places), ridge) * 2
            roof = flops_per_s / 1e12
            axes.plot([low, ridge, high], [low * bytes_per_s / 1e12, roof, roof], color=GREY)
            limits = f"{bytes_per_s / 1e9:,.0f} GB/s\n{roof:,.0f} TFLOP/s"
            axes.annotate(limits, (0.02, 0.97), xycoords="axes fraction", va="top", color=GREY)
            _scatter(axes, others, places, looks)
            axes.set(xlabel="flops a byte", ylabel="TFLOP/s")
        handles = [artists.Line2D([], [], color=c, marker=m, linestyle="") for c, m in looks.values()]
        figure.legend(handles, [f" {group}" for group in groups], loc="outside right upper", frameon=False)
        return svg(figure, title)


def _scatter(axes: Axes, dots: Sequence[Dot], places: Sequence[tuple[float, float]], looks: dict[str, Any]) -> None:
    """Both axes logarithmic, with plain numbers."""
    for group, (colour, marker) in looks.items():
        for chosen in (False, True):
            here = [place for dot, place in zip(dots, places) if (dot.group, dot.chosen) == (group, chosen)]
            if here:
                fill = (
                    {"markersize": 5.5, "markerfacecolor": colour}
                    if chosen
                    else {"markersize": 4.0, "fillstyle": "none"}
                )
                axes.plot(*zip(*here), marker, markeredgecolor=colour, alpha=0.85, zorder=3 if chosen else 2, **fill)
    axes.set(xscale="log", yscale="log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(ticker.StrMethodFormatter("{x:,g}"))


def latency(lines: Sequence[Line], title: str) -> str:
    """Tokens a second of all sequences together over the time that each waits for a token; both logarithmic."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.0, 4.6), layout="constrained")
        axes = figure.subplots()
        colours = {kind: itertools.cycle(c) for kind, c in (("ours", COLOURS[:3]), ("peer", COLOURS[3:6]))}
        for line in lines:
            xs, ys = [ms for _, ms in line.steps], [batch / ms * 1e3 for batch, ms in line.steps]
            if line.kind == "floor":
                axes.plot(xs, ys, "--", color=GREY, marker=".", label=f" {line.name}")
                for (batch, _), x, y in zip(line.steps, xs, ys):
                    axes.annotate(f"{batch} ", (x, y), ha="right", va="bottom", color=GREY)
            else:
                style = "-" if line.kind == "ours" else ":"
                axes.plot(xs, ys, style, marker="o", color=next(colours[line.kind]), label=f" {line.name}")
        axes.set(xscale="log", yscale="log", xlabel="ms a token of one sequence", ylabel="tokens a second of all")
        axes.xaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
        axes.xaxis.set_minor_formatter(ticker.FormatStrFormatter("%g"))
        axes.yaxis.set_major_formatter(ticker.StrMethodFormatter("{x:,.0f}"))
        axes.grid(alpha=0.25, which="both")
        axes.legend(frameon=False, loc="lower right")
        return svg(figure, title)


def waterfall(parts: Sequence[Part], floor_us: float, step_us: float, title: str) -> str:
    """From the floor of a step to the step: what each part adds, one bar below the other."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.0, 1.2 + 0.27 * (len(parts) + 2)), layout="constrained")
        axes = figure.subplots()
        reached = 0.0
        bars = [Part("floor", floor_us, GREY), *parts, Part("step by the clock", step_us, COLOURS[6])]
        for row, part in enumerate(bars):
            whole = row in (0, len(bars) - 1)
            left = 0.0 if whole else reached
            axes.barh(row, part.us, left=left, color=part.colour, height=0.7)
            label = f" {part.us:,.0f}" if whole else f" {part.us:+,.0f}"
            axes.annotate(label, (max(left, left + part.us), row), va="center")
            reached = part.us if row == 0 else reached + part.us
        axes.set_yticks(range(len(bars)), [f"{part.name} " for part in bars])
        axes.invert_yaxis()
        axes.axvline(floor_us, color=GREY, linewidth=0.8, linestyle=":")
        axes.set(xlabel="us", xlim=(0, max(step_us, floor_us) * 1.1))
        return svg(figure, title)
