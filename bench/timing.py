"""How benches time: as `nanodeploy tune` does. The functions live in nanodeploy/ops/timing.py."""

from nanodeploy.ops.timing import Timing, graph_time, graph_us, input_sets, stream_time, time_call

__all__ = ["Timing", "graph_time", "graph_us", "input_sets", "stream_time", "time_call"]
