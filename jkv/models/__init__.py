"""Decoders and how to load them."""

from jkv.models.config import Config, Rope
from jkv.models.decoder import Decoder
from jkv.models.lm import LM, load
from jkv.models.tokenizer import Tokenizer

__all__ = ["LM", "Config", "Decoder", "Rope", "Tokenizer", "load"]
