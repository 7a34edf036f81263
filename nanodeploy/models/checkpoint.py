"""Reading safetensors straight into a model's parameters, strictly: every tensor is used once, every parameter filled.

A module whose parameter has another name or form in the checkpoint says so where it is born:
`checkpoint = {"qkv.weight": Stack("q_proj.weight", "k_proj.weight", "v_proj.weight")}`.

A weight in FP8 with scales beside it (`X_scale_inv`, ops/layouts.py) either finds parameters of the same kind, or is
multiplied out while it is read into a parameter of another dtype. One in 16 bits or more that finds FP8 parameters is
quantised while it is read.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from tqdm import tqdm

from nanodeploy.errors import CheckpointError
from nanodeploy.ops.layouts import E4M3, E4M3_MAX, FP8_BLOCK, fp8_scales, num_fp8_blocks

INDEX = "model.safetensors.index.json"
DTYPES = ("F64", "F32", "F16", "BF16")
FP8_DTYPE = "F8_E4M3"
SCALES = "_scale_inv"  # what the name of a quantised weight's scales adds to the weight's
SHOWN = 10  # names that an error lists of each kind


@dataclass(frozen=True, init=False)
class Stack:
    """One weight that is several tensors in the checkpoint, stacked along its rows. If it has scales, so are they."""

    parts: tuple[str, ...]

    def __init__(self, *parts: str):
        object.__setattr__(self, "parts", parts)

    def slices(self, owner: nn.Module, parameter: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Each tensor's name, and the rows it fills. `owner` has the parameter, and says how many rows are whose."""
        rows: Any = owner.parts
        if parameter is owner.weight:
            return zip(self.parts, parameter.split(rows), strict=True)
        return zip(
            (part + SCALES for part in self.parts), parameter.split(list(map(num_fp8_blocks, rows))), strict=True
        )


@dataclass(frozen=True, init=False)
class PerExpert:
    """One parameter [E, ...] that the checkpoint keeps expert by expert: tensors `N.<part>` for N from 0 to E - 1.

    Several parts of one expert stand stacked along its rows, all of equal height.
    """

    parts: tuple[str, ...]

    def __init__(self, *parts: str):
        object.__setattr__(self, "parts", parts)

    def slices(self, owner: nn.Module, parameter: Tensor) -> Iterator[tuple[str, Tensor]]:
        names = (f"{expert}.{part}" for expert in range(parameter.shape[0]) for part in self.parts)
        # Views made in one call: a large model has a hundred thousand of them.
        return zip(names, parameter.unflatten(1, (len(self.parts), -1)).flatten(0, 1).unbind(), strict=True)


def parts(model: nn.Module) -> Iterator[tuple[str, str, Tensor]]:
    """(name of a parameter, a tensor of the checkpoint that fills it or a part of it, that part), of all parameters.

    Works on the meta device too.
    """
    parameters = dict(model.named_parameters())
    declared: dict[str, tuple[str, Stack | PerExpert]] = {}
    for prefix, module in model.named_modules():
        for own_name, declaration in getattr(module, "checkpoint", {}).items():
            name = _join(prefix, own_name)
            declared[name] = prefix, declaration
            if isinstance(declaration, Stack) and name + SCALES in parameters:
                declared[name + SCALES] = prefix, declaration
    unknown = sorted(declared.keys() - parameters)
    assert not unknown, f"declared in `checkpoint`, but no such parameter: {unknown}"
    for name, parameter in parameters.items():
        if name not in declared:
            yield name, name, parameter
            continue
        prefix, declaration = declared[name]
        owner = model.get_submodule(name.rpartition(".")[0])
        for part, view in declaration.slices(owner, parameter):
            yield name, _join(prefix, part), view


def destinations(model: nn.Module) -> dict[str, Tensor]:
    """Checkpoint name -> the parameter, or the part of one, that this tensor fills."""
    return {tensor: view for _, tensor, view in parts(model)}


def sources(model: nn.Module) -> dict[str, list[str]]:
    """Parameter -> names of the checkpoint's tensors that fill it."""
    found: dict[str, list[str]] = {}
    for name, tensor, _ in parts(model):
        found.setdefault(name, []).append(tensor)
    return found


def tensor_names(paths: Iterable[Path]) -> set[str]:
    """Of all tensors in these files."""
    names: set[str] = set()
    for path in paths:
        with _opened(path) as file:
            names.update(file.keys())
    return names


