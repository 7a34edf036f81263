"""What a layer of recurrent attention keeps of a whole sequence, in slots beside the pages of layouts.py.

A page holds tokens; a slot holds one state, that of a sequence after some token. Three rooms read and write slots
(causal_conv, gdn_scan, gdn_step), and all by the same two arguments:

  read_slots [S] int32   where the state of a sequence before its first token lies; -1: it is new, its state is zero,
                         whatever any slot holds
  write_slots [T] int32  where to keep the state after each token; -1: nowhere

So a chunk's end is kept by naming a slot for its last token, a checkpoint for a prefix cache by naming one for the last
token of a page, and what speculation may go back to by naming one for each token. A sequence that continues from a
checkpoint reads that and writes its own slot; nothing is copied. No slot is written by two tokens, and none that one
sequence writes is read by another of the same call; a sequence may write the slot that it reads.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class States(NamedTuple):
    """One layer's slots."""

    tails: Tensor  # [N, width - 1, channels]: the last inputs of the convolution, the newest last
    states: Tensor  # [N, H, V, K]: of each value head the sum of value times key, fp32 or bf16


@dataclass(frozen=True)
class StateLayout:
    """One layer's slots of a Gated DeltaNet (arXiv:2412.06464).

    Axes: N slots, H value heads, V and K the dims of a head's values and keys. Keys lie innermost, so a slice of
    a head's values is one contiguous piece; slots are outermost, so a slot of one layer is two contiguous pieces.
    """

    channels: int  # of the convolution: queries, keys and values of all heads
    width: int  # taps of the convolution
    num_heads: int
    value_dim: int
    key_dim: int
    dtype: torch.dtype  # of the tails: the model's, so that they are exactly what came in
    state_dtype: torch.dtype = torch.float32

    def tails_shape(self, num_slots: int) -> tuple[int, int, int]:
        return (num_slots, self.width - 1, self.channels)

    def states_shape(self, num_slots: int) -> tuple[int, int, int, int]:
        return (num_slots, self.num_heads, self.value_dim, self.key_dim)

    @property
    def slot_bytes(self) -> int:
        tail = math.prod(self.tails_shape(1)) * self.dtype.itemsize
        return tail + math.prod(self.states_shape(1)) * self.state_dtype.itemsize

    def empty(self, num_slots: int, device: torch.device) -> States:
        """The slots themselves, not cleared."""
        tails = torch.empty(self.tails_shape(num_slots), dtype=self.dtype, device=device)
        return States(tails, torch.empty(self.states_shape(num_slots), dtype=self.state_dtype, device=device))
