"""jkv: the key/value cache of autoregressive decoders in JAX.

Names resolve on first use (PEP 562), so that `import jkv.store` and `jkv --help` do not wait for
JAX to start.
"""

import importlib
from typing import TYPE_CHECKING, Any

from jkv._version import __version__ as __version__

if TYPE_CHECKING:  # what type checkers see of the lazy names
    from jkv.cache import Cache as Cache
    from jkv.cache import CacheKind as CacheKind
    from jkv.cache import LayerCache as LayerCache
    from jkv.cache import Step as Step
    from jkv.cache import attention_cache as attention_cache
    from jkv.cache import fp8 as fp8
    from jkv.cache import from_legacy as from_legacy
    from jkv.cache import from_transformers as from_transformers
    from jkv.cache import init_cache as init_cache
    from jkv.cache import load_cache as load_cache
    from jkv.cache import near_far as near_far
    from jkv.cache import scores as scores
    from jkv.cache import sparse as sparse
    from jkv.cache import to_transformers as to_transformers
    from jkv.cache.concat import concat as concat
    from jkv.cache.dense import dense as dense
    from jkv.cache.evicting import evicting as evicting
    from jkv.cache.none import none as none
    from jkv.cache.paged import paged as paged
    from jkv.cache.per_layer import per_layer as per_layer
    from jkv.cache.pyramid import pyramid as pyramid
    from jkv.cache.quantized import quantized as quantized
    from jkv.cache.spec import parse as parse
    from jkv.cache.window import window as window
    from jkv.decoding import Chat as Chat
    from jkv.decoding import Result as Result
    from jkv.decoding import beam_search as beam_search
    from jkv.decoding import decode_step as decode_step
    from jkv.decoding import generate as generate
    from jkv.decoding import load_result as load_result
    from jkv.decoding import prefill as prefill
    from jkv.decoding import prompt_lookup as prompt_lookup
    from jkv.decoding import rollout as rollout
    from jkv.decoding import sampling as sampling
    from jkv.decoding.score import score as score
    from jkv.decoding.stream import stream as stream
    from jkv.engine import Engine as Engine
    from jkv.errors import CacheFullError as CacheFullError
    from jkv.errors import CheckpointError as CheckpointError
    from jkv.errors import JkvError as JkvError
    from jkv.errors import NonFiniteError as NonFiniteError
    from jkv.errors import PerformanceWarning as PerformanceWarning
    from jkv.errors import PoolFullError as PoolFullError
    from jkv.errors import StaleError as StaleError
    from jkv.errors import UnsupportedError as UnsupportedError
    from jkv.models import LM as LM
    from jkv.models import Config as Config
    from jkv.models import Decoder as Decoder
    from jkv.models import Rope as Rope
    from jkv.models import load as load
    from jkv.models.shard import shard as shard
    from jkv.ops.device import about as about
    from jkv.planning.plan import plan as plan

    from . import cache as cache
    from . import decoding as decoding
    from . import engine as engine
    from . import errors as errors
    from . import models as models
    from . import ops as ops
    from . import planning as planning
    from . import store as store
    from . import testing as testing

# A function that a module of its name defines comes from there: in the cycle of imports which the
# block above makes for it, mypy (2.4) takes `from jkv.cache import dense` to be the module.
_HOME = {
    "Cache": "jkv.cache",
    "CacheKind": "jkv.cache",
    "LayerCache": "jkv.cache",
    "Step": "jkv.cache",
    "attention_cache": "jkv.cache",
    "concat": "jkv.cache.concat",
    "dense": "jkv.cache.dense",
    "evicting": "jkv.cache.evicting",
    "fp8": "jkv.cache",
    "from_legacy": "jkv.cache",
    "from_transformers": "jkv.cache",
    "init_cache": "jkv.cache",
    "load_cache": "jkv.cache",
    "near_far": "jkv.cache",
    "none": "jkv.cache.none",
    "paged": "jkv.cache.paged",
    "parse": "jkv.cache.spec",
    "quantized": "jkv.cache.quantized",
    "sparse": "jkv.cache",
    "to_transformers": "jkv.cache",
    "per_layer": "jkv.cache.per_layer",
    "pyramid": "jkv.cache.pyramid",
    "window": "jkv.cache.window",
    "Config": "jkv.models",
    "Decoder": "jkv.models",
    "LM": "jkv.models",
    "Rope": "jkv.models",
    "load": "jkv.models",
    "shard": "jkv.models.shard",
    "Chat": "jkv.decoding",
    "Result": "jkv.decoding",
    "beam_search": "jkv.decoding",
    "decode_step": "jkv.decoding",
    "generate": "jkv.decoding",
    "load_result": "jkv.decoding",
    "prefill": "jkv.decoding",
    "prompt_lookup": "jkv.decoding",
    "rollout": "jkv.decoding",
    "score": "jkv.decoding.score",
    "stream": "jkv.decoding.stream",
    "about": "jkv.ops.device",
    "plan": "jkv.planning.plan",
    "Engine": "jkv.engine",
    "CacheFullError": "jkv.errors",
    "CheckpointError": "jkv.errors",
    "JkvError": "jkv.errors",
    "NonFiniteError": "jkv.errors",
    "PerformanceWarning": "jkv.errors",
    "PoolFullError": "jkv.errors",
    "StaleError": "jkv.errors",
    "UnsupportedError": "jkv.errors",
}
_MODULES = {
    "cache": "jkv.cache",
    "decoding": "jkv.decoding",
    "engine": "jkv.engine",
    "errors": "jkv.errors",
    "models": "jkv.models",
    "ops": "jkv.ops",
    "planning": "jkv.planning",
    "sampling": "jkv.decoding.sampling",
    "scores": "jkv.cache.scores",
    "store": "jkv.store",
    "testing": "jkv.testing",
}

__all__ = ["__version__", *_HOME, *_MODULES]  # pyright: ignore[reportUnsupportedDunderAll]

if not TYPE_CHECKING:  # there, a misspelt name is an error

    def __getattr__(name: str) -> Any:
        if name in _HOME:
            value = getattr(importlib.import_module(_HOME[name]), name)
            globals()[name] = value
            return value
        if name in _MODULES:
            return importlib.import_module(_MODULES[name])
        raise AttributeError(f"module 'jkv' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