def shards(directory: Path) -> list[Path]:
    """The safetensors files of a checkpoint. Raises CheckpointError if there are none, or if the index is not sound."""
    index = directory / INDEX
    if index.is_file():
        return [_inside(directory, name) for name in sorted(set(_weight_map(index).values()))]
    if (directory / "model.safetensors").is_file():
        return [directory / "model.safetensors"]
    found = sorted(directory.glob("*.safetensors"))
    if found:
        return found
    others = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth", "*.gguf") for path in directory.glob(pattern))
    if others:
        raise CheckpointError(f"{directory} has {_some(others)}; nanodeploy reads safetensors only: convert it first.")
    raise CheckpointError(f"{directory} has no *.safetensors file.")


@dataclass(frozen=True)
class Header:
    """What a file says about one of its tensors."""

    path: Path
    dtype: str  # as safetensors writes it
    shape: list[int]


def headers(paths: Iterable[Path]) -> tuple[dict[str, Header], list[str]]:
    """(every tensor's header by name, names that are there twice). Reads no tensor."""
    found: dict[str, Header] = {}
    twice = []
    for path in paths:
        with _opened(path) as file:
            for name in file.keys():  # noqa: SIM118 (not a mapping)
                if name in found:
                    twice.append(name)
                tensor = file.get_slice(name)
                found[name] = Header(path, tensor.get_dtype(), tensor.get_shape())
    return found, twice


def check(model: nn.Module, paths: Iterable[Path], ignored: Iterable[str] = ()) -> None:
    """Compare a checkpoint's names, shapes and dtypes with the model's, reading headers only.

    Raises one CheckpointError that lists everything that does not fit. Tensors whose names match a pattern of `ignored`
    (`*` stands for anything) may be there or not.
    """
    wanted = destinations(model)
    have, twice = headers(paths)
    unknown, misfits = [], []
    for name in have:
        if name in wanted:
            misfits += _misfits(name, wanted[name], have)
        elif not _multiplies_out(name, wanted, have) and not any(fnmatchcase(name, pattern) for pattern in ignored):
            unknown.append(name)
    complaints = [
        f"{len(names)} {what}: {_some(names)}"
        for what, names in (
            ("missing", [name for name in wanted if name not in have and not _quantises(name, wanted, have)]),
            ("unknown", unknown),
            ("there twice", twice),
            ("of the wrong form", misfits),
        )
        if names
    ]
    if complaints:
        raise CheckpointError("The checkpoint does not fit the model. Tensors " + "; ".join(complaints) + ".")


def _misfits(name: str, target: Tensor, have: dict[str, Header]) -> list[str]:
    """What is wrong with a tensor that is to fill `target`: nothing, or one complaint."""
    header, scales = have[name], have.get(name + SCALES)
    if header.shape != list(target.shape):
        return [f"{name} is {_form(header.shape)}, wanted {_form(target.shape)}"]
    if target.dtype == E4M3:
        fits = header.dtype == FP8_DTYPE or (scales is None and header.dtype in DTYPES)
        return [] if fits else [f"{name} is {header.dtype}, wanted {FP8_DTYPE}"]
    if header.dtype in DTYPES:
        return []
    if header.dtype != FP8_DTYPE:
        return [f"{name} is {header.dtype}, wanted one of {', '.join(DTYPES)}"]
    if scales is None:
        return [f"{name} is {FP8_DTYPE} without {name + SCALES}"]
    blocks = [num_fp8_blocks(size) for size in header.shape]
    if scales.shape != blocks or scales.dtype not in DTYPES:
        is_ = f"{scales.dtype} {_form(scales.shape)}"
        return [f"{name + SCALES} is {is_}, wanted {_form(blocks)} in one of {', '.join(DTYPES)}"]
    return []


def _multiplies_out(name: str, wanted: dict[str, Tensor], have: dict[str, Header]) -> bool:
    """Whether a tensor is the scales of a quantised weight whose parameter is not quantised."""
    weight = name.removesuffix(SCALES)
    is_scales = weight != name and weight in wanted and weight in have and have[weight].dtype == FP8_DTYPE
    return is_scales and wanted[weight].dtype != E4M3


def _quantises(name: str, wanted: dict[str, Tensor], have: dict[str, Header]) -> bool:
    """Whether a tensor that is wanted is the scales of a weight that is quantised while it is read."""
    weight = name.removesuffix(SCALES)
    return weight != name and weight in have and weight in wanted and have[weight].dtype in DTYPES


def load(model: nn.Module, paths: list[Path], show: bool | None = None) -> None:
    """Copy a checkpoint that `check` has passed into the model's parameters, converting dtypes on the way.

    The files are mapped, not read into memory, so that no second copy of the weights exists at any time.
    `show` True or False forces the progress bar on or off; None shows it on a terminal.
    """
    wanted = destinations(model)
    scales = _Scales(paths)
    disable = None if show is None else not show
    for path in tqdm(paths, desc="weights", unit="shard", disable=disable, leave=False):
        with _opened(path) as file:
            for name in file.keys():  # noqa: SIM118 (not a mapping)
                if name not in wanted:
                    continue
                target, tensor = wanted[name], file.get_tensor(name)
                if tensor.dtype == E4M3 and target.dtype != E4M3:
                    tensor = multiplied_out(tensor.to(target.device), scales.of(name).to(target.device))
                elif tensor.dtype != E4M3 and target.dtype == E4M3:
                    tensor, made = quantised(tensor.to(target.device))
                    wanted[name + SCALES].copy_(made)
                target.copy_(tensor)


