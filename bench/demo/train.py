"""Trains a demo checkpoint with transformers' own model and saves it in Hugging Face format.

python -m bench.demo.train --recipe qwen3 --out nanodeploy/demo/qwen3 --minutes 3 --device cuda --graphs

Mixtures of experts are kept in balance as their families do it: by an auxiliary loss (router_aux_loss_coef; Qwen3-MoE)
or by a bias that moves against the load (e_score_correction_bias; DeepSeek-V3, arXiv:2408.15664).
"""

import argparse
import json
import math
import multiprocessing
import os
import platform
import random
import time
from collections import Counter
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy
import tokenizers
import torch
import transformers
from torch import Tensor, nn
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.integrations.moe import ExpertsInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from bench.demo import data
from bench.demo.evaluate import accuracy
from bench.demo.tasks import Chat, Sample
from bench.demo.tokenizer import VOCAB, build, prompt

RECIPES: dict[str, dict[str, Any]] = {
    "qwen3": {
        "model_type": "qwen3",
        "hidden_size": 192,
        "intermediate_size": 512,
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
    },
    "qwen3-moe": {
        "model_type": "qwen3_moe",
        "hidden_size": 192,
        "intermediate_size": 384,
        "moe_intermediate_size": 96,
        "num_experts": 8,
        "num_experts_per_tok": 4,
        "norm_topk_prob": True,
        "router_aux_loss_coef": 0.01,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
    },
    "deepseek-v3": {
        "model_type": "deepseek_v3",
        "hidden_size": 192,
        "intermediate_size": 384,
        "moe_intermediate_size": 96,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "num_experts_per_tok": 3,
        "n_group": 4,
        "topk_group": 2,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "first_k_dense_replace": 1,
        "num_nextn_predict_layers": 0,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "q_lora_rank": 96,
        "kv_lora_rank": 128,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 32,
        "v_head_dim": 64,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 100000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 1024,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        },
    },
}
BIAS_STEP = 0.001  # by which the bias of an expert moves after each step
SHAPES = {64: 512, 512: 64, 1024: 32, 2048: 16}  # length: rows; about as many tokens in each
CURRICULUM = [  # from this progress on: the share of steps at each length
    (0.00, {64: 0.60, 512: 0.40}),
    (0.12, {64: 0.45, 512: 0.35, 1024: 0.20}),
    (0.30, {64: 0.40, 512: 0.28, 1024: 0.12, 2048: 0.20}),
]

# A name without a mask function: transformers then builds no mask, and SDPA runs causal. Rows are padded on the right.
AttentionInterface.register("causal_sdpa", sdpa_attention_forward)


