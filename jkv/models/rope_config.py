"""The reader of rotary position settings in a `config.json`, in all of their formats."""

from __future__ import annotations

import math
from typing import Any

from jkv._text import brief
from jkv.models.config import Rope, RopeRule
from jkv.models.hf_config import HFConfig

_RULES = ("default", "linear", "llama3", "yarn")


def read_rope(
    s: HFConfig,
    head_dim: int,
    context: int,
    *,
    partial: float | None = None,
    interleaved: bool = False,
) -> tuple[Rope, int]:
    """Read rotary positions from `rope_parameters`, or from `rope_theta` and `rope_scaling`.

    Args:
        s: the keys of `config.json`.
        head_dim: H.
        context: `max_position_embeddings`.
        partial: default share of each head that is rotated; None where all of it always is.
        interleaved: how the rotated dimensions are paired.

    Returns:
        The settings, and the context length with them.
    """
    theta = s.number("rope_theta", 10000.0, null=10000.0)
    # Read for every rule: the key is irrelevant to rules that need no original context.
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
    original = own if original is None else original  # the outer one wins in transformers too
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
    # The other rules do not scale cosines and sines, and a factor of 1 changes nothing.
    inner.finish(dict.fromkeys(("factor", "attention_factor", "mscale", "mscale_all_dim"), (1.0,)))
    if rule == "yarn":
        # Model cards enable YaRN and leave max_position_embeddings at its trained value.
        context = max(context, int(fields["factor"] * fields["original_context"]))
        if context >= 2**31:
            inner.problem(
                f"factor is {fields['factor']}, for {brief(context)} tokens; expected fewer"
            )
    s.broken |= inner.broken
    return (plain if inner.broken else Rope(**fields)), context


def _scaling(s: HFConfig) -> HFConfig | None:
    """Return the object with the scaling of frequencies, under either name."""
    old, new = s.group("rope_scaling"), s.group("rope_parameters")
    if old is not None and new is not None and old.values != new.values:
        s.problem("rope_scaling and rope_parameters differ; expected one of them")
    return old if new is None else new


def _dims(s: HFConfig, inner: HFConfig | None, head_dim: int, partial: float | None) -> int:
    """Return how many dimensions of each head are rotated."""
    share = s.number("partial_rotary_factor", partial or 1.0, null=partial or 1.0)
    if inner is not None:
        share = inner.number("partial_rotary_factor", share, null=share)
    if partial is None and share != 1.0:
        s.problem(f"partial_rotary_factor is {share}; expected 1 in this family")
    dims = int(head_dim * share)
    if dims < 2 or dims % 2 or dims > head_dim:
        s.problem(
            f"{dims} of each head's {head_dim} dimensions would be rotated; expected an even "
            "number of at least 2, at most the head's"
        )
        return 2
    return dims


def _rule(inner: HFConfig) -> RopeRule:
    old, new = inner.raw("type"), inner.raw("rope_type")
    name = old if new is None else new
    name = "default" if name is None else name
    if None not in (old, new) and old != new:
        inner.problem(f"type is {brief(old)} and rope_type {brief(new)}; expected one")
    if name not in _RULES:
        inner.problem(f"rope_type is {brief(name)}; expected one of {', '.join(_RULES)}")
        inner.ignore(*inner.values)  # its other keys mean nothing under another rule
        return "default"
    return name


def _yarn(inner: HFConfig, factor: float) -> dict[str, Any]:
    """Read the keys of YaRN; null means the value of the paper."""
    inner.ignore("finetuned")
    fast = inner.number("beta_fast", 32.0, null=32.0)
    slow = inner.number("beta_slow", 1.0, null=1.0)
    if fast < slow:
        inner.problem(f"beta_fast is {fast}; expected at least beta_slow, {slow}")
    magnitude = inner.number("attention_factor", None, null=None)
    scale, scale_all = inner.raw("mscale"), inner.raw("mscale_all_dim")
    for name, value in (("mscale", scale), ("mscale_all_dim", scale_all)):
        number = isinstance(value, int | float) and not isinstance(value, bool)
        # False for NaN. A scale below 0 could negate cosines and sines, or make them 0.
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
