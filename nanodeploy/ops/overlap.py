"""Programmatic dependent launch (PDL): a kernel's programs are on the machine before the kernel ahead of it is done.

In a decode step the launches of some three hundred short kernels would cost more than a tenth of the time. With PDL
the next kernel's programs take their places, read what no kernel of the step writes (weights), and wait for the results
of the kernel ahead only then. A kernel that takes part has a constexpr PDL, is launched with `**overlap.launch()`, and
calls `wait(PDL)` before it touches anything that another kernel of the step reads or writes; `go(PDL)` comes first, as
it only lets the next kernel's programs come, which will wait in their turn for this whole kernel to end.
"""

import functools
from typing import Any

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from nanodeploy.config import triton_interpret
from nanodeploy.ops import machine


@functools.cache
def supported() -> bool:
    """Whether kernels can be launched so: on a GPU of Hopper or later, not in the interpreter."""
    return not triton_interpret() and machine.capability() >= 90


def launch() -> dict[str, Any]:
    """Keyword arguments of the launch: the kernel's constexpr PDL, and Triton's own option."""
    return {"PDL": True, "launch_pdl": True} if supported() else {"PDL": False}


@triton.jit
def go(PDL: tl.constexpr):
    """Let the next kernel's programs come as soon as there is room for them."""
    if PDL:
        gdc_launch_dependents()


@triton.jit
def wait(PDL: tl.constexpr):
    """Wait until the kernel ahead has ended and its writes can be seen."""
    if PDL:
        gdc_wait()
