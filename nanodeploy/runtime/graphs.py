"""CUDA graphs: forward passes of a few forms, each captured when it is first wanted and launched as one call after.

A graph saves the launches, which matters where they take longer than the device's own work. That is every step of
decodes alone, and mixed steps up to some number of tokens that start-up measures.
"""

import bisect
from collections.abc import Callable

import torch
from torch import Tensor

from nanodeploy.runtime.step import Form


def batch_sizes(max_num_seqs: int) -> list[int]:
    """The numbers of decodes worth a graph; a step takes the next larger one and pads."""
    sizes = {1, 2, 4, *range(8, max_num_seqs, 8), max_num_seqs}
    return sorted(size for size in sizes if size <= max_num_seqs)


def token_sizes(max_num_tokens: int) -> list[int]:
    """The numbers of tokens worth a graph of a mixed step: padding adds a quarter at most, a sixth on average."""
    sizes, size = [], 16
    while size <= max_num_tokens:
        sizes += [size, size + size // 4, size + size // 2, size + size // 4 * 3]
        size *= 2
    return [size for size in sizes if size <= max_num_tokens]


class Graphs:
    """Captured forward passes. Their inputs are the runner's fixed buffers, their output hidden states [N, D].

    The logits are left out: they are one more kernel, and 35 graphs would keep 1.4 GB of them at a vocabulary of 152k.
    """

    def __init__(self, forward: Callable[[Form], Tensor], max_num_seqs: int, max_mixed_tokens: int):
        """`forward` runs the model on what lies in the buffers. max_mixed_tokens 0: no graphs of mixed steps."""
        self.forward = forward
        self.max_num_seqs = max_num_seqs
        self.decode_sizes = batch_sizes(max_num_seqs)
        self.mixed_sizes = token_sizes(max_mixed_tokens)
        self.captured: dict[Form, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self.pool = torch.cuda.graph_pool_handle()
        self.stream = torch.cuda.Stream()

    def padded(self, form: Form) -> Form:
        """The form of the smallest graph that holds this step; the form itself if none is to."""
        if not form.num_chunks:
            size = self.decode_sizes[bisect.bisect_left(self.decode_sizes, form.num_decodes)]
            return Form(size, size, 0, size, form.shared)
        at = bisect.bisect_left(self.mixed_sizes, max(form.num_tokens, form.num_decodes))
        if at == len(self.mixed_sizes) or form.num_logit_rows > self.max_num_seqs:
            return form
        return self.mixed(self.mixed_sizes[at])

    def mixed(self, num_tokens: int) -> Form:
        """Any number of decodes and chunks may share its tokens."""
        return Form(num_tokens, min(num_tokens, self.max_num_seqs), self.max_num_seqs, self.max_num_seqs)

    def covers(self, form: Form) -> bool:
        """Whether `padded` made this form, so that it can be captured."""
        return not form.num_chunks or (form.num_tokens in self.mixed_sizes and form == self.mixed(form.num_tokens))

    def run(self, form: Form) -> Tensor:
        """Run on what lies in the buffers now. The result is overwritten by the next run of the same form.

        The first run of a form is an ordinary one, in which kernels load and choose their forms, and is captured after.
        """
        if form not in self.captured:
            hidden = self.forward(form)
            self.capture(form)
            return hidden
        graph, hidden = self.captured[form]
        graph.replay()
        return hidden

    def capture(self, form: Form) -> None:
        """Record a pass without running it. (torch.cuda.graph would collect garbage first, which takes longer.)"""
        graph = torch.cuda.CUDAGraph()
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
            hidden = self.forward(form)
            graph.capture_end()
        self.captured[form] = graph, hidden

    def missing(self) -> Form | None:
        """The largest form of decodes that is not captured yet."""
        forms = (Form(size, size, 0, size) for size in reversed(self.decode_sizes))
        return next((form for form in forms if form not in self.captured), None)

    def forget(self) -> None:
        """Drop all graphs: the kernels have changed. The device must have finished with them."""
        self.captured.clear()
