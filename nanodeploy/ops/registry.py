"""The registry: an op is its reference; kernels are contenders that must agree with it.

`@op` turns a reference into `torch.ops.nanodeploy.<name>`, opaque to torch.compile. `@<op>.kernel` adds a contender.
Tests, bench and dispatch all read the same registry, and ask the same `when(case)`, so nothing untested is chosen.
"""

import importlib
import importlib.util
import inspect
import json
import pkgutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from nanodeploy.errors import ConfigError
from nanodeploy.ops import machine

LIBRARY = torch.library.Library("nanodeploy", "FRAGMENT")
OPS: dict[str, "Op"] = {}
CHOICES = Path(__file__).parent / "choices"


@dataclass(frozen=True)
class Aot:
    """One shipped configuration of a Triton kernel. CI compiles it for sm_90 without a GPU and reads the result."""

    fn: Any  # triton.JITFunction
    signature: dict[str, str]  # argument -> Triton type ("*bf16", "i32", "fp32"); constexpr arguments left out
    constexprs: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    divisible: tuple[str, ...] = ()  # arguments known to be divisible by 16
    wants: tuple[str, ...] = ()  # what its PTX must contain: "wgmma", "cp.async"
    max_spills: int = 0  # bytes


@dataclass(frozen=True)
class Kernel:
    """One contender of an op."""

    name: str
    fn: Callable[..., Any]
    needs: str  # "cpu", "sm80", "sm90"
    when: Callable[[Any], bool]
    batch_invariant: bool  # a row's bits do not depend on the other rows
    requires: str | None  # optional package that must be importable
    interpretable: bool  # Triton's interpreter can run it
    aot: Callable[[], Sequence[Aot]] | None
    path: str
    capturable: bool = True  # False: it reads the device's values on the host, which no CUDA graph can hold

    def available(self) -> bool:
        """Whether this machine and environment can run it at all (`when` decides case by case)."""
        if self.requires and importlib.util.find_spec(self.requires) is None:
            return False
        return machine.satisfies(self.needs)


@dataclass
class Choice:
    kernel: Kernel | None  # None: the reference
    reason: str

    @property
    def name(self) -> str:
        return self.kernel.name if self.kernel else "reference"