def quantised(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A weight [N, K] in 16 bits or more as float8_e4m3fn, and its scales [ceil(N / 128), ceil(K / 128)] fp32.

    A block's scale is its largest magnitude / 448 (1 of zeros); values are rounded to nearest.
    """
    num_blocks = [num_fp8_blocks(size) for size in weight.shape]
    padding = [blocks * FP8_BLOCK - size for blocks, size in zip(num_blocks, weight.shape)]
    padded = nn.functional.pad(weight.float(), (0, padding[1], 0, padding[0]))
    blocks = padded.unflatten(1, (num_blocks[1], FP8_BLOCK)).unflatten(0, (num_blocks[0], FP8_BLOCK))
    scales = fp8_scales(blocks.abs().amax((1, 3)))
    small = (blocks * (1 / scales)[:, None, :, None]).clamp(-E4M3_MAX, E4M3_MAX).to(E4M3)
    values = small.flatten(2, 3).flatten(0, 1)[: weight.shape[0], : weight.shape[1]]
    return values.contiguous(), scales


def multiplied_out(weight: Tensor, scales: Tensor) -> Tensor:
    """The reverse, in fp32, but for what rounding took."""
    by_row = scales.float().repeat_interleave(FP8_BLOCK, dim=0)[: weight.shape[0]]
    return weight.float() * by_row.repeat_interleave(FP8_BLOCK, dim=1)[:, : weight.shape[1]]


class _Scales:
    """The scales of quantised weights, which may lie in another shard than their weight."""

    def __init__(self, paths: list[Path]):
        self.paths = paths
        self.found: dict[str, Path] = {}

    def of(self, weight: str) -> Tensor:
        if not self.found:
            for path in self.paths:
                with _opened(path) as file:
                    self.found.update((name, path) for name in file.keys() if name.endswith(SCALES))  # noqa: SIM118
        with _opened(self.found[weight + SCALES]) as file:
            scales: Tensor = file.get_tensor(weight + SCALES)
            return scales


def materialise(model: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    """Give a model built on the meta device its memory: parameters are left unset; buffers keep their values.

    Parameters get `dtype`, but for those in 8 bits and those that their module lists in `keep_fp32`.
    """
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            own = param_dtype(module, name, parameter, dtype)
            empty = torch.empty(parameter.shape, dtype=own, device=device)
            setattr(module, name, nn.Parameter(empty, requires_grad=False))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))


def param_dtype(module: nn.Module, name: str, parameter: Tensor, dtype: torch.dtype) -> torch.dtype:
    """The dtype of a module's own parameter in a model of `dtype`."""
    if name in getattr(module, "keep_fp32", ()):
        return torch.float32
    return parameter.dtype if parameter.dtype.itemsize == 1 else dtype


def num_bytes(model: nn.Module, dtype: torch.dtype) -> int:
    """Of a model's parameters, once they are materialised in `dtype`."""
    return sum(
        parameter.numel() * param_dtype(module, name, parameter, dtype).itemsize
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
    )


def _opened(path: Path):
    """A safetensors file on the CPU, mapped. Opening checks the header against the file's length."""
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged or cannot be read: {error}. Fetch it again.") from error


def _weight_map(index: Path) -> dict[str, str]:
    try:
        value = json.loads(index.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{index} cannot be read as JSON: {error}.") from error
    weight_map = value.get("weight_map") if isinstance(value, dict) else None
    if not isinstance(weight_map, dict) or not weight_map or not all(type(v) is str for v in weight_map.values()):
        raise CheckpointError(f"{index} has no weight_map of tensor names to file names.")
    return weight_map


def _inside(directory: Path, name: str) -> Path:
    """A shard that an index names. Links are followed (hub caches are made of them); a path out of the directory is
    refused before it is touched."""
    if Path(name).name != name or not name.endswith(".safetensors"):
        raise CheckpointError(f"{directory / INDEX} names the shard {name!r}; wanted a *.safetensors file beside it.")
    path = directory / name
    if not path.is_file():
        raise CheckpointError(f"{directory / INDEX} names the shard {name}, which is not there.")
    return path


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def _form(shape: Iterable[int]) -> str:
    return "[" + ", ".join(map(str, shape)) + "]"


def _some(names: list[str]) -> str:
    rest = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {rest} more" if rest > 0 else "")
