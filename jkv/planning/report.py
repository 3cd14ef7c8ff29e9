"""A plan for people: what the command prints, and `print(plan)`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jkv._bytes import is_decimal, size
from jkv._tables import columns, operations
from jkv._text import plural

if TYPE_CHECKING:
    from jkv.planning.plan import Plan


def report(plan: Plan) -> str:
    """Write all that there is to say about one plan."""
    decimal = is_decimal(plan.device_memory or 0)
    lines = [heading(plan), f"cache {plan.cache}, {describe_rows(plan)}", *past(plan), ""]
    memory = [
        ("weights", plan.weight_bytes, ""),
        ("cache", plan.cache_bytes, _growth(plan)),
        ("activations", plan.activation_bytes, "about"),
        ("total", plan.total_bytes, ""),
    ]
    lines += columns(
        [
            ("bytes", "", "", ""),
            *((n, f"{b:,}", size(b, decimal=decimal), more) for n, b, more in memory),
        ]
    )
    if plan.device_memory is not None:
        lines += ["", _fit(plan, plan.device_memory)]
    step, without = plan.step, plan.step_without
    rows = [("one more token per row", "with the cache", "without", "")]
    for part in (*step.PARTS, "flops"):
        a, b = getattr(step, part), getattr(without, part)
        rows.append((_NAMES[part], operations(a), operations(b), f"{b / a:,.4g} x" if a else ""))
    for part in ("between_blocks", "read", "written"):
        a, b = getattr(step, part), getattr(without, part)
        rows.append(
            (
                _NAMES[part],
                size(a, decimal=decimal),
                size(b, decimal=decimal),
                f"{b / a:,.4g} x" if a else "",
            )
        )
    lines += ["", *columns(rows)]
    lines += ["", f"the whole prompt into an empty cache: {operations(plan.prompt.flops)}FLOP"]
    return "\n".join(lines)


_NAMES = {
    "projections": "projections, FLOP",
    "scores": "scores, FLOP",
    "values": "values, FLOP",
    "mlp": "feed-forward, FLOP",
    "logits": "logits, FLOP",
    "flops": "all, FLOP",
    "between_blocks": "between blocks [B, T, D]",
    "read": "weights and cache read",
    "written": "cache written",
}


def heading(plan: Plan) -> str:
    """Describe the model in a line."""
    return (
        f"{plan.model}: {plan.parameters:,} parameters in {plan.dtype}, "
        f"made for {plural(plan.context, 'token', commas=True)}"
    )


def past(plan: Plan) -> list[str]:
    """Write that rows are longer than what the model was made for, where they are."""
    if not plan.past_context:
        return []
    return [
        f"past the context: rows of {plural(plan.seq_len, 'token', commas=True)}, of a model that "
        f"was made for {plural(plan.context, 'token', commas=True)}"
    ]


def describe_rows(plan: Plan) -> str:
    """Write how many rows of how many tokens."""
    rows = plural(plan.batch, "row", commas=True)
    return f"{rows} of {plural(plan.seq_len, 'token', commas=True)}"


def _growth(plan: Plan) -> str:
    """Write what a cache takes with each token, or the room that it has from the start."""
    if plan.kept_tokens is None or plan.bytes_per_token:
        return f"{plan.bytes_per_token:,} per token"
    return f"0 per token, room for {plan.kept_tokens:,} from the start"


def _fit(plan: Plan, memory: int) -> str:
    longest = "rows of any length"
    if plan.max_seq_len is not None:
        longest = plural(plan.max_seq_len, "token", commas=True)
    there = size(memory, decimal=is_decimal(memory))
    return (
        f"{there} of memory: {'fits' if plan.fits else 'does not fit'}; "
        f"at most {longest} in each of {plan.batch:,}, or "
        f"{plural(plan.max_batch or 0, 'row', commas=True)} of {plan.seq_len:,}"
    )
