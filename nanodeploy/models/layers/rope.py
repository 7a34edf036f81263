"""Rotary position tables (RoPE, arXiv:2104.09864), with the two ways to stretch them that checkpoints use.

Axes: N positions, R rotary dims of a head.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nanodeploy.errors import ConfigError
from nanodeploy.models.fields import integer, number

KINDS = ("default", "linear", "yarn")


@dataclass(frozen=True)
class Rope:
    """What a checkpoint says about its positions."""

    dim: int  # R
    theta: float
    max_len: int  # N, positions the model takes, after stretching
    kind: str = "default"
    factor: float = 1.0  # how far the trained context is stretched
    trained_len: int = 0  # yarn: positions before stretching
    beta_fast: float = 32.0  # yarn: a dim that turns more often than this over the trained context is left alone
    beta_slow: float = 1.0  # yarn: one that turns less often than this is slowed by the whole factor
    truncate: bool = True  # yarn: whether the bounds of the two are rounded outwards to whole dims
    gain: float = 1.0  # yarn: of cos and sin, which is a temperature of the attention
    logit_gain: float = 1.0  # yarn with mscale_all_dim: of attention's logits, those of dims that do not rotate too

    @staticmethod
    def from_hf(config: dict[str, Any], dim: int) -> "Rope":
        """Read `rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling` (before). Raises ConfigError."""
        given = config.get("rope_scaling") or config.get("rope_parameters") or {}
        if not isinstance(given, dict):
            raise ConfigError(f"config.json: rope_scaling is {given!r}; wanted an object or null.")
        kind = given.get("rope_type") or given.get("type") or "default"
        if kind not in KINDS:
            raise ConfigError(f"config.json: rope_type is {kind!r}; nanodeploy has {', '.join(KINDS)}.")
        theta = number(given, "rope_theta", number(config, "rope_theta", 10000.0))
        max_len = integer(config, "max_position_embeddings")
        if kind == "default":
            return Rope(dim, theta, max_len)
        factor = number(given, "factor")
        if kind == "linear":
            return Rope(dim, theta, math.floor(factor * max_len), kind, factor)
        trained_len = integer(given, "original_max_position_embeddings", max_len)
        return Rope(
            dim,
            theta,
            # The published way to turn yarn on leaves max_position_embeddings as it was.
            max(max_len, math.floor(factor * trained_len)),
            kind,
            factor,
            trained_len,
            number(given, "beta_fast", 32.0),
            number(given, "beta_slow", 1.0),
            given.get("truncate", True),
            _yarn_gain(given, factor),
            _yarn_scale(number(given, "mscale_all_dim"), factor) ** 2 if given.get("mscale_all_dim") else 1.0,
        )

    def table(self) -> Tensor:
        """[N, R] fp32 on the CPU: the first R/2 columns cosines, the last R/2 sines, as ops.rope takes them."""
        # In fp32 as the models were trained: at far positions one ulp of a frequency is visible in the angle.
        frequency = 1.0 / self.theta ** (torch.arange(0, self.dim, 2, dtype=torch.float32, device="cpu") / self.dim)
        if self.kind == "linear":
            frequency = frequency / self.factor
        elif self.kind == "yarn":
            slowed = self._slowed()
            frequency = frequency / self.factor * slowed + frequency * (1 - slowed)
        angles = torch.arange(self.max_len, dtype=torch.float32, device="cpu")[:, None] * frequency
        return torch.cat((angles.cos() * self.gain, angles.sin() * self.gain), dim=-1)

    def _slowed(self) -> Tensor:
        """How much of the factor each of the R/2 pairs gets, 0 to 1 (YaRN, arXiv:2309.00071, eq. 22 and 23)."""

        def pair_that_turns(times: float) -> float:
            return self.dim * math.log(self.trained_len / (times * 2 * math.pi)) / (2 * math.log(self.theta))

        low, high = pair_that_turns(self.beta_fast), pair_that_turns(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, self.dim - 1)
        if low == high:
            high += 0.001
        return ((torch.arange(self.dim // 2, dtype=torch.float32, device="cpu") - low) / (high - low)).clamp(0, 1)


def _yarn_gain(given: dict[str, Any], factor: float) -> float:
    """The gain a yarn config asks for: said outright, or derived from the factor, or from two scales of it."""
    if given.get("attention_factor") is not None:
        return number(given, "attention_factor")
    if given.get("mscale") and given.get("mscale_all_dim"):
        return _yarn_scale(number(given, "mscale"), factor) / _yarn_scale(number(given, "mscale_all_dim"), factor)
    return _yarn_scale(1.0, factor)


def _yarn_scale(weight: float, factor: float) -> float:
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0
