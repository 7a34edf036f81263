"""Every setting, declared once: flags, the YAML file, /server_info and bench headers all derive from `Config`.

Imports nothing heavy: `nanodeploy --help` must answer at once. Environment variables are read here and nowhere else.
"""

import dataclasses
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nanodeploy.errors import ConfigError


def option(default: Any, help: str, **extra: Any) -> Any:
    """A field with its help. `extra`: choices=(...), low and high (bounds, included), positional=True."""
    return field(default=default, metadata={"help": help, **extra})


@dataclass(frozen=True, kw_only=True)
class Config:
    """One engine and its front end. `None` means auto: the runtime resolves it, with a reason, before weights load."""

    # what to serve
    model: str = option(
        "demo:qwen3", "checkpoint directory, demo:NAME, or demo:random-NAME (random weights)", positional=True
    )
    tokenizer: str | None = option(None, "directory with tokenizer.json, if not the model's own")
    served_model_name: str | None = option(None, "name clients use; default: the model argument")
    dtype: str = option(
        "auto",
        "compute dtype; auto takes the checkpoint's (float32 on a CPU)",
        choices=("auto", "bfloat16", "float16", "float32"),
    )
    load_format: str = option(
        "auto", "auto reads safetensors; dummy draws random weights", choices=("auto", "safetensors", "dummy")
    )
    quantization: str = option(
        "auto",
        "weights in FP8: auto takes them as the checkpoint has them, fp8 quantises one of 16 bits as it loads",
        choices=("auto", "fp8"),
    )
    max_model_len: int | None = option(
        None, "longest prompt plus output, tokens; default: the model's, cut to what fits", low=1
    )
    seed: int = option(0, "seed of requests that bring none, and of dummy weights", low=-(2**63), high=2**63 - 1)
    # the machine
    device: str = option("auto", "auto takes the GPU when there is one", choices=("auto", "cuda", "cpu"))
    gpu_memory_utilization: float = option(
        0.9, "share of the GPU's memory this engine may fill, 0 to 1", low=0.01, high=1.0
    )
    kvcache_block_size: int = option(64, "tokens per KV page", choices=(16, 64, 256))
    kv_cache_dtype: str = option(
        "auto",
        "what the KV cache holds; auto takes the compute dtype, fp8 is e4m3 with scales",
        choices=("auto", "fp8"),
    )
    num_kvcache_blocks: int | None = option(
        None, "KV pages; default: measured from free memory after a warm-up step", low=1
    )
    enforce_eager: bool = option(False, "no torch.compile and no CUDA graphs")
    compile: bool = option(
        False,
        "torch.compile the layers at start (about 10 s), which shortens the launch of steps that are no CUDA graph",
    )
    deterministic: bool = option(
        False, "the same bits for a request whatever shares its steps, however its prompt is cut, cached or preempted"
    )
    kernels: str = option("", "fixed kernels: op=kernel,op=kernel")
    lab: bool = option(
        False,
        "for development: gate each kernel file when it is saved under nanodeploy/ops, and switch to it (docs/LAB.md)",
    )
    # scheduling
    max_num_seqs: int = option(256, "sequences that run at once", low=1)
    max_num_batched_tokens: int = option(8192, "token budget of one step, prefill and decode together", low=1)
    enable_prefix_caching: bool = option(True, "reuse the KV pages of equal prompt prefixes")
    max_num_waiting: int = option(4096, "requests that may wait; more are refused with 503", low=0)
    max_logprobs: int = option(20, "most log-probabilities per token a request may ask for", low=0)
    # the server
    tool_call_parser: str = option(
        "auto",
        "how the model writes tool calls: hermes (or qwen3), qwen3_coder (qwen3_xml), glm47 (glm45, glm5), "
        "deepseek_v3, deepseek_v31, deepseek_v32, deepseek_v4, kimi_k2, none; auto sees it in the chat template",
    )
    reasoning_parser: str = option(
        "auto",
        "how the model writes reasoning: think (or a model's name, such as qwen3, glm5, kimi_k2), deepseek_r1 (always "
        "thinks), none; auto sees it in the chat template",
    )
    host: str = option("127.0.0.1", "address to listen on")
    port: int = option(8000, "port to listen on; 0 takes a free one", low=0, high=65535)
    shutdown_timeout: float = option(30.0, "seconds a drain may take after Ctrl-C or SIGTERM", low=0)
    heartbeat_timeout: float = option(
        30.0, "seconds without a sign of life from the engine loop before /health says 503", low=0.1
    )
    log_level: str = option("info", "log level", choices=("debug", "info", "warning", "error"))

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @property
    def public_name(self) -> str:
        return self.served_model_name or self.model

    def kernel_overrides(self) -> dict[str, str]:
        """`--kernels` as op -> kernel. Raises ConfigError on a malformed list."""
        from_flag = {}
        for part in filter(None, (p.strip() for p in self.kernels.split(","))):
            op_name, equals, kernel = part.partition("=")
            if not equals or not kernel or not op_name:
                raise ConfigError(f"--kernels {self.kernels}: wanted op=kernel,op=kernel; {part!r} has no kernel.")
            from_flag[op_name.strip()] = kernel.strip()
        return from_flag


def triton_interpret() -> bool:
    """Triton's own switch: run kernels in its CPU interpreter. Must be set before triton is imported."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def cache_dir() -> Path:
    """Where compile and autotune caches live: NANODEPLOY_CACHE, else ~/.cache/nanodeploy."""
    return Path(os.environ.get("NANODEPLOY_CACHE") or Path.home() / ".cache" / "nanodeploy")


def use_compile_caches() -> None:
    """Keep what torch.compile and Triton build under cache_dir(), unless the operator put it elsewhere.

    Must run before torch._inductor and triton look, which is on their first compilation.
    """
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_dir() / "inductor"))
    os.environ.setdefault("TRITON_CACHE_DIR", str(cache_dir() / "triton"))
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # there is little to compile: no pool of processes
