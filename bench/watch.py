"""Run bench.op again whenever a file of a room changes, each time in a fresh process.

A kernel may kill its CUDA context, and reloading modules would leave old kernels behind. So that a fresh process still
answers at once, the next one is started early: it imports torch and Triton, opens the GPU, and waits.
"""

import subprocess
import sys
import time
from pathlib import Path

from bench.header import ROOT
from nanodeploy.runtime.saves import stamps

POLL_S = 0.2
# The room's own files are imported after the line arrives, so what runs is what was saved.
WAIT = """
import sys, runpy
import bench.interpret, torch, torch._dynamo, triton
if torch.cuda.is_available():
    torch.cuda.init()
if sys.stdin.readline():
    sys.argv = ["bench.op", *sys.argv[1:]]
    runpy.run_module("bench.op", run_name="__main__", alter_sys=True)
"""


def start(arguments: list[str]) -> subprocess.Popen:
    """A process that is ready to run bench.op with these arguments, once it gets a line."""
    command = [sys.executable, "-c", WAIT, *arguments]
    # A session of its own: Ctrl-C reaches the watcher alone, which then ends its processes without their tracebacks.
    return subprocess.Popen(command, stdin=subprocess.PIPE, text=True, cwd=ROOT, start_new_session=True)


def watch(folder: Path, arguments: list[str], runs: int | None = None) -> int:
    """Run now and after every change, until Ctrl-C (or `runs` times). Returns the exit status 0: the watcher's own."""
    running, waiting = None, start(arguments)
    try:
        while True:
            before = stamps(folder)
            running, waiting = waiting, start(arguments)
            running.communicate("go\n")
            if runs is not None:
                runs -= 1
                if runs == 0:
                    return 0
            print(f"\nwatching {folder.name}/; Ctrl-C ends", flush=True)
            while stamps(folder) == before:
                time.sleep(POLL_S)
    except KeyboardInterrupt:
        print()
        return 0
    finally:
        for process in filter(None, (running, waiting)):
            process.kill()
            process.wait()