def every_expert(experts: Any, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """All experts for all tokens: at this size cheaper than sorting, and a CUDA graph can hold it.

    x [T, D]; ids and weights [T, k]. Returns [T, D].
    """
    shares = x.new_zeros(len(x), experts.num_experts, dtype=weights.dtype).scatter(1, ids, weights)
    gate, up = (x @ experts.gate_up_proj.transpose(1, 2)).chunk(2, dim=-1)  # [E, T, I] each
    each = (experts.act_fn(gate) * up) @ experts.down_proj.transpose(1, 2)  # [E, T, D]
    return (each * shares.T.unsqueeze(-1)).sum(0).to(x.dtype)


ExpertsInterface.register("every_expert", every_expert)


class Balance:
    """Counts how often each expert is chosen, and moves the biases of routers that have one."""

    def __init__(self, model: PreTrainedModel):
        self.routers: list[Any] = [m for m in model.modules() if hasattr(m, "e_score_correction_bias")]
        self.loads = [torch.zeros_like(router.e_score_correction_bias) for router in self.routers]
        for router, load in zip(self.routers, self.loads):
            router.register_forward_hook(lambda module, args, routed, load=load: self._count(load, routed[2]))

    @staticmethod
    @torch.no_grad()
    def _count(load: Tensor, ids: Tensor) -> None:
        load.index_add_(0, ids.flatten(), torch.ones_like(ids.flatten(), dtype=load.dtype))

    @torch.no_grad()
    def step(self) -> None:
        for router, load in zip(self.routers, self.loads):
            router.e_score_correction_bias += BIAS_STEP * torch.sign(load.mean() - load)
            load.zero_()

    def spread(self) -> float | None:
        """The biases' range, the largest over the layers; it grows for as long as a router leaves experts idle."""
        biases = [router.e_score_correction_bias for router in self.routers]
        return max((b.max() - b.min()).item() for b in biases) if biases else None


def imbalance(routed: list[tuple[Tensor, Tensor]]) -> Tensor:
    """The auxiliary loss of arXiv:2101.03961, equations 4 to 6, over all layers together: k if all experts are chosen
    alike. transformers' own counts on the host, which no CUDA graph can hold."""
    num_experts = routed[0][0].shape[1]
    ids = torch.cat([ids.flatten() for _, ids in routed])
    counts = torch.zeros(num_experts, device=ids.device).index_add_(0, ids, torch.ones_like(ids, dtype=torch.float32))
    chances = torch.cat([torch.softmax(logits.float(), dim=-1) for logits, _ in routed])
    return num_experts * (counts / len(chances) * chances.mean(dim=0)).sum()


class Batches:
    """Batches from worker processes, made ahead. When none is ready, an old one of that length is used again."""

    def __init__(
        self, pool: ProcessPoolExecutor, folder: Path, seed: int, shapes: dict[int, int], ahead: int, device: str
    ):
        self.pool, self.folder, self.seed, self.shapes, self.device = pool, folder, seed, shapes, device
        self.used: dict[int, list[tuple[Tensor, Tensor]]] = {length: [] for length in shapes}
        self.num_made, self.num_fresh, self.num_again = 0, 0, 0
        self.rng = random.Random(seed)
        self.waiting: dict[int, list[Future]] = {
            length: [self._make(length) for _ in range(ahead)] for length in shapes
        }

    def _make(self, length: int) -> Future:
        self.num_made += 1
        return self.pool.submit(data.batch, self.folder, f"{self.seed} {self.num_made}", self.shapes[length], length)

    def take(self, length: int) -> tuple[Tensor, Tensor]:
        queue, used = self.waiting[length], self.used[length]
        if used and not queue[0].done():
            self.num_again += 1
            return self.rng.choice(used)
        ids, weights = queue.pop(0).result()
        queue.append(self._make(length))
        self.num_fresh += 1
        used.append((self._send(ids).long(), self._send(weights)))
        return used[-1]

    def _send(self, array: numpy.ndarray) -> Tensor:
        tensor = torch.from_numpy(array)
        return tensor.pin_memory().to(self.device, non_blocking=True) if self.device == "cuda" else tensor


class Gradients:
    """Loss and gradients of a batch; with graphs, each shape is captured once and replayed."""

    def __init__(self, model: PreTrainedModel, graphs: bool):
        self.model, self.graphs = model, graphs
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.captured: dict[torch.Size, tuple] = {}
        self.aux_share: float = getattr(model.config, "router_aux_loss_coef", 0.0)
        self.routed: list[tuple[Tensor, Tensor]] = []  # (logits [T, E], ids [T, k]) of each router in a forward pass
        if self.aux_share:
            for router in (m for m in model.modules() if type(m).__name__.lower().endswith("topkrouter")):
                router.register_forward_hook(self._note)

    def _note(self, module: nn.Module, args: tuple, routed: tuple[Tensor, Tensor, Tensor]) -> None:
        if torch.is_grad_enabled():
            self.routed.append((routed[0], routed[2]))

    def eager(self, ids: Tensor, weights: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        # no cast cache: a cast made before a capture must not be reused in it
        on_gpu = ids.is_cuda
        self.routed.clear()
        with torch.autocast("cuda", torch.bfloat16, cache_enabled=False) if on_gpu else nullcontext():
            output = self.model(input_ids=ids, use_cache=False)
        logits = output.logits[:, :-1]
        each = nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
        wanted = weights[:, 1:].flatten()
        loss = (each * wanted).sum() / wanted.sum()
        total = loss + self.aux_share * imbalance(self.routed) if self.aux_share else loss
        gradients = torch.autograd.grad(total, self.parameters)
        return loss.detach(), tuple(g.contiguous() for g in gradients)  # the fused optimizer wants strides like theirs

    def capture(self, ids: Tensor, weights: Tensor) -> None:
        ids, weights = ids.clone(), weights.clone()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self.eager(ids, weights)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            loss, gradients = self.eager(ids, weights)
        self.captured[ids.shape] = graph, ids, weights, loss, gradients

    def __call__(self, ids: Tensor, weights: Tensor) -> Tensor:
        """Sets every parameter's grad and returns the loss."""
        if self.graphs:
            if ids.shape not in self.captured:
                self.capture(ids, weights)
            graph, own_ids, own_weights, loss, gradients = self.captured[ids.shape]
            own_ids.copy_(ids)
            own_weights.copy_(weights)
            graph.replay()
            loss = loss.clone()
        else:
            loss, gradients = self.eager(ids, weights)
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient
        return loss


@torch.inference_mode()
def greedy(
    model: PreTrainedModel, folder: Path, chats: list[Chat], most_new: int = 160, most_tokens: int = 2**17
) -> list[str]:
    """Greedy answers in batches of like length. No KV cache: rows are padded on the right as in training."""
    tokenizer, device = data.load(folder), model.device
    ends = [data.token_id(tokenizer, token) for token in ("<|endoftext|>", "<|im_end|>")]
    prompts = [tokenizer.encode(prompt(chat)).ids for chat in chats]
    order = sorted(range(len(chats)), key=lambda i: len(prompts[i]))
    answers = [""] * len(chats)
    while order:
        rows = max(1, min(len(order), most_tokens // len(prompts[order[-1]])))
        part, order = order[-rows:], order[:-rows]
        lens = torch.tensor([len(prompts[i]) for i in part], device=device)
        ids = torch.full((rows, int(lens.max()) + most_new), ends[0], device=device)
        for row, i in enumerate(part):
            ids[row, : len(prompts[i])] = torch.tensor(prompts[i], device=device)
        alive = torch.ones(rows, dtype=torch.bool, device=device)
        for new in range(most_new):
            kept = alive.nonzero().flatten()
            at = lens[kept] + new
            hidden = model.model(input_ids=ids[kept, : int(at.max())], use_cache=False).last_hidden_state
            best = model.lm_head(hidden[torch.arange(len(kept), device=device), at - 1]).argmax(-1)
            ids[kept, at] = best
            alive[kept] = ~torch.isin(best, torch.tensor(ends, device=device))
            if not alive.any():
                break
        for row, i in enumerate(part):
            new_ids = ids[row, len(prompts[i]) :].tolist()
            stop = next((k for k, token in enumerate(new_ids) if token in ends), len(new_ids))
            answers[i] = tokenizer.decode(new_ids[:stop], skip_special_tokens=False)
    return answers


def schedule(progress: float, step: int, lr: float) -> float:
    """Warm-up over 200 steps, cosine to 2 % of lr."""
    return lr * min(1.0, (step + 1) / 200) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def train(model: PreTrainedModel, batches: Batches, args: argparse.Namespace) -> dict:
    gradients, balance = Gradients(model, args.graphs), Balance(model)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98), fused=args.device == "cuda")
    rng = random.Random(f"lengths {args.seed}")
    for length in batches.shapes if args.graphs else ():
        gradients.capture(*batches.take(length))
    seen: Counter[int] = Counter()
    start, step, progress = time.time(), 0, 0.0
    losses: dict[int, list[Tensor]] = {length: [] for length in batches.shapes}
    while progress < 1.0:
        shares = [shares for since, shares in CURRICULUM if since <= progress][-1]
        length = rng.choices(list(shares), list(shares.values()))[0]
        for group in optimizer.param_groups:
            group["lr"] = schedule(progress, step, args.lr)
        losses[length].append(gradients(*batches.take(length)))
        nn.utils.clip_grad_norm_(gradients.parameters, 1.0)
        optimizer.step()
        balance.step()
        seen[length] += 1
        step += 1
        if step % args.print_every == 0:
            means = "  ".join(
                f"{length}: {torch.stack(values).mean().item():.4f}" for length, values in losses.items() if values
            )
            losses = {length: [] for length in losses}
            print(
                f"step {step}  {time.time() - start:.0f} s  {100 * progress:.0f} %  loss at length  {means}  "
                f"batches again {batches.num_again}",
                flush=True,
            )
        progress = step / args.steps if args.steps else (time.time() - start) / (60 * args.minutes)
    return {
        "steps": step,
        "seconds": round(time.time() - start, 1),
        "steps_by_length": dict(seen),
        "batches": {"fresh": batches.num_fresh, "again": batches.num_again},
        "spread_of_router_biases": balance.spread(),
    }


def save(model: PreTrainedModel, folder: Path) -> None:
    """In bf16, but for the routers' biases, as the families' own checkpoints have them."""
    routers: list[Any] = [m for m in model.modules() if hasattr(m, "e_score_correction_bias")]
    biases = [router.e_score_correction_bias for router in routers]
    model.bfloat16()
    for router, bias in zip(routers, biases):
        router.e_score_correction_bias = bias
    model.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
    tokenizer = data.load(folder)
    ends = [data.token_id(tokenizer, token) for token in ("<|im_end|>", "<|endoftext|>")]
    GenerationConfig(do_sample=False, eos_token_id=ends, pad_token_id=ends[1]).save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", choices=RECIPES, default="qwen3")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=0, help="train this many steps; 0: train for --minutes")
    parser.add_argument("--minutes", type=float, default=3.0, help="training time, without start-up and evaluation")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--graphs", action="store_true", help="capture each shape's forward and backward (cuda)")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 2))
    parser.add_argument("--fewer", type=int, default=1, help="divide the rows of every batch by this")
    parser.add_argument("--num_eval", type=int, default=200, help="held-out samples a task")
    parser.add_argument("--print_every", type=int, default=200)
    args = parser.parse_args()
    began = time.time()
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    # Workers are forked before CUDA starts; the first job starts them all.
    with ProcessPoolExecutor(args.workers, multiprocessing.get_context("fork")) as pool:
        pool.submit(build, args.out, args.seed).result()
        shapes = {length: max(1, rows // args.fewer) for length, rows in SHAPES.items()}
        batches = Batches(pool, args.out, args.seed, shapes, 2 + 2 * args.workers, args.device)
        tokenizer = data.load(args.out)
        end, pad = (data.token_id(tokenizer, token) for token in ("<|im_end|>", "<|endoftext|>"))
        config = AutoConfig.for_model(
            **RECIPES[args.recipe],
            vocab_size=VOCAB,
            max_position_embeddings=4096,
            initializer_range=0.04,
            bos_token_id=None,
            eos_token_id=end,
            pad_token_id=pad,
        )
        how = {"attn_implementation": "causal_sdpa", "experts_implementation": "every_expert"}
        model = AutoModelForCausalLM.from_config(config, **how).float().to(args.device)
        num_parameters = sum(p.numel() for p in model.parameters())
        print(f"{args.recipe}: {num_parameters} parameters; start-up {time.time() - began:.1f} s", flush=True)
        result = train(model, batches, args)
        pool.shutdown(wait=False, cancel_futures=True)
    save(model.eval(), args.out)
    misses: list[tuple[Sample, str]] = []
    scores = accuracy(lambda chats: greedy(model, args.out, chats), seed=args.seed, n=args.num_eval, misses=misses)
    for task, score in scores.items():
        print(f"{task:18} {100 * score:6.1f} %", flush=True)
    for task, group in {s.task: [m for m in misses if m[0].task == s.task][:4] for s, _ in misses}.items():
        for sample, got in group:
            print(f"missed {task}: {sample.chat.messages[-1]['content'][-120:]!r} -> {got!r}, not {sample.answer!r}")
    record = {
        "recipe": args.recipe,
        "parameters": num_parameters,
        "seed": args.seed,
        "lr": args.lr,
        **result,
        "batch_rows_by_length": shapes,
        "total_seconds": round(time.time() - began, 1),
        "device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu",
        "cuda_graphs": args.graphs,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": numpy.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        },
        "held_out_samples_per_task": args.num_eval,
        "greedy_accuracy": {task: round(score, 4) for task, score in scores.items()},
    }
    (args.out / "TRAINING.json").write_text(json.dumps(record, indent=2) + "\n")
    print(f"saved to {args.out}; {record['total_seconds']} s in all", flush=True)


if __name__ == "__main__":
    main()
