"""Training batches from the tasks: pure Python and numpy, so that worker processes can make them."""

import random
from functools import cache
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from bench.demo import tasks
from bench.demo.tokenizer import prompt


@cache
def load(folder: Path) -> Tokenizer:
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def token_id(tokenizer: Tokenizer, token: str) -> int:
    found = tokenizer.token_to_id(token)
    assert found is not None, token
    return found


def encode(tokenizer: Tokenizer, sample: tasks.Sample, think: bool = True) -> tuple[list[int], list[float]]:
    """Token ids and the loss weight of each as a target: every assistant turn of n tokens weighs sqrt(n) in all.

    A raw sample ends with <|endoftext|>, a chat with <|im_end|>. think=False puts the empty think block in the prompt.
    """
    end = token_id(tokenizer, "<|endoftext|>" if sample.chat.raw else "<|im_end|>")
    ids = tokenizer.encode(prompt(sample.chat, enable_thinking=think)).ids
    answer = [*tokenizer.encode(sample.answer).ids, end]
    weights = [0.0] * len(ids) + [len(answer) ** -0.5] * len(answer)
    if not sample.chat.raw:
        head = tokenizer.encode("<|im_start|>assistant\n").ids
        for i in (i for i, token in enumerate(ids) if token == head[0] and ids[i : i + len(head)] == head):
            start = i + len(head)
            if end in ids[start:]:
                stop = ids.index(end, start) + 1
                weights[start:stop] = [(stop - start) ** -0.5] * (stop - start)
    return ids + answer, weights


def batch(folder: Path, seed: str, rows: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """ids [rows, length] and target weights [rows, length]; short rows are padded on the right, weight 0."""
    rng, tokenizer = random.Random(seed), load(folder)
    ids = np.full((rows, length), token_id(tokenizer, "<|endoftext|>"), np.int32)
    weights = np.zeros((rows, length), np.float32)
    for row in range(rows):
        while True:
            row_ids, row_weights = encode(tokenizer, tasks.draw(rng, length), think=rng.random() > 0.15)
            if len(row_ids) <= length:
                break
        ids[row, : len(row_ids)], weights[row, : len(row_ids)] = row_ids, row_weights
    return ids, weights
