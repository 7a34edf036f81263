"""Compile a kernel's shipped configurations for sm_90 without a GPU, and read what the compiler made of them.

`python -m nanodeploy.ops.aot [OP ...]` prints the table; `--json` prints one list of reports. Triton's interpreter must
be off (TRITON_INTERPRET=0): it replaces the functions that would be compiled.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction

import nanodeploy.ops  # noqa: F401  loads every room into OPS
from nanodeploy.errors import ConfigError
from nanodeploy.ops.registry import OPS, Aot

TARGET = GPUTarget("cuda", 90, 32)
MAX_SHARED_BYTES = 227 * 1024  # what one block may have on sm_90

# What a word in `Aot.wants` means in PTX. Waits and commits alone are not copies, hence not a plain "cp.async".
PTX = {
    "wgmma": r"\bwgmma\.mma_async\b",
    "mma": r"\bmma\.sync\b",
    "cp.async": r"\bcp\.async\.(?:ca|cg|bulk)\b",
    "tma": r"\bcp\.async\.bulk\.tensor\b",
    "ld.v4": r"\bld\.global\S*\.v4\b",
}


@dataclass(frozen=True)
class Report:
    """One configuration after ptxas. `counts`: instructions in the PTX by the words of `PTX` and of `wants`."""

    op: str
    kernel: str
    config: str
    regs: int  # per thread
    spill_bytes: int  # stores, per thread
    shared_bytes: int  # per block
    counts: dict[str, int]
    complaints: list[str]


def compile_sm90(aot: Aot) -> triton.compiler.CompiledKernel:
    """Triton's own pipeline down to the cubin. Triton's disk cache answers when source and configuration are known."""
    if not isinstance(aot.fn, triton.JITFunction):
        raise ConfigError(f"{aot.fn} is no compilable function; set TRITON_INTERPRET=0 to compile offline.")
    unknown = [a for a in (*aot.signature, *aot.constexprs, *aot.divisible) if a not in aot.fn.arg_names]
    missing = [a for a in aot.fn.arg_names if a not in aot.signature and a not in aot.constexprs]
    if unknown or missing:
        raise ConfigError(
            f"Aot of {aot.fn.__name__}: no such argument {unknown}; neither typed nor constant {missing}."
        )
    signature = {a: "constexpr" if a in aot.constexprs else aot.signature[a] for a in aot.fn.arg_names}
    attrs = {(aot.fn.arg_names.index(a),): [["tt.divisibility", 16]] for a in aot.divisible}
    source_type = GluonASTSource if isinstance(aot.fn, GluonJITFunction) else ASTSource
    source = source_type(aot.fn, signature, aot.constexprs, attrs)
    options = {"num_warps": aot.num_warps, "num_stages": aot.num_stages, "maxnreg": aot.maxnreg}
    return triton.compile(source, target=TARGET, options=options)


def resources(compiled: triton.compiler.CompiledKernel) -> tuple[int, int]:
    """Registers per thread and bytes of spill stores, as ptxas prints them for this PTX."""
    with tempfile.TemporaryDirectory() as folder:
        ptx = Path(folder) / "kernel.ptx"
        ptx.write_text(compiled.asm["ptx"])
        arch = re.search(r"^\.target (\w+)", compiled.asm["ptx"], re.MULTILINE)
        assert arch, "PTX without .target"
        command = [knobs.nvidia.ptxas.path, "-v", f"--gpu-name={arch[1]}", "-lineinfo"]
        if not compiled.metadata.enable_fp_fusion:
            command.append("--fmad=false")
        said = subprocess.run(
            [*command, str(ptx), "-o", f"{folder}/kernel.cubin"], check=True, capture_output=True, text=True
        ).stderr
    # One line per function: the kernel and what it does not inline.
    regs, spills = re.findall(r"Used (\d+) registers", said), re.findall(r"(\d+) bytes spill stores", said)
    assert regs and spills, f"ptxas -v said: {said}"
    return max(map(int, regs)), sum(map(int, spills))


def inspect(op: str, kernel: str, aot: Aot) -> Report:
    """Compile one configuration, and say what breaks its promises (spills, shared memory, instructions wanted)."""
    config = ", ".join(f"{k}={v}" for k, v in {**aot.constexprs, "warps": aot.num_warps}.items())
    types = sorted({t for t in aot.signature.values() if t.startswith("*")})
    config = f"{config}, stages={aot.num_stages}, {' '.join(types)}"
    compiled = compile_sm90(aot)
    regs, spill_bytes = resources(compiled)
    shared_bytes = compiled.metadata.shared
    patterns = PTX | {want: re.escape(want) for want in aot.wants if want not in PTX}
    counts = {word: len(re.findall(pattern, compiled.asm["ptx"])) for word, pattern in patterns.items()}
    complaints = [f"wants {want}; its PTX has none" for want in aot.wants if not counts[want]]
    if spill_bytes > aot.max_spills:
        complaints.append(f"spills {spill_bytes} bytes; allowed {aot.max_spills}")
    if shared_bytes > MAX_SHARED_BYTES:
        complaints.append(f"takes {shared_bytes} bytes of shared memory; sm_90 has {MAX_SHARED_BYTES}")
    return Report(op, kernel, config, regs, spill_bytes, shared_bytes, counts, complaints)


def reports(op_names: list[str] | None = None) -> list[Report]:
    """Every shipped configuration of the named ops (all when None), in the registry's order."""
    jobs = [
        (op.name, kernel.name, aot)
        for op in OPS.values()
        for kernel in op.kernels.values()
        if kernel.aot and (not op_names or op.name in op_names)
        for aot in kernel.aot()
    ]
    with ThreadPoolExecutor(2) as pool:  # ptxas is a process of its own, so a second one can run beside the compiler
        return list(pool.map(lambda job: inspect(*job), jobs))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m nanodeploy.ops.aot", description=__doc__)
    parser.add_argument("ops", nargs="*", help="op names; default: all")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    found = reports(args.ops)
    if args.json:
        print(json.dumps([asdict(report) for report in found]))
        return 0
    for r in found:
        counts = " ".join(f"{word}:{n}" for word, n in r.counts.items() if n)
        verdict = "; ".join(r.complaints) or "ok"
        print(
            f"{r.op}/{r.kernel} [{r.config}] regs {r.regs} spills {r.spill_bytes} shared {r.shared_bytes} "
            f"{counts}  {verdict}"
        )
    return int(any(r.complaints for r in found))


if __name__ == "__main__":
    sys.exit(main())
