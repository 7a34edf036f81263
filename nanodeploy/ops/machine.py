"""What this machine is: the device the kernels meet, its key in measured tables, and how to time on it."""

import functools
import re

import torch


@functools.cache
def capability() -> int:
    """Compute capability as one number (90 on Hopper), 0 without a CUDA device."""
    if not torch.cuda.is_available():
        return 0
    major, minor = torch.cuda.get_device_capability()
    return major * 10 + minor


@functools.cache
def key() -> str:
    """File-name-safe name of the device, its maker left out: `cpu`, `h200`."""
    if not torch.cuda.is_available():
        return "cpu"
    return (
        re.sub(r"[^a-z0-9]+", "_", torch.cuda.get_device_name().lower())
        .strip("_")
        .removeprefix("nvidia_")
        .removeprefix("nvidia_")
    )


@functools.cache
def num_sms() -> int:
    """Streaming multiprocessors; 1 without a CUDA device, where the interpreter is serial anyway."""
    if not torch.cuda.is_available():
        return 1
    return torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count


def satisfies(needs: str) -> bool:
    """Whether this machine meets `needs`: `cpu`, `smNN` for at least that compute capability, `smNNa` for exactly it.

    The latter as in CUDA: instructions of one architecture (wgmma of sm_90a) that later ones do not have.
    """
    if needs == "cpu":
        return True
    if needs.endswith("a"):
        return capability() == int(needs[2:-1])
    return capability() >= int(needs.removeprefix("sm"))
