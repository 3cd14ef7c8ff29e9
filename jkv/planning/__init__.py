"""Bytes and operations of a model and its cache, before anything is allocated."""

from jkv.planning.plan import Plan, Refusal, plan, survey
from jkv.planning.presets import PRESETS
from jkv.planning.work import Work

__all__ = ["PRESETS", "Plan", "Refusal", "Work", "plan", "survey"]


def __dir__() -> list[str]:
    return sorted(__all__)
