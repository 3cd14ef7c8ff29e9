"""`plan`: what a model and its cache will take, before anything is allocated."""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import os
from collections.abc import Sequence
from typing import Any, overload

from jax.typing import DTypeLike

from jkv import _pytree
from jkv._bytes import parse_bytes
from jkv._checks import check_integer
from jkv._text import brief
from jkv.cache import spec
from jkv.cache.dense import dense
from jkv.cache.protocol import CacheKind
from jkv.decoding.arguments import CacheLike
from jkv.decoding.options import Options, resolve_kind
from jkv.errors import CheckpointError, UnsupportedError
from jkv.models.config import Config
from jkv.models.decoder import Decoder
from jkv.models.hf_keys import check_ignore
from jkv.models.lm import LM, read_config
from jkv.planning import memory
from jkv.planning.presets import PRESETS, preset
from jkv.planning.report import report
from jkv.planning.work import Work, work

_LEAST_MEMORY = 1000**2  # fewer bytes are a number of GB whose unit was forgotten
ModelLike = str | os.PathLike[str] | Config | LM | Decoder


@dataclasses.dataclass(frozen=True)
class Plan:
    """Bytes, operations, and what fits.

    `print` shows it as a table; for JSON take `to_dict()`, as in ``json.dumps(plan.to_dict())``.

    Attributes:
        model: name.
        cache: the kind, as text.
        dtype: of weights, activations, and keys and values before a kind encodes them.
        batch: B, rows.
        seq_len: S, tokens in each row.
        context: tokens that the model was made for.
        past_context: whether S is more than that: what a model says there may make little sense.
        parameters: numbers in the weights.
        bytes_per_token: of cache, that one more token takes in one row of S: the average over the
            next 1024. 0 where the cache has stopped growing.
        kept_tokens: of a row, however long, on average over the layers; None where all are kept. A
            kind that keeps so many has room for them from the start, in shorter rows too.
        cache_bytes: what `jkv.init_cache(config, kind, batch=B, slots=S).nbytes` says. Unless given
            `slots`, `jkv.generate` makes a cache of the next size for which it has a program: at
            most a quarter of a large one more. A cache that grows is there twice while it does.
        weight_bytes: of all weights.
        activation_bytes: about what the largest pass needs beside them: a chunk of the prompt,
            256 tokens of each row; without a cache all S. See `jkv.planning.memory.activations`.
        total_bytes: the sum of these three. What a runtime takes for itself comes on top.
        device_memory: bytes there are, or None.
        fits: whether the total is at most that.
        max_seq_len: tokens that each of B rows can have, whatever the model's context; 0 where not
            one fits, None without a `device_memory`, and where nothing grows with the rows.
        max_batch: rows of S tokens, 0 where not one fits, None without a `device_memory`.
        step: the S-th token of each row, with this cache.
        step_without: the same without a cache: all S tokens go through the model once more.
        prompt: S tokens into an empty cache, in chunks.

    Example:
        >>> plan = jkv.plan("llama-3-8b", seq_len=8192, cache="int4", device_memory="24GB")
        >>> plan.fits, plan.to_dict()["batch"]
        (True, 1)
    """

    model: str
    cache: str
    dtype: str
    batch: int
    seq_len: int
    context: int
    past_context: bool
    parameters: int
    bytes_per_token: int | float
    kept_tokens: int | None
    cache_bytes: int
    weight_bytes: int
    activation_bytes: int
    total_bytes: int
    device_memory: int | None
    fits: bool | None
    max_seq_len: int | None
    max_batch: int | None
    step: Work
    step_without: Work
    prompt: Work

    def __str__(self) -> str:
        """Write all that there is to say, as `jkv plan` does."""
        return report(self)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {k: v.to_dict() if isinstance(v, Work) else v for k, v in values.items()}


