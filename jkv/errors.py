"""What can go wrong, by name. Importable without JAX."""


class JkvError(Exception):
    """Base of the errors that only this library raises.

    Example:
        >>> try:
        ...     jkv.load("./no-such-directory")
        ... except jkv.JkvError as error:
        ...     print(type(error).__name__)
        CheckpointError
    """


class CacheFullError(JkvError, ValueError):
    """A row had no slot left for a new token: the write was dropped and nothing was changed.

    Example:
        >>> cache = jkv.init_cache(lm.config, batch=1, slots=8)
        >>> for _ in range(3):
        ...     logits, cache = jkv.prefill(lm.model, jnp.array([[5, 6, 7]]), cache)
        >>> cache.check()
        Traceback (most recent call last):
            ...
        jkv.errors.CacheFullError: the cache is full: rows [0] had no room for their new tokens...
    """


class PoolFullError(JkvError, ValueError):
    """A pool had too few free pages: none was taken.

    Example:
        >>> jkv.Engine(lm, pages=1).submit("ROMEO:", max_new_tokens=100)
        Traceback (most recent call last):
            ...
        jkv.errors.PoolFullError: a prompt of 2 tokens and max_new_tokens=100 need 7 pages...
    """


class NonFiniteError(JkvError, ValueError):
    """NaN or infinity where only finite numbers mean something.

    In the logits that a token is to be drawn from (those of the model, or what a sampler made of
    them), or in the keys and values for a cache that rounds what it stores. The message names the
    rows, the step, and where to look.

    Example:
        >>> nan = jkv.sampling.chain(lambda logits: logits * jnp.nan, jkv.sampling.greedy())
        >>> jkv.generate(lm, "ROMEO:", max_new_tokens=8, sampler=nan)
        Traceback (most recent call last):
            ...
        jkv.errors.NonFiniteError: a token could not be drawn...
    """


class UnsupportedError(JkvError, ValueError):
    """An operation that this kind of cache, model or device cannot honour.

    Example:
        >>> jkv.init_cache(lm.config, jkv.window(), batch=1, slots=8)
        Traceback (most recent call last):
            ...
        jkv.errors.UnsupportedError: window() takes the model's own windows, and this...
    """


class StaleError(JkvError, ValueError):
    """Cached keys and values are those of weights that the model does not have any more.

    Example:
        >>> other = jkv.load("shakespeare")
        >>> out = jkv.generate(other, "ROMEO:", max_new_tokens=8)
        >>> other.model.embedding[...] = other.model.embedding[...] * 2  # a training step, say
        >>> jkv.generate(other, " Ay", max_new_tokens=8, resume=out)
        Traceback (most recent call last):
            ...
        jkv.errors.StaleError: resume got a result of other weights than the model has now...
    """


class CheckpointError(JkvError, ValueError):
    """A checkpoint, or a cache's file, refused as a whole, with every problem that was found.

    Example:
        >>> jkv.load("./no-such-directory")
        Traceback (most recent call last):
            ...
        jkv.errors.CheckpointError: load got './no-such-directory', which is neither...
    """


class TierError(JkvError, OSError):
    """A tier of the store could not do what was asked; what it held is as it was.

    Example:
        >>> store = jkv.store.Store([jkv.store.Disk("/dev/null/caches")])
        Traceback (most recent call last):
            ...
        jkv.errors.TierError: [Errno 20] no directory for the disk tier: ...
    """


class CorruptError(JkvError, ValueError):
    """What a tier holds is not what was written: it was put aside, and is a miss.

    Example:
        >>> jkv.store.unpack(jkv.store.Entry({}, {"jkv": 0}))
        Traceback (most recent call last):
            ...
        jkv.errors.CorruptError: an entry of version 0; expected a cache of 1
    """


class PerformanceWarning(UserWarning):
    """What was asked for is done, much slower than in another way that the message names.

    Example:
        >>> import warnings
        >>> with warnings.catch_warnings():
        ...     warnings.simplefilter("error", jkv.PerformanceWarning)  # rather fail than crawl
        ...     out = jkv.generate(lm, "ROMEO:", max_new_tokens=8)
    """


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
