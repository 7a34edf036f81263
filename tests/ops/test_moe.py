"""Mixture of experts beyond what the registry's checks cover: every schedule, and the layers beside transformers'."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DeepseekV3Config, Qwen3MoeConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Experts, DeepseekV3TopkRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from bench import gate
from nanodeploy.models.checkpoint import quantised
from nanodeploy.models.layers.experts import Experts, Router, Routing
from nanodeploy.models.layers.linear import in_fp8
from nanodeploy.ops.agreement import Truth, bits
from nanodeploy.ops.layouts import E4M3
from nanodeploy.ops.moe_align import moe_align
from nanodeploy.ops.moe_align.reference import num_tiles
from nanodeploy.ops.moe_gemm import moe_gemm, tiles
from nanodeploy.ops.moe_gemm.cases import Case
from nanodeploy.ops.moe_gemm.tiles import Config, Schedule

DEVICE = gate.default_device()
ON_GPU = DEVICE.type == "cuda"
HALF = torch.bfloat16 if ON_GPU else torch.float16

SCHEDULES = {
    "weight left": Schedule(16, Config(64, 64, 4, 4, True), Config(64, 64, 4, 4, True)),
    "weight left, halves in one copy": Schedule(16, Config(32, 128, 4, 4, True), Config(64, 128, 4, 4, True)),
    "tokens left": Schedule(64, Config(64, 64, 4, 3), Config(128, 64, 4, 3)),
    "tokens left, in groups": Schedule(64, Config(32, 64, 4, 3, group=2), Config(64, 64, 4, 3, group=3)),
    "persistent": Schedule(16, Config(64, 64, 4, 4, True, True), Config(64, 64, 4, 4, True, True)),
    "persistent, in groups": Schedule(
        64, Config(64, 64, 4, 3, persistent=True, group=2), Config(64, 64, 4, 3, persistent=True, programs=2, group=2)
    ),
}
FP8_SCHEDULES = {
    "weight left": Schedule(16, Config(128, 128, 4, 3, True), Config(64, 128, 4, 4, True)),
    "tokens left": Schedule(64, Config(128, 128, 8, 3), Config(128, 128, 8, 3)),
    "persistent": Schedule(
        64, Config(128, 128, 8, 3, persistent=True), Config(128, 128, 8, 3, persistent=True, group=2)
    ),
}


def agrees(case: Case, chosen: Schedule, seed: int) -> None:
    args = moe_gemm.cases.make(case, DEVICE, seed)
    with gate.poisoned_memory():
        out = tiles.run(*args, chosen)
    assert (complaint := Truth(moe_gemm, case, args).complaint(out, {"out": out})) is None, complaint


@pytest.mark.parametrize("name", SCHEDULES)
@settings(max_examples=4)
@given(seed=st.integers(0, 7), num_tokens=st.integers(1, 70), inner=st.sampled_from([24, 64, 136]))
def test_every_way_to_cut_the_products(name, seed, num_tokens, inner):
    agrees(Case(HALF, num_tokens, 2, 3, 136, inner), SCHEDULES[name], seed)


@pytest.mark.parametrize("name", FP8_SCHEDULES)
@settings(max_examples=4)
@given(seed=st.integers(0, 7), num_tokens=st.integers(1, 70), inner=st.sampled_from([64, 128, 208]))
def test_every_way_to_cut_the_products_in_fp8(name, seed, num_tokens, inner):
    agrees(Case(E4M3, num_tokens, 2, 3, 144, inner, scaled=True), FP8_SCHEDULES[name], seed)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, E4M3])
@settings(settings.get_profile("gpu"), max_examples=20)
@given(seed=st.integers(0, 2**16), num_tokens=st.integers(1, 1000), few=st.integers(1, 40))
def test_kernels_of_one_order_agree_to_the_bit(dtype, seed, num_tokens, few):
    """A token's bits are the same from any kernel of the order, with any number of other tokens."""
    case = Case(dtype, max(num_tokens, few), 8, 16, 2048, 768, scaled=dtype == E4M3)
    x, x_scales, ids, weights, *held = moe_gemm.cases.make(case, DEVICE, seed)
    results = []
    for count in (few, case.num_tokens):
        args = (x[:count], None if x_scales is None else x_scales[:count], ids[:count], weights[:count], *held)
        for kernel in moe_gemm.kernels.values():
            if kernel.order == "k16" and kernel.available() and kernel.when(moe_gemm.cases.of(*args)):
                results.append((kernel.name, kernel.fn(*args)[:few]))
    for name, result in results[1:]:
        assert torch.equal(bits(result), bits(results[0][1])), f"{name} differs from {results[0][0]}"


@settings(max_examples=40)
@given(seed=st.integers(0, 7), num_tokens=st.integers(0, 60), num_experts=st.integers(1, 12), tile=st.integers(1, 9))
def test_alignment_puts_every_slot_into_a_tile_of_its_expert(seed, num_tokens, num_experts, tile):
    case = moe_align.cases.Case(torch.int32, num_tokens, min(2, num_experts), num_experts, tile)
    ids, *_ = moe_align.cases.make(case, torch.device("cpu"), seed)
    rows, experts = moe_align.reference(ids, num_experts, tile)
    flat, someone = ids.flatten(), rows < ids.numel()
    assert sorted(rows[someone].tolist()) == (flat >= 0).nonzero().flatten().tolist()
    assert torch.equal(flat[rows[someone].long()], experts.repeat_interleave(tile)[someone])


