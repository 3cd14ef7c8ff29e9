"""From logits to text: the compiled decode loop, sampling, streaming and chat."""

from jkv.decoding import sampling
from jkv.decoding.arguments import CachedModel
from jkv.decoding.beam import Beams, beam_search
from jkv.decoding.chat import Chat
from jkv.decoding.draft import Draft, prompt_lookup
from jkv.decoding.generation import generate
from jkv.decoding.loop import Rollout, decode_step, prefill, rollout
from jkv.decoding.result import Result
from jkv.decoding.saved import load_result
from jkv.decoding.score import Scores, score
from jkv.decoding.stream import Block, Stream, stream

__all__ = [
    "Beams",
    "Block",
    "CachedModel",
    "Chat",
    "Draft",
    "Result",
    "Rollout",
    "Scores",
    "Stream",
    "beam_search",
    "decode_step",
    "generate",
    "load_result",
    "prefill",
    "prompt_lookup",
    "rollout",
    "sampling",
    "score",
    "stream",
]


def __dir__() -> list[str]:
    return sorted(__all__)
