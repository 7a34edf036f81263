"""Which weights a model holds in FP8: what a checkpoint brings, and what --quantization fp8 does to one in 16 bits.

A checkpoint in FP8 says so in config.json (quantization_config), but which of its weights are quantised is decided by
the tensors themselves: those that have scales beside them. Layers that can hold FP8 weights have `quantise()` and
`takes_fp8`; the output layer, embeddings, norms and routers stay as they are.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from nanodeploy import ops
from nanodeploy.errors import CheckpointError, ConfigError
from nanodeploy.models.checkpoint import SCALES
from nanodeploy.models.layers.experts import Experts
from nanodeploy.models.layers.linear import Linear
from nanodeploy.ops import machine
from nanodeploy.ops.layouts import FP8_BLOCK
from nanodeploy.ops.registry import Op

STAYS = ("lm_head",)  # what --quantization fp8 leaves alone, though it could
SHOWN = 5  # names that an error lists


def check_method(config: Mapping[str, Any]) -> None:
    """Raise ConfigError unless config.json has no quantization_config, or one that nanodeploy reads."""
    given = config.get("quantization_config")
    if given is None:
        return
    if not isinstance(given, dict):
        raise ConfigError(f"config.json: quantization_config is {given!r}; wanted an object.")
    for key, wanted in (
        ("quant_method", "fp8"),
        ("fmt", "e4m3"),
        ("weight_block_size", [FP8_BLOCK, FP8_BLOCK]),
        ("activation_scheme", "dynamic"),
    ):
        value = given.get(key, wanted if key in ("fmt", "activation_scheme") else None)
        if value != wanted:
            raise ConfigError(
                f"config.json: quantization_config.{key} is {value!r}; nanodeploy reads {wanted!r} only, "
                "or weights in bf16, fp16 or fp32."
            )


def choose(
    model: nn.Module,
    config: Mapping[str, Any],
    sources: Mapping[str, Sequence[str]],
    tensors: Collection[str] | None,
    quantization: str,
) -> None:
    """Turn those layers of a model without memory to FP8 that are to hold it.

    sources: parameter -> names of the checkpoint's tensors that fill it. tensors: names of all that the checkpoint has;
    None: the weights will be random, and config.json alone says which are quantised. quantization: the flag, "auto" or
    "fp8". Raises ConfigError where the checkpoint contradicts itself.
    """
    given = config.get("quantization_config")
    left_out = (given or {}).get("modules_to_not_convert") or []
    for prefix, module in list(model.named_modules()):
        if not hasattr(module, "quantise"):
            continue
        weights = [w for name, _ in module.named_parameters(recurse=False) for w in sources[f"{prefix}.{name}"]]
        if tensors is None:
            scaled = [] if given is None or prefix in STAYS or _listed(weights, left_out) else weights
        else:
            scaled = [weight for weight in weights if weight + SCALES in tensors]
        if scaled and len(scaled) < len(weights):
            bare = [weight for weight in weights if weight not in scaled]
            raise CheckpointError(
                f"{prefix} has {len(scaled)} quantised parts and {len(bare)} that are not ({_some(bare)} without "
                f"{SCALES}); they are one weight here, so wanted all or none."
            )
        if contradicted := _listed(scaled, left_out):
            raise ConfigError(
                f"config.json: quantization_config.modules_to_not_convert names {_some(contradicted)}, but the "
                f"checkpoint has {contradicted[0]}.weight{SCALES}. One of the two is wrong."
            )
        if scaled or (quantization == "fp8" and given is None and prefix not in STAYS):
            module.quantise()


def check_device(model: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Raise ConfigError if no kernel of this GPU takes the model's FP8 weights, or its experts in whatever dtype.

    dtype: the model's. A CPU runs the references, which take anything.
    """
    if device.type != "cuda":
        return
    for name, module in model.named_modules():
        if isinstance(module, Linear) and module.takes_fp8:
            shape = list(module.weight.shape)
            case = ops.linear_fp8.cases.Case(dtype, 1, *shape)
            _check_kernels(ops.linear_fp8, case, f"{name} is {shape} in FP8", "columns in multiples of 16")
        elif isinstance(module, Experts):
            (num_experts, dim, inner), scaled = module.down.shape, module.takes_fp8
            case = ops.moe_gemm.cases.Case(dtype, 1, 1, num_experts, dim, inner, scaled)
            what = f"{name} are {num_experts} of [{inner}, {dim}]{' in FP8' if scaled else ''}"
            _check_kernels(ops.moe_gemm, case, what, f"sizes in multiples of {16 if scaled else 8}")


def _check_kernels(op: Op, case: Any, what: str, sizes: str) -> None:
    """Raise ConfigError if no kernel takes `case` here, which is that of `what`; there are some for `sizes`."""
    kernels = [kernel for kernel in op.kernels.values() if kernel.needs != "cpu" and kernel.requires is None]
    here = [kernel for kernel in kernels if machine.satisfies(kernel.needs)]
    if op.override == "reference" or any(kernel.when(case) for kernel in here):
        return
    if not here:
        raise ConfigError(
            f"{what}; the kernels want a GPU of {' or '.join(sorted({kernel.needs for kernel in kernels}))}, and this "
            f"one is sm{machine.capability()}. FP8 is left out with a checkpoint in bf16 and no --quantization fp8; "
            f"--kernels {op.name}=reference runs the slow reference."
        )
    raise ConfigError(
        f"{what}, and its results are in {str(case.dtype)[6:]}; on a GPU there are kernels for --dtype bfloat16 or "
        f"float16 and {sizes}."
    )


def _listed(weights: Sequence[str], left_out: Sequence[str]) -> list[str]:
    """The modules of these weights that a list of modules names: outright, by their last names or by their parents."""
    modules = [weight.removesuffix(".weight") for weight in weights]
    return [module for module in modules if any(f".{name}." in f".{module}." for name in left_out)]


def _some(names: Sequence[str]) -> str:
    rest = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {rest} more" if rest > 0 else "")
