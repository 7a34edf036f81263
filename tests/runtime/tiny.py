"""Tiny random models made by transformers, an engine on them, and what it must answer, worked out the slow way."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from nanodeploy.config import Config
from nanodeploy.ops.sample.reference import sample
from nanodeploy.runtime.engine import Engine
from nanodeploy.runtime.graphs import Graphs, batch_sizes, token_sizes
from nanodeploy.runtime.step import Form
from nanodeploy.wire import GenerateRequest, TokenEvent

VOCAB, END, MAX_LEN = 61, 60, 96


SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": MAX_LEN,
    "initializer_range": 0.5,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": END,
}
QWEN3 = {**SIZES, "num_key_value_heads": 2, "head_dim": 8}
DEEPSEEK = {
    **SIZES,
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 16,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "num_mtp_layers": 0,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": MAX_LEN // 4,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    },
}


class KimiK2(DeepseekV3ForCausalLM):
    """transformers has no class for its model_type: what this saves says so, as published checkpoints do."""

    def save_pretrained(self, directory, **options):
        super().save_pretrained(directory, **options)
        path = Path(directory) / "config.json"
        says = {"model_type": "kimi_k2", "architectures": ["DeepseekV3ForCausalLM"]}
        path.write_text(json.dumps({**json.loads(path.read_text()), **says}))


FAMILIES: dict[str, tuple[type, type, dict[str, Any]]] = {
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, QWEN3),
    "qwen3_moe": (
        Qwen3MoeForCausalLM,
        Qwen3MoeConfig,
        {**QWEN3, "moe_intermediate_size": 16, "num_experts": 6, "num_experts_per_tok": 2, "norm_topk_prob": True},
    ),
    "deepseek_v3": (DeepseekV3ForCausalLM, DeepseekV3Config, DEEPSEEK),
    "kimi_k2": (
        KimiK2,
        DeepseekV3Config,
        {**DEEPSEEK, "n_routed_experts": 6, "n_group": 1, "topk_group": 1, "q_lora_rank": 20},
    ),
}


def make_model(family: str = "qwen3") -> PreTrainedModel:
    """In fp32, with weights large enough that its tokens vary and no two logits are nearly equal."""
    model_class, config_class, settings = FAMILIES[family]
    torch.manual_seed(1)
    config = config_class(**settings)
    config._experts_implementation = "eager"
    model: PreTrainedModel = model_class(config).eval().requires_grad_(False)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.normal_(0, 0.1)
    return model


def make_engine(directory, **flags) -> Engine:
    """Flags default to sizes at which nothing is scarce. The cache is poisoned: what nobody wrote must not be used."""
    flags = {"max_num_seqs": 8, "kvcache_block_size": 16, "max_num_batched_tokens": 256, "device": "cpu", **flags}
    engine = Engine(Config(model=str(directory), **flags))
    poison(engine)
    return engine


def poison(engine: Engine) -> None:
    """Fill the cache with what must not be used: NaN, in 8 bits too."""
    for tensor in (t for cache in engine.runner.caches for t in cache if t is not None):
        if tensor.dtype == torch.uint8:
            tensor.fill_(255)
        else:
            tensor.copy_(torch.full((1,), math.nan).to(tensor.dtype))


class PaddedSteps(Graphs):
    """Every step in the padded form of its graph, but run as it is, since a CPU captures nothing."""

    def __init__(self, engine: Engine):
        config = engine.config
        self.forward, self.max_num_seqs = engine.runner.forward, config.max_num_seqs
        self.decode_sizes = batch_sizes(config.max_num_seqs)
        self.mixed_sizes = token_sizes(config.max_num_batched_tokens)
        self.forms: list[Form] = []

    def run(self, form: Form) -> torch.Tensor:
        self.forms.append(form)
        return self.forward(form)

    def missing(self) -> None:
        return None


@dataclass
class Answer:
    """What came of one request, gathered from its events."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list = field(default_factory=list)
    events: list[TokenEvent] = field(default_factory=list)

    @property
    def end(self) -> TokenEvent:
        assert [event.finish_reason is not None for event in self.events] == [False] * (len(self.events) - 1) + [True]
        return self.events[-1]

    @property
    def told(self):
        return self.tokens, self.end.finish_reason, self.end.stop_token_id


