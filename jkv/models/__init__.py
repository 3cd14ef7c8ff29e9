"""Decoders and how to load them."""

from jkv.models.config import Config, Rope
from jkv.models.decoder import Decoder

__all__ = ["Config", "Decoder", "Rope"]
