"""Which models there are, and where their files lie. Reads JSON only: no torch, so that the command line fails fast."""

import dataclasses
import difflib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanodeploy.errors import CheckpointError, ConfigError

PACKAGE = Path(__file__).parent
DEMOS = PACKAGE / "demo"
SHAPES = PACKAGE / "models" / "configs"
RANDOM = "random-"  # demo:random-NAME

# The architecture that config.json names -> the values of model_type that come with it, which are also the names of the
# files in nanodeploy/models. Of a model_type that is not among them the first decides.
FAMILIES = {
    "Qwen3ForCausalLM": ("qwen3",),
    "Qwen3MoeForCausalLM": ("qwen3_moe",),
    "DeepseekV3ForCausalLM": ("deepseek_v3", "kimi_k2"),
}


@dataclass(frozen=True)
class ModelFiles:
    """A model that was found: its settings as written in its JSON files, nothing interpreted but the end tokens."""

    name: str  # what the operator asked for
    path: Path | None  # directory of the safetensors; None if there are none to read
    config: dict[str, Any]
    generation_config: dict[str, Any]  # empty if the model has none
    tokenizer_dir: Path | None  # has a tokenizer.json; None: the model takes token ids only
    eos_token_ids: tuple[int, ...]
    dummy: bool  # the weights are to be drawn at random

    @property
    def dtype_name(self) -> str | None:
        """The dtype the checkpoint says it is in, such as "bfloat16"."""
        return self.config.get("dtype") or self.config.get("torch_dtype")


def locate(model: str, tokenizer: str | None = None) -> ModelFiles:
    """Find a model: a directory in Hugging Face's layout, demo:NAME (shipped), or demo:random-NAME (a shape only).

    `tokenizer` names another directory to take tokenizer.json from. Weights are not looked at. Raises ConfigError
    that says what there is, and CheckpointError on a damaged JSON file.
    """
    if model.startswith("demo:"):
        name = model.removeprefix("demo:")
        files = _random(model, name) if name.lower().startswith(RANDOM) else _demo(model, name)
    else:
        files = _directory(model, Path(model).expanduser())
    family(files.config)
    if tokenizer is None:
        return files
    directory = Path(tokenizer).expanduser()
    if not (directory / "tokenizer.json").is_file():
        raise ConfigError(f"--tokenizer {tokenizer}: there is no tokenizer.json in that directory.")
    return dataclasses.replace(files, tokenizer_dir=directory)


def family(config: dict[str, Any]) -> str:
    """The file in nanodeploy/models for a config.json. Raises ConfigError if there is none."""
    model_type = config.get("model_type")
    architectures = config.get("architectures") or [a for a, names in FAMILIES.items() if model_type in names]
    for architecture in architectures:
        if architecture in FAMILIES:
            names = FAMILIES[architecture]
            return model_type if model_type in names else names[0]
    ours = [f"{architecture} (model_type {' or '.join(names)})" for architecture, names in FAMILIES.items()]
    raise ConfigError(
        f"config.json says architectures {config.get('architectures')}, model_type {model_type!r}; "
        f"nanodeploy runs {', '.join(ours)}."
    )


def available() -> list[str]:
    """Names of the models that need no files of the operator's."""
    shipped = [f"demo:{path.parent.name}" for path in sorted(DEMOS.glob("*/config.json"))]
    return shipped + [f"demo:{RANDOM}{path.stem.lower()}" for path in sorted(SHAPES.glob("*.json"))]


def _random(model: str, name: str) -> ModelFiles:
    shapes = {path.stem.lower(): path for path in SHAPES.glob("*.json")}
    path = shapes.get(name.lower().removeprefix(RANDOM))
    if path is None:
        raise _unknown(model)
    config = read_json(path)
    return ModelFiles(model, None, config, {}, None, _eos_token_ids(config, {}), dummy=True)


def _demo(model: str, name: str) -> ModelFiles:
    if model not in available():  # only names that a listing shows, so no path can be smuggled in
        raise _unknown(model)
    return _directory(model, DEMOS / name)


def _directory(model: str, directory: Path) -> ModelFiles:
    if not directory.exists():
        raise _unknown(model)
    if not directory.is_dir():
        raise ConfigError(f"{model} is a file; wanted a directory with config.json and *.safetensors.")
    if not (directory / "config.json").is_file():
        raise CheckpointError(f"{model} has no config.json; wanted a directory in Hugging Face's layout.")
    config = read_json(directory / "config.json")
    generation = directory / "generation_config.json"
    generation_config = read_json(generation) if generation.is_file() else {}
    tokenizer_dir = directory if (directory / "tokenizer.json").is_file() else None
    eos_token_ids = _eos_token_ids(config, generation_config)
    return ModelFiles(model, directory, config, generation_config, tokenizer_dir, eos_token_ids, dummy=False)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a model directory. Raises CheckpointError that names the file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a JSON {type(value).__name__}; wanted an object.")
    return value


def _eos_token_ids(config: dict[str, Any], generation_config: dict[str, Any]) -> tuple[int, ...]:
    """Tokens that end an answer: generation_config.json has the last word; one id, a list of ids, or none."""
    value = generation_config.get("eos_token_id")
    if value is None:
        value = config.get("eos_token_id")
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(type(i) is int and i >= 0 for i in ids):
        raise CheckpointError(f"eos_token_id is {value!r}; wanted a token id or a list of them.")
    return tuple(ids)


def _unknown(model: str) -> ConfigError:
    there = available()
    parent = Path(model).expanduser().parent
    beside = [] if model.startswith("demo:") else _children(parent)
    close = difflib.get_close_matches(model.lower(), there, n=3) + difflib.get_close_matches(model, beside, n=3)
    hint = f" Did you mean {' or '.join(close)}?" if close else ""
    if model.startswith("demo:"):
        return ConfigError(f"There is no {model}.{hint} There are: {', '.join(there)}.")
    hub = " A model from a hub must be downloaded first." if not close and model.count("/") == 1 else ""
    return ConfigError(f"There is no directory {model}.{hint}{hub} Without files there are: {', '.join(there)}.")


def _children(parent: Path) -> Iterable[str]:
    try:
        return [str(child) for child in parent.iterdir() if child.is_dir()]
    except OSError:
        return []
