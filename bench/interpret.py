"""Import this before triton: on a machine without a GPU, kernels then run in Triton's interpreter.

An explicit TRITON_INTERPRET stands.
"""

import os
import sys

import torch

if not torch.cuda.is_available() and "TRITON_INTERPRET" not in os.environ:
    # Triton reads it once per function, its own library's at import: set late, half of them would be compiled ones.
    assert "triton" not in sys.modules, "bench.interpret must be imported before triton"
    os.environ["TRITON_INTERPRET"] = "1"
