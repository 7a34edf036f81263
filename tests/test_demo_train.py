"""The demos' trainer: its recipes, and how it keeps experts in balance. Training itself is in runtime/test_families."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from bench.demo import train

NAMES = ("qwen3-moe", "deepseek-v3")
IDS = torch.arange(120).view(3, 40) * 7 % 700


def model_of(name: str, experts: str = "every_expert"):
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        **train.RECIPES[name], vocab_size=768, max_position_embeddings=4096, initializer_range=0.1
    )
    how = {"attn_implementation": "causal_sdpa", "experts_implementation": experts}
    return AutoModelForCausalLM.from_config(config, **how).float()


@pytest.mark.parametrize("name", NAMES)
def test_recipes_are_what_the_kernels_take(name):
    """Sizes in multiples of 16 and latents in multiples of 128: so they have kernels and pages in FP8."""
    recipe = train.RECIPES[name]
    assert recipe["hidden_size"] % 16 == recipe["moe_intermediate_size"] % 16 == 0
    assert recipe.get("kv_lora_rank", 128) % 128 == recipe.get("q_lora_rank", 16) % 16 == 0


@pytest.mark.parametrize("name", NAMES)
@torch.inference_mode()
def test_every_expert_computes_what_transformers_does(name):
    """On any path: all experts for all tokens, weighted by zero where they were not chosen."""
    ours, theirs = model_of(name), model_of(name, "eager")
    torch.testing.assert_close(ours(input_ids=IDS).logits, theirs(input_ids=IDS).logits, rtol=1e-4, atol=1e-4)


@torch.inference_mode(False)  # where another test's fixture has it on
@torch.enable_grad()
def test_the_auxiliary_loss_is_transformers():
    model = model_of("qwen3-moe")
    gradients = train.Gradients(model, graphs=False)
    wanted = model(input_ids=IDS, use_cache=False, output_router_logits=True).aux_loss
    assert len(gradients.routed) == 4
    torch.testing.assert_close(train.imbalance(gradients.routed), wanted)
    loss, first = gradients.eager(IDS, torch.ones(IDS.shape))
    gradients.aux_share = 0.0
    again, without = gradients.eager(IDS, torch.ones(IDS.shape))
    assert loss == again and not all(map(torch.equal, first, without))  # it moves the weights, and is not shown as loss


def test_biases_move_against_the_load():
    model = model_of("deepseek-v3")
    balance = train.Balance(model)
    assert len(balance.routers) == 3 and balance.spread() == 0
    with torch.no_grad():
        model(input_ids=IDS, use_cache=False)
    loads = [load.clone() for load in balance.loads]
    assert all(load.sum() == IDS.numel() * 3 for load in loads)
    balance.step()
    for router, load in zip(balance.routers, loads):
        wanted = torch.where(load > load.mean(), -1.0, 1.0) * (load != load.mean())
        assert torch.equal(router.e_score_correction_bias.sign(), wanted)
    assert balance.spread() == pytest.approx(2 * train.BIAS_STEP) and all(load.sum() == 0 for load in balance.loads)
