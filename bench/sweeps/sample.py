"""How long the sampler takes on this GPU: rows x what they ask for x how peaked their logits are.

python -m bench.sweeps.sample [--kernel two_pass] [--vocab 151936]

The logits lie in the L2 cache where they fit, as after the projection that made them.
"""

import argparse
import functools

import torch

from bench.timing import graph_us
from nanodeploy.ops import sample
from nanodeploy.ops.sample import cases

# name -> temperature, top_k, top_p, spread of the logits
ASKED = {
    "greedy": (0.0, 0, 1.0, 3.0),
    "temperature": (0.8, 0, 1.0, 3.0),
    "top_k 50, top_p 0.9": (0.8, 50, 0.9, 3.0),
    "top_p 0.9, peaked": (0.8, 0, 0.9, 6.0),
    "top_p 0.9, flat": (1.0, 0, 0.9, 0.3),
}


def make(num_seqs: int, vocab_size: int, dtype: torch.dtype, asked: tuple[float, int, float, float]):
    temperature, top_k, top_p, spread = asked
    g = torch.Generator("cuda").manual_seed(0)
    logits = (spread * torch.randn(num_seqs, vocab_size, generator=g, device="cuda")).to(dtype)
    rows = torch.arange(num_seqs, device="cuda")
    column = functools.partial(torch.full, (num_seqs,), device="cuda")
    return (
        logits,
        column(temperature, dtype=torch.float32),
        column(top_k, dtype=torch.int32),
        column(top_p, dtype=torch.float32),
        column(0.0, dtype=torch.float32),
        rows * 7919,
        rows + 100,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernel", choices=list(sample.kernels), default="two_pass")
    parser.add_argument("--vocab", type=int, default=151936)
    args = parser.parse_args()
    kernel = sample.kernels[args.kernel].fn
    print(f"{'':22}" + "".join(f"S {s} {d}".rjust(16) for d in ("bf16", "fp32") for s in (1, 64, 256)) + "   us (GB/s)")
    for name, asked in ASKED.items():
        line = f"{name:22}"
        for dtype in (torch.bfloat16, torch.float32):
            for num_seqs in (1, 64, 256):
                arguments = make(num_seqs, args.vocab, dtype, asked)
                case = cases.of(*arguments)
                complaint = cases.agrees(arguments, kernel(*arguments), sample.reference(*arguments), case)
                assert complaint is None, f"{name}, {case}: {complaint}"
                us = graph_us([functools.partial(kernel, *arguments)])
                line += f"{us:9.1f} ({cases.cost(case).num_bytes / us / 1e3:4.0f})"
        print(line, flush=True)


if __name__ == "__main__":
    main()
