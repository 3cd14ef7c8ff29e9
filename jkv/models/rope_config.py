"""Rotary positions as `config.json` has written them over the years."""

from __future__ import annotations

import math
from typing import Any

from jkv._text import brief
from jkv.models.config import Rope
from jkv.models.settings import Settings

_RULES = ("default", "linear", "llama3", "yarn")


def read_rope(
    s: Settings,
    head_dim: int,
    context: int,
    *,
    partial: float | None = None,
    interleaved: bool = False,
) -> tuple[Rope, int]:
    """Rotary positions from `rope_parameters`, or from `rope_theta` and `rope_scaling`.

    Args:
        s: the keys of `config.json`.
        head_dim: H.
        context: `max_position_embeddings`.
        partial: share of each head that turns by default; None where all of it always does.
        interleaved: how the turning dimensions pair.

    Returns:
        The positions, and the tokens that the model is made for with them.
    """
    theta = s.number("rope_theta", 10000.0, null=10000.0)
    # Read here whatever the rule: those that need no original context mean nothing by it.
    original = s.integer("original_max_position_embeddings", None, null=None)
    inner = _scaling(s)
    dims = _dims(s, inner, head_dim, partial)
    plain = Rope(theta=theta, dims=dims, interleaved=interleaved)
    if inner is None:
        return plain, context
    rule = _rule(inner)
    fields: dict[str, Any] = {
        "theta": inner.number("rope_theta", theta, null=theta),
        "dims": dims,
        "interleaved": interleaved,
        "rule": rule,
    }
    own = inner.integer("original_max_position_embeddings", None, null=None)
    original = own if original is None else original  # in transformers, too, the outer one wins
    if rule in ("llama3", "yarn"):
        fields["original_context"] = original or context
    if rule == "yarn" and original is not None and inner.values.get("factor") is None:
        inner.ignore("factor")
        fields["factor"] = context / original
    elif rule != "default":
        fields["factor"] = inner.number("factor")
    if rule == "llama3":
        low, high = inner.number("low_freq_factor"), inner.number("high_freq_factor")
        if high <= low:
            inner.problem(f"high_freq_factor is {high}; expected more than low_freq_factor, {low}")
        fields |= {"low_freq_factor": low, "high_freq_factor": high}
    if rule == "yarn":
        fields |= _yarn(inner, fields["factor"])
    # Under the other rules nothing scales cosines and sines, and factor 1 scales nothing.
    inner.finish(dict.fromkeys(("factor", "attention_factor", "mscale", "mscale_all_dim"), (1.0,)))
    if rule == "yarn":
        # Model cards turn YaRN on and leave max_position_embeddings as it was trained.
        context = max(context, int(fields["factor"] * fields["original_context"]))
        if context >= 2**31:
            inner.problem(
                f"factor is {fields['factor']}, for {brief(context)} tokens; expected fewer"
            )
    s.broken |= inner.broken
    return (plain if inner.broken else Rope(**fields)), context


def _scaling(s: Settings) -> Settings | None:
    """The object that says how frequencies are scaled, of whichever name."""
    old, new = s.group("rope_scaling"), s.group("rope_parameters")
    if old is not None and new is not None and old.values != new.values:
        s.problem("rope_scaling and rope_parameters differ; expected one of them")
    return old if new is None else new


def _dims(s: Settings, inner: Settings | None, head_dim: int, partial: float | None) -> int:
    """How many dimensions of each head turn."""
    share = s.number("partial_rotary_factor", partial or 1.0, null=partial or 1.0)
    if inner is not None:
        share = inner.number("partial_rotary_factor", share, null=share)
    if partial is None and share != 1.0:
        s.problem(f"partial_rotary_factor is {share}; expected 1 in this family")
    dims = int(head_dim * share)
    if dims < 2 or dims % 2 or dims > head_dim:
        s.problem(
            f"{dims} of each head's {head_dim} dimensions would turn; expected an even number of "
            "at least 2, at most the head's"
        )
        return 2
    return dims


def _rule(inner: Settings) -> Any:
    old, new = inner.raw("type"), inner.raw("rope_type")
    name = old if new is None else new
    name = "default" if name is None else name
    if None not in (old, new) and old != new:
        inner.problem(f"type is {brief(old)} and rope_type {brief(new)}; expected one")
    if name not in _RULES:
        inner.problem(f"rope_type is {brief(name)}; expected one of {', '.join(_RULES)}")
        inner.ignore(*inner.values)  # what else it holds means nothing under another rule
        return "default"
    return name


def _yarn(inner: Settings, factor: float) -> dict[str, Any]:
    """YaRN's own keys; a null stands for the paper's value."""
    inner.ignore("finetuned")
    fast = inner.number("beta_fast", 32.0, null=32.0)
    slow = inner.number("beta_slow", 1.0, null=1.0)
    if fast < slow:
        inner.problem(f"beta_fast is {fast}; expected at least beta_slow, {slow}")
    magnitude = inner.number("attention_factor", None, null=None)
    scale, scale_all = inner.raw("mscale"), inner.raw("mscale_all_dim")
    for name, value in (("mscale", scale), ("mscale_all_dim", scale_all)):
        number = isinstance(value, int | float) and not isinstance(value, bool)
        # False for NaN. A scale below 0 could turn cosines and sines around, or make them 0.
        if value is not None and not (number and 0 <= value < 1e300):
            inner.problem(f"{name} is {brief(value)}; expected a finite number from 0, or null")
            scale = scale_all = None
    if magnitude is None:
        magnitude = _magnitude(factor, 1.0)
        if scale and scale_all:
            magnitude = _magnitude(factor, scale) / _magnitude(factor, scale_all)
    return {
        "beta_fast": fast,
        "beta_slow": slow,
        "magnitude": magnitude,
        "truncate": inner.flag("truncate", True),
    }


def _magnitude(factor: float, scale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0
