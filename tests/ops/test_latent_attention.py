"""What mla_decode's kernels promise beyond the gate: cuts of a context, repeated runs, and what vendors are given."""

import dataclasses
import sys
import types

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bench import gate
from nanodeploy.errors import ConfigError
from nanodeploy.ops import registry
from nanodeploy.ops.agreement import bits
from nanodeploy.ops.layouts import num_pages_for
from nanodeploy.ops.mla_decode import cases, flash_mla, flashinfer, mla_decode
from nanodeploy.ops.mla_decode.reference import num_tiles
from nanodeploy.ops.plan_decode import plan_decode

DEVICE = gate.default_device()
ON_GPU = DEVICE.type == "cuda"
CPU = torch.device("cpu")
FEW = settings(settings.get_profile("gpu" if ON_GPU else "ci"), max_examples=30 if ON_GPU else 6)
SEEDS = st.integers(0, 2**16)
WHY_NOT = gate.why_not(mla_decode.kernels["planned"], DEVICE)
needs_planned = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))


@needs_planned
@FEW
@given(data=st.data(), seed=SEEDS)
def test_planned_gives_the_same_bits_again_and_the_same_answer_however_contexts_are_cut(data, seed):
    planned = mla_decode.kernels["planned"]
    case = data.draw(cases.strategy(st, small=not ON_GPU).filter(planned.when))
    q, q_rope, pages, page_table, kv_lens, _, scale = cases.make(case, DEVICE, seed)
    tiles = num_tiles(case.num_queries, case.num_heads)
    once = planned.fn(q, q_rope, pages, page_table, kv_lens, None, scale)
    for unit in (128, 256):
        plan = plan_decode.reference(kv_lens, None, case.num_queries, case.num_heads, tiles, 0, unit)
        again = [planned.fn(q, q_rope, pages, page_table, kv_lens, plan, scale) for _ in range(2)]
        assert torch.equal(bits(again[0]), bits(again[1]))
        torch.testing.assert_close(again[0], once, rtol=cases.TOLERANCE[case.dtype], atol=cases.TOLERANCE[case.dtype])


@needs_planned
@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("num_queries", [1, 3])
def test_sixty_four_rows_stop_where_each_sees_no_further(fp8, num_queries):
    """The masks of the last tiles: contexts that end in and at the end of a tile and a page, and before the queries."""
    kind = torch.bfloat16 if ON_GPU else torch.float16
    lens = (0, 1, 2, 63, 64, 65, 200)
    case = cases.Case(kind, len(lens), 32, 128, 16, 64, 4, fp8, num_queries, kv_lens=lens)
    gate.agreement(mla_decode, mla_decode.kernels["planned"], dataclasses.replace(case, num_heads=64), DEVICE, 0)
    gate.agreement(mla_decode, mla_decode.kernels["planned"], case, DEVICE, 1)


def reference(q: Tensor, q_rope: Tensor, pages: Tensor, table: Tensor, kv_lens: Tensor, scale: float) -> Tensor:
    """The room's reference, but NaN where a query sees nothing: no vendor says what stands there."""
    out = mla_decode.reference(q, q_rope, pages, table, kv_lens, None, scale)
    num_queries = q.shape[0] // kv_lens.shape[0]
    positions = kv_lens[:, None] - num_queries + torch.arange(num_queries)
    return out.masked_fill((positions < 0).flatten()[:, None, None], float("nan"))


class FakeFlashMLA(types.ModuleType):
    """flash_mla_with_kvcache as its interface tells it, for the CPU."""

    def get_mla_metadata(self):
        return "meta", None

    def flash_mla_with_kvcache(
        self, q, k_cache, block_table, cache_seqlens, head_dim_v, meta, num_splits, softmax_scale, causal
    ):
        assert (meta, num_splits, head_dim_v) == ("meta", None, 512)
        assert k_cache.shape[1:] == (64, 1, 576) and causal == (q.shape[1] > 1)
        assert int(block_table.min()) >= 0 and int(block_table.max()) < k_cache.shape[0]
        rows, rotated = q.flatten(0, 1).split((512, 64), dim=-1)
        out = reference(rows, rotated, k_cache.squeeze(2), block_table, cache_seqlens, softmax_scale)
        return out.unflatten(0, q.shape[:2]), None


