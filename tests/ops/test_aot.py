"""Every shipped configuration of every kernel compiles for sm_90, without a GPU: no spills, shared memory in bounds,
and the instructions it was written for.

A process of its own compiles: this one may run Triton's interpreter, which replaces the functions to compile.
"""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nanodeploy.ops.registry import OPS

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = [(op.name, kernel.name) for op in OPS.values() for kernel in op.kernels.values() if kernel.aot]


@functools.cache
def reports() -> list[dict]:
    """All configurations, compiled once. Triton's disk cache makes the next run of unchanged kernels quick."""
    done = subprocess.run(
        [sys.executable, "-m", "nanodeploy.ops.aot", "--json"],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(("op", "kernel"), SHIPPED, ids=[f"{op}/{kernel}" for op, kernel in SHIPPED])
def test_shipped_configurations_compile_as_promised(op, kernel):
    mine = [r for r in reports() if (r["op"], r["kernel"]) == (op, kernel)]
    assert mine, f"aot of {kernel} lists no configuration"
    broken = [f"[{r['config']}] {'; '.join(r['complaints'])}" for r in mine if r["complaints"]]
    assert not broken, "\n".join(broken)


def test_every_triton_kernel_ships_configurations():
    """A kernel that needs a GPU and no vendor's package is ours, and says what it launches."""
    silent = [
        f"{op.name}/{kernel.name}"
        for op in OPS.values()
        for kernel in op.kernels.values()
        if kernel.needs != "cpu" and not kernel.requires and kernel.interpretable and not kernel.aot
    ]
    assert not silent, f"no aot configurations: {', '.join(silent)}"
