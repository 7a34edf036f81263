"""A mixed step is its decodes, its prefill chunks and zeros; what no CUDA graph can hold stays out of graphs."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from bench import gate
from nanodeploy.errors import ConfigError
from nanodeploy.ops import decode_attention, paged_attention, prefill_attention
from nanodeploy.ops.decode_attention import cases as decode_cases
from nanodeploy.ops.decode_attention import flashinfer as decode_adapter
from nanodeploy.ops.layouts import KVCache
from nanodeploy.ops.paged_attention import Rows
from nanodeploy.ops.prefill_attention import cases as prefill_cases
from nanodeploy.ops.prefill_attention import flashinfer as prefill_adapter
from nanodeploy.ops.registry import Kernel, Op

DEVICE = gate.default_device()
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
SCALE = 64**-0.5


def step(
    decode_lens: list[int], chunks: list[tuple[int, int]], num_padding: int, num_spare: int, seed: int
) -> tuple[tuple[Tensor, KVCache, Rows], Tensor]:
    """(arguments of paged_attention for this step, what it should return). A chunk is (q_len, kv_len); `num_spare`
    rows of the per-sequence buffers and the padding tokens hold garbage."""
    q_lens, num_decodes = tuple(q for q, _ in chunks), len(decode_lens)
    kv_lens = (*decode_lens, *(kv for _, kv in chunks), *[1] * num_spare)
    shape = (len(kv_lens), 6, 2, 64, 16, 4)
    g = torch.Generator(DEVICE).manual_seed(seed)
    layout = decode_cases.Case(DTYPE, *shape).layout
    cache, table, lens = decode_cases.make_cache(layout, kv_lens, 4, DEVICE, g)
    q = decode_cases.make_queries((num_decodes + sum(q_lens) + num_padding, 6, 64), 2, DTYPE, g)
    q[num_decodes + sum(q_lens) :] = float("nan")
    cu_q_lens = torch.tensor([num_decodes, *q_lens], device=DEVICE).cumsum(0).int()
    spare = torch.full((num_spare,), -7, dtype=torch.int32, device=DEVICE)
    rows = Rows(
        decode_table=table,
        decode_lens=lens,
        prefixes=torch.zeros((len(lens), 2), dtype=torch.int32, device=DEVICE),
        chunk_table=table[num_decodes:].clone(),
        chunk_lens=lens[num_decodes:].clone(),
        cu_q_lens=torch.cat([cu_q_lens, spare]),
        counts=torch.tensor([num_decodes, len(chunks), 0], dtype=torch.int32),
    ).planned(6, 2)

    head, after = slice(num_decodes), slice(num_decodes, num_decodes + len(chunks))
    wanted = prefill_attention.reference(q, *cache, table[after], lens[after], cu_q_lens, None, SCALE, 0, 0)
    wanted[head] = decode_attention.reference(q[head], *cache, table[head], lens[head], None, None, None, SCALE, 0)
    return (q, cache, rows), wanted


chunk = st.integers(0, 64).flatmap(lambda kv_len: st.tuples(st.integers(0, kv_len), st.just(kv_len)))


@given(
    decode_lens=st.lists(st.integers(0, 64), max_size=4),
    chunks=st.lists(chunk, max_size=3),
    num_padding=st.integers(0, 3),
    num_spare=st.integers(0, 3),
    seed=st.integers(0, 99),
)
def test_mixed_step_is_its_parts(decode_lens, chunks, num_padding, num_spare, seed):
    args, wanted = step(decode_lens, chunks, num_padding, num_spare, seed)
    tolerance = decode_cases.TOLERANCE[DTYPE]
    torch.testing.assert_close(paged_attention(*args, SCALE), wanted, rtol=tolerance, atol=tolerance)


@given(
    decode_lens=st.lists(st.integers(1, 64), min_size=1, max_size=3),
    chunks=st.lists(chunk, max_size=2),
    full=st.booleans(),
)
def test_more_rows_than_there_are_change_nothing(decode_lens, chunks, full):
    """As in a CUDA graph captured for more decodes (full: as many as tokens) and more chunks: the device's lengths say
    which are there."""
    (q, cache, rows), wanted = step(decode_lens, chunks, 6, 2, seed=1)
    q = q.nan_to_num()
    num_decodes, num_chunks = len(decode_lens), len(chunks)
    num_more = len(q) - num_decodes if full else 2
    lens = torch.cat([rows.decode_lens[:num_decodes], rows.decode_lens.new_zeros(num_more)])
    ends = rows.cu_q_lens[num_chunks].repeat(2)
    table = torch.cat([rows.decode_table[:num_decodes], rows.decode_table[:1].repeat(num_more, 1)])
    wider = dataclasses.replace(
        rows,
        decode_table=table,
        decode_lens=lens,
        prefixes=rows.prefixes.new_zeros(len(lens), 2),
        chunk_table=torch.cat([rows.chunk_table[:num_chunks], rows.decode_table[:2]]),
        chunk_lens=torch.cat([rows.chunk_lens[:num_chunks], rows.chunk_lens.new_zeros(2)]),
        cu_q_lens=torch.cat([rows.cu_q_lens[: num_chunks + 1], ends]),
        counts=torch.tensor([len(lens), num_chunks + 2, 0], dtype=torch.int32),
    ).planned(6, 2)
    tolerance = decode_cases.TOLERANCE[DTYPE]
    torch.testing.assert_close(paged_attention(q, cache, wider, SCALE), wanted, rtol=tolerance, atol=tolerance)


def test_counts_are_read_at_run_time_without_compiling_again():
    """One compilation serves mixed steps, steps of decodes alone and steps of chunks alone."""
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(
        lambda *args: paged_attention(*args, SCALE) * 2, backend=counter, fullgraph=True, dynamic=True
    )
    for decode_lens, chunks, num_padding in (([5, 9], [(3, 40)], 1), ([1, 64, 30], [], 2), ([], [(4, 4), (2, 9)], 0)):
        args, wanted = step(decode_lens, chunks, num_padding, 2, seed=3)
        # By default two axes of one length are taken for one axis.
        with torch.fx.experimental._config.patch(use_duck_shape=False):  # type: ignore[attr-defined]
            torch.testing.assert_close(compiled(*args), wanted * 2, rtol=2e-2, atol=2e-2)
    assert counter.frame_count == 1


def test_it_is_a_sound_torch_op():
    (q, cache, rows), _ = step([5, 0, 33], [(3, 40)], 1, 1, seed=0)
    tensors = rows.decode_table, rows.decode_lens, rows.prefixes, rows.chunk_table, rows.chunk_lens, rows.cu_q_lens
    args = q, cache.pages, None, *tensors, rows.counts, rows.plan, None, SCALE, 0, 0
    torch.library.opcheck(torch.ops.nanodeploy.paged_attention.default, args)


class PagedWrapper:
    """flashinfer's two wrappers as far as the adapters use them: page lists on the host, and causal or one query."""

    def plan(self, *lists: Tensor, causal: bool = False, sm_scale: float, num_kv_heads: int, page_size: int, **_):
        *chunks, begins, indices, last = lists
        assert all(host.device.type == "cpu" for host in (*chunks, begins, last))
        num_pages = begins.diff()
        assert (num_pages > 0).all() and len(indices) == begins[-1] and causal == bool(chunks)
        assert ((last > 0) & (last <= page_size)).all()
        self.kv_lens = ((num_pages - 1) * page_size + last).int().to(indices.device)
        self.page_table = torch.full((len(last), int(num_pages.max())), -1, dtype=torch.int32, device=indices.device)
        for row, (begin, end) in enumerate(zip(begins[:-1].tolist(), begins[1:].tolist())):
            self.page_table[row, : end - begin] = indices[begin:end]
        bounds = chunks[0] if chunks else torch.arange(len(last) + 1, dtype=torch.int32)
        assert (bounds.diff() > 0).all()
        self.cu_q_lens, self.scale = bounds.to(indices.device), sm_scale

    def run(self, q: Tensor, kv_pages: Tensor, out: Tensor | None = None) -> Tensor:
        assert q.is_contiguous() and len(q) == self.cu_q_lens[-1]
        found = prefill_attention.reference(
            q, kv_pages, None, self.page_table, self.kv_lens, self.cu_q_lens, None, self.scale, 0, 0
        )
        return found if out is None else out.copy_(found)


