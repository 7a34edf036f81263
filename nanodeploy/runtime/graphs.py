"""CUDA graphs of decode steps: one per batch size of a few, each a whole forward pass that launches as one call."""

import bisect
from collections.abc import Callable

import torch
from torch import Tensor


def batch_sizes(max_num_seqs: int) -> list[int]:
    """The batch sizes worth a graph; a step takes the next larger one and pads."""
    sizes = {1, 2, 4, *range(8, max_num_seqs, 8), max_num_seqs}
    return sorted(size for size in sizes if size <= max_num_seqs)


class DecodeGraphs:
    """Captured forward passes. Their inputs are the runner's fixed buffers, their output hidden states [S, D].

    The logits are left out: they are one more kernel, and 35 graphs would keep 1.4 GB of them at a vocabulary of 152k.
    """

    def __init__(self, forward: Callable[[int], Tensor], max_num_seqs: int):
        """`forward(size)` runs the model on the first `size` rows of the fixed buffers."""
        self.sizes = batch_sizes(max_num_seqs)
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self.hidden: dict[int, Tensor] = {}
        pool = torch.cuda.graph_pool_handle()
        for size in reversed(self.sizes):  # the largest first: the others fit into its memory
            forward(size)  # kernels load and choose their forms outside the capture
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                self.hidden[size] = forward(size)
            self.graphs[size] = graph

    def size_for(self, num_seqs: int) -> int:
        """The smallest captured batch size that holds so many."""
        return self.sizes[bisect.bisect_left(self.sizes, num_seqs)]

    def replay(self, size: int) -> Tensor:
        """Run on what lies in the buffers now. The result is overwritten by the next replay."""
        self.graphs[size].replay()
        return self.hidden[size]
