"""From the files of a model to a module that runs."""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nanodeploy import catalog
from nanodeploy.catalog import ModelFiles
from nanodeploy.models import checkpoint, quantize
from nanodeploy.models.layers.norm import RMSNorm
from nanodeploy.models.model import LanguageModel
from nanodeploy.ops.layouts import E4M3

DEVIATION = 0.02  # of random weights
E4M3_DEVIATION = 64.0  # of their values where they are in FP8, which reaches to 448


def skeleton(files: ModelFiles, load_format: str = "auto", quantization: str = "auto") -> LanguageModel:
    """The model without memory (its parameters on the meta device): enough to ask what it needs and takes.

    Which of its weights are in FP8 is settled (models/quantize.py): for that the names of the checkpoint's tensors are
    read. Raises ConfigError for a config.json that no model fits, CheckpointError for files that cannot be read.
    """
    quantize.check_method(files.config)
    module = importlib.import_module(f"nanodeploy.models.{catalog.family(files.config)}")
    shape = module.Shape.from_hf(files.config)
    with torch.device("meta"):
        model: LanguageModel = module.Model(shape)
    directory = weights_of(files, load_format)
    tensors = None if directory is None else checkpoint.tensor_names(checkpoint.shards(directory))
    quantize.choose(model, files.config, checkpoint.sources(model), tensors, quantization)
    return model.eval()


def weights_of(files: ModelFiles, load_format: str) -> Path | None:
    """The directory of the weights; None if they are to be drawn at random."""
    return None if files.dummy or load_format == "dummy" else files.path


def build(
    files: ModelFiles,
    *,
    dtype: torch.dtype,
    device: torch.device,
    load_format: str,
    seed: int,
    quantization: str = "auto",
    progress: Callable[[str], None] | None = None,
) -> LanguageModel:
    """The model in eval mode on `device`, its parameters in `dtype` or FP8, filled from safetensors.

    load_format "dummy", or a model that has no weights to read, draws them at random from `seed` instead. quantization
    "fp8" quantises weights of 16 bits as they are read, "auto" takes them as the checkpoint has them. Everything
    that can be wrong with a checkpoint, the bytes of its tensors aside, is found before device memory is taken.
    Raises ConfigError for a config.json that no model fits, CheckpointError for files that do not fit the model.
    """
    model = skeleton(files, load_format, quantization)
    quantize.check_device(model, device, dtype)
    directory = weights_of(files, load_format)
    if directory is None:
        if progress:
            progress("drawing random weights")
        checkpoint.materialise(model, dtype, device)
        draw(model, seed)
        return model
    paths = checkpoint.shards(directory)
    checkpoint.check(model, paths, model.ignored_tensors)
    if progress:
        progress("loading weights")
    checkpoint.materialise(model, dtype, device)
    checkpoint.load(model, paths)
    return model


def draw(model: nn.Module, seed: int) -> None:
    """Random weights on the model's own device: normal with deviation 0.02; the gains of norms are 1."""
    generator: torch.Generator | None = None
    for module in model.modules():
        scales: Any = module.keep_fp32 if hasattr(module, "quantise") else ()
        for name, parameter in module.named_parameters(recurse=False):
            generator = generator or torch.Generator(parameter.device).manual_seed(seed)
            if isinstance(module, RMSNorm):
                parameter.fill_(1)
            elif name in scales:
                parameter.fill_(DEVIATION / E4M3_DEVIATION)
            elif parameter.dtype == E4M3:
                for rows in parameter.split(-(-len(parameter) // 64)):  # torch draws in fp32 only: not all at once
                    drawn = torch.empty(rows.shape, device=rows.device).normal_(0, E4M3_DEVIATION, generator=generator)
                    rows.copy_(drawn)
            else:
                parameter.normal_(0, DEVIATION, generator=generator)
