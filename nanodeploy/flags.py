"""Flags, the YAML file and keyword arguments: three spellings of Config's fields, checked in one place.

Flags are flat and take `_` or `-`. A boolean is `--x` or `--no_x`. A flag beats the same key in `--config file.yaml`.
"""

import argparse
import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml

from nanodeploy.config import Config
from nanodeploy.errors import ConfigError

FIELDS = {f.name: f for f in dataclasses.fields(Config)}
POSITIONAL = next(f.name for f in FIELDS.values() if f.metadata.get("positional"))
CONFIG_FILE = "config"  # the one flag that is no field
AUTO = ("auto", "none")  # how a command line says None


class UsageError(ConfigError):
    """The command line itself is wrong: exit code 2."""


class Help(Exception):
    """--help was asked for; the text is the message."""


def parse(argv: Sequence[str], prog: str) -> Config:
    """A command line to a Config. Raises UsageError with one line that says what to write instead, or Help."""
    given = vars(_parser(prog).parse_args(_normalise(argv)))
    file = given.pop(CONFIG_FILE, None)
    positional = given.pop("positional", None)
    if positional is not None:
        if given.setdefault(POSITIONAL, positional) != positional:
            raise UsageError(f"two models: {positional} and --{POSITIONAL} {given[POSITIONAL]}. Give one.")
    from_flags = {name: _from_text(name, value) for name, value in given.items()}
    from_file = _read(file) if file is not None else {}
    return Config(**{**from_file, **from_flags})


def from_mapping(values: Mapping[str, Any], source: str = "Config") -> Config:
    """Keyword arguments to a Config, with the checks the command line has. `source` opens the error messages."""
    return Config(**_checked(values, source))


def suggest(name: str, names: Iterable[str], prefix: str = "") -> str:
    """` Did you mean X?`, or nothing if no name is close."""
    close = difflib.get_close_matches(name, names, n=1)
    return f" Did you mean {prefix}{close[0]}?" if close else ""


def _checked(values: Mapping[str, Any], source: str) -> dict[str, Any]:
    checked = {}
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name not in FIELDS:
            raise UsageError(f"{source}: {key!r} is not a setting.{suggest(name, FIELDS)}")
        checked[name] = _from_value(name, value, f"{source}: {name}")
    return checked


def _read(path: str) -> dict[str, Any]:
    try:
        loaded = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"--{CONFIG_FILE} {path}: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"--{CONFIG_FILE} {path} is not YAML: {error}") from error
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise UsageError(f"--{CONFIG_FILE} {path} holds a {type(loaded).__name__}; wanted `flag: value` lines.")
    return _checked(loaded, path)


def _kind(name: str) -> tuple[type, bool]:
    """A field's type, and whether it may be None."""
    declared = FIELDS[name].type
    if isinstance(declared, types.UnionType):
        base = next(a for a in typing.get_args(declared) if a is not types.NoneType)
        return base, True
    assert isinstance(declared, type)
    return declared, False


def _from_text(name: str, text: Any) -> Any:
    """A flag's value. Booleans come from argparse as such, everything else as text."""
    kind, optional = _kind(name)
    if isinstance(text, bool):
        return text
    if optional and text.lower() in AUTO:
        return None
    try:
        value = kind(text)
    except ValueError:
        wanted = {"int": "a whole number", "float": "a number"}[kind.__name__]
        raise UsageError(f"--{name} {text}: wanted {wanted}.") from None
    return _from_value(name, value, f"--{name}")