@pytest.mark.parametrize(
    ("op", "cases", "adapter"),
    [(decode_attention, decode_cases, decode_adapter), (prefill_attention, prefill_cases, prefill_adapter)],
    ids=["decode", "prefill"],
)
@given(data=st.data())
def test_flashinfer_is_given_lists_that_mean_the_same(op, cases, adapter, data):
    fits = op.kernels["flashinfer"].when
    case = data.draw(cases.strategy(st, small=True).filter(lambda c: fits(c) and not getattr(c, "num_before", 0)))
    args = cases.make(case, DEVICE, data.draw(st.integers(0, 99)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adapter, "_wrapper", lambda device: PagedWrapper())
        got = adapter.flashinfer(*args)
    tolerance = decode_cases.TOLERANCE[case.dtype]
    torch.testing.assert_close(got, op.reference(*args), rtol=tolerance, atol=tolerance)


def test_a_kernel_that_no_graph_can_hold_is_not_chosen_while_capturing(monkeypatch):
    def kernel(name: str, capturable: bool) -> Kernel:
        return Kernel(name, lambda x: x, "cpu", lambda case: True, False, None, None, True, None, "", capturable)

    op = Op("two", lambda x: x, (), {"planned": kernel("planned", False), "plain": kernel("plain", True)})
    monkeypatch.setattr("nanodeploy.ops.registry.measured", lambda key: {"two": [{"kernel": "planned"}]})
    assert op.choose(None, on_gpu=True).name == "planned"
    assert op.choose(None, on_gpu=True, capturing=True).name == "plain"
    op.override = "planned"
    assert op.choose(None, on_gpu=True).name == "planned"
    with pytest.raises(ConfigError, match="enforce_eager"):
        op.choose(None, on_gpu=True, capturing=True)
