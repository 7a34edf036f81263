"""From the files of a model to a module that runs."""

import importlib
from collections.abc import Callable

import torch
from torch import nn

from nanodeploy import catalog
from nanodeploy.catalog import ModelFiles
from nanodeploy.errors import ConfigError
from nanodeploy.models import checkpoint
from nanodeploy.models.layers.norm import RMSNorm
from nanodeploy.models.model import LanguageModel


def skeleton(files: ModelFiles) -> LanguageModel:
    """The model without memory (its parameters on the meta device): enough to ask what it needs and takes.

    Raises ConfigError for a config.json that no model fits.
    """
    if files.config.get("quantization_config"):
        raise ConfigError(f"{files.name} is quantised (config.json: quantization_config); wanted bf16, fp16 or fp32.")
    module = importlib.import_module(f"nanodeploy.models.{catalog.family(files.config)}")
    shape = module.Shape.from_hf(files.config)
    with torch.device("meta"):
        model: LanguageModel = module.Model(shape)
    return model.eval()


def build(
    files: ModelFiles,
    *,
    dtype: torch.dtype,
    device: torch.device,
    load_format: str,
    seed: int,
    progress: Callable[[str], None] | None = None,
) -> LanguageModel:
    """The model in eval mode on `device`, its parameters in `dtype`, filled from safetensors.

    load_format "dummy", or a model that has no weights to read, draws them at random from `seed` instead. Everything
    that can be wrong with a checkpoint, the bytes of its tensors aside, is found before device memory is taken.
    Raises ConfigError for a config.json that no model fits, CheckpointError for files that do not fit the model.
    """
    model = skeleton(files)
    if files.path is None or files.dummy or load_format == "dummy":
        if progress:
            progress("drawing random weights")
        checkpoint.materialise(model, dtype, device)
        draw(model, seed)
        return model
    paths = checkpoint.shards(files.path)
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
        for parameter in module.parameters(recurse=False):
            if isinstance(module, RMSNorm):
                parameter.fill_(1)
            else:
                generator = generator or torch.Generator(parameter.device).manual_seed(seed)
                parameter.normal_(0, 0.02, generator=generator)
