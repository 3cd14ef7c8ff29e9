"""From logits to text: the compiled decode loop, sampling, streaming and chat."""

from jkv.decoding import sampling
from jkv.decoding.loop import Rollout, decode_step, prefill, rollout
from jkv.decoding.run import Result, generate

__all__ = ["Result", "Rollout", "decode_step", "generate", "prefill", "rollout", "sampling"]
