"""One program per row and stretch of mask words: 32 logits a word, read, chosen and written back in wide accesses.

It takes no part in programmatic dependent launch: before it stands a copy of masks to the device, which is no kernel
that it could wait for.
"""

import triton
import triton.language as tl

from nanodeploy.ops.mask_logits.reference import mask_logits
from nanodeploy.ops.registry import Aot

WORDS = 128  # of a mask per program
NUM_WARPS = 4


@triton.jit
def _hide(logits, masks, rows, stride, vocab_size, num_words, WORDS: tl.constexpr):
    place = tl.program_id(1).to(tl.int64)
    row = tl.load(rows + place)
    words = tl.program_id(0) * WORDS + tl.arange(0, WORDS)
    allowed = tl.load(masks + place * num_words + words, mask=words < num_words, other=0)
    bit = tl.arange(0, 32)[None, :]
    tokens = words[:, None] * 32 + bit
    there = tokens < vocab_size
    at = logits + row * stride + tokens
    x = tl.load(at, mask=there)
    tl.store(at, tl.where((allowed[:, None] >> bit) & 1 != 0, x, float("-inf")), mask=there)


def _aot():
    for dtype in ("*bf16", "*fp32"):
        yield Aot(
            _hide,
            {"logits": dtype, "masks": "*i32", "rows": "*i64"}
            | dict.fromkeys(("stride", "vocab_size", "num_words"), "i32"),
            {"WORDS": WORDS},
            num_warps=NUM_WARPS,
            divisible=("logits", "masks", "rows", "stride", "vocab_size"),
            wants=("ld.v4",),
        )


@mask_logits.kernel(needs="sm80", batch_invariant=True, aot=_aot)
def words(logits, masks, rows):
    (num_masked, num_words), vocab_size = masks.shape, logits.shape[1]
    assert masks.is_contiguous() and logits.stride(1) == 1, "rows must be contiguous"
    if num_masked:
        grid = (triton.cdiv(num_words, WORDS), num_masked)
        _hide[grid](
            logits, masks, rows, logits.stride(0), vocab_size, num_words, WORDS=WORDS, num_warps=NUM_WARPS
        )  # fmt: skip
