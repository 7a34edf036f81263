"""Reading safetensors straight into a model's parameters, strictly: every tensor is used once, every parameter filled.

A module whose parameter has another name or form in the checkpoint says so where it is born:
`checkpoint = {"qkv.weight": Stack("q_proj.weight", "k_proj.weight", "v_proj.weight")}`.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from tqdm import tqdm

from nanodeploy.errors import CheckpointError

INDEX = "model.safetensors.index.json"
DTYPES = ("F64", "F32", "F16", "BF16")
SHOWN = 10  # names that an error lists of each kind


@dataclass(frozen=True, init=False)
class Stack:
    """One parameter that is several tensors in the checkpoint, stacked along its rows."""

    parts: tuple[str, ...]

    def __init__(self, *parts: str):
        object.__setattr__(self, "parts", parts)


def destinations(model: nn.Module) -> dict[str, Tensor]:
    """Checkpoint name -> the parameter, or the rows of one, that this tensor fills. Works on the meta device too."""
    found: dict[str, Tensor] = {}
    declared: dict[str, list[str]] = {}
    for prefix, module in model.named_modules():
        for own_name, stack in getattr(module, "checkpoint", {}).items():
            declared[_join(prefix, own_name)] = [_join(prefix, part) for part in stack.parts]
    for name, parameter in model.named_parameters():
        parts = declared.pop(name, None)
        if parts is None:
            found[name] = parameter
        else:
            owner = model.get_submodule(name.rpartition(".")[0])
            found.update(zip(parts, parameter.split(owner.parts), strict=True))
    assert not declared, f"declared in `checkpoint`, but no such parameter: {sorted(declared)}"
    return found


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


def check(model: nn.Module, paths: Iterable[Path], ignored: Iterable[str] = ()) -> None:
    """Compare a checkpoint's names, shapes and dtypes with the model's, reading headers only.

    Raises one CheckpointError that lists everything that does not fit. Tensors named `ignored` may be there or not.
    """
    wanted = destinations(model)
    seen: set[str] = set()
    unknown, twice, misfits = [], [], []
    for path in paths:
        with _opened(path) as file:
            for name in file.keys():  # noqa: SIM118 (not a mapping)
                if name in seen:
                    twice.append(name)
                elif name in wanted:
                    have = file.get_slice(name)
                    if list(have.get_shape()) != list(wanted[name].shape):
                        misfits.append(f"{name} is {_form(have.get_shape())}, wanted {_form(wanted[name].shape)}")
                    elif have.get_dtype() not in DTYPES:
                        misfits.append(f"{name} is {have.get_dtype()}, wanted one of {', '.join(DTYPES)}")
                elif name not in ignored:
                    unknown.append(name)
                seen.add(name)
    complaints = [
        f"{len(names)} {what}: {_some(names)}"
        for what, names in (
            ("missing", [name for name in wanted if name not in seen]),
            ("unknown", unknown),
            ("there twice", twice),
            ("of the wrong form", misfits),
        )
        if names
    ]
    if complaints:
        raise CheckpointError("The checkpoint does not fit the model. Tensors " + "; ".join(complaints) + ".")


def load(model: nn.Module, paths: list[Path], show: bool | None = None) -> None:
    """Copy a checkpoint that `check` has passed into the model's parameters, converting dtypes on the way.

    The files are mapped, not read into memory, so that no second copy of the weights exists at any time.
    `show` True or False forces the progress bar on or off; None shows it on a terminal.
    """
    wanted = destinations(model)
    disable = None if show is None else not show
    for path in tqdm(paths, desc="weights", unit="shard", disable=disable, leave=False):
        with _opened(path) as file:
            for name in file.keys():  # noqa: SIM118 (not a mapping)
                if name in wanted:
                    wanted[name].copy_(file.get_tensor(name))


def materialise(model: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    """Give a model built on the meta device its memory: parameters are left unset; buffers keep their values."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            empty = torch.empty(parameter.shape, dtype=dtype, device=device)
            setattr(module, name, nn.Parameter(empty, requires_grad=False))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))


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
