"""Counters and latencies of an engine."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from jkv.engine.request import RUNNING, WAITING, Request

LATEST = 10_000  # latencies, from which percentiles are taken


@dataclasses.dataclass(frozen=True)
class FinishedCounts:
    """Counts of the requests that have ended: one value, so that each is counted once."""

    number: int = 0  # of the request that was counted last
    tokens: int = 0
    reasons: Mapping[str, int] = dataclasses.field(
        default_factory=lambda: dict.fromkeys(("stop", "length", "cancelled", "error"), 0)
    )


class Stats:
    """Counters of one engine; see `as_dict`."""

    def __init__(self) -> None:
        self.counts: collections.Counter[str] = collections.Counter()
        self.finished = FinishedCounts()
        self.first: collections.deque[float] = collections.deque(maxlen=LATEST)
        self.between: collections.deque[tuple[float, int]] = collections.deque(maxlen=LATEST)
        self.busy_seconds = 0.0
        self.host_seconds = 0.0
        self.prefill_seconds = 0.0
        self._last: float | None = None  # when tokens were last read
        self.slots_held = 0  # summed over the sampled steps, as is the next
        self.slots_filled = 0

    def record_step(self, seconds: float, waited: float, prefilled: int) -> None:
        """Record a step: its seconds, those that it waited for the device, and prompt tokens."""
        self.counts["steps"] += 1
        self.busy_seconds += seconds
        self.host_seconds += seconds - waited
        if prefilled:
            self.counts["prefill_tokens"] += prefilled
            self.prefill_seconds += seconds

    def record_tokens(self, tokens: int, lanes: int, now: float) -> None:
        """Record that so many tokens of so many lanes were read."""
        if self._last is not None:
            self.between.append(((now - self._last) * lanes / tokens, tokens))
        self._last = now

    def record_finished(self, number: int, reason: str, tokens: int) -> None:
        """Record the end of a request; repeated for the same request, it changes nothing."""
        old = self.finished
        if old.number != number:
            reasons = {**old.reasons, reason: old.reasons[reason] + 1}
            self.finished = FinishedCounts(number, old.tokens + tokens, reasons)

    def record_idle(self) -> None:
        """Record that there was nothing to do: the time until the next token is no latency."""
        self._last = None

    def record_slots(self, held: int, filled: int) -> None:
        """Record the slots of the pages that requests hold, and how many of them are filled."""
        self.slots_held += held
        self.slots_filled += filled

    def prefill_rate(self) -> float:
        """Return prompt tokens per second, over all steps that prefilled any."""
        return max(self.counts["prefill_tokens"], 1) / max(self.prefill_seconds, 1e-9)

    def as_dict(self, *, live: list[Request], pool: dict[str, Any]) -> dict[str, Any]:
        """Return all figures.

        Args:
            live: requests that have not been counted as ended.
            pool: figures of the pages.

        Keys: requests `running`, `waiting`, `finished` and by reason; `pages` (in all, `used`, and
        of them `shared`; `cached`, without an owner and to be found again; `free`); `hit_rate`
        (tokens of prompts found, of those asked for); `preemptions` (`recompute`, `swap`);
        `time_to_first_token` and `time_between_tokens` (seconds, `p50` and `p99` of the latest);
        `tokens`, `tokens_per_second` (while there was work); `host_seconds_per_step` (the host's
        own work, waiting for the device left out); `waste` (slots held and not filled, of those
        held, over the steps that were looked at).
        """
        counts, ended = self.counts, self.finished
        states = collections.Counter(request.state for request in live)
        tokens = ended.tokens + sum(len(request.tokens) for request in live)
        swapped = sum(r.swapped.nbytes for r in live if r.swapped is not None)
        asked = counts["asked_tokens"]
        return {
            "running": states[RUNNING],
            "waiting": states[WAITING],
            "finished": sum(ended.reasons.values()),
            "reasons": dict(ended.reasons),
            "pages": {k: pool[k] for k in ("pages", "used", "free", "shared", "cached")},
            "hit_rate": counts["hit_tokens"] / asked if asked else 0.0,
            "hit_tokens": counts["hit_tokens"],
            "asked_tokens": asked,
            "prefill_tokens": counts["prefill_tokens"],
            "preemptions": {k: counts[k] for k in ("recompute", "swap")},
            "time_to_first_token": _percentiles(list(self.first), None),
            "time_between_tokens": _percentiles(
                [s for s, _ in self.between], [n for _, n in self.between]
            ),
            "tokens": tokens,
            "tokens_per_second": tokens / self.busy_seconds if self.busy_seconds else 0.0,
            "steps": counts["steps"],
            "host_seconds_per_step": self.host_seconds / max(counts["steps"], 1),
            "swapped_bytes": swapped,
            "waste": 1 - self.slots_filled / self.slots_held if self.slots_held else 0.0,
        }


def _percentiles(values: list[float], weights: list[int] | None) -> dict[str, float | None]:
    """Return the 50th and 99th, each value counted `weights` times; None without any."""
    if not values:
        return {"p50": None, "p99": None}
    order = np.argsort(values)
    heavy = np.cumsum(np.ones(len(values)) if weights is None else np.asarray(weights)[order])
    at = {p: int(np.searchsorted(heavy, p / 100 * heavy[-1])) for p in (50, 99)}
    return {f"p{p}": float(values[order[min(i, len(values) - 1)]]) for p, i in at.items()}


_HELP = {
    "running": ("gauge", "Requests that run."),
    "waiting": ("gauge", "Requests that wait."),
    "finished": ("counter", "Requests that have ended."),
    "tokens": ("counter", "Tokens generated."),
    "prefill_tokens": ("counter", "Tokens of prompts computed."),
    "hit_tokens": ("counter", "Tokens of prompts found in the cache."),
    "asked_tokens": ("counter", "Tokens of prompts looked for in the cache."),
    "steps": ("counter", "Steps."),
    "swapped_bytes": ("gauge", "Bytes of pages on the host."),
    "waste": ("gauge", "Share of the slots held that is not filled."),
}


def prometheus(figures: dict[str, Any], prefix: str = "jkv_engine") -> str:
    """Format the figures of `Engine.stats` as Prometheus' text."""
    lines: list[str] = []

    def family(name: str, kind: str, text: str, samples: list[tuple[str, Any]]) -> None:
        full = f"{prefix}_{name}" + ("_total" if kind == "counter" else "")
        lines.extend([f"# HELP {full} {text}", f"# TYPE {full} {kind}"])
        lines.extend(f"{full}{labels} {value!r}" for labels, value in samples)

    for name, (kind, text) in _HELP.items():
        family(name, kind, text, [("", figures[name])])
    labelled = (
        ("requests", "counter", "Requests that have ended, by reason.", "reason", "reasons"),
        ("preemptions", "counter", "Requests sent back to wait.", "how", "preemptions"),
    )
    for name, kind, text, label, key in labelled:
        samples = [(f'{{{label}="{k}"}}', v) for k, v in figures[key].items()]
        family(name, kind, text, samples)
    pages = figures["pages"]
    states = [(f'{{state="{k}"}}', pages[k]) for k in ("used", "cached", "free")]
    family("pages", "gauge", "Pages of the pool.", states)
    family("pages_shared", "gauge", "Pages with several owners.", [("", pages["shared"])])
    for name, text in (
        ("time_to_first_token", "Seconds from submission to the first token."),
        ("time_between_tokens", "Seconds from one token to the next."),
    ):
        samples = [
            (f'{{quantile="0.{p[1:]}"}}', v) for p, v in figures[name].items() if v is not None
        ]
        family(f"{name}_seconds", "gauge", text, samples)
    return "\n".join(lines) + "\n"
