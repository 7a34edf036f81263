"""Latent attention as a whole: a mixed step against the formula with expanded keys and values, in fp64."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bench import gate
from nanodeploy.ops.head_linear import head_linear
from nanodeploy.ops.latent_attention import latent_attention, planned
from nanodeploy.ops.layouts import E4M3, LatentCache, LatentLayout
from nanodeploy.ops.mla_decode import cases as decode_cases
from nanodeploy.ops.mla_decode import mla_decode
from nanodeploy.ops.mla_decode.reference import context
from nanodeploy.ops.mla_prefill import absorbed, cases, expanded, mla_prefill
from nanodeploy.ops.paged_attention import Rows

DEVICE = gate.default_device()
ON_GPU = DEVICE.type == "cuda"
DTYPE = torch.bfloat16 if ON_GPU else torch.float16
PAGE = 16
MAX_PAGES = 12
FEW = settings(settings.get_profile("gpu" if ON_GPU else "ci"), max_examples=30 if ON_GPU else 6)

GATE_REASON = gate.why_not(mla_prefill.kernels["absorbed"], DEVICE)
needs_kernels = pytest.mark.skipif(GATE_REASON is not None, reason=str(GATE_REASON))


@dataclasses.dataclass
class Step:
    """What latent_attention takes for a step of decodes, then chunks of (q_len, kv_len), then padding."""

    q_nope: Tensor
    q_rope: Tensor
    cache: LatentCache
    rows: Rows
    w_uk: Tensor
    w_uv: Tensor
    scale: float
    kv_lens: list[int]  # of the decodes, then of the chunks
    q_lens: list[int]
    table: Tensor

    @property
    def args(self):
        return self.q_nope, self.q_rope, self.cache, self.rows, self.w_uk, self.w_uv, self.scale

    def formula(self) -> Tensor:
        """Every token over its own context, with keys and values made for it, in fp64: nothing as the kernels do it."""
        kind = torch.float64
        rank = self.w_uk.shape[2]
        wanted = torch.zeros((*self.q_nope.shape[:2], self.w_uv.shape[1]), dtype=kind, device=DEVICE)
        row = 0
        for seq, (q_len, kv_len) in enumerate(zip(self.q_lens, self.kv_lens)):
            tokens = context(self.cache.pages, self.table[seq], kv_len, rank, kind)
            keys = torch.einsum("nr,hdr->nhd", tokens[:, :rank], self.w_uk.to(kind))
            shared = tokens[:, None, rank:].expand(-1, keys.shape[1], -1)
            keys = torch.cat((keys, shared), dim=-1)
            values = torch.einsum("nr,hdr->nhd", tokens[:, :rank], self.w_uv.to(kind))
            for i in range(q_len):
                seen = kv_len - q_len + i + 1
                query = torch.cat((self.q_nope[row], self.q_rope[row]), dim=-1).to(kind)
                weights = (torch.einsum("hd,nhd->hn", query, keys[:seen]) * self.scale).softmax(-1)
                wanted[row] = torch.einsum("hn,nhd->hd", weights, values[:seen])
                row += 1
        return wanted


def make_step(
    decode_lens: list[int],
    chunks: list[tuple[int, int]],
    seed: int,
    fp8: bool = False,
    known: bool = True,
    num_padding: int = 2,
    heads: int = 3,
    real: bool = False,
) -> Step:
    """real: DeepSeek-V3's dims, instead of small and odd ones."""
    small = (128 if fp8 else 24, 4, 16, 24)
    rank, rope_dim, nope_dim, value_dim = (512, 64, 128, 128) if real else small
    q_lens = [1] * len(decode_lens) + [q for q, _ in chunks]
    kv_lens = decode_lens + [kv for _, kv in chunks]
    g = torch.Generator(DEVICE).manual_seed(seed)
    layout = LatentLayout(PAGE, rank, rope_dim, E4M3 if fp8 else DTYPE)
    cache, table, lens = decode_cases.make_cache(layout, tuple(kv_lens), MAX_PAGES, DEVICE, g)
    q = torch.randn(sum(q_lens) + num_padding, heads, nope_dim + rope_dim, generator=g, device=DEVICE).to(DTYPE)
    q[sum(q_lens) :] = float("nan")
    weights = torch.randn(heads, nope_dim + value_dim, rank, generator=g, device=DEVICE).mul_(rank**-0.5).to(DTYPE)
    w_uk, w_uv = weights.split((nope_dim, value_dim), dim=1)
    bounds = torch.tensor([len(decode_lens), *(q for q, _ in chunks)], device=DEVICE).cumsum(0).int()
    num_context = sum(kv for _, kv in chunks) if known else 0
    rows = Rows(
        decode_table=table,
        decode_lens=lens,
        prefixes=torch.zeros((len(lens), 2), dtype=torch.int32, device=DEVICE),
        chunk_table=table[len(decode_lens) :],
        chunk_lens=lens[len(decode_lens) :],
        cu_q_lens=bounds,
        counts=torch.tensor([len(decode_lens), len(chunks), 0, num_context], dtype=torch.int32),
    )
    q_nope, q_rope = q.split((nope_dim, rope_dim), dim=-1)
    scale = (nope_dim + rope_dim) ** -0.5
    return Step(q_nope, q_rope.contiguous(), cache, planned(rows, heads), w_uk, w_uv, scale, kv_lens, q_lens, table)