@dataclasses.dataclass(frozen=True)
class Refusal:
    """A kind that a model cannot have.

    Attributes:
        cache: its text.
        why: in words.

    Example:
        >>> every = jkv.planning.survey("gpt2")
        >>> [one.cache for one in every if isinstance(one, jkv.planning.Refusal)]
        ['window:1020,sinks=4']
    """

    cache: str
    why: str

    def to_dict(self) -> dict[str, str]:
        """Return plain values, for JSON."""
        return {"cache": self.cache, "refused": self.why}


@overload
def plan(
    model: ModelLike,
    *,
    batch: int = 1,
    seq_len: int | None = None,
    cache: CacheLike | None = None,
    dtype: DTypeLike | None = None,
    device_memory: int | str | None = None,
    ignore: Sequence[str] = (),
) -> Plan: ...
@overload
def plan(
    model: ModelLike,
    *,
    batch: int = 1,
    seq_len: int | None = None,
    cache: Sequence[CacheLike],
    dtype: DTypeLike | None = None,
    device_memory: int | str | None = None,
    ignore: Sequence[str] = (),
) -> list[Plan]: ...
def plan(
    model: ModelLike,
    *,
    batch: int = 1,
    seq_len: int | None = None,
    cache: CacheLike | Sequence[CacheLike] | None = None,
    dtype: DTypeLike | None = None,
    device_memory: int | str | None = None,
    ignore: Sequence[str] = (),
) -> Plan | list[Plan]:
    """Plan the bytes and operations that a model and its cache take; nothing is allocated.

    Args:
        model: the name of a preset ("llama-2-7b"), what `jkv.load` takes, of which only
            `config.json` is read, a `Config`, or what has one, as a loaded model.
        batch: rows.
        seq_len: tokens in each, the model's context by default.
        cache: a kind, or its text as on the command line ("int4:residual=64"); dense by default. A
            list of them gives a list.
        dtype: of the weights and of what is kept, by default the model's own.
        device_memory: "80GB", "24GiB", or bytes, of which a device has more than a million: how
            long and how many rows would fit?
        ignore: keys of `config.json` to treat as absent, as of `jkv.load`.

    Returns:
        A `Plan`, or a list of them. `print` shows one as a table; `to_dict()` gives plain values,
        as for `json.dumps`.

    Raises:
        CheckpointError: no preset, and nothing that can be read.
        UnsupportedError: a kind that this model cannot have.
        TypeError: something that is no model or kind.
        ValueError: numbers below 1, a memory below 1 MB, a text that names no kind, or keys to
            ignore where there is no `config.json`.

    Example:
        >>> jkv.plan("llama-2-7b", seq_len=4096).bytes_per_token
        524288
    """
    name, config = find_config(model, dtype, ignore)
    batch = check_integer("batch", batch, 1, memory.LONGEST, of="plan")
    if seq_len is None:
        seq_len = config.context
    seq_len = check_integer("seq_len", seq_len, 1, memory.LONGEST, of="plan")
    if config.rope is None and seq_len > config.context:
        raise ValueError(
            f"plan got seq_len={seq_len}; expected at most {config.context}, since {name} has a "
            "table of as many positions"
        )
    there = None if device_memory is None else parse_bytes(device_memory, least=_LEAST_MEMORY)
    if isinstance(cache, list | tuple):
        return [_plan(name, config, batch, seq_len, each, there) for each in cache]
    return _plan(name, config, batch, seq_len, cache, there)  # pyright: ignore[reportArgumentType]


def survey(
    model: ModelLike,
    *,
    batch: int = 1,
    seq_len: int | None = None,
    dtype: DTypeLike | None = None,
    device_memory: int | str | None = None,
    ignore: Sequence[str] = (),
) -> list[Plan | Refusal]:
    """Plan every kind of cache, or say why the model cannot have it.

    Args:
        model: see `plan`.
        batch: see `plan`.
        seq_len: see `plan`.
        dtype: see `plan`.
        device_memory: see `plan`.
        ignore: see `plan`.

    Raises:
        CheckpointError: no preset, and nothing that can be read.
        ValueError: numbers below 1, a memory below 1 MB, a text that names no kind, or keys to
            ignore where there is no `config.json`.

    Example:
        >>> plans = jkv.planning.survey("gpt2", seq_len=1024)
        >>> plans[0].cache, plans[0].cache_bytes
        ('dense', 75497477)
    """
    name, config = find_config(model, dtype, ignore)
    made: list[Plan | Refusal] = []
    for text in spec.examples():
        try:
            one = plan(
                config, batch=batch, seq_len=seq_len, cache=text, device_memory=device_memory
            )
            made.append(dataclasses.replace(one, model=name))
        except UnsupportedError as error:
            made.append(Refusal(text, str(error)))
    return made


