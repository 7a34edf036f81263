"""Start-up: from a Config to a runner that is warm. Every "auto" becomes a value with its reason, said aloud.

What can fail, fails as early as it can be known: most of it before weights load.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from nanodeploy import catalog
from nanodeploy.catalog import ModelFiles
from nanodeploy.config import Config, use_compile_caches
from nanodeploy.errors import ConfigError
from nanodeploy.models import checkpoint
from nanodeploy.models import registry as models
from nanodeploy.ops import machine
from nanodeploy.ops import registry as ops
from nanodeploy.ops.layouts import SPLIT_TOKENS, num_pages_for
from nanodeploy.runtime import cache
from nanodeploy.runtime.runner import Runner


@dataclass(frozen=True)
class Started:
    config: Config  # resolved
    runner: Runner
    num_pages: int
    max_model_len: int  # tokens
    eos_ids: frozenset[int]
    tokenizer_json: Path | None  # None: the model takes token ids only
    info: dict[str, Any]


@dataclass
class Phases:
    """Says that a phase begins, and notes the seconds it took."""

    say: Callable[[str], None]
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self.say(name)
        began = time.monotonic()
        yield
        self.seconds[name] = time.monotonic() - began


def start(config: Config, say: Callable[[str], None]) -> Started:
    """Raises ConfigError, CheckpointError."""
    use_compile_caches()
    files = catalog.locate(config.model, config.tokenizer)
    skeleton = models.skeleton(files, config.load_format, config.quantization)
    model_len, vocab_size, needs = skeleton.max_model_len, skeleton.vocab_size, skeleton.cache_needs()
    config, reasons = resolve(config, files, model_len)
    ops.use(config.kernel_overrides(), config.deterministic)
    device, dtype, page_size = torch.device(config.device), getattr(torch, config.dtype), config.kvcache_block_size
    device_key = machine.key() if device.type == "cuda" else "cpu"
    fast = device.type == "cuda" and not config.enforce_eager
    in_fp8 = any(getattr(module, "takes_fp8", False) for module in skeleton.modules())
    say(f"{files.name}: {config.dtype} on {device_key}{', weights in FP8' if in_fp8 else ''}")

    kv_dtype = cache.kv_dtype(config)
    bytes_per_page = cache.page_bytes(needs, page_size, kv_dtype)
    weights_bytes = checkpoint.num_bytes(skeleton, dtype)

    def room(step_bytes: int) -> cache.Room:
        if device.type == "cuda":
            return cache.room_on_gpu(device, config.gpu_memory_utilization, weights_bytes, step_bytes)
        return cache.room_on_cpu(config, bytes_per_page, model_len)

    cache.choose_sizes(config, room(0), bytes_per_page, model_len)  # if even this fails, weights need not load
    phase = Phases(say)
    try:
        with phase("loading weights"):
            model = models.build(
                files,
                dtype=dtype,
                device=device,
                load_format=config.load_format,
                seed=config.seed,
                quantization=config.quantization,
            )
        runner = Runner(
            model,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_pages=num_pages_for(config.max_model_len or model_len, page_size),
            page_size=page_size,
            device=device,
            split_tokens=SPLIT_TOKENS if config.deterministic else 0,
        )
        with phase("warming up"):
            runner.caches = cache.allocate(needs, 2, page_size, kv_dtype, device)
            step_bytes = runner.warm_up(config.max_model_len or model_len) - weights_bytes
            runner.caches = []
        with phase("allocating the KV cache"):
            have = room(step_bytes)
            num_pages, max_model_len = cache.choose_sizes(config, have, bytes_per_page, model_len)
            runner.caches = cache.allocate(needs, num_pages, page_size, kv_dtype, device)
        if fast and config.compile:
            with phase("compiling"):
                runner.compile()
        if fast:
            with phase("capturing a CUDA graph"):  # the others follow at their first use, or in idle moments
                runner.use_graphs()
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"The GPU's memory ran out: {str(error).partition('. ')[0]}. "
            f"Lower --gpu_memory_utilization (it is {config.gpu_memory_utilization:g}) or --max_num_batched_tokens."
        ) from error

    if config.max_model_len is None:
        reasons["max_model_len"] = "the model's" if max_model_len == model_len else "cut to what the cache holds"
        say(f"max_model_len: {max_model_len} ({reasons['max_model_len']})")
    if config.num_kvcache_blocks is None:
        reasons["num_kvcache_blocks"] = have.reason
    config = dataclasses.replace(config, max_model_len=max_model_len, num_kvcache_blocks=num_pages)
    info: dict[str, Any] = {
        "config": config.to_dict(),
        "reasons": reasons,
        "device": device_key,
        "torch": str(torch.__version__),
        "kernels": ops.chosen(),
        "phases": phase.seconds,
        "num_pages": num_pages,
        "page_size": page_size,
        "cache_tokens": num_pages * page_size,
        "cache_bytes": num_pages * bytes_per_page,
        "weights_bytes": weights_bytes,
    }
    say(
        f"KV cache: {info['cache_tokens']} tokens in {num_pages} pages, {info['cache_bytes'] / cache.GIB:.2f} GiB of "
        f"{have.num_bytes / cache.GIB:.2f} ({have.reason})"
    )
    for line in kernel_lines():
        say(line)
    eos_ids = frozenset(token for token in files.eos_token_ids if token < vocab_size)
    tokenizer_json = files.tokenizer_dir / "tokenizer.json" if files.tokenizer_dir else None
    return Started(config, runner, num_pages, max_model_len, eos_ids, tokenizer_json, info)


def resolve(config: Config, files: ModelFiles, model_len: int) -> tuple[Config, dict[str, str]]:
    """Settle device and dtype, check what settings must have in common, and return the reasons of what was chosen.

    `model_len` is the longest sequence that the model takes. The cache's size, and with it max_model_len where that
    is None, is settled later: it wants a measurement. Raises ConfigError.
    """
    reasons = {}
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
        reasons["device"] = "torch sees a GPU" if device == "cuda" else "torch sees no GPU"
    elif device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "--device is cuda, but torch sees no GPU. Use --device cpu, or install a CUDA build of torch."
        )

    if config.kv_cache_dtype == "fp8" and device == "cuda" and machine.capability() < 89:
        raise ConfigError(
            "--kv_cache_dtype fp8 wants a GPU that converts e4m3 (sm89 or later); "
            f"this one is sm{machine.capability()}. Use --kv_cache_dtype auto."
        )
    dtype = config.dtype
    if dtype == "auto":
        if device == "cpu":
            dtype, reasons["dtype"] = "float32", "on a CPU"
        elif files.dtype_name in ("bfloat16", "float16"):
            dtype, reasons["dtype"] = files.dtype_name, "the checkpoint's"
        else:
            dtype, reasons["dtype"] = (
                "bfloat16",
                f"the GPU's kernels want 16 bits; the checkpoint is {files.dtype_name}",
            )

    if config.max_model_len is not None and not 2 <= config.max_model_len <= model_len:
        raise ConfigError(f"--max_model_len is {config.max_model_len}; {files.name} takes 2 to {model_len} tokens.")
    if config.max_num_batched_tokens < config.max_num_seqs:
        raise ConfigError(
            f"--max_num_batched_tokens is {config.max_num_batched_tokens} and --max_num_seqs {config.max_num_seqs}; "
            "every running sequence needs a token in each step. "
            f"Use --max_num_seqs {config.max_num_batched_tokens} or less."
        )
    return dataclasses.replace(config, device=device, dtype=dtype), reasons


def kernel_lines() -> Iterator[str]:
    """Which kernel each op took, ops of the same choice in one line."""
    names: dict[str, list[str]] = {}
    for op, choices in ops.chosen().items():
        names.setdefault(", ".join(f"{kernel} ({reason})" for kernel, reason in choices.items()), []).append(op)
    for choice, op_names in names.items():
        yield f"{', '.join(op_names)}: {choice}"