def take(answers: dict[str, Answer], events: list[TokenEvent]) -> None:
    for event in events:
        answer = answers.setdefault(event.id, Answer())
        answer.tokens += event.token_ids
        answer.logprobs += event.logprobs
        answer.events.append(event)


def run(engine: Engine, requests: list[GenerateRequest], arrivals=None, step=Engine.step) -> dict[str, Answer]:
    """Submit each request before step number arrivals[i], and run until all have ended."""
    answers: dict[str, Answer] = {}
    pending = sorted(zip(arrivals or [0] * len(requests), range(len(requests))))
    for number in range(10_000):
        while pending and pending[0][0] <= number:
            engine.submit(requests[pending.pop(0)[1]])
        if not pending and not engine.busy():
            assert engine.stats().num_free_pages == engine.num_pages and engine.stats().num_running == 0
            return answers
        take(answers, step(engine))
    raise AssertionError("no end")


def without_overlap(engine: Engine) -> list[TokenEvent]:
    """A step that is waited for before the next one is planned."""
    engine.scheduler.admit(engine.inbox)
    plan = engine.scheduler.plan()
    return engine.settle(engine.runner.launch(plan) if plan else None)


class Oracle:
    """Says what a request must get, by transformers' model run on its tokens alone."""

    def __init__(self, model: PreTrainedModel):
        self.model = model

    def logits(self, tokens: list[int]) -> torch.Tensor:
        """[len(tokens), V]"""
        return self.model(torch.tensor([tokens])).logits[0]

    def answer(self, request: GenerateRequest, got: list[int]):
        """((tokens, reason, stop token), the raw log-probabilities [V] that each was drawn by).

        Token by token as if `got` were not known; but one pass over `got` gives the logits up to where it is right.
        """
        prompt, params = request.prompt_token_ids, request.params
        stops = set(params.stop_token_ids) | (set() if params.ignore_eos else {END})
        logits = self.logits(prompt + got)
        out: list[int] = []
        while out == got[: len(out)] and len(out) <= len(got):
            raw = logits[len(prompt) + len(out) - 1]
            token = self.pick(edited(raw, prompt, out, params, stops), len(prompt) + len(out), params)
            if token in stops:
                return (out, "stop", token), logits[len(prompt) - 1 :].log_softmax(-1)
            out.append(token)
            if len(out) == params.max_tokens or len(prompt) + len(out) == MAX_LEN:
                return (out, "length", None), logits[len(prompt) - 1 :].log_softmax(-1)
        return (out, "goes on", None), logits[len(prompt) - 1 :].log_softmax(-1)

    @staticmethod
    def pick(logits, position, params):
        row = [torch.tensor([v], dtype=torch.float32) for v in (params.temperature, params.top_p, params.min_p)]
        temperature, top_p, min_p = row
        top_k = torch.tensor([params.top_k], dtype=torch.int32)
        seeds = torch.tensor([params.seed or 0])
        return int(sample(logits[None], temperature, top_k, top_p, min_p, seeds, torch.tensor([position]))[0])


def edited(raw, prompt, out, params, stops):
    """Penalties, bias and min_tokens, token by token."""
    logits = raw.clone()
    for token in set(prompt) | set(out):
        x = logits[token]
        logits[token] = x / params.repetition_penalty if x > 0 else x * params.repetition_penalty
    for token in set(out):
        logits[token] -= params.frequency_penalty * out.count(token) + params.presence_penalty
    for token, bias in (params.logit_bias or {}).items():
        logits[token] += bias
    if len(out) < params.min_tokens:
        logits[list(stops)] = -math.inf
    return logits