def find_config(
    model: ModelLike, dtype: DTypeLike | None = None, ignore: Sequence[str] = ()
) -> tuple[str, Config]:
    """Find the name and configuration of a model; see `plan`."""
    keys, is_read = check_ignore(ignore), False
    if isinstance(model, str) and (known := preset(model)) is not None:
        name, config = next(n for n, c in PRESETS.items() if c is known), known
    elif isinstance(model, str | os.PathLike):
        name, config, is_read = os.fspath(model), _read(model, keys), True
    else:
        config = model if isinstance(model, Config) else getattr(model, "config", None)
        if not isinstance(config, Config):
            raise TypeError(
                f"plan got a {type(model).__name__}; expected the name of a preset, a checkpoint, "
                "or a jkv.Config"
            )
        name = getattr(model, "source", config.family)
    if keys and not is_read:
        raise ValueError(
            f"plan got ignore={brief(keys)} with {brief(name)}; expected it with a checkpoint, "
            "whose config.json has keys: leave it out"
        )
    if dtype is not None or not config.dtype:
        config = dataclasses.replace(config, dtype=_dtype(dtype or "float32"))
    return name, config


def _read(model: str | os.PathLike[str], ignore: tuple[str, ...]) -> Config:
    """Read the configuration of what is no preset; where there is none, name the preset meant."""
    try:
        return read_config(model, ignore=ignore)
    except CheckpointError as error:
        near = []
        if isinstance(model, str) and not os.path.exists(model):
            near = difflib.get_close_matches(model[:80].lower(), PRESETS, 1, 0.75)
        if not near:
            raise
        raise CheckpointError(f"did you mean the preset {near[0]!r}? {error}") from error


def _plan(
    name: str, config: Config, batch: int, seq_len: int, cache: CacheLike | None, there: int | None
) -> Plan:
    kind = dense() if cache is None else resolve_kind(cache)
    parameters, weight_bytes = memory.weights(config)
    shape = memory.cache_shape(config, kind, batch, seq_len)
    size = memory.cache_sizer(config, kind)
    whole = kind.recomputes  # keeps tokens only, and all of them go through each pass

    def activations(batch: int, length: int) -> int:
        new = length if whole else min(length, Options.prefill_chunk)
        together = memory.looked_at_together(config, kind, length, new)
        return memory.activations(config, batch, new, together)

    def fits(batch: int, length: int) -> bool:
        return weight_bytes + size(batch, length) + activations(batch, length) <= (there or 0)

    cache_bytes, needed = _pytree.nbytes(shape), activations(batch, seq_len)
    longest = memory.LONGEST if config.rope is not None else config.context
    max_seq_len = max_batch = None
    if there is not None:
        max_seq_len = memory.most(lambda length: fits(batch, length), longest)
        max_seq_len = None if max_seq_len == memory.LONGEST else max_seq_len
        max_batch = memory.most(lambda rows: fits(rows, seq_len), memory.LONGEST)
    total = cache_bytes + weight_bytes + needed
    step, prompt = _works(config, kind, batch, seq_len)
    return Plan(
        model=name,
        cache=cache if isinstance(cache, str) else spec.text(kind),
        dtype=config.dtype,
        batch=batch,
        seq_len=seq_len,
        context=config.context,
        past_context=seq_len > config.context,
        parameters=parameters,
        bytes_per_token=memory.bytes_per_token(config, kind, seq_len),
        kept_tokens=None if whole else _kept_tokens(config, kind, batch, seq_len),
        cache_bytes=cache_bytes,
        weight_bytes=weight_bytes,
        activation_bytes=needed,
        total_bytes=total,
        device_memory=there,
        fits=None if there is None else total <= there,
        max_seq_len=max_seq_len,
        max_batch=max_batch,
        step=step,
        step_without=without_cache(config, batch, seq_len, 1),
        prompt=prompt,
    )


