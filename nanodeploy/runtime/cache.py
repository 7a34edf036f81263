"""The KV cache: how many pages there can be, and the tensors they lie in."""

from dataclasses import dataclass

import torch

from nanodeploy.config import Config
from nanodeploy.errors import ConfigError
from nanodeploy.models.batch import CacheNeeds
from nanodeploy.ops.layouts import Cache, num_pages_for

GIB = 2**30
CPU_BYTES = GIB


@dataclass(frozen=True)
class Room:
    """How much the cache may take, and the sum that led there, for the operator to read."""

    num_bytes: int
    reason: str


KV_DTYPES = {"fp8": torch.float8_e4m3fn}


def kv_dtype(config: Config) -> torch.dtype:
    """What the cache's pages hold: --kv_cache_dtype, by default the model's dtype (which is resolved already)."""
    kv_dtype: torch.dtype = KV_DTYPES.get(config.kv_cache_dtype) or getattr(torch, config.dtype)
    return kv_dtype


def page_bytes(needs: list[CacheNeeds], page_size: int, dtype: torch.dtype) -> int:
    """One page, in all layers. Raises ConfigError where a layer cannot keep what it needs in this dtype."""
    return sum(need.layout(page_size, dtype).page_bytes for need in needs)


def allocate(
    needs: list[CacheNeeds], num_pages: int, page_size: int, dtype: torch.dtype, device: torch.device
) -> list[Cache]:
    """One per layer, in the layer's own layout. Not cleared: nothing is read before it was written, and on a CPU memory
    costs nothing until it is touched.
    """
    return [need.layout(page_size, dtype).empty(num_pages, device) for need in needs]


def room_on_gpu(device: torch.device, utilization: float, weights_bytes: int, step_bytes: int) -> Room:
    """What --gpu_memory_utilization leaves beside the weights, the most a step takes of its own, and what others hold.

    `weights_bytes` and `step_bytes` may be there already or not; the memory that torch holds is theirs.
    """
    free, total = torch.cuda.mem_get_info(device)
    others = total - free - torch.cuda.memory_reserved(device)
    num_bytes = int(total * utilization) - others - weights_bytes - step_bytes
    return Room(
        max(0, num_bytes),
        f"{total / GIB:.1f} GiB x {utilization:g} - {others / GIB:.1f} driver and other processes "
        f"- {weights_bytes / GIB:.1f} weights - {step_bytes / GIB:.1f} of a step",
    )


def room_on_cpu(config: Config, bytes_per_page: int, model_len: int) -> Room:
    """Enough for all sequences at full length, up to CPU_BYTES; but always for one of --max_model_len."""
    page_size = config.kvcache_block_size
    all_of_them = config.max_num_seqs * num_pages_for(config.max_model_len or model_len, page_size)
    one = num_pages_for(config.max_model_len or 1, page_size)
    num_pages = config.num_kvcache_blocks or max(one, min(all_of_them, CPU_BYTES // bytes_per_page))
    return Room(num_pages * bytes_per_page, f"on a CPU up to {CPU_BYTES / GIB:g} GiB unless flags want more")


def choose_sizes(config: Config, room: Room, bytes_per_page: int, model_len: int) -> tuple[int, int]:
    """Returns the number of pages and max_model_len. `model_len` is the longest sequence that the model takes.

    The model's own length is cut to what fits. Raises ConfigError if --max_model_len or --num_kvcache_blocks does not
    fit, with the values that would.
    """
    page_size, max_pages = config.kvcache_block_size, room.num_bytes // bytes_per_page
    num_pages = config.num_kvcache_blocks or max_pages
    have = f"{room.num_bytes / GIB:.2f} GiB are there ({room.reason})"
    if num_pages > max_pages:
        raise ConfigError(
            f"--num_kvcache_blocks {num_pages} takes {num_pages * bytes_per_page / GIB:.2f} GiB; {have}. "
            f"At most {max_pages} fit."
        )
    max_len = num_pages * page_size
    wanted_len = config.max_model_len or min(model_len, page_size)
    if max_len < wanted_len:
        advice = f"--max_model_len {max_len} would fit" if max_len else "Free memory"
        if config.num_kvcache_blocks:
            raise ConfigError(
                f"--max_model_len {wanted_len} needs {num_pages_for(wanted_len, page_size)} pages of {page_size}; "
                f"--num_kvcache_blocks is {num_pages}. {advice}."
            )
        need = num_pages_for(wanted_len, page_size) * bytes_per_page
        raise ConfigError(
            f"The KV cache of one sequence of {wanted_len} tokens takes {need / GIB:.2f} GiB; {have}. "
            f"{advice}, or raise --gpu_memory_utilization."
        )
    return num_pages, min(config.max_model_len or model_len, max_len)
