"""The pages of sequences in all groups of layers, reserved together."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from jkv.engine.page_pool import PagePool, PageSequence
from jkv.engine.sequence import RunningSequence, SequenceTable
from jkv.store.policy import Policy


class PageAllocator:
    """One page pool per group of layers; a sequence has a page table in each of them.

    Layers with the same window form a group: they need the same tokens' pages.

    Args:
        pages: of each pool.
        page: tokens per page.
        windows: of each group, None where its layers see all tokens.
        policy: which cached page is evicted first.
    """

    def __init__(
        self, *, pages: int, page: int, windows: Sequence[int | None], policy: Policy | None
    ) -> None:
        self.pages, self.page, self.windows = pages, page, tuple(windows)
        self._policy = policy
        self.pools: list[PagePool] = []
        self.reset()

    def reset(
        self, fingerprint: bytes = b"", on_evict: Callable[[bytes, int], None] | None = None
    ) -> None:
        """Make all pages free and forget what they hold.

        Args:
            fingerprint: of all that pages depend on beside tokens and tenant.
            on_evict: called with the name and number of an evicted page.
        """
        self.pools = [
            PagePool(
                pages=self.pages,
                page=self.page,
                policy=self._policy,
                fingerprint=fingerprint,
                on_evict=on_evict,
            )
            for _ in self.windows
        ]

    @property
    def free_pages(self) -> int:
        """Pages that could be reserved now."""
        return min(pool.free_pages for pool in self.pools)

    @property
    def windowed(self) -> bool:
        """Whether pages of some layers leave their window."""
        return any(window is not None for window in self.windows)

    def pages_for(self, tokens: int) -> int:
        """Return the pages that hold so many tokens."""
        return -(-tokens // self.page)

    def open(self, tenant: str) -> list[PageSequence]:
        """Return an empty page table of each pool."""
        return [pool.sequence(tenant=tenant) for pool in self.pools]

    def close(self, page_tables: list[PageSequence]) -> None:
        """Give back all pages."""
        for table in page_tables:
            table.close()

    def match(self, page_tables: list[PageSequence], ids: list[int]) -> int:
        """Take the cached pages that hold the beginning of `ids`; the number of tokens in them.

        The last token is left out: its logits are wanted.
        """
        found = [table.match(ids, limit=len(ids) - 1) for table in page_tables]
        for table, tokens in zip(page_tables, found, strict=True):
            if tokens > min(found):
                table.crop(min(found))
        return min(found)

    def reserve(self, sequence: RunningSequence, length: int) -> None:
        """Reserve pages for the first `length` tokens.

        Raises:
            PoolFullError: too few free pages; repeated, it goes on where it stopped.
        """
        for table in sequence.page_tables:
            # Only full pages are shared here, and a full page is not written: nothing to copy.
            if table.reserve(length):
                raise RuntimeError(
                    f"{sequence.request} shares a page that is not full: an error in jkv"
                )
        self.count_slots(sequence)

    def extend(
        self,
        table: SequenceTable,
        running: Sequence[RunningSequence | None],
        lanes: np.ndarray,
        lengths: np.ndarray,
    ) -> None:
        """Reserve pages for these lanes, where enough are free for all of them."""
        for lane, length in zip(lanes.tolist(), lengths.tolist(), strict=True):
            sequence = running[lane]
            if sequence is None:
                raise RuntimeError(f"lane {lane} has no sequence: an error in jkv")
            for pages in sequence.page_tables:
                pages.extend(length)
        table.reserved[lanes] = -(-lengths // self.page) * self.page

    def publish(self, sequence: RunningSequence, length: int) -> None:
        """Let others find the full pages of the first `length` tokens, which are dispatched."""
        ids = sequence.request.history[:length].tolist()
        for table in sequence.page_tables:
            table.reserve(len(ids))  # its own pages; the pool does not know yet how full they are
            table.publish(ids)

    def withdraw(self, sequence: RunningSequence) -> None:
        """Remove the sequence's pages from the prefix index: they must not be reused."""
        for table in sequence.page_tables:
            table.withdraw()

    def release_windows(self, sequence: RunningSequence, written: int) -> None:
        """Give back the pages that have left the windows of their layers."""
        for table, window in zip(sequence.page_tables, self.windows, strict=True):
            if window is not None and written >= window:
                table.drop_before(min(written - window + 1, table.length))

    def count_slots(self, sequence: RunningSequence) -> None:
        """Enter the slots of a sequence's pages into the counts of its lane."""
        sequence.table.reserved[sequence.lane] = len(sequence.page_tables[0].table) * self.page

    def slots(self, table: SequenceTable) -> tuple[int, int]:
        """Return the slots of all held pages of the first pool, and how many of them are filled.

        A shared page is full and counts once; the free slots are those of each sequence's own.
        """
        held = self.pools[0].stats()["used"] * self.page
        return held, held - int(np.sum(table.reserved - table.lengths))

    def stats(self) -> dict[str, int]:
        """Return the pools' figures, summed."""
        figures = [pool.stats() for pool in self.pools]
        return {name: sum(f[name] for f in figures) for name in figures[0]}