def _kept_tokens(config: Config, kind: CacheKind, batch: int, length: int) -> int | None:
    """Return the tokens of a row that layers keep on average, None where one keeps all."""
    total = 0
    for layers in memory.distinct(config, kind):
        retained = layers.shape(config, batch, length).retained
        if retained is None:
            return None
        total += layers.count * retained
    return round(total / config.layers)


@dataclasses.dataclass(frozen=True)
class _Kept:
    """What layers of one kind hold of B rows of S tokens."""

    layers: tuple[int, ...]
    slots: int  # that the bytes are for
    nbytes: int  # of one layer


def kept(config: Config, kind: CacheKind, batch: int, length: int) -> list[_Kept]:
    """Return what each kind of layer stores of rows of `length` tokens."""
    found: list[_Kept] = []
    for layers in memory.distinct(config, kind):
        shape = layers.shape(config, batch, length)
        slots = shape.retained or length
        found.append(_Kept(layers.numbers, slots, _pytree.nbytes(shape)))
    return found


@dataclasses.dataclass(frozen=True)
class _Passes:
    """Passes of T new tokens per row, after which rows have `first`, first + T, ... of them."""

    new: int
    first: int
    count: int

    def sum_up_to(self, most: int) -> int:
        """Sum the rows' lengths after each pass, none counted for more than `most`."""
        below = min(max((most - self.first) // self.new + 1, 0), self.count)
        return (
            below * self.first + self.new * below * (below - 1) // 2 + (self.count - below) * most
        )


def with_cache(
    config: Config, kind: CacheKind, batch: int, length: int, passes: list[_Passes]
) -> Work:
    """Count the work of passes with a cache for rows of `length` tokens.

    A cache is read as far as a query looks: a layer's own window, or all that the kind keeps.
    """
    looks = read = written = 0
    for each in passes:
        read += each.count * memory.weights_read(config, batch * each.new)
    for layers in memory.distinct(config, kind):
        shape = layers.shape(config, batch, length)
        nbytes, slots = _pytree.nbytes(shape), shape.retained or length
        for each, i in itertools.product(passes, layers.numbers):
            # Tokens of one chunk see each other before any is let go of.
            most = min(slots, config.window(i) or length) + each.new - 1
            looks += each.new * each.sum_up_to(most)
            read += nbytes * each.sum_up_to(min(most, slots)) // slots
            written += each.count * nbytes * min(each.new, slots) // slots
    return work(
        config,
        batch,
        sum(each.count * each.new for each in passes),
        looks,
        widest=max(each.new for each in passes),
        read=read,
        written=written,
    )


def without_cache(config: Config, batch: int, length: int, new: int) -> Work:
    """Count the work of a pass over all tokens, of which the last `new` are new."""
    return work(
        config,
        batch,
        length,
        config.layers * length**2,
        widest=length,
        read=memory.weights_read(config, batch * length) + 4 * batch * length,
        written=4 * batch * new,
    )


def _works(config: Config, kind: CacheKind, batch: int, length: int) -> tuple[Work, ...]:
    """Count the work of the last of `length` tokens, and of all into an empty cache."""
    if kind.recomputes:
        return tuple(without_cache(config, batch, length, new) for new in (1, length))
    size = min(Options.prefill_chunk, length)
    chunks = [_Passes(size, first=size, count=length // size)]
    if length % size:
        chunks.append(_Passes(length % size, first=length, count=1))
    return tuple(
        with_cache(config, kind, batch, length, passes)
        for passes in ([_Passes(1, first=length, count=1)], chunks)
    )


def _dtype(dtype: DTypeLike) -> str:
    from jkv.models.lm import dtype_name

    return dtype_name(dtype)
