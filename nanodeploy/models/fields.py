"""Reading config.json: each value is checked as it is read, and a wrong one is named in the words of the file."""

from typing import Any

from nanodeploy.errors import ConfigError


def integer(config: dict[str, Any], key: str, default: int | None = None, *, least: int = 1) -> int:
    """A whole number. Raises ConfigError if it is neither there nor has a default, or is something else or smaller."""
    wanted = "a positive whole number" if least == 1 else f"a whole number from {least} on"
    value = config.get(key)
    if value is None:
        value = default
    if value is None:
        raise ConfigError(f"config.json has no {key}; wanted {wanted}.")
    if type(value) is not int or value < least:
        raise ConfigError(f"config.json: {key} is {value!r}; wanted {wanted}.")
    return value


def number(config: dict[str, Any], key: str, default: float | None = None) -> float:
    """A number greater than zero. Raises ConfigError like `integer`."""
    value = config.get(key)
    if value is None:
        value = default
    if value is None:
        raise ConfigError(f"config.json has no {key}; wanted a number greater than 0.")
    if type(value) not in (int, float) or not 0 < value < float("inf"):
        raise ConfigError(f"config.json: {key} is {value!r}; wanted a number greater than 0.")
    return float(value)


def boolean(config: dict[str, Any], key: str, default: bool) -> bool:
    """True or false. Raises ConfigError if it is something else."""
    value = config.get(key)
    if value is None:
        value = default
    if type(value) is not bool:
        raise ConfigError(f"config.json: {key} is {value!r}; wanted true or false.")
    return value


def only(config: dict[str, Any], key: str, wanted: Any, default: Any) -> None:
    """Refuse a variant that nanodeploy does not implement."""
    value = config.get(key, default)
    if value != wanted:
        raise ConfigError(f"config.json: {key} is {value!r}; nanodeploy implements {wanted!r} only.")
