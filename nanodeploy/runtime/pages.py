"""Pages of the KV cache: who holds them, and how equal prefixes are found again. Pure Python."""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence


def extend_digests(digests: list[bytes], tokens: array, num_pages: int, page_size: int, salt: str) -> None:
    """Grow `digests` to the first `num_pages` full pages of `tokens` (int64). What is there already is kept.

    A page's digest is sha256 over its parent's digest and its own token ids, so it names the whole prefix; the root
    is the salt. Equal digests therefore mean equal tokens, equal positions and equal salt.
    """
    parent = digests[-1] if digests else hashlib.sha256(salt.encode()).digest()
    for page in range(len(digests), num_pages):
        content = tokens[page * page_size : (page + 1) * page_size].tobytes()
        parent = hashlib.sha256(parent + content).digest()
        digests.append(parent)


class PagePool:
    """Page numbers 0 to num_pages - 1. A page is held (by one or more sequences), idle, or free.

    An idle page is held by nobody but still has a digest: it can be found and shared again, until it is evicted because
    there is no free page left; the one idle for longest goes first.
    """

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self.free = list(range(num_pages - 1, -1, -1))
        self.idle: OrderedDict[int, None] = OrderedDict()  # longest idle first
        self.num_holders = [0] * num_pages
        self.digest_of: list[bytes | None] = [None] * num_pages
        self.page_of: dict[bytes, int] = {}

    @property
    def num_available(self) -> int:
        return len(self.free) + len(self.idle)

    def acquire(self, digests: Iterable[bytes], num_pages: int, *, spare: int = 0) -> tuple[list[int], int] | None:
        """`num_pages` pages for a sequence, and how many of them, from the first, hold its KV already.

        Those are the longest known chain of `digests`. None, and nothing changed, if fewer than `spare` pages would
        be left.
        """
        found = []
        for digest in digests:
            page = self.page_of.get(digest)
            if page is None:
                break
            found.append(page)
        num_idle = sum(page in self.idle for page in found)
        if num_pages - len(found) + spare > self.num_available - num_idle:
            return None
        for page in found:
            self.num_holders[page] += 1
            self.idle.pop(page, None)
        return found + self.allocate(num_pages - len(found)), len(found)

    def allocate(self, num_pages: int) -> list[int]:
        """Fresh pages; the caller has looked at num_available."""
        pages = []
        for _ in range(num_pages):
            if self.free:
                page = self.free.pop()
            else:
                page, _ = self.idle.popitem(last=False)
                digest = self.digest_of[page]
                assert digest is not None
                del self.page_of[digest]
                self.digest_of[page] = None
            self.num_holders[page] = 1
            pages.append(page)
        return pages

    def release(self, pages: Sequence[int]) -> None:
        """One holder gives them up. Last page first, so that of a chain the end is evicted before its beginning."""
        for page in reversed(pages):
            self.num_holders[page] -= 1
            if self.num_holders[page] == 0:
                if self.digest_of[page] is None:
                    self.free.append(page)
                else:
                    self.idle[page] = None

    def publish(self, page: int, digest: bytes) -> None:
        """Let later sequences find this held, full page. If an equal page is known already, this one stays private."""
        if digest not in self.page_of:
            self.page_of[digest] = page
            self.digest_of[page] = digest

    def forget(self) -> None:
        """Let nothing be found any more. Pages that are held stay with their holders."""
        self.free += self.idle
        self.idle.clear()
        self.page_of.clear()
        self.digest_of = [None] * self.num_pages