def chunk(max_len: int):
    return st.integers(1, max_len).flatmap(lambda kv_len: st.tuples(st.integers(0, kv_len), st.just(kv_len)))


def check(step: Step, got: Tensor) -> None:
    wanted = step.formula()
    size = wanted.square().mean().sqrt().item() if wanted.numel() else 0.0
    tolerance = decode_cases.TOLERANCE[DTYPE]
    torch.testing.assert_close(got.double(), wanted, rtol=tolerance, atol=tolerance * max(size, 0.1))


@settings(FEW)
@given(
    decode_lens=st.lists(st.integers(0, PAGE * MAX_PAGES), max_size=3),
    chunks=st.lists(chunk(PAGE * MAX_PAGES), max_size=3),
    seed=st.integers(0, 999),
    fp8=st.booleans(),
    known=st.booleans(),
)
def test_a_mixed_step_is_the_formula(decode_lens, chunks, seed, fp8, known):
    step = make_step(decode_lens, chunks, seed, fp8, known)
    check(step, latent_attention(*step.args))


@needs_kernels
@pytest.mark.parametrize("kernel", ["absorbed", "expanded"])
@settings(FEW)
@given(
    decode_lens=st.lists(st.integers(1, PAGE * MAX_PAGES), max_size=2),
    chunks=st.lists(chunk(PAGE * MAX_PAGES), min_size=1, max_size=3),
    seed=st.integers(0, 999),
    fp8=st.booleans(),
)
def test_each_kernel_serves_a_mixed_step(kernel, decode_lens, chunks, seed, fp8):
    step = make_step(decode_lens, chunks, seed, fp8)
    with gate.forced(mla_prefill, kernel):
        check(step, latent_attention(*step.args))


@needs_kernels
@pytest.mark.parametrize("kernel", ["absorbed", "expanded"])
@pytest.mark.parametrize("cut", [1, 15, 16, 17, 63, 64, 65, 127, 128, 129])
def test_chunks_cut_anywhere_near_a_tile(kernel, cut):
    """The end of a chunk, the start of the next, and a context that ends there: at every edge of tiles and pages."""
    total = 150
    whole = make_step([], [(total, total)], seed=5, num_padding=0)
    first = dataclasses.replace(
        whole, q_nope=whole.q_nope[:cut], q_rope=whole.q_rope[:cut], q_lens=[cut], kv_lens=[cut]
    )
    rest = dataclasses.replace(whole, q_nope=whole.q_nope[cut:], q_rope=whole.q_rope[cut:], q_lens=[total - cut])
    for step in (first, rest):
        lens = [torch.tensor(values, dtype=torch.int32, device=DEVICE) for values in (step.kv_lens, [0, *step.q_lens])]
        got = mla_prefill.kernels[kernel].fn(
            step.q_nope,
            step.q_rope,
            step.cache.pages,
            step.table,
            *lens,
            step.w_uk,
            step.w_uv,
            step.scale,
            sum(step.kv_lens),
        )
        check(step, got)


