"""What can go wrong, by name. Importable without JAX."""


class JkvError(Exception):
    """Base of the errors that only this library raises."""


class CacheFullError(JkvError, ValueError):
    """A row had no slot left for a new token: the write was dropped and nothing was changed."""


class PoolFullError(JkvError, ValueError):
    """A pool had too few free pages: none was taken."""


class NonFiniteError(JkvError, ValueError):
    """NaN or infinity where only finite numbers mean something.

    In the logits that a token is to be drawn from (those of the model, or what a sampler made of
    them), or in the keys and values for a cache that rounds what it stores. The message names the
    rows, the step, and where to look.
    """


class UnsupportedError(JkvError, ValueError):
    """An operation that this kind of cache, model or device cannot honour."""


class StaleError(JkvError, ValueError):
    """Cached keys and values are those of weights that the model does not have any more."""


class CheckpointError(JkvError, ValueError):
    """A checkpoint, or a cache's file, refused as a whole, with every problem that was found."""


class TierError(JkvError, OSError):
    """A tier of the store could not do what was asked; what it held is as it was."""


class CorruptError(JkvError, ValueError):
    """What a tier holds is not what was written: it was put aside, and is a miss."""


class PerformanceWarning(UserWarning):
    """What was asked for is done, much slower than in another way that the message names."""


__all__ = [
    "CacheFullError",
    "CheckpointError",
    "CorruptError",
    "JkvError",
    "NonFiniteError",
    "PerformanceWarning",
    "PoolFullError",
    "StaleError",
    "TierError",
    "UnsupportedError",
]


def __dir__() -> list[str]:
    return sorted(__all__)
