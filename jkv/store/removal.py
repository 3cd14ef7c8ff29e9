"""How entries are taken out: from the index at once, from tiers as soon as these let them go."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from jkv.errors import TierError
from jkv.store.index import Index
from jkv.store.keys import split_name
from jkv.store.state import Record


class Removal:
    """Entries that go, and orphans: what is left of them in a tier until it can be deleted."""

    def __init__(self, index: Index) -> None:
        self._index = index

    # Orphans.

    def clean(self, at: int, name: str) -> bool:
        """Delete what a tier has of a name and no record refers to; False: it could not be."""
        state = self._index.tiers[at]
        if name not in state.orphans:
            return True
        if not state.delete(name, state.orphan_versions.get(name)):
            return False
        with self._index.lock:
            self._index.drop_orphan(at, name)
        return True

    def clean_all(self, name: str) -> None:
        """Clean a name in all tiers; what cannot be deleted now stays an orphan."""
        for at in range(len(self._index.tiers)):
            self.clean(at, name)

    def clean_orphans(self) -> None:
        """Try again to delete what could not be deleted."""
        for at, state in enumerate(self._index.tiers):
            for name in list(state.orphans):
                if self._index.claim([name], wait=False):
                    try:
                        self.clean(at, name)
                    finally:
                        self._index.unclaim([name])

    def discard_older(self, record: Record) -> None:
        """Make orphans of what other processes have put under its name until now."""
        index = self._index
        for at, state in enumerate(index.tiers[1:], 1):
            old = state.version_of(record.name)
            if old in (None, record.version):
                continue
            with index.lock:
                known = index.records.get(record.name)
                if known is not None and known.version == old:
                    continue  # it goes when the new one has come
                if known is not None and at in known.locations:
                    index.forget(known, "replaced")
                index.add_orphan(at, record.name, 0, old)  # how much is not known

    # Entries.

    def drop(
        self,
        names: Sequence[str],
        reason: str,
        condition: Callable[[Record], bool],
        *,
        wait: bool = True,
        any_put: bool = False,
    ) -> int:
        """Take entries out of everything, those for which the condition holds then; how many.

        What another process has put under their names since stays, but with `any_put`.
        """
        index, dropped = self._index, 0
        for name in names:
            if not index.claim([name], wait=wait):
                continue
            try:
                with index.lock:
                    record = index.records.get(name)
                    if record is None or not condition(record):
                        continue
                    index.forget(record, reason, any_put=any_put)
                    dropped += 1
                self.clean_all(name)
            finally:
                index.unclaim([name])
        return dropped

    def reject(self, name: str, condition: Callable[[Record], bool]) -> bool:
        """Take out an entry that is not what it says; whether there was one.

        It is counted as corrupt and lost, and put aside by tiers that can do so.
        """
        index = self._index
        index.claim([name])
        try:
            with index.lock:
                record = index.records.get(name)
                if record is None or not condition(record):
                    return False
                lasting = [at for at in record.locations if index.tiers[at].persistent]
                index.tiers[min(record.locations, default=0)].counts["corrupt"] += 1
            for at in lasting:
                index.tiers[at].tier.put_aside(name, record.version)
            with index.lock:
                for at in lasting:
                    index.drop_location(record, at)
                index.forget(record, "lost")
            self.clean_all(name)
            return True
        finally:
            index.unclaim([name])

    def remove(self, name: str, sync: bool) -> bool:
        """See `Store.remove`."""
        known = self.drop([name], "removed", lambda _: True, any_put=True)
        # Another process may have put it, or put it anew.
        if not known or any(state.version_of(name) for state in self._index.tiers):
            known = self.delete_unknown(name) or known
        if sync:
            self.purge([name])
        return bool(known)

    def delete_unknown(self, name: str) -> bool:
        """Delete what tiers may have of a name that the store does not know.

        Whether a reader has come to know it meanwhile: then it goes as what is known.
        """
        index = self._index
        index.claim([name])
        try:
            with index.lock:
                record = index.records.get(name)
                if record is not None:
                    index.forget(record, "removed", any_put=True)
            for at, state in enumerate(index.tiers):
                if name in state.orphans:
                    self.clean(at, name)
                elif state.persistent and not state.delete(name):
                    with index.lock:
                        index.add_orphan(at, name, 0)  # how much is not known
            return record is not None
        finally:
            index.unclaim([name])

    def clear(self, tenant: str | None) -> int:
        """See `Store.clear`."""
        index = self._index
        with index.lock:
            known = [*index.records, *(name for state in index.tiers for name in state.orphans)]
            names = [name for name in known if tenant is None or split_name(name)[0] == tenant]
        gone = self.drop(names, "removed", lambda _: True, any_put=True)
        self.clean_orphans()
        self.purge(names)
        return gone

    def purge(self, names: Sequence[str]) -> None:
        """Wait until what was dropped is gone for good.

        Raises:
            TierError: something is left, or may come back.
        """
        problems = []
        for state in self._index.tiers:
            if left := sum(name in state.orphans for name in names):
                problems.append(f"{left} could not be deleted from {state.name}")
            if names:
                try:
                    state.tier.purge(names)
                except TierError as error:
                    state.count_error()
                    problems.append(str(error))
        if problems:
            raise TierError(
                f"removed, and not served any more; but {', '.join(problems)}; it is tried "
                "again now and then, and by another remove or clear"
            )
