"""How large the KV cache gets, and what is said when it cannot be."""

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nanodeploy.config import Config
from nanodeploy.errors import ConfigError
from nanodeploy.models.batch import KVPages
from nanodeploy.runtime import cache
from nanodeploy.runtime.cache import Room, choose_sizes

PAGE_BYTES = 1000


def config(**flags):
    return Config(**{"kvcache_block_size": 16, **flags})


@given(
    num_bytes=st.integers(0, 40 * PAGE_BYTES),
    max_model_len=st.none() | st.integers(2, 400),
    num_blocks=st.none() | st.integers(1, 50),
    model_len=st.integers(400, 1000),
)
def test_what_is_chosen_fits_and_what_is_advised_works(num_bytes, max_model_len, num_blocks, model_len):
    room = Room(num_bytes, "the sum")
    wanted = config(max_model_len=max_model_len, num_kvcache_blocks=num_blocks)
    try:
        num_pages, length = choose_sizes(wanted, room, PAGE_BYTES, model_len)
    except ConfigError as error:
        if advised := re.search(r"--max_model_len (\d+) would fit", str(error)):
            wanted = config(max_model_len=int(advised[1]), num_kvcache_blocks=num_blocks)
        elif advised := re.search(r"At most (\d+) fit", str(error)):
            if advised[1] == "0":
                assert num_bytes < PAGE_BYTES
                return
            wanted = config(num_kvcache_blocks=int(advised[1]))
        else:
            assert num_bytes < PAGE_BYTES and "Free memory" in str(error) and "the sum" in str(error)
            return
        num_pages, length = choose_sizes(wanted, room, PAGE_BYTES, model_len)
    assert 1 <= num_pages <= num_bytes // PAGE_BYTES
    assert wanted.num_kvcache_blocks in (None, num_pages)
    assert length == (wanted.max_model_len or min(model_len, num_pages * 16))


def test_on_a_cpu_there_is_always_room_for_one_sequence():
    bytes_per_page = cache.CPU_BYTES // 10
    room = cache.room_on_cpu(config(max_model_len=20 * 16), bytes_per_page, 10**6)
    assert choose_sizes(config(max_model_len=20 * 16), room, bytes_per_page, 10**6) == (20, 320)
    room = cache.room_on_cpu(config(), bytes_per_page, 10**6)
    assert choose_sizes(config(), room, bytes_per_page, 10**6) == (10, 160)
    room = cache.room_on_cpu(config(max_num_seqs=2), 1, 100)  # both at full length, and no more
    assert choose_sizes(config(max_num_seqs=2), room, 1, 100) == (14, 100)
    few = config(num_kvcache_blocks=3)
    assert choose_sizes(few, cache.room_on_cpu(few, bytes_per_page, 10**6), bytes_per_page, 10**6) == (3, 48)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float8_e4m3fn])
def test_a_page_has_the_bytes_of_all_layers(dtype):
    needs = [KVPages(2, 8)] * 3
    caches = cache.allocate(needs, 5, 16, dtype, torch.device("cpu"))
    num_bytes = sum(tensor.nbytes for layer in caches for tensor in layer if tensor is not None)
    assert num_bytes == 5 * cache.page_bytes(needs, 16, dtype)


def test_an_fp8_cache_holds_nearly_twice_the_tokens():
    needs = [KVPages(8, 128)] * 36
    assert 1.95 < cache.page_bytes(needs, 64, torch.bfloat16) / cache.page_bytes(needs, 64, torch.float8_e4m3fn) < 2