@needs_kernels
@settings(FEW)
@given(data=st.data(), parts=st.integers(2, 5), seed=st.integers(0, 999))
def test_a_context_in_parts_is_the_whole(data, parts, seed):
    """Some parts see nothing, of some rows or at all: the sum of parts is that of the whole."""
    fits = mla_prefill.kernels["absorbed"].when
    case = data.draw(cases.strategy(st, small=not ON_GPU).filter(fits))
    q_nope, q_rope, pages, table, kv_lens, cu_q_lens, w_uk, _, scale, _ = cases.make(case, DEVICE, seed)
    q = head_linear(q_nope, w_uk.transpose(1, 2))
    rest = q_rope, pages, table, kv_lens, cu_q_lens, scale, absorbed.pick(case.fp8)
    with gate.poisoned_memory():
        whole, split = (absorbed.attend(q, *rest, parts=n) for n in (1, parts))
    tolerance = decode_cases.TOLERANCE[case.dtype]
    torch.testing.assert_close(split, whole, rtol=tolerance, atol=tolerance)


@needs_kernels
def test_heads_by_turns_are_all_heads(monkeypatch):
    """A workspace too small for all heads at once changes nothing."""
    step = make_step([], [(9, 40), (30, 30)], seed=3, heads=4)
    with gate.forced(mla_prefill, "expanded"):
        together = latent_attention(*step.args)
        monkeypatch.setattr(expanded, "WORKSPACE_BYTES", 1)
        assert expanded.heads_at_once(256, 4, 80) == 1
        torch.testing.assert_close(latent_attention(*step.args), together, rtol=0, atol=0)


def test_contexts_bound_the_workspace():
    """One GiB at a time, whatever the context; never less than a head."""
    token_bytes = 2 * (128 + 128)
    assert expanded.heads_at_once(8192, 128, token_bytes) == 128
    assert expanded.heads_at_once(32768, 128, token_bytes) == 64
    assert expanded.heads_at_once(2**24, 128, token_bytes) == 1


@pytest.mark.parametrize("fp8", [False, True])
def test_a_chunk_of_one_token_is_a_decode(fp8):
    step = make_step([40, 7], [], seed=1, fp8=fp8, num_padding=0)
    decoded = mla_decode(
        head_linear(step.q_nope, step.w_uk.transpose(1, 2)),
        step.q_rope,
        step.cache.pages,
        step.table,
        step.rows.decode_lens,
        None,
        step.scale,
    )
    check(step, head_linear(decoded, step.w_uv))
    as_chunks = make_step([], [(1, 40), (1, 7)], seed=1, fp8=fp8, num_padding=0)
    check(as_chunks, latent_attention(*as_chunks.args))


def shared_orders() -> list[str]:
    orders = ({k.order for k in op.kernels.values() if k.order} for op in (mla_prefill, mla_decode))
    return sorted(set.intersection(*orders))


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("order", shared_orders())
def test_a_chunk_has_the_bits_of_decodes(order, fp8, monkeypatch):
    """--deterministic: the last token of each chunk, and the same token decoded, through the whole composite."""
    if (order == "rows") == ON_GPU:
        pytest.skip("rows are the CPU's, the others the GPU's")
    for op in (mla_prefill, mla_decode, head_linear):
        monkeypatch.setattr(op, "deterministic", True)
        monkeypatch.setattr(op, "decided", {})
    for op in (mla_prefill, mla_decode):
        monkeypatch.setattr(op, "one_order", lambda on_gpu: order)
    chunks = [(1, 1), (9, 150), (64, 64), (17, 180)]
    ends = torch.tensor([q for q, _ in chunks]).cumsum(0) - 1
    step = make_step([], chunks, seed=2, fp8=fp8, num_padding=0, heads=8, real=True)
    decodes = make_step([kv for _, kv in chunks], [], seed=2, fp8=fp8, num_padding=0, heads=8, real=True)
    decodes.q_nope, decodes.q_rope = step.q_nope[ends].contiguous(), step.q_rope[ends]
    decodes.w_uk, decodes.w_uv = step.w_uk, step.w_uv
    decodes.cache.pages.copy_(step.cache.pages)
    assert torch.equal(latent_attention(*step.args)[ends], latent_attention(*decodes.args))
