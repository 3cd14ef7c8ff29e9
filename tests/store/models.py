"""Eviction policies once more, slow and obvious: lists that are searched from end to end."""

from __future__ import annotations

from typing import Any


class Model:
    """Entries as dictionaries; the victim is the least of those not held, by `order`."""

    def __init__(self, capacity: float) -> None:
        self.capacity = capacity
        self.entries: dict[Any, dict[str, Any]] = {}
        self.clock = 0
        self.floor = 0.0

    def now(self) -> int:
        self.clock += 1
        return self.clock

    def expect(self, key):
        pass

    def add(self, key, size, cost):
        self.entries[key] = entry = {"size": size, "cost": cost, "uses": 1, "held": False}
        entry["born"] = self.now()
        self.used(entry)

    def used(self, entry):
        entry["last"] = self.now()

    def touch(self, key):
        self.entries[key]["uses"] += 1
        self.used(self.entries[key])

    def update(self, key, size, cost):
        self.entries[key].update(size=size, cost=cost)

    def hold(self, key):
        self.entries[key]["held"] = True

    def release(self, key):
        self.entries[key]["held"] = False
        self.used(self.entries[key])

    def removed(self, key):
        del self.entries[key]

    def evicted(self, key):
        del self.entries[key]

    def order(self, entry) -> Any:
        raise NotImplementedError

    def victim(self):
        free = [
            (self.order(entry), key) for key, entry in self.entries.items() if not entry["held"]
        ]
        return min(free)[1] if free else None


class FIFO(Model):
    def order(self, entry):
        return entry["born"]


class LRU(Model):
    def order(self, entry):
        return entry["last"]


class LFU(Model):
    aging = True

    def value(self, entry):
        return 1

    def used(self, entry):
        super().used(entry)
        entry["rank"] = entry["uses"] * self.value(entry) + self.floor

    def evicted(self, key):
        if self.aging:
            self.floor = max(self.floor, self.entries[key]["rank"])
        super().evicted(key)

    def order(self, entry):
        return entry["rank"], entry["last"]


class NoAging(LFU):
    aging = False


class CostAware(LFU):
    def update(self, key, size, cost):
        super().update(key, size, cost)
        self.used(self.entries[key])

    def value(self, entry):
        return entry["cost"] / entry["size"]


class SLRU(Model):
    share = 0.5

    def add(self, key, size, cost):
        super().add(key, size, cost)
        self.entries[key]["again"] = False

    def touch(self, key):
        entry = self.entries[key]
        entry["again"] = True
        super().touch(key)
        self.balance()

    def release(self, key):
        super().release(key)
        self.balance()

    def update(self, key, size, cost):
        super().update(key, size, cost)
        self.balance()

    def balance(self):
        while True:
            again = [e for e in self.entries.values() if e["again"]]
            free = [e for e in again if not e["held"]]
            if sum(e["size"] for e in again) <= self.share * self.capacity or not free:
                return
            oldest = min(free, key=lambda e: e["last"])
            oldest["again"] = False
            self.used(oldest)

    def order(self, entry):
        return entry["again"], entry["last"]


class ARC(Model):
    """With the ghosts as two lists of (key, size), the oldest first."""

    def __init__(self, capacity):
        super().__init__(capacity)
        self.ghosts: list[list[tuple[Any, float]]] = [[], []]
        self.p = 0.0
        self.learnt: list[Any] = []
        self.expected_again = False

    def size_of(self, again):
        return sum(e["size"] for e in self.entries.values() if e["again"] == again)

    def ghost(self, key):
        for line in (0, 1):
            for name, size in self.ghosts[line]:
                if name == key:
                    return line, size
        return None, 0

    def expect(self, key):
        line, size = self.ghost(key)
        self.expected_again = line == 1
        if line is None or key in self.learnt:
            return
        self.learnt.append(key)
        b1, b2 = (sum(size for _, size in ghosts) for ghosts in self.ghosts)
        if line == 0:
            self.p = min(self.capacity, self.p + size * max(1, b2 / b1))
        else:
            self.p = max(0, self.p - size * max(1, b1 / b2))

    def add(self, key, size, cost):
        self.expect(key)
        self.expected_again = False
        line, _ = self.ghost(key)
        self.ghosts = [[g for g in ghosts if g[0] != key] for ghosts in self.ghosts]
        self.learnt = [k for k in self.learnt if k != key]
        super().add(key, size, cost)
        self.entries[key]["again"] = line is not None
        self.trim()

    def trim(self):
        def total():
            return sum(size for ghosts in self.ghosts for _, size in ghosts) + sum(
                e["size"] for e in self.entries.values()
            )

        while (
            self.ghosts[0]
            and self.size_of(False) + sum(s for _, s in self.ghosts[0]) > self.capacity
        ):
            self.forget(0)
        while self.ghosts[1] and total() > 2 * self.capacity:
            self.forget(1)

    def forget(self, line):
        key, _ = self.ghosts[line].pop(0)
        self.learnt = [k for k in self.learnt if k != key]

    def touch(self, key):
        self.entries[key]["again"] = True
        super().touch(key)

    def evicted(self, key):
        entry = self.entries[key]
        self.ghosts[entry["again"]].append((key, entry["size"]))
        super().evicted(key)

    def victim(self):
        t1 = self.size_of(False)
        once_first = t1 > self.p or (self.expected_again and t1 == self.p)
        free = {k: e for k, e in self.entries.items() if not e["held"]}
        return min(
            free, key=lambda k: (free[k]["again"] == once_first, free[k]["last"]), default=None
        )


def paper_arc(trace: list[Any], c: int) -> list[bool]:
    """Figure 4 of Megiddo and Modha (2003), line by line: which requests hit."""
    t1: list[Any] = []
    t2: list[Any] = []
    b1: list[Any] = []
    b2: list[Any] = []
    p = 0.0
    hits = []

    def replace(x):
        if t1 and (len(t1) > p or (x in b2 and len(t1) == p)):
            b1.append(t1.pop(0))
        else:
            b2.append(t2.pop(0))

    for x in trace:
        hits.append(x in t1 or x in t2)
        if x in t1:
            t1.remove(x)
            t2.append(x)
        elif x in t2:
            t2.remove(x)
            t2.append(x)
        elif x in b1:
            p = min(c, p + max(len(b2) / len(b1), 1))
            replace(x)
            b1.remove(x)
            t2.append(x)
        elif x in b2:
            p = max(0, p - max(len(b1) / len(b2), 1))
            replace(x)
            b2.remove(x)
            t2.append(x)
        else:
            if len(t1) + len(b1) == c:
                if len(t1) < c:
                    b1.pop(0)
                    replace(x)
                else:
                    t1.pop(0)
            elif len(t1) + len(b1) < c and len(t1) + len(t2) + len(b1) + len(b2) >= c:
                if len(t1) + len(t2) + len(b1) + len(b2) == 2 * c:
                    b2.pop(0)
                replace(x)
            t1.append(x)
    return hits
