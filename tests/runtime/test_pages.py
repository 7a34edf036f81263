"""The page pool as a state machine: one owner per fresh page, no leak, and a hit only on equal tokens and salt."""

from array import array

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule

from nanodeploy.runtime.pages import PagePool, extend_digests

PAGE_SIZE = 4
tokens_lists = st.lists(st.integers(0, 1), min_size=1, max_size=6 * PAGE_SIZE)  # few token ids: many equal prefixes
salts = st.sampled_from(["", "a"])


class Sequence:
    def __init__(self, tokens, salt, pages, num_found):
        self.tokens, self.salt, self.pages, self.num_published = tokens, salt, pages, num_found


def digests_of(tokens, salt):
    digests: list[bytes] = []
    extend_digests(digests, array("q", tokens), len(tokens) // PAGE_SIZE, PAGE_SIZE, salt)
    return digests


class Pool(RuleBasedStateMachine):
    sequences = Bundle("sequences")

    @initialize(num_pages=st.integers(1, 12))
    def start(self, num_pages):
        self.pool = PagePool(num_pages)
        self.live: list[Sequence] = []
        self.content: dict[int, tuple] = {}  # page -> what a page that can be found stands for

    @rule(target=sequences, tokens=tokens_lists, salt=salts, spare=st.integers(0, 2))
    def acquire(self, tokens, salt, spare):
        digests, before = digests_of(tokens, salt), self.pool.num_available
        idle_before = set(self.pool.idle)
        num_pages = -(-len(tokens) // PAGE_SIZE)
        taken = self.pool.acquire(digests, num_pages, spare=spare)
        if taken is None:
            assert self.pool.num_available == before and set(self.pool.idle) == idle_before
            assert num_pages + spare > before
            return multiple()
        assert self.pool.num_available >= spare
        pages, num_found = taken
        assert len(pages) == num_pages == len(set(pages))
        for index, page in enumerate(pages):
            if index < num_found:  # found: it holds this very prefix, under this salt
                assert self.content[page] == (salt, *tokens[: (index + 1) * PAGE_SIZE])
            else:  # fresh: nobody else holds it, and it can no longer be found
                assert all(page not in other.pages for other in self.live)
                self.content.pop(page, None)
        made = Sequence(tokens, salt, pages, num_found)
        self.live.append(made)
        return made

    @rule(sequence=sequences)
    def publish(self, sequence):
        """Of the full pages, the next in order."""
        digests, index = digests_of(sequence.tokens, sequence.salt), sequence.num_published
        if sequence in self.live and index < len(digests):
            known = digests[index] in self.pool.page_of
            self.pool.publish(sequence.pages[index], digests[index])
            sequence.num_published += 1
            if not known:
                end = (index + 1) * PAGE_SIZE
                self.content[sequence.pages[index]] = (sequence.salt, *sequence.tokens[:end])

    @rule(sequence=consumes(sequences))
    def release(self, sequence):
        self.pool.release(sequence.pages)
        self.live.remove(sequence)

    @rule()
    def forget(self):
        self.pool.forget()
        self.content.clear()

    @invariant()
    def every_page_is_somewhere_once(self):
        pool = self.pool
        held = {page for sequence in self.live for page in sequence.pages}
        assert sorted([*held, *pool.free, *pool.idle]) == list(range(pool.num_pages))
        for page in range(pool.num_pages):
            assert pool.num_holders[page] == sum(page in sequence.pages for sequence in self.live)

    @invariant()
    def what_can_be_found_is_what_was_published(self):
        assert {page: digest for digest, page in self.pool.page_of.items()} == {
            page: digest for page, digest in enumerate(self.pool.digest_of) if digest is not None
        }
        assert set(self.pool.page_of.values()) == set(self.content)
        assert set(self.pool.idle) <= set(self.content) and not set(self.pool.free) & set(self.content)


TestPool = Pool.TestCase
TestPool.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


@given(tokens_lists, tokens_lists, salts, salts)
def test_equal_digests_mean_equal_prefixes_and_salts(a, b, salt_a, salt_b):
    for index, (x, y) in enumerate(zip(digests_of(a, salt_a), digests_of(b, salt_b))):
        end = (index + 1) * PAGE_SIZE
        assert (x == y) == (a[:end] == b[:end] and salt_a == salt_b)


@given(tokens_lists, st.data())
def test_digests_grown_in_steps_are_those_made_at_once(tokens, data):
    grown: list[bytes] = []
    for end in [*sorted(data.draw(st.lists(st.integers(0, len(tokens) // PAGE_SIZE)))), len(tokens) // PAGE_SIZE]:
        extend_digests(grown, array("q", tokens), end, PAGE_SIZE, "s")
    assert grown == digests_of(tokens, "s")


def test_the_page_idle_for_longest_is_evicted_first_and_a_chain_from_its_end():
    pool = PagePool(4)
    old, new = [0] * (2 * PAGE_SIZE), [1] * (2 * PAGE_SIZE)
    for tokens in (old, new):
        pages, _ = pool.acquire([], 2)
        for page, digest in zip(pages, digests_of(tokens, "")):
            pool.publish(page, digest)
        pool.release(pages)
    pool.allocate(1)
    assert [d in pool.page_of for d in digests_of(old, "") + digests_of(new, "")] == [True, False, True, True]
    pool.allocate(1)
    assert [d in pool.page_of for d in digests_of(old, "") + digests_of(new, "")] == [False, False, True, True]
