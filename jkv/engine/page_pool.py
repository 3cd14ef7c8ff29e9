"""Pages that sequences share: their owners, which may be written, and which can be found again.

Plain Python: the contents of a page are kept elsewhere. A page is

* free, with nothing in it;
* owned by one sequence or several, with a count of them;
* cached: full, without an owner, and found again by its contents, until the policy evicts it.

A full page is found by a chained SHA-256 over what it depends on: the model and the cache (the
pool's fingerprint), the tenant, and all tokens up to its end. A page with several owners, or one
that can be found, is never written again: `reserve` returns what to copy first.

Every operation takes O(pages touched). Not for several threads at once. A call that raises changes
nothing. The idea of pages is that of Kwon et al., "Efficient Memory Management for Large
Language Model Serving with PagedAttention" (SOSP 2023).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

from jkv._text import plural
from jkv.errors import PoolFullError
from jkv.store import digest
from jkv.store.policy import LRU, Policy


class PagePool:
    """A pool of equal pages, and the index by which full ones are found.

    Args:
        pages: their number; they are called 0, 1, ... in tables.
        page: tokens in each.
        policy: which cached page is evicted first.
        fingerprint: of all that keys and values depend on beside tokens and tenant: weights,
            configuration, dtype, the kind of cache. Pools with equal ones name contents alike.
        on_evict: called with the name and number of a cached page that is evicted, before it may
            be written.

    Raises:
        ValueError: sizes below 1.

    Example:
        >>> pool = jkv.engine.PagePool(pages=8, page=4)
        >>> sequence = pool.sequence()
        >>> pool.needs(sequence, 6), pool.free_pages  # 6 tokens take two pages
        (2, 8)
    """

    def __init__(
        self,
        *,
        pages: int,
        page: int,
        policy: Policy | None = None,
        fingerprint: bytes = b"",
        on_evict: Callable[[bytes, int], None] | None = None,
    ) -> None:
        if pages < 1 or page < 1:
            raise ValueError(f"pages={pages}, page={page}; expected at least 1 of each")
        self.pages, self.page = pages, page
        self.policy = LRU() if policy is None else policy
        self.fingerprint = fingerprint
        self._on_evict = on_evict
        self._owners = [0] * pages
        self._names: list[bytes | None] = [None] * pages  # of those that the index has
        self._index: dict[bytes, int] = {}
        self._evictor = self.policy.start(pages)  # has what the index has; owned pages are held
        self._empty = list(range(pages - 1, -1, -1))
        self._open: set[PageSequence] = set()
        self._generation = 0  # a sequence with older pages adds none to the index
        self._used = self._cached = self._shared = 0
        self._hits = self._asked = self._evicted = self._copies = 0

    @property
    def free_pages(self) -> int:
        """Pages that could be reserved now: free ones and cached ones."""
        return len(self._empty) + self._cached

    def sequence(self, *, tenant: str = "") -> PageSequence:
        """Return a sequence without tokens. Tenants never find each other's pages."""
        sequence = PageSequence(self, tenant)
        self._open.add(sequence)
        return sequence

    def needs(self, sequence: PageSequence, length: int) -> int:
        """Return how many of the free pages ``sequence.reserve(length)`` would take.

        Raises:
            ValueError: a closed sequence, or another pool's.
        """
        if sequence._pool is not self:
            raise ValueError("needs got another pool's sequence; expected one of this pool's")
        return sequence._needs(length)

    def cached(self) -> list[tuple[bytes, int]]:
        """Return names and numbers of the cached pages."""
        return [(name, page) for name, page in self._index.items() if not self._owners[page]]

    def clear(self) -> None:
        """Forget the contents of every page: nothing is found until it is published anew.

        Sequences keep their pages; what those hold now is not published any more.
        """
        for page in self._index.values():
            self._names[page] = None
            if not self._owners[page]:
                self._empty.append(page)
        self._index.clear()
        self._evictor = self.policy.start(self.pages)  # without a memory of what went
        self._cached = 0
        self._generation += 1

    def stats(self) -> dict[str, int]:
        """Return the pages by state, and what happened so far.

        ``pages = used + cached + free``; of those used, `shared` have several owners. Of
        `asked_tokens` in calls of `match`, `hits_tokens` were found. `evicted` counts cached pages
        that were evicted, `copies` pages that were copied before they were written.
        """
        return {
            "pages": self.pages,
            "used": self._used,
            "cached": self._cached,
            "free": len(self._empty),
            "shared": self._shared,
            "sequences": len(self._open),
            "asked_tokens": self._asked,
            "hits_tokens": self._hits,
            "evicted": self._evicted,
            "copies": self._copies,
        }

    def check(self) -> None:
        """Compare all counts with the pages themselves; for tests: O(pages).

        Raises:
            RuntimeError: something does not agree.
        """
        owners = [0] * self.pages
        for sequence in self._open:
            held = [page for page in sequence.table if page >= 0]
            _agree("pages of a table", len(set(held)), len(held))
            _agree("a table's pages", len(sequence.table), -(-sequence.length // self.page))
            _agree("dropped pages", len(sequence.table) - len(held), sequence._dropped)
            for page in held:
                owners[page] += 1
        _agree("owners", self._owners, owners)
        _agree("used", self._used, sum(n > 0 for n in owners))
        _agree("shared", self._shared, sum(n > 1 for n in owners))
        named = {page: name for page, name in enumerate(self._names) if name is not None}
        _agree("the index", {page: name for name, page in self._index.items()}, named)
        cached = {page for page in named if not owners[page]}
        _agree("cached", self._cached, len(cached))
        _agree("empty", len(set(self._empty)), len(self._empty))
        states = [set(self._empty), cached, {page for page, n in enumerate(owners) if n}]
        _agree("pages in a state", sum(map(len, states)), self.pages)
        _agree("pages in any state", len(set().union(*states)), self.pages)
        _agree("pages in the policy", len(self._evictor), len(named))
        if not all(name in self._evictor for name in named.values()):
            raise RuntimeError("the policy does not know a page that the index has")

    def _take(self, count: int) -> list[int]:
        """Take pages for one owner: free ones, and then cached ones by the policy."""
        taken = []
        for _ in range(count):
            page = self._empty.pop() if self._empty else self._evict()
            self._owners[page] = 1
            self._used += 1
            taken.append(page)
        return taken

    def _evict(self) -> int:
        """Evict a cached page by the policy; its number."""
        name = cast(bytes, self._evictor.victim())  # what the index has
        self._evictor.evicted(name)
        page = self._index.pop(name)
        self._names[page] = None
        self._cached -= 1
        self._evicted += 1
        if self._on_evict is not None:
            self._on_evict(name, page)
        return page

    def _share(self, page: int) -> None:
        """Add an owner to a page."""
        self._owners[page] += 1
        if self._owners[page] == 1:
            self._cached -= 1
            self._used += 1
            self._evictor.hold(self._names[page])
        elif self._owners[page] == 2:
            self._shared += 1

    def _leave(self, page: int) -> None:
        """Remove an owner from a page."""
        self._owners[page] -= 1
        if self._owners[page] == 1:
            self._shared -= 1
        elif self._owners[page] == 0:
            self._used -= 1
            if self._names[page] is None:
                self._empty.append(page)
            else:
                self._cached += 1
                self._evictor.release(self._names[page])

    def _publish(self, page: int, name: bytes) -> None:
        """Let an owned page be found, unless one with the same contents is."""
        if name not in self._index:
            self._names[page] = name
            self._index[name] = page
            self._evictor.add(name)
            self._evictor.hold(name)

    def _withdraw(self, page: int) -> None:
        """Remove an owned page from the index."""
        name = self._names[page]
        if name is not None:
            self._names[page] = None
            del self._index[name]
            self._evictor.removed(name)


class PageSequence:
    """One sequence's block table; made by `PagePool.sequence`.

    Attributes:
        tenant: that it belongs to.
        table: the pages in order, -1 where one was dropped. Read only.
        length: tokens that pages are reserved for. Only this sequence writes those that are not
            written yet; before others share its pages, `crop` to what is written.
    """

    __slots__ = (
        "_closed",
        "_dropped",
        "_generation",
        "_names",
        "_pool",
        "_root",
        "length",
        "table",
        "tenant",
    )

    def __init__(self, pool: PagePool, tenant: str) -> None:
        self.tenant = tenant
        self._pool = pool
        self._root = digest.root(pool.fingerprint, tenant, pool.page)
        self._names: list[bytes] = []  # of the first full pages
        self._dropped = 0  # pages
        self._generation = pool._generation
        self._closed = False
        self.table: list[int] = []
        self.length = 0

    def match(self, tokens: Sequence[int], limit: int | None = None) -> int:
        """Take the longest chain of full pages that hold the beginning of `tokens`.

        Args:
            tokens: token ids.
            limit: at most so many of them; one less than all where logits are wanted.

        Returns:
            tokens covered, a multiple of the page.

        Raises:
            ValueError: the sequence is closed, or has tokens already.
            TypeError: tokens that are not whole numbers.
        """
        self._must_be_open()
        if self.length:
            raise ValueError(
                f"match got a sequence of {plural(self.length, 'token')}; expected an empty one"
            )
        pool, page = self._pool, self._pool.page
        most = len(tokens) if limit is None else max(0, min(limit, len(tokens)))
        names: list[bytes] = []
        for end in range(page, most + 1, page):
            name = digest.chain(names[-1] if names else self._root, tokens[end - page : end])
            if name not in pool._index:
                break
            names.append(name)
        self.table = [pool._index[name] for name in names]
        # From the last one back, so that the end of an unused chain is evicted first: pages behind
        # a missing one cannot be found.
        for name, found in zip(reversed(names), reversed(self.table), strict=True):
            pool._evictor.touch(name)
            pool._share(found)
        self._names, self._generation = names, pool._generation
        self.length = len(names) * page
        pool._asked += len(tokens)
        pool._hits += self.length
        return self.length

    def names(self, tokens: Sequence[int]) -> list[bytes]:
        """Return the names of the full pages of a sequence of these tokens, 32 bytes each.

        Raises:
            TypeError: tokens that are not whole numbers.
        """
        names, page = [self._root], self._pool.page
        for end in range(page, len(tokens) + 1, page):
            names.append(digest.chain(names[-1], tokens[end - page : end]))
        return names[1:]

    def reserve(self, length: int) -> list[tuple[int, int]]:
        """Reserve pages for `length` tokens in all; nothing to do where it has them.

        Returns:
            Pairs (source, target) of pages to copy, in this order, before anything is written
            that was reserved now or later.

        Raises:
            PoolFullError: too few free pages.
            ValueError: the sequence is closed.
        """
        self._must_be_open()
        if length <= self.length:
            return []
        pool, copy = self._pool, self._must_copy()
        needed = -(-length // pool.page) - len(self.table) + copy
        if needed > pool.free_pages:
            raise PoolFullError(
                f"{plural(length, 'token')} need {plural(needed, 'page')} more, and "
                f"{pool.free_pages} of {pool.pages} "
                "are free; close or crop a sequence, or make the pool larger"
            )
        if not self.table:
            self._generation = pool._generation
        last = len(self.table) - 1
        self.extend(length)
        if not copy:
            return []
        source, (target,) = self.table[last], pool._take(1)
        self.table[last] = target
        pool._leave(source)
        pool._copies += 1
        return [(source, target)]

    def extend(self, length: int) -> None:
        """Do what `reserve` does, where enough pages are free and nothing has to be copied."""
        pool = self._pool
        self.table += pool._take(-(-length // pool.page) - len(self.table))
        self.length = length

    def publish(self, tokens: Sequence[int]) -> None:
        """Let the full pages of its first tokens be found, which are these and are written.

        What was published before is not looked at again. Where a page with the same contents can
        be found already, this one becomes free in the end.

        Raises:
            ValueError: the sequence is closed, or has fewer tokens.
            TypeError: tokens that are not whole numbers.
        """
        self._must_be_open()
        if len(tokens) > self.length:
            raise ValueError(
                f"publish got {plural(len(tokens), 'token')}, and pages for {self.length} are "
                "reserved; expected no more than that"
            )
        pool, page, known = self._pool, self._pool.page, len(self._names)
        names = self._names[-1:] or [self._root]
        for end in range((known + 1) * page, len(tokens) + 1, page):
            names.append(digest.chain(names[-1], tokens[end - page : end]))
        self._names += names[1:]
        if self._generation == pool._generation:
            for at, name in enumerate(names[1:], known):
                if self.table[at] >= 0:
                    pool._publish(self.table[at], name)

    def withdraw(self) -> None:
        """Remove all its pages from the index, such as when their contents turn out to be bad.

        Sequences that have them keep them.

        Raises:
            ValueError: the sequence is closed.
        """
        self._must_be_open()
        for page in self.table:
            if page >= 0:
                self._pool._withdraw(page)

    def fork(self) -> PageSequence:
        """Return another sequence of the same tokens in the same pages, the last one too.

        The first to write into a page that is partly filled gets a copy.

        Raises:
            ValueError: the sequence is closed.
        """
        self._must_be_open()
        other = self._pool.sequence(tenant=self.tenant)
        other.table, other.length = list(self.table), self.length
        other._names, other._dropped = list(self._names), self._dropped
        other._generation = self._generation
        for page in self.table[self._dropped :]:
            self._pool._share(page)
        return other

    def crop(self, length: int) -> None:
        """Keep the first `length` tokens, and give back the pages past them.

        Raises:
            ValueError: the sequence is closed, has fewer tokens, or has dropped one of the last
                that would be left.
        """
        self._must_be_open()
        page = self._pool.page
        if not 0 <= length <= self.length:
            raise ValueError(f"crop got {length}; expected 0 to {plural(self.length, 'token')}")
        if 0 < length < self._dropped * page:
            raise ValueError(
                f"crop got {length}, and the pages of the first {self._dropped * page} tokens were "
                "dropped; expected at least so many, or 0"
            )
        self._give_back(-(-length // page))
        del self._names[length // page :]
        self.length = length

    def drop_before(self, position: int) -> None:
        """Give back the pages that are wholly before a position, as a sliding window allows.

        Raises:
            ValueError: the sequence is closed, or the position past its end.
        """
        self._must_be_open()
        if position > self.length:
            raise ValueError(f"drop_before got {position}; expected at most {self.length}")
        while (self._dropped + 1) * self._pool.page <= position:
            self._pool._leave(self.table[self._dropped])
            self.table[self._dropped] = -1
            self._dropped += 1

    def close(self) -> None:
        """Give back all pages. Every call after that raises.

        Raises:
            ValueError: it was closed before.
        """
        self._must_be_open()
        self._give_back(0)
        self.length = 0
        self._closed = True
        self._pool._open.remove(self)

    def _give_back(self, keep: int) -> None:
        """Give back all pages but the first ones: the last ones first, to be evicted first."""
        while len(self.table) > keep:
            page = self.table.pop()
            if page >= 0:
                self._pool._leave(page)
        self._dropped = min(self._dropped, keep)

    def _needs(self, length: int) -> int:
        self._must_be_open()
        if length <= self.length:
            return 0
        return -(-length // self._pool.page) - len(self.table) + self._must_copy()

    def _must_copy(self) -> bool:
        """Whether the next token would go into a page that is shared or can be found."""
        if self.length % self._pool.page == 0:
            return False
        last = self.table[-1]
        return self._pool._owners[last] > 1 or self._pool._names[last] is not None

    def _must_be_open(self) -> None:
        if self._closed:
            raise ValueError("this sequence is closed; make another with PagePool.sequence")


def _agree(what: str, counted: object, actual: object) -> None:
    if counted != actual:
        raise RuntimeError(f"{what}: counted {counted!r:.200}, but there are {actual!r:.200}")
