"""Scores any engine on held-out samples of the demo's tasks."""

import random
from collections import defaultdict
from collections.abc import Callable, Mapping

from bench.demo.tasks import TASKS, Chat, Sample

BANDS = [256, 512, 1024, 1536, 2048]  # needle distances, upper ends

AnswerFn = Callable[[list[Chat]], list[str]]
Make = Callable[[random.Random, str], Sample]


def samples(tasks: Mapping[str, Make], seed: int, n: int) -> list[Sample]:
    """n held-out samples of each task; the same for the same seed, whatever the other tasks are."""
    chosen = []
    for task, make in tasks.items():
        rng = random.Random(f"test {task} {seed}")
        chosen += [make(rng, "test") for _ in range(n)]
    return chosen


def accuracy(
    answer_fn: AnswerFn,
    tasks: Mapping[str, Make] = TASKS,
    seed: int = 0,
    n: int = 200,
    misses: list[tuple[Sample, str]] | None = None,
) -> dict[str, float]:
    """The share of exact answers of each task, and of needles by distance ("needle <= 512").

    answer_fn gets all chats at once and returns their greedy answers as text, without the end token. Wrong ones are
    appended to `misses`.
    """
    asked = [(task, sample) for task, make in tasks.items() for sample in samples({task: make}, seed, n)]
    answers = answer_fn([sample.chat for _, sample in asked])
    right = defaultdict(list)
    for (task, sample), answer in zip(asked, answers, strict=True):
        good = answer.strip() == sample.answer.strip()
        right[task].append(good)
        if task == "needle" and sample.distance is not None:
            band = next((top for top in BANDS if sample.distance <= top), sample.distance)
            right[f"needle <= {band}"].append(good)
        if not good and misses is not None:
            misses.append((sample, answer))
    order = {name: i for i, name in enumerate([*tasks, *(f"needle <= {top}" for top in BANDS)])}
    return {name: sum(right[name]) / len(right[name]) for name in sorted(right, key=lambda name: order.get(name, 99))}