@dataclass
class Op:
    """An op: its reference (the truth), its contenders, and the one chosen for each case."""

    name: str
    reference: Callable[..., Any]
    mutates: tuple[str, ...]
    kernels: dict[str, Kernel] = field(default_factory=dict)
    cases: Any = None  # the room's cases.py (a CasesModule), once it is loaded
    override: str | None = None  # --kernels name=...
    decided: dict[Any, Choice] = field(default_factory=dict)
    torch_op: Any = None

    def __call__(self, *args: Any) -> Any:
        return self.torch_op(*args)

    def kernel(
        self,
        *,
        needs: str,
        when: Callable[[Any], bool] = lambda case: True,
        batch_invariant: bool = False,
        requires: str | None = None,
        interpretable: bool = True,
        aot: Callable[[], Sequence[Aot]] | None = None,
        capturable: bool = True,
    ) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Register a contender under its function's name. It takes exactly the reference's arguments."""

        def register(fn: Callable[..., Any]) -> Callable[..., Any]:
            wanted, got = list(inspect.signature(self.reference).parameters), list(inspect.signature(fn).parameters)
            if wanted != got:
                raise TypeError(f"kernel {fn.__name__} of {self.name} takes {got}; the op's arguments are {wanted}")
            path = inspect.getsourcefile(fn) or ""
            self.kernels[fn.__name__] = Kernel(
                fn.__name__, fn, needs, when, batch_invariant, requires, interpretable, aot, path, capturable
            )
            self.decided.clear()
            return fn

        return register

    def run(self, *args: Any) -> Any:
        """What torch calls. The device of the first tensor decides whether kernels are in play."""
        tensor = next(a for a in args if isinstance(a, torch.Tensor))
        assert self.cases is not None, f"{self.name} was not loaded through its room"
        case = self.cases.of(*args)
        key = (tensor.is_cuda, case)
        choice = self.decided.get(key)
        if choice is None:
            if len(self.decided) > 4096:  # prefill sizes are many; deciding again is cheap
                self.decided.clear()
            choice = self.decided[key] = self.choose(case, on_gpu=tensor.is_cuda)
        if choice.kernel and not choice.kernel.capturable and torch.cuda.is_current_stream_capturing():
            choice = self.choose(case, on_gpu=True, capturing=True)
        return choice.kernel.fn(*args) if choice.kernel else self.reference(*args)

    def choose(self, case: Any, *, on_gpu: bool, capturing: bool = False) -> Choice:
        """Explicit flag, then the measured table of this device, then the first that fits; the reference on a CPU.

        While a CUDA graph is being captured only kernels that it can hold come into question. Raises ConfigError on a
        GPU where nothing fits: a reference there would be a quiet slow path.
        """

        def fits(kernel: Kernel) -> bool:
            return kernel.available() and kernel.when(case) and (kernel.capturable or not capturing)

        if self.override == "reference":
            return Choice(None, "flag")
        if self.override:
            kernel = self.kernels[self.override]
            if not kernel.when(case):
                raise ConfigError(f"--kernels {self.name}={self.override}: that kernel does not take {case}.")
            if capturing and not kernel.capturable:
                raise ConfigError(
                    f"--kernels {self.name}={self.override}: no CUDA graph can hold that kernel; add --enforce_eager."
                )
            return Choice(kernel, "flag")
        if not on_gpu:
            fitting = [k for k in self.kernels.values() if k.needs == "cpu" and k.available() and k.when(case)]
            return Choice(fitting[0], "first that fits") if fitting else Choice(None, "cpu")
        for row in measured(machine.key()).get(self.name, ()):
            best = self.kernels.get(row["kernel"])
            if best and matches(row.get("where", {}), case) and fits(best):
                return Choice(best, f"measured, {machine.key()}")
        for kernel in self.kernels.values():
            if kernel.requires is None and fits(kernel):
                return Choice(kernel, "first that fits")
        raise ConfigError(
            f"{self.name}: no kernel on sm{machine.capability()} takes {case} (there are: {', '.join(self.kernels)}). "
            f"--kernels {self.name}=reference runs the slow reference."
        )


def op(*, out: Callable[..., Any], mutates: tuple[str, ...] = ()) -> Callable[[Callable[..., Any]], Op]:
    """Declare an op by its reference. `out` makes the outputs from the arguments (it is also the fake kernel).

    The reference's annotations give the schema. Outputs never alias inputs; `mutates` names what is written in place.
    """

    def declare(reference: Callable[..., Any]) -> Op:
        name = reference.__name__
        made = Op(name, reference, mutates)
        schema = torch.library.infer_schema(reference, mutates_args=mutates)
        LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order))
        LIBRARY.impl(name, made.run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"nanodeploy::{name}", out, lib=LIBRARY)
        made.torch_op = getattr(torch.ops.nanodeploy, name).default
        made.__doc__ = reference.__doc__
        OPS[name] = made
        return made

    return declare


def room(package: str) -> Op:
    """Load the room `package`: reference.py, cases.py, then every other file in the folder as kernels."""
    name = package.rpartition(".")[2]
    reference = importlib.import_module(f"{package}.reference")
    made: Op = getattr(reference, name)
    made.cases = importlib.import_module(f"{package}.cases")
    if importlib.util.find_spec("triton") is None:
        return made  # no Triton on this platform: the reference is all there is
    for info in sorted(pkgutil.iter_modules(sys.modules[package].__path__), key=lambda i: i.name):
        if info.name not in ("reference", "cases"):
            importlib.import_module(f"{package}.{info.name}")
    return made


def matches(where: dict[str, Any], case: Any) -> bool:
    """Whether `case` lies in a measured region: {"axis": value} or {"axis": [low, high]} inclusive, null unbounded."""
    for axis, wanted in where.items():
        got = getattr(case, axis)
        if isinstance(wanted, list):
            low, high = wanted
            if (low is not None and got < low) or (high is not None and got > high):
                return False
        elif got != wanted:
            return False
    return True


_measured: dict[str, dict[str, list[dict[str, Any]]]] = {}


def measured(device_key: str) -> dict[str, list[dict[str, Any]]]:
    """The measured table of a device: op -> rows {"where": region, "kernel": name}, first match wins."""
    if device_key not in _measured:
        path = CHOICES / f"{device_key}.json"
        _measured[device_key] = json.loads(path.read_text()) if path.exists() else {}
    return _measured[device_key]


def use(overrides: dict[str, str]) -> None:
    """Fix kernels by name (`--kernels op=kernel,...`). Raises ConfigError on an unknown op or kernel."""
    for op_name, kernel_name in overrides.items():
        if op_name not in OPS:
            raise ConfigError(f"--kernels {op_name}={kernel_name}: no such op; there are {', '.join(sorted(OPS))}.")
        made = OPS[op_name]
        if kernel_name != "reference":
            if kernel_name not in made.kernels:
                names = ", ".join(["reference", *made.kernels])
                raise ConfigError(f"--kernels {op_name}={kernel_name}: {op_name} has {names}.")
            kernel = made.kernels[kernel_name]
            if not kernel.available():
                wanted = f"the package {kernel.requires}" if kernel.requires else kernel.needs
                raise ConfigError(f"--kernels {op_name}={kernel_name}: needs {wanted}, which is not here.")
    for op_name, made in OPS.items():
        made.override = overrides.get(op_name)
        made.decided.clear()


def chosen() -> dict[str, dict[str, str]]:
    """What has been decided so far: op -> kernel -> reason. Printed at start-up, served, stored with benches."""
    return {
        name: {choice.name: choice.reason for choice in made.decided.values()}
        for name, made in sorted(OPS.items())
        if made.decided
    }
