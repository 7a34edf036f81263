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
from nanodeploy.ops import machine, tuned

LIBRARY = torch.library.Library("nanodeploy", "FRAGMENT")
OPS: dict[str, "Op"] = {}
CHOICES = Path(__file__).parent / "choices"

# Vendor packages built from their own sources, and which. PyPI's projects of these names are other people's.
SOURCES = {
    "deep_gemm": "github.com/deepseek-ai/DeepGEMM at v2.1.1.post3 (c9f8b34)",
    "flash_mla": "github.com/deepseek-ai/FlashMLA at 9241ae3ef9bac614dd25e45e507e089f888280e0",
}


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
    maxnreg: int | None = None  # registers per thread to start with; warp-specialised kernels share them out anew


@dataclass(frozen=True)
class Kernel:
    """One contender of an op."""

    name: str
    fn: Callable[..., Any]
    needs: str  # "cpu", "sm80", "sm90", "sm90a" (see machine.satisfies)
    when: Callable[[Any], bool]
    batch_invariant: bool  # a row's bits do not depend on the other rows
    order: str | None  # batch_invariant kernels of one order give a row the same bits, whichever of them runs
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
    deterministic: bool = False  # --deterministic: only kernels of one order
    favourite: str | None = None  # a kernel that stands above the measured table wherever it fits (the kernel lab's)
    decided: dict[Any, Choice] = field(default_factory=dict)
    torch_op: Any = None

    def __call__(self, *args: Any) -> Any:
        """Through torch only where torch.compile looks on: its dispatcher takes as long as everything else here."""
        return self.torch_op(*args) if torch.compiler.is_compiling() else self.run(*args)

    def kernel(
        self,
        *,
        needs: str,
        when: Callable[[Any], bool] = lambda case: True,
        batch_invariant: bool = False,
        order: str | None = None,
        requires: str | None = None,
        interpretable: bool = True,
        aot: Callable[[], Sequence[Aot]] | None = None,
        capturable: bool = True,
    ) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Register a contender under its function's name. It takes exactly the reference's arguments.

        `order` names the order in which it sums, where that is fixed: kernels of the op (and of another op that says
        so) with the same order agree to the bit. By default a batch-invariant kernel has an order of its own.
        """

        def register(fn: Callable[..., Any]) -> Callable[..., Any]:
            wanted, got = list(inspect.signature(self.reference).parameters), list(inspect.signature(fn).parameters)
            if wanted != got:
                raise TypeError(f"kernel {fn.__name__} of {self.name} takes {got}; the op's arguments are {wanted}")
            path = inspect.getsourcefile(fn) or ""
            if order and not batch_invariant:
                raise TypeError(f"kernel {fn.__name__} of {self.name} has an order, so it must be batch_invariant")
            summed = (order or fn.__name__) if batch_invariant else None
            self.kernels[fn.__name__] = Kernel(
                fn.__name__, fn, needs, when, batch_invariant, summed, requires, interpretable, aot, path, capturable
            )
            self.decided.clear()
            return fn

        return register

    def put(self, name: str, kernel: Kernel | None) -> None:
        """Replace a contender in its place among the others, add it as the last one, or (None) take it away."""
        if kernel is None:
            self.kernels.pop(name, None)
        else:
            self.kernels[name] = kernel
        self.decided.clear()

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
        if (
            choice.kernel
            and not choice.kernel.capturable
            and tensor.is_cuda
            and torch.cuda.is_current_stream_capturing()
        ):
            choice = self.choose(case, on_gpu=True, capturing=True)
        return choice.kernel.fn(*args) if choice.kernel else self.reference(*args)

    def one_order(self, on_gpu: bool) -> str | None:
        """The order of --deterministic: the one with most kernels here, of equals the first. None: there is none."""
        orders = [k.order for k in self.kernels.values() if k.order and k.available() and (k.needs == "cpu") != on_gpu]
        return max(orders, key=orders.count) if orders else None

    def choose(self, case: Any, *, on_gpu: bool, capturing: bool = False) -> Choice:
        """Explicit flag, then the measured table of this device, then the first that fits; the reference on a CPU.

        While a CUDA graph is being captured only kernels that it can hold come into question. Raises ConfigError on a
        GPU where nothing fits: a reference there would be a quiet slow path.
        """

        one_order = self.one_order(on_gpu) if self.deterministic else None

        def fits(kernel: Kernel) -> bool:
            in_order = not self.deterministic or kernel.order == one_order
            if on_gpu and kernel.needs == "cpu" and machine.capability():
                return False  # made for the CPU, slow on a GPU
            return in_order and kernel.available() and kernel.when(case) and (kernel.capturable or not capturing)

        if self.override == "reference":
            return Choice(None, "flag")
        if self.override:
            kernel = self.kernels[self.override]
            if self.deterministic and kernel.order != one_order:
                raise ConfigError(
                    f"--kernels {self.name}={self.override}: --deterministic wants kernels that sum in the order "
                    f"{one_order}; this one does not."
                )
            if not kernel.when(case):
                raise ConfigError(f"--kernels {self.name}={self.override}: that kernel does not take {case}.")
            if capturing and not kernel.capturable:
                raise ConfigError(
                    f"--kernels {self.name}={self.override}: no CUDA graph can hold that kernel; add --enforce_eager."
                )
            return Choice(kernel, "flag")
        favourite = self.kernels.get(self.favourite) if self.favourite else None
        if favourite and (on_gpu or favourite.needs == "cpu") and fits(favourite):
            return Choice(favourite, "saved in the lab")
        if not on_gpu:  # the reference; where that is not batch-invariant, there is a kernel for --deterministic
            fitting = [k for k in self.kernels.values() if self.deterministic and k.needs == "cpu" and fits(k)]
            return Choice(fitting[0], "deterministic") if fitting else Choice(None, "cpu")
        for row in measured(machine.key()).get(self.name, ()):
            best = self.kernels.get(row["kernel"])
            if best and matches(row.get("where", {}), case) and fits(best):
                return Choice(best, f"measured, {machine.key()}")
        # Those that keep to an order which others share pay for it; they are last.
        for kernel in sorted(self.kernels.values(), key=lambda k: k.order not in (None, k.name)):
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
    """The measured table of a device: op -> rows {"where": region, "kernel": name}, first match wins.

    What `nanodeploy tune` measured on this machine stands above what is shipped, op by op.
    """
    if device_key not in _measured:
        path = CHOICES / f"{device_key}.json"
        shipped = json.loads(path.read_text()) if path.exists() else {}
        _measured[device_key] = shipped | tuned.read(device_key)
    return _measured[device_key]


def use(overrides: dict[str, str], deterministic: bool = False) -> None:
    """Fix kernels by name (`--kernels op=kernel,...`), and whether all of an op's must sum in one order.

    Raises ConfigError on an unknown op or kernel.
    """
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
                source = f", built from {SOURCES[kernel.requires]}" if kernel.requires in SOURCES else ""
                wanted = f"the package {kernel.requires}{source}" if kernel.requires else kernel.needs
                raise ConfigError(f"--kernels {op_name}={kernel_name}: needs {wanted}, which is not here.")
    for op_name, made in OPS.items():
        made.override = overrides.get(op_name)
        made.deterministic = deterministic
        made.favourite = None
        made.decided.clear()


def chosen() -> dict[str, dict[str, str]]:
    """What has been decided so far: op -> kernel -> reason. Printed at start-up, served, stored with benches."""
    return {
        name: {choice.name: choice.reason for choice in made.decided.values()}
        for name, made in sorted(OPS.items())
        if made.decided
    }
