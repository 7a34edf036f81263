"""Where the seconds of a start go: phases that follow one another, so that every second belongs to one of them.

Times are those of time.monotonic(), which is one clock for all processes of a machine. Imports nothing heavy.
"""

import os
import time
from collections.abc import Mapping
from pathlib import Path

STAT = Path("/proc/self/stat")
START_FIELD = 19  # of what follows the command's name in STAT: proc(5)'s field 22, in clock ticks since boot


class Phases:
    """One phase runs at any time, from the first, which began at `began`, until `end`."""

    def __init__(self, first: str, began: float):
        self.name, self.began = first, began
        self.seconds: dict[str, float] = {}

    def begin(self, name: str) -> None:
        """End the running phase and begin another. A name that comes again adds to its seconds."""
        self.end()
        self.name = name

    def end(self) -> dict[str, float]:
        """Phase -> seconds up to now, in the order they first began. May be called again later."""
        now = time.monotonic()
        self.seconds[self.name] = self.seconds.get(self.name, 0.0) + now - self.began
        self.began = now
        return self.seconds


def process_began() -> float:
    """When this process was created; where the system does not tell, when this was first asked.

    On Linux to 10 ms, the tick of its clock.
    """
    if not STAT.exists():
        return FIRST_ASKED
    fields = STAT.read_text().rpartition(")")[2].split()  # the name before it may hold anything
    age = time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[START_FIELD]) / os.sysconf("SC_CLK_TCK")
    return time.monotonic() - max(0.0, age)


FIRST_ASKED = time.monotonic()


def table(seconds: Mapping[str, float], total: float, until: str) -> list[str]:
    """The start as lines: one per phase with its seconds, then their sum, which is `total`.

    What no phase claims, down to a hundredth of a second, has a line of its own.
    """
    rows = dict(seconds)
    rest = total - sum(rows.values())
    if abs(rest) >= 0.005:
        rows["between these"] = rest
    return [*(f"{took:8.2f} s  {name}" for name, took in rows.items()), f"{total:8.2f} s  {until}"]
