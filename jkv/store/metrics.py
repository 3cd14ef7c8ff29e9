"""What a store did, in figures: a dictionary, a table, Prometheus' text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from jkv.store.index import Index
from jkv.store.tiering import Tiering

if TYPE_CHECKING:
    from rich.table import Table

REASONS = ("absent", "expired", "foreign", "declined", "error")
FATES = ("replaced", "removed", "expired", "evicted", "rejected", "lost")
_TIER = (
    *("writes", "found", "evictions", "gone", "demotions", "demotions_by_caller"),
    *("promotions", "promotions_dropped", "rejected", "refused", "unconverted"),
    *("errors", "corrupt", "bytes_read", "bytes_written"),
)


def collect(index: Index, tiering: Tiering, now: int | float) -> dict[str, Any]:
    """Return all figures of a store, whose lock the caller has.

    Keys: `entries`, `bytes` (in all tiers); `accesses`, `hits`, `misses`, `hit_rate`,
    `misses_by_reason`; `tokens_asked` and `tokens_found` of `longest_prefix`; `puts`, `found` and
    what became of them (`replaced`, `removed`, `expired`, `evicted`, `rejected`, `lost`);
    `bytes_read`, `bytes_written`; `seconds_saved` (what hits took to make), `seconds_reading`;
    `tiers` and `tenants`, each with its own. Of a tier `accesses` are those that no tier above it
    served, `rejected` entries larger than it, `refused` those for which nothing could go.
    """
    waiting = index.counts["hits"] + index.counts["misses"]
    tiers = {}
    for state, worker in zip(index.tiers, tiering.workers, strict=True):
        hits = state.counts["hits"]
        rate = state.rate(now)
        tiers[state.name] = {
            "entries": len(state.evictor),
            "bytes": state.bytes,
            "limit_bytes": state.max_bytes,
            "limit_entries": state.max_entries,
            "accesses": waiting,
            "hits": hits,
            "misses": waiting - hits,
            "hit_rate": hits / waiting if waiting else 0.0,
            **{what: state.counts[what] for what in _TIER},
            "bytes_per_second": rate,
            "rubbish": len(state.orphans),
            "queue": len(worker),
            "queue_bytes": worker.nbytes,
            "form": state.form,
        }
        waiting -= hits
    tenants = {
        name: {
            "entries": tenant.entries,
            "bytes": tenant.bytes,
            "limit_bytes": tenant.max_bytes,
            **_served(tenant.counts),
        }
        for name, tenant in index.tenants.items()
    }
    return {
        "entries": len(index.records),
        "bytes": sum(state.bytes for state in index.tiers),
        **_served(index.counts),
        "bytes_read": sum(state.counts["bytes_read"] for state in index.tiers),
        "bytes_written": sum(state.counts["bytes_written"] for state in index.tiers),
        "evictions": index.counts["evicted"],
        "seconds_reading": float(index.counts["seconds_reading"]),
        "tiers": tiers,
        "tenants": tenants,
    }


def _served(counts: Counter[str]) -> dict[str, Any]:
    accesses = counts["hits"] + counts["misses"]
    return {
        "accesses": accesses,
        "hits": counts["hits"],
        "misses": counts["misses"],
        "hit_rate": counts["hits"] / accesses if accesses else 0.0,
        "misses_by_reason": {why: counts[f"misses_{why}"] for why in REASONS},
        "tokens_asked": counts["tokens_asked"],
        "tokens_found": counts["tokens_found"],
        "puts": counts["puts"],
        "found": counts["found"],
        **{fate: counts[fate] for fate in FATES},
        "seconds_saved": float(counts["seconds_saved"]),
    }


def by_entry(index: Index) -> list[dict[str, Any]]:
    """Return figures by entry; times are seconds since the epoch, `age` those since the put."""
    now = index.clock()
    return [
        {
            "key": record.key,
            "tenant": record.tenant,
            "bytes": record.nbytes,
            "tokens": None if record.tokens is None else len(record.tokens),
            "hits": record.hits,
            "created": record.created,
            "updated": record.updated,
            "last_access": record.accessed,
            "age": now - record.updated,
            "expires": record.expires,
            "seconds": record.seconds,
            "pinned": record.pinned,
            "tiers": [index.tiers[at].name for at in sorted(record.locations)],
        }
        for record in index.records.values()
    ]


def size_text(count: int | None) -> str:
    """Return bytes for people."""
    if count is None:
        return "no limit"
    size, unit = float(count), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if size < 1024 or unit == "TiB":
            break
        size /= 1024
    return f"{size:.4g} {unit}"


def report(figures: dict[str, Any]) -> Table:
    """Return a `rich` table of what `collect` gave."""
    from rich.table import Table

    table = Table(title="store", title_justify="left")
    table.add_column("")
    columns = {"all": figures, **figures["tiers"]}
    columns |= {f"tenant {name!r}": f for name, f in figures["tenants"].items() if name}
    for name in columns:
        table.add_column(name, justify="right")

    def row(title: str, key: str, form: Callable[[Any], str] = str) -> None:
        table.add_row(title, *[form(f[key]) if key in f else "" for f in columns.values()])

    row("entries", "entries")
    row("size", "bytes", size_text)
    row("limit", "limit_bytes", size_text)
    for key in ("accesses", "hits", "misses"):
        row(key, key)
    row("hit rate", "hit_rate", lambda share: f"{share:.1%}")
    for key in ("puts", "evictions", "evicted", "expired", "rejected", "lost", "errors", "corrupt"):
        row(key, key)
    row("read", "bytes_read", size_text)
    row("written", "bytes_written", size_text)
    row("seconds saved", "seconds_saved", lambda seconds: f"{seconds:.3g}")
    return table


_HELP = {
    "entries": ("gauge", "Entries."),
    "bytes": ("gauge", "Bytes in all tiers."),
    "hits": ("counter", "Accesses that were served."),
    "misses": ("counter", "Accesses that were not."),
    "tokens_asked": ("counter", "Tokens of prompts looked for."),
    "tokens_found": ("counter", "Tokens of prompts found."),
    "puts": ("counter", "Puts."),
    "found": ("counter", "Entries of other processes, or from before."),
    "bytes_read": ("counter", "Bytes read from tiers."),
    "bytes_written": ("counter", "Bytes written to tiers."),
    "seconds_saved": ("counter", "Seconds that hits had taken to make."),
    "seconds_reading": ("counter", "Seconds spent reading."),
}


def prometheus(figures: dict[str, Any], prefix: str = "jkv_store") -> str:
    """Return what `collect` gave, in Prometheus' text format."""
    lines: list[str] = []

    def family(name: str, kind: str, text: str, samples: list[tuple[str, int | float]]) -> None:
        full = f"{prefix}_{name}" + ("_total" if kind == "counter" else "")
        lines.extend([f"# HELP {full} {text}", f"# TYPE {full} {kind}"])
        lines.extend(f"{full}{labels} {float(value):.17g}" for labels, value in samples)

    def labelled(label: str, values: Mapping[str, int | float]) -> list[tuple[str, int | float]]:
        return [(f'{{{label}="{_escaped(name)}"}}', value) for name, value in values.items()]

    for name, (kind, text) in _HELP.items():
        family(name, kind, text, [("", figures[name])])
    fates = {fate: figures[fate] for fate in FATES}
    family("gone", "counter", "Entries that are not there any more.", labelled("why", fates))
    reasons = figures["misses_by_reason"]
    family("misses_by_reason", "counter", "Why accesses missed.", labelled("why", reasons))
    for label, each in (("tier", figures["tiers"]), ("tenant", figures["tenants"])):
        for name, kind in (("entries", "gauge"), ("bytes", "gauge"), ("hits", "counter")):
            values = {owner: f[name] for owner, f in each.items()}
            family(f"{label}_{name}", kind, f"The same by {label}.", labelled(label, values))
    for name in ("writes", "evictions", "errors", "corrupt", "bytes_read", "bytes_written"):
        values = {owner: f[name] for owner, f in figures["tiers"].items()}
        family(f"tier_{name}", "counter", f"{name} of a tier.", labelled("tier", values))
    return "\n".join(lines) + "\n"


def _escaped(label: str) -> str:
    return label.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
