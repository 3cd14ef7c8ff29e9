"""What one step of the engine computes, and how much that may be."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from jkv.engine.sequence import RunningSequence, SequenceTable


@dataclasses.dataclass(frozen=True)
class BatchLimits:
    """How much one step may compute.

    Attributes:
        lanes: requests that run at once.
        block: tokens that each lane generates.
        chunk: tokens of prompts.
        rows: prompts.
    """

    lanes: int
    block: int
    chunk: int
    rows: int

    @property
    def shared_chunk(self) -> int:
        """Tokens of each prompt in a step that prefills several."""
        return -(-self.chunk // self.rows)


@dataclasses.dataclass(frozen=True, slots=True)
class Prefill:
    """Tokens `start` to `stop` of a sequence, to be computed in one step."""

    sequence: RunningSequence
    start: int
    stop: int


@dataclasses.dataclass(frozen=True, slots=True)
class Schedule:
    """What one step computes.

    Attributes:
        prefills: pieces of prompts.
        decodes: ``[N]`` lanes that generate, in order.
        running: the sequence in each lane.
        table: the counts of the lanes.
    """

    prefills: list[Prefill]
    decodes: np.ndarray
    running: Sequence[RunningSequence | None]
    table: SequenceTable