def _from_value(name: str, value: Any, source: str) -> Any:
    """A typed value, checked against the field's type, choices and bounds."""
    kind, optional = _kind(name)
    if value is None and optional:
        return None
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise UsageError(f"{source} is {value!r}; wanted {'None or ' if optional else ''}{kind.__name__}.")
    extra = FIELDS[name].metadata
    choices = extra.get("choices")
    if choices and value not in choices:
        near = suggest(str(value), choices) if kind is str else ""
        raise UsageError(f"{source} is {value!r}; wanted one of {', '.join(map(str, choices))}.{near}")
    if isinstance(value, int | float):
        low, high = extra.get("low", -math.inf), extra.get("high", math.inf)
        if not low <= value <= high:
            wanted = f"{low} to {high}" if high != math.inf else f"at least {low}"
            raise UsageError(f"{source} is {value}; wanted {wanted}.")
    if isinstance(value, str) and "\0" in value:
        raise UsageError(f"{source} holds a NUL character.")
    return value


def _flag_names() -> dict[str, bool]:
    """Every flag without its dashes, and whether it takes a value."""
    names = {"help": False, CONFIG_FILE: True}
    for name in FIELDS:
        boolean = _kind(name)[0] is bool
        names[name] = not boolean
        if boolean:
            names[f"no_{name}"] = False
    return names


def _normalise(argv: Sequence[str]) -> list[str]:
    """`--max-model-len=4` to `--max_model_len=4`; an unknown flag is refused here, before its value misleads."""
    known = _flag_names()
    normal: list[str] = []
    rest = iter(argv)
    for word in rest:
        if not word.startswith("--"):
            if re.fullmatch(r"-[^\d.].*", word) and word != "-h":
                raise UsageError(f"{word} is not a flag; flags are written --name.")
            normal.append(word)
            continue
        spelled, equals, value = word.partition("=")
        name = spelled[2:].replace("-", "_")
        if name not in known:
            raise UsageError(f"{spelled} is not a flag.{suggest(name, known, '--')} See --help.")
        if equals and not known[name]:
            opposite = name.removeprefix("no_") if name.startswith("no_") else f"no_{name}"
            raise UsageError(f"--{name} takes no value: write --{name} or --{opposite}.")
        if known[name] and not equals:
            equals, value = "=", _value_after(name, rest)
        normal.append(f"--{name}{equals}{value}")
    return normal


def _value_after(name: str, rest: Iterator[str]) -> str:
    """The word after a flag. It may open with one dash, as in --seed -1."""
    value = next(rest, None)
    if value is None:
        raise UsageError(f"--{name} needs a value.")
    if value.startswith("--"):
        raise UsageError(f"--{name} needs a value; {value} came instead.")
    return value


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message.replace("unrecognized arguments:", "unexpected argument"))

    def print_help(self, file: Any = None) -> None:
        raise Help(self.format_help())


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = _Parser(
        prog=prog,
        usage=f"{prog} [{POSITIONAL.upper()}] [--flag value ...]",
        description="Serve a model over HTTP as OpenAI's API does. Flags take _ or -; a boolean is --x or --no_x.",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=32, width=110),
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("positional", metavar=POSITIONAL.upper(), nargs="?", help=_help(POSITIONAL))
    parser.add_argument(f"--{CONFIG_FILE}", metavar="FILE", help="YAML file of `flag: value` lines; flags beat it")
    for name in FIELDS:
        kind, _ = _kind(name)
        if kind is bool:
            parser.add_argument(f"--{name}", action="store_true", help=_help(name))
            parser.add_argument(f"--no_{name}", dest=name, action="store_false", help=argparse.SUPPRESS)
        else:
            metavar = {int: "N", float: "X", str: "TEXT"}[kind]
            parser.add_argument(f"--{name}", metavar=metavar, help=_help(name))
    return parser


def _help(name: str) -> str:
    field = FIELDS[name]
    choices = field.metadata.get("choices")
    words = [field.metadata["help"]]
    if choices:
        words.append("{" + ", ".join(map(str, choices)) + "}")
    if field.default is True:
        words.append(f"[on; --no_{name}]")
    elif field.default is not None and field.default is not False and field.default != "":
        words.append(f"[{field.default}]")
    return " ".join(words).replace("%", "%%")
