"""Regional compilation: one layer is compiled, and every layer runs it.

Layers of one class share compiled code as long as nothing in them differs but the values of tensors: weights and
caches are inputs, and a layer holds no number of its own, such as its index. What varies from call to call is the
number of tokens; it is marked, so that the first call does not fix it.
"""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor, nn

from nanodeploy.models.batch import Batch
from nanodeploy.ops.layouts import Cache


def compile_layers(layers: nn.ModuleList, backend: str | Callable = "inductor") -> None:
    """Compile on first use: once for a single token, once for any larger number."""
    for layer in layers:
        layer.compile(backend=backend, fullgraph=True)


def mark_sizes(batch: Batch, x: Tensor, residual: Tensor, cache: Cache) -> None:
    """Say which axes of the first layer's inputs vary; later layers then fit the code that the first one compiled.

    These are the tokens, the pages of the cache (a warm-up runs before they are counted), and the sizes of the
    per-sequence buffers. An axis of length 1 is left: torch.compile gives it code of its own.
    """
    fields = [getattr(part, field.name) for part in (batch, batch.rows) for field in dataclasses.fields(part)]
    tensors = [t for t in fields if isinstance(t, Tensor) and t is not batch.rows.counts]
    axes = [(t, axis) for t in tensors for axis in range(t.ndim)]
    for tensor, axis in [*axes, (x, 0), (residual, 0), *((t, 0) for t in cache if t is not None)]:
        if tensor.shape[axis] > 1:
            torch._dynamo.mark_dynamic(tensor, axis)
