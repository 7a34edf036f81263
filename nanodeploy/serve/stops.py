"""Stop strings in streamed text: found however the text is cut, nothing shown too early, linear time.

An Aho-Corasick automaton (Aho and Corasick, 1975) reads one character at a time. Its depth is the length of the
longest tail of the text that a stop string may still grow from: exactly what must be held back.
"""

import functools
from collections import deque
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class _Automaton:
    edges: list[dict[str, int]]  # per node: character -> child
    fallback: list[int]  # per node: node of its longest proper suffix
    depth: list[int]  # per node: characters from the root
    match: list[int]  # per node: length of the longest stop string that ends here, 0 if none


@functools.lru_cache(maxsize=64)
def _compile(stops: tuple[str, ...]) -> _Automaton:
    edges: list[dict[str, int]] = [{}]
    depth, match = [0], [0]
    for stop in stops:
        node = 0
        for char in stop:
            child = edges[node].get(char)
            if child is None:
                child = edges[node][char] = len(edges)
                edges.append({})
                depth.append(depth[node] + 1)
                match.append(0)
            node = child
        match[node] = len(stop)
    fallback = [0] * len(edges)
    queue = deque(edges[0].values())
    while queue:  # breadth first, so that a node's fallback is finished before its children ask for it
        node = queue.popleft()
        for char, child in edges[node].items():
            queue.append(child)
            tail = fallback[node]
            while tail and char not in edges[tail]:
                tail = fallback[tail]
            fallback[child] = edges[tail].get(char, 0)
            match[child] = match[child] or match[fallback[child]]
    return _Automaton(edges, fallback, depth, match)


class StopMatcher:
    """Passes text through until a stop string completes; what could still become one is held back.

    The match is the one that ends first; of those that end there, the longest. The result does not depend on how the
    text was cut into pieces.
    """

    def __init__(self, stops: tuple[str, ...], include_stop: bool = False):
        self._automaton = _compile(stops) if stops else None
        self._include = include_stop
        self._node = 0
        self._held = ""
        self.matched = False

    def feed(self, text: str) -> str:
        """The text that may be shown now. After a match nothing more comes out."""
        if self._automaton is None:
            return text
        if self.matched:
            return ""
        edges, fallback, match = self._automaton.edges, self._automaton.fallback, self._automaton.match
        node = self._node
        for position, char in enumerate(text):
            while node and char not in edges[node]:
                node = fallback[node]
            node = edges[node].get(char, 0)
            if match[node]:
                self.matched = True
                seen = self._held + text[: position + 1]
                self._held = ""
                return seen if self._include else seen[: len(seen) - match[node]]
        self._node = node
        seen = self._held + text
        shown = len(seen) - self._automaton.depth[node]
        self._held = seen[shown:]
        return seen[:shown]

    def flush(self) -> str:
        """What was held back, once no more text will come."""
        held, self._held, self._node = self._held, "", 0
        return held
