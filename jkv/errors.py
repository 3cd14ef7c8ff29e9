"""What can go wrong, by name. Importable without JAX."""


class JkvError(Exception):
    """Base of the errors that only this library raises."""


class CacheFullError(JkvError, ValueError):
    """A row had no slot left for a new token: the write was dropped and nothing was changed."""


class NonFiniteError(JkvError, ValueError):
    """NaN or infinity was given to a cache that rounds what it stores."""


class UnsupportedError(JkvError, ValueError):
    """An operation that this kind of cache, model or device cannot honour."""


class CheckpointError(JkvError, ValueError):
    """A checkpoint refused as a whole; the message lists every problem that was found."""