@pytest.mark.parametrize(("num_slots", "num_experts", "tile"), [(5, 3, 4), (64, 8, 16), (7, 9, 2), (129, 8, 1)])
def test_alignment_has_room_for_the_worst_case_and_no_more(num_slots, num_experts, tile):
    """One slot for each expert, and all others of one of them, in whole tiles but for that slot."""
    ids = torch.full((num_slots, 1), 0, dtype=torch.int32)
    opened = min(num_slots, num_experts)
    ids[:opened, 0] = torch.arange(opened, dtype=torch.int32)
    used = int((moe_align.reference(ids, num_experts, tile)[1] >= 0).sum())
    assert used == int(num_tiles(num_slots, num_experts, tile))


QWEN = {"hidden_size": 48, "num_experts": 12, "num_experts_per_tok": 3}
DEEPSEEK = {"hidden_size": 48, "n_routed_experts": 24, "num_local_experts": 24, "num_experts_per_tok": 4}


@pytest.mark.parametrize("renormalise", [True, False])
def test_router_is_that_of_qwen3_moe(renormalise):
    torch.manual_seed(0)
    theirs = Qwen3MoeTopKRouter(Qwen3MoeConfig(**QWEN, norm_topk_prob=renormalise))
    torch.nn.init.normal_(theirs.weight)
    ours = Router(48, Routing(12, 3, renormalise=renormalise))
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(50, 48)
    _, weights, wanted = theirs(x)
    ids, got = ours(x)
    assert torch.equal(ids.long(), wanted)
    torch.testing.assert_close(got, weights)


@pytest.mark.parametrize(("num_groups", "top_groups"), [(1, 1), (8, 4), (4, 1), (6, 3)])
def test_router_is_that_of_deepseek_v3(num_groups, top_groups):
    torch.manual_seed(0)
    config = DeepseekV3Config(
        **DEEPSEEK, n_group=num_groups, topk_group=top_groups, norm_topk_prob=True, routed_scaling_factor=2.5
    )
    theirs = DeepseekV3TopkRouter(config)
    torch.nn.init.normal_(theirs.weight)
    torch.nn.init.normal_(theirs.e_score_correction_bias)
    ours = Router(48, Routing(24, 4, "sigmoid", num_groups, top_groups, scale=2.5, has_bias=True))
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(50, 48)
    _, weights, wanted = theirs(x)
    ids, got = ours(x)
    order = ids.argsort(dim=-1)  # theirs are not sorted
    assert torch.equal(ids.long().gather(1, order), wanted.sort(dim=-1).values)
    torch.testing.assert_close(got.gather(1, order), weights.gather(1, wanted.argsort(dim=-1)))


def both_experts() -> tuple[DeepseekV3Experts, Experts]:
    torch.manual_seed(0)
    theirs = DeepseekV3Experts(DeepseekV3Config(**DEEPSEEK, moe_intermediate_size=40))
    torch.nn.init.normal_(theirs.gate_up_proj, std=0.2)
    torch.nn.init.normal_(theirs.down_proj, std=0.2)
    ours = Experts(24, 48, 40)
    ours.gate_up.copy_(theirs.gate_up_proj.detach())
    ours.down.copy_(theirs.down_proj.detach())
    return theirs, ours


def test_experts_are_those_of_deepseek_v3():
    theirs, ours = both_experts()
    x = torch.randn(30, 48)
    weights, ids = torch.rand(30, 24).topk(4)
    ids = ids.to(torch.int32)
    torch.testing.assert_close(ours(x, ids, weights), theirs(x, ids.long(), weights), rtol=1e-4, atol=1e-5)


def test_experts_in_fp8_are_near_those_without():
    """Within what four bits of a mantissa cost. Each matrix has blocks of scales of its own, also partial ones."""
    _, ours = both_experts()
    x, ids, weights = torch.randn(30, 48), torch.randint(0, 24, (30, 4), dtype=torch.int32), torch.rand(30, 4)
    wanted, gate_up, down = ours(x, ids, weights), ours.gate_up.clone(), ours.down.clone()
    ours.quantise()
    assert ours.takes_fp8 and ours.gate_up.dtype == ours.down.dtype == E4M3
    for expert in range(24):
        small = [quantised(matrix) for matrix in (*gate_up[expert].chunk(2), down[expert])]
        ours.gate_up[expert] = torch.cat([small[0][0], small[1][0]])
        ours.gate_up_scales[expert] = torch.cat([small[0][1], small[1][1]])
        ours.down[expert], ours.down_scales[expert] = small[2]
    for got in (ours(x, ids, weights), ours(in_fp8(x), ids, weights)):
        assert 0 < (got - wanted).norm() / wanted.norm() < 0.08
