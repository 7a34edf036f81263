"""Every "auto" becomes a value with its reason, before weights load."""

import dataclasses

import torch

from nanodeploy.catalog import ModelFiles
from nanodeploy.config import Config
from nanodeploy.errors import ConfigError


def resolve(config: Config, files: ModelFiles, model_len: int) -> tuple[Config, dict[str, str]]:
    """Settle device and dtype, check what settings must have in common, and return the reasons of what was chosen.

    `model_len` is the longest sequence that the model takes. The cache's size, and with it max_model_len where that
    is None, is settled later: it wants a measurement. Raises ConfigError.
    """
    reasons = {}
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
        reasons["device"] = "torch sees a GPU" if device == "cuda" else "torch sees no GPU"
    elif device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "--device is cuda, but torch sees no GPU. Use --device cpu, or install a CUDA build of torch."
        )

    dtype = config.dtype
    if dtype == "auto":
        if device == "cpu":
            dtype, reasons["dtype"] = "float32", "on a CPU"
        elif files.dtype_name in ("bfloat16", "float16"):
            dtype, reasons["dtype"] = files.dtype_name, "the checkpoint's"
        else:
            dtype, reasons["dtype"] = (
                "bfloat16",
                f"the GPU's kernels want 16 bits; the checkpoint is {files.dtype_name}",
            )

    if config.max_model_len is not None and not 2 <= config.max_model_len <= model_len:
        raise ConfigError(f"--max_model_len is {config.max_model_len}; {files.name} takes 2 to {model_len} tokens.")
    if config.max_num_batched_tokens < config.max_num_seqs:
        raise ConfigError(
            f"--max_num_batched_tokens is {config.max_num_batched_tokens} and --max_num_seqs {config.max_num_seqs}; "
            "every running sequence needs a token in each step. "
            f"Use --max_num_seqs {config.max_num_batched_tokens} or less."
        )
    return dataclasses.replace(config, device=device, dtype=dtype), reasons
