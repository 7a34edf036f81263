"""One call of a running engine, cut down to what the reference can redo beside it.

A live call may hold a whole layer's cache and thousands of rows. Of the rows a few are redone, and of the cache the
pages that these touch.
"""

import random
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from nanodeploy.ops.agreement import Truth, alone, copy, names, outputs
from nanodeploy.ops.layouts import num_pages_for
from nanodeploy.ops.registry import Op

NUM_ROWS = 16  # redone of a call whose rows are independent
MAX_WIDE_ELEMENTS = (
    2**27
)  # of the floating tensors redone in float64; above, the reference in its own dtype is the truth
MAX_CACHE_ELEMENTS = 2**28  # of the pages that are copied
MAX_FLOPS = {"cuda": 1e11, "cpu": 1e9}  # references are slow: larger calls are let pass
PAGED = ("kv_pages", "kv_scales")


class TooLarge(Exception):
    """The reference would hold up the engine for too long."""


@dataclass
class LiveCall:
    """What a call must give, taken down before the kernel runs; `complaint` compares afterwards.

    Raises TooLarge; torch.OutOfMemoryError can come out of `complaint`.
    """

    op: Op
    live: tuple[Any, ...]  # the call's own arguments
    chance: random.Random
    args: tuple[Any, ...] = ()  # of the part that is redone; what the op mutates is a copy from before
    rows: slice | None = None  # where the part's outputs lie in the call's; None: the part is the whole
    pages: Tensor | None = None  # the cache's pages that the part touches
    sliced: set[str] = field(default_factory=set)  # arguments of which the part has `rows`

    def __post_init__(self) -> None:
        args = self.some_rows()
        values = dict(zip(names(self.op), args, strict=True))
        if values.get("kv_pages") is not None:
            values |= self.small_cache(values)
        for name in self.op.mutates:
            if values[name] is not None and not (name in PAGED and self.pages is not None):
                values[name] = copy(values[name])
        self.args = tuple(values.values())
        case = self.op.cases.of(*self.args)
        if self.op.cases.cost(case).flops > MAX_FLOPS[self.device.type]:
            raise TooLarge

    @property
    def device(self) -> torch.device:
        return next(a for a in self.live if isinstance(a, Tensor)).device

    def some_rows(self) -> tuple[Any, ...]:
        """The arguments of a few rows, where the room says how rows come apart."""
        cases = self.op.cases
        if hasattr(cases, "alone"):
            parts = [(args, place) for args, place in alone(self.op, self.live) if place.stop > place.start]
            if not parts:
                return self.live
            args, self.rows = self.chance.choice(parts)
            return args
        if not hasattr(cases, "ROWS"):
            return self.live
        self.sliced = set(cases.ROWS)
        num_rows = next(a for n, a in zip(names(self.op), self.live) if n in self.sliced and a is not None).shape[0]
        first = self.chance.randint(0, max(0, num_rows - NUM_ROWS))
        self.rows = rows = slice(first, min(first + NUM_ROWS, num_rows))
        return tuple(a[rows] if n in self.sliced and a is not None else a for n, a in zip(names(self.op), self.live))

    def small_cache(self, values: dict[str, Any]) -> dict[str, Any]:
        """The paged arguments and what points into them, on copies of the pages in question alone."""
        page_size = values["kv_pages"].shape[2]
        changed: dict[str, Any] = {}
        if "page_table" in values:
            table, kv_lens = values["page_table"], values["kv_lens"]
            width = max(1, num_pages_for(int(kv_lens.max()), page_size))
            used = torch.arange(width, device=table.device) * page_size < kv_lens[:, None]
            self.pages, where = table[:, :width][used].long().unique(return_inverse=True)
            changed["page_table"] = table.new_zeros(used.shape)
            changed["page_table"][used] = where.to(table.dtype)
        else:
            slots = values["slots"]
            stored = slots >= 0
            self.pages, where = (slots[stored] // page_size).unique(return_inverse=True)
            changed["slots"] = slots.clone()
            changed["slots"][stored] = where * page_size + slots[stored] % page_size
        if len(self.pages) * values["kv_pages"][:1].numel() > MAX_CACHE_ELEMENTS:
            raise TooLarge
        if not len(self.pages):  # nothing is read or written: one page will do
            self.pages = torch.zeros(1, dtype=torch.int64, device=self.pages.device)
        for name in PAGED:
            if values.get(name) is not None:
                changed[name] = values[name][self.pages]
        return changed

    def complaint(self, returned: Any) -> str | None:
        """What is wrong with what the kernel returned, and with what it wrote; None if nothing is."""
        elements = sum(a.numel() for a in self.args if isinstance(a, Tensor) and a.is_floating_point())
        case = self.op.cases.of(*self.args)
        expected = Truth(self.op, case, self.args, with_float64=elements <= MAX_WIDE_ELEMENTS)
        got = {name: out if self.rows is None else out[self.rows] for name, out in outputs(returned).items()}
        for name, live in zip(names(self.op), self.live):
            if name in self.op.mutates and live is not None:
                got[name] = self.part_of(name, live)
        cut: Any = tuple(got[name] for name in outputs(returned))
        if not isinstance(returned, (tuple, list)):
            cut = cut[0] if cut else None
        return expected.stray_write(got) or expected.complaint(cut, got)

    def part_of(self, name: str, live: Tensor) -> Tensor:
        if name in PAGED and self.pages is not None:
            return live[self.pages]
        return live[self.rows] if name in self.sliced and self.rows is not None else live
