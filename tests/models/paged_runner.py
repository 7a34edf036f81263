"""A hand-made paged runner, to compare our models with transformers' ones."""

import torch
from torch import Tensor

from nanodeploy.models.batch import Batch
from nanodeploy.ops.layouts import num_pages_for
from nanodeploy.ops.paged_attention import Rows


class PagedRunner:
    """Runs a model step by step as the engine would: shuffled pages, NaN where nobody wrote, buffers too long."""

    def __init__(
        self,
        model,
        *,
        page_size: int,
        num_pages: int = 80,
        max_seqs: int = 5,
        max_len: int = 256,
        seed: int = 0,
        kv_dtype=None,
    ):
        weight = next(model.parameters())
        self.model, self.page_size, self.device = model, page_size, weight.device
        self.generator = torch.Generator().manual_seed(seed)
        self.free = torch.randperm(num_pages, generator=self.generator).tolist()
        self.pages: dict[str, list[int]] = {}
        self.lengths: dict[str, int] = {}
        self.max_seqs, self.max_pages = max_seqs, num_pages_for(max_len, page_size)
        layouts = [need.layout(page_size, kv_dtype or weight.dtype) for need in model.cache_needs()]
        self.caches = [layout.empty(num_pages, self.device) for layout in layouts]
        for tensor in (t for cache in self.caches for t in cache if t is not None):
            tensor.copy_(torch.full(tensor.shape, 255 if tensor.dtype == torch.uint8 else float("nan")))

    def batch(self, decodes: dict[str, int], chunks: dict[str, list[int]], padding: int = 0) -> Batch:
        """The Batch of one step, in which every token's logits are wanted; takes pages as they are needed."""
        work = {**{name: [token] for name, token in decodes.items()}, **chunks}
        table = torch.randint(0, 10**6, (self.max_seqs, self.max_pages), generator=self.generator, dtype=torch.int32)
        kv_lens = torch.zeros(self.max_seqs, dtype=torch.int32)
        cu_q_lens = torch.full((self.max_seqs + 1,), len(decodes), dtype=torch.int32)
        tokens, positions, slots = [], [], []
        for row, (name, new) in enumerate(work.items()):
            begin = self.lengths.get(name, 0)
            end = self.lengths[name] = begin + len(new)
            pages = self.pages.setdefault(name, [])
            while len(pages) < num_pages_for(end, self.page_size):
                pages.append(self.free.pop())
            table[row, : len(pages)] = torch.tensor(pages, dtype=torch.int32)
            kv_lens[row] = end
            if row >= len(decodes):
                cu_q_lens[row - len(decodes) + 1] = cu_q_lens[row - len(decodes)] + len(new)
            tokens += new
            positions += range(begin, end)
            slots += [pages[p // self.page_size] * self.page_size + p % self.page_size for p in range(begin, end)]
        long = {"dtype": torch.int64, "device": self.device}
        return Batch(
            tokens=torch.tensor(tokens + [0] * padding, **long),
            positions=torch.tensor(positions + [0] * padding, **long),
            slots=torch.tensor(slots + [-1] * padding, **long),
            rows=Rows(
                decode_table=table.to(self.device),
                decode_lens=kv_lens.to(self.device),
                prefixes=torch.zeros((self.max_seqs, 2), dtype=torch.int32, device=self.device),
                chunk_table=table[len(decodes) :].contiguous().to(self.device),
                chunk_lens=kv_lens[len(decodes) :].contiguous().to(self.device),
                cu_q_lens=cu_q_lens.to(self.device),
                counts=torch.tensor([len(decodes), len(chunks), 0], dtype=torch.int32),
            ),
            logit_rows=torch.arange(len(tokens), **long),
        )

    def step(
        self, decodes: dict[str, int] | None = None, chunks: dict[str, list[int]] | None = None, padding: int = 0
    ) -> dict[str, Tensor]:
        """Logits of every token of the step, [tokens, V] per sequence, fp32 on the CPU."""
        decodes, chunks = decodes or {}, chunks or {}
        with torch.inference_mode():
            hidden = self.model(self.batch(decodes, chunks, padding), self.caches)
            logits = self.model.logits(hidden).float().cpu()
        sizes = [1] * len(decodes) + [len(chunk) for chunk in chunks.values()]
        return dict(zip([*decodes, *chunks], logits.split(sizes), strict=True))


def relative_error(got: Tensor, wanted: Tensor) -> float:
    """Worst row of largest difference over largest value."""
    return ((got - wanted).abs().amax(-1) / wanted.abs().amax(-1)).max().item()
