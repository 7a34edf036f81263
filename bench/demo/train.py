"""Trains a demo checkpoint with transformers' own model and saves it in Hugging Face format.

python -m bench.demo.train --recipe qwen3 --out nanodeploy/demo/qwen3 --minutes 3 --device cuda --graphs
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
}
SHAPES = {64: 512, 512: 64, 1024: 32, 2048: 16}  # length: rows; about as many tokens in each
CURRICULUM = [  # from this progress on: the share of steps at each length
    (0.00, {64: 0.60, 512: 0.40}),
    (0.12, {64: 0.45, 512: 0.35, 1024: 0.20}),
    (0.30, {64: 0.40, 512: 0.28, 1024: 0.12, 2048: 0.20}),
]

# A name without a mask function: transformers then builds no mask, and SDPA runs causal. Rows are padded on the right.
AttentionInterface.register("causal_sdpa", sdpa_attention_forward)


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

    def eager(self, ids: Tensor, weights: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        # no cast cache: a cast made before a capture must not be reused in it
        on_gpu = ids.is_cuda
        with torch.autocast("cuda", torch.bfloat16, cache_enabled=False) if on_gpu else nullcontext():
            logits = self.model(input_ids=ids, use_cache=False).logits[:, :-1]
        each = nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
        wanted = weights[:, 1:].flatten()
        loss = (each * wanted).sum() / wanted.sum()
        return loss.detach(), torch.autograd.grad(loss, self.parameters)

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
    gradients = Gradients(model, args.graphs)
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
    }


def save(model: PreTrainedModel, folder: Path) -> None:
    model.bfloat16().save_pretrained(folder)
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
        model = AutoModelForCausalLM.from_config(config, attn_implementation="causal_sdpa").float().to(args.device)
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