class FakeWrapper:
    """flashinfer's BatchMLAPagedAttentionWrapper, for the CPU."""

    def __init__(self, workspace):
        assert workspace.dtype == torch.uint8

    def plan(self, qo_indptr, kv_indptr, kv_indices, kv_len_arr, **rest):
        assert {t.dtype for t in (qo_indptr, kv_indptr, kv_indices, kv_len_arr)} == {torch.int32}
        assert (rest["head_dim_ckv"], rest["head_dim_kpe"]) == (512, 64)
        self.counts, self.lens, self.rest = qo_indptr.diff().tolist(), kv_len_arr, rest
        self.lists = [kv_indices[a:b] for a, b in zip(kv_indptr.tolist(), kv_indptr[1:].tolist())]

    def run(self, q_nope, q_pe, ckv_cache, kpe_cache):
        pages = torch.cat((ckv_cache, kpe_cache), dim=-1)
        assert pages.shape[1] == self.rest["page_size"]
        found, begin = [], 0
        for count, ids, kv_len in zip(self.counts, self.lists, self.lens):
            assert 0 < count <= kv_len and len(ids) == num_pages_for(int(kv_len), pages.shape[1])
            assert self.rest["causal"] or count == 1
            mine = slice(begin, begin + count)
            begin += count
            found.append(reference(q_nope[mine], q_pe[mine], pages, ids[None], kv_len[None], self.rest["sm_scale"]))
        return torch.cat(found)


@pytest.fixture(scope="module", autouse=True)
def vendors():
    """Vendors' packages that answer by the reference, while this file's tests run."""
    package, mla = types.ModuleType("flashinfer"), types.ModuleType("flashinfer.mla")
    mla.BatchMLAPagedAttentionWrapper = FakeWrapper
    package.mla = mla
    flashinfer._wrapper.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "flash_mla", FakeFlashMLA("flash_mla"))
        patch.setitem(sys.modules, "flashinfer", package)
        patch.setitem(sys.modules, "flashinfer.mla", mla)
        yield
    flashinfer._wrapper.cache_clear()


@pytest.mark.parametrize("adapter", [flash_mla.flash_mla, flashinfer.flashinfer], ids=["flash_mla", "flashinfer"])
@settings(FEW)
@given(data=st.data(), num_queries=st.integers(1, 4), seed=SEEDS)
def test_what_vendors_are_given(adapter, data, num_queries, seed):
    """Empty sequences and queries before position 0 are zeros, whatever the vendor makes of them."""
    lens = data.draw(st.lists(st.sampled_from([0, 1, 2, 3, 64, 65, 130]), min_size=1, max_size=4))
    case = cases.Case(torch.float16, len(lens), 2, 512, 64, 64, 3, False, num_queries, kv_lens=tuple(lens))
    args = cases.make(case, CPU, seed)
    assert mla_decode.kernels[adapter.__name__].when(cases.of(*args))
    got = adapter(*args)
    assert got.is_contiguous() and got.dtype == torch.float16
    torch.testing.assert_close(got, mla_decode.reference(*args), rtol=1e-3, atol=1e-3)


def test_vendors_are_not_given_what_they_do_not_take():
    taken = cases.Case(torch.bfloat16, 1, 16, 512, 64, 64, 1)
    for change in ({"fp8": True}, {"rank": 256}, {"rope_dim": 32}, {"dtype": torch.float32}):
        for name in ("flash_mla", "flashinfer"):
            assert mla_decode.kernels[name].when(taken)
            assert not mla_decode.kernels[name].when(dataclasses.replace(taken, **change)), (name, change)
    assert not mla_decode.kernels["flash_mla"].when(dataclasses.replace(taken, page_size=32))


def test_a_missing_flash_mla_is_named_with_its_source(monkeypatch):
    monkeypatch.setattr(registry.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"flash_mla, built from github.com/deepseek-ai/FlashMLA at [0-9a-f]{40}"):
        registry.use({"mla_decode": "flash_mla"})
