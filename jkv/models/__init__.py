"""Decoders and how to load them."""

from jkv.models.config import Config, Rope
from jkv.models.decoder import Decoder
from jkv.models.lm import LM, load, outline, read_config
from jkv.models.shard import shard
from jkv.models.tokenizer import Tokenizer

__all__ = [
    "LM",
    "Config",
    "Decoder",
    "Rope",
    "Tokenizer",
    "load",
    "outline",
    "read_config",
    "shard",
]


def __dir__() -> list[str]:
    return sorted(__all__)
