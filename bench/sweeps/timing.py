"""How the sweeps time: as every bench does, by the calls alone. The function lives in bench/timing.py."""

from bench.timing import graph_us

__all__ = ["graph_us"]
