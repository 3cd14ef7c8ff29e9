"""A language model: the decoder, its configuration and its tokenizer, from one directory."""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jkv._bytes import parse_bytes
from jkv._fork import check_fork
from jkv._text import brief, plural
from jkv._transfer import transfers
from jkv.errors import UnsupportedError
from jkv.models import checkpoint, diagnose, hub, save
from jkv.models.checkpoint import Progress
from jkv.models.config import Config
from jkv.models.decoder import Decoder
from jkv.models.hf_keys import check_ignore
from jkv.models.slots import outline_model
from jkv.models.tokenizer import Ids, Tokenizer, read_tokenizer

_DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class LM:
    """A model with its configuration and tokenizer, as `jkv.load` returns it.

    Attributes:
        model: ``logits, cache = model(tokens, cache)``.
        config: its shape and mathematics.
        tokenizer: None where the checkpoint has none; ids work without it.
        source: what it was loaded from.
        directory: where that lies; None for a model that was not loaded.
        ignored: keys of its `config.json` that were treated as absent.

    Example:
        >>> lm = jkv.load("shakespeare")
        >>> lm
        LM(llama, 5 layers, 3.9M parameters, float32, context 512)
        >>> lm.decode(lm.encode("ROMEO:")[0])
        'ROMEO:'
        >>> lm.config.layers, lm.source
        (5, 'shakespeare')
    """

    model: Decoder
    config: Config
    tokenizer: Tokenizer | None
    source: str
    directory: Path | None = None
    ignored: tuple[str, ...] = ()

    def __repr__(self) -> str:
        """Sizes rather than weights."""
        config = self.config
        parameters = sum(map(np.size, jax.tree.leaves(self.model)))
        return (
            f"LM({config.family}, {plural(config.layers, 'layer')}, {_rounded(parameters)} "
            f"parameters, {config.dtype}, context {config.context})"
        )

    def encode(self, texts: str | Sequence[str]) -> list[list[int]]:
        """Encode each text, one list of ids per text, with the special tokens the checkpoint adds.

        A text that begins with the start token's own text does not get a second one.

        Args:
            texts: one or several.

        Raises:
            UnsupportedError: there is no tokenizer.
            ValueError: something else than texts.
        """
        texts = [texts] if isinstance(texts, str) else texts
        if (
            not isinstance(texts, Sequence)
            or isinstance(texts, bytes)
            or not all(isinstance(text, str) for text in texts)
        ):
            raise ValueError(f"encode got {type(texts).__name__}; expected a text or several")
        tokenizer = self._tokenizer("encode")
        return [tokenizer.encode(text) for text in texts]

    def decode(self, tokens: Ids | Sequence[Ids]) -> str | list[str]:
        """Decode a row of ids, or several; -1 (padding) and special tokens are skipped.

        Args:
            tokens: ids ``[T]`` or ``[B, T]``: lists (of any lengths) or integer arrays.

        Raises:
            UnsupportedError: there is no tokenizer.
            ValueError: something else than ids.
        """
        tokenizer = self._tokenizer("decode")
        listed = isinstance(tokens, Iterable) and not hasattr(tokens, "ndim")
        rows: Any = list(tokens) if listed and not isinstance(tokens, str | bytes) else tokens
        nested = any(np.ndim(row) for row in rows) if isinstance(rows, list) else np.ndim(rows) > 1
        if nested:
            return [tokenizer.decode(row) for row in rows]
        return tokenizer.decode(rows)

    def save(
        self,
        directory: str | os.PathLike[str],
        *,
        dtype: DTypeLike | None = None,
        max_shard_size: int | str = "5GB",
        overwrite: bool = False,
    ) -> None:
        """Save the model in Hugging Face layout, for `jkv.load` and for transformers.

        Weights, configuration, tokenizer and chat templates are written to the side and put in
        place at the end, `config.json` last: what is interrupted is no checkpoint.

        Args:
            directory: to write; made where it is missing. One that is not empty is refused.
            dtype: of the weights on disk: "float32", "bfloat16" or "float16". By default the one
                that they have in memory.
            max_shard_size: bytes of a file ("5GB", "500MB"), beyond which the weights are split
                over several.
            overwrite: replace the checkpoint in a directory that is not empty; other files in it
                stay.

        Raises:
            FileExistsError: the directory is not empty.
            UnsupportedError: the model is none that a family describes, or has no weights.
            ValueError: weights too large for the dtype, or arguments of another kind.

        Example:
            >>> lm = jkv.load("shakespeare")
            >>> lm.save("tuned", dtype="bfloat16")  # after training `lm.model`, say
            >>> jkv.load("tuned").config == lm.config
            True
        """
        name = None if dtype is None else dtype_name(dtype, "save")
        save.save(self, directory, name, parse_bytes(max_shard_size, "max_shard_size"), overwrite)

    def _tokenizer(self, what: str) -> Tokenizer:
        if self.tokenizer is None:
            raise UnsupportedError(
                f"{what} needs a tokenizer, and {self.source} has no tokenizer.json: "
                f"{diagnose.tokenizer(self.directory)}"
            )
        return self.tokenizer


def _rounded(count: int) -> str:
    """Round a count to three or so digits: "950", "3.9M", "7.2B"."""
    for size, unit in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if count >= size:
            return f"{count / size:.1f}{unit}"
    return str(count)


@transfers
def load(
    source: str | os.PathLike[str],
    *,
    dtype: DTypeLike | None = None,
    revision: str | None = None,
    ignore: Sequence[str] = (),
    progress: Progress | None = None,
) -> LM:
    """Load a decoder and its tokenizer.

    Args:
        source: the built-in model's name ("shakespeare"), else a directory in Hugging Face layout,
            else the id of a repository of the hub. ("./shakespeare" is a directory in any case.)
        dtype: of the weights: "float32", "bfloat16" or "float16". By default float32 on the CPU,
            where products in anything else are slow, and the checkpoint's own elsewhere.
        revision: branch, tag or commit of a hub repository.
        ignore: keys of `config.json` to treat as absent, where an error names them and they are
            known to change nothing.
        progress: called with the bytes read so far and those to read; nothing is shown without.

    Raises:
        CheckpointError: it cannot be found or is refused; the message lists everything wrong.
        ValueError: a dtype or source of another kind.

    Example:
        >>> lm = jkv.load("shakespeare")
        >>> out = jkv.generate(lm, ["ROMEO:"], max_new_tokens=8)
    """
    check_fork()
    name = None if dtype is None else dtype_name(dtype)
    keys = check_ignore(ignore)
    directory = hub.resolve(source, revision, show=progress is not None)
    problems: list[str] = []
    tokenizer = read_tokenizer(directory, problems)
    model, config = checkpoint.read_checkpoint(
        directory, dtype=name, ignore=keys, progress=progress, problems=problems
    )
    return LM(model, config, tokenizer, os.fspath(source), directory, keys)


def read_config(
    source: str | os.PathLike[str],
    *,
    dtype: DTypeLike | None = None,
    revision: str | None = None,
    ignore: Sequence[str] = (),
) -> Config:
    """Read the configuration of a checkpoint, from its `config.json` alone.

    Args:
        source: as of `load`; of a repository of the hub nothing else is downloaded.
        dtype: of the weights: "float32", "bfloat16" or "float16". By default the checkpoint's own,
            float32 where it does not say.
        revision: branch, tag or commit of a hub repository.
        ignore: as of `load`.

    Raises:
        CheckpointError: it cannot be found or is refused; the message lists everything wrong.
        ValueError: a dtype or source of another kind.

    Example:
        >>> jkv.models.read_config("shakespeare").context
        512
    """
    name = None if dtype is None else dtype_name(dtype)
    keys = check_ignore(ignore)
    directory = hub.resolve(source, revision, wanted=hub.CONFIG)
    return checkpoint.read_config(directory, dtype=name, ignore=keys)


def outline(
    source: str | os.PathLike[str],
    *,
    dtype: DTypeLike | None = None,
    revision: str | None = None,
    ignore: Sequence[str] = (),
) -> LM:
    """Return what `load` does with shapes in place of weights, which are not read.

    Args:
        source: as of `load`.
        dtype: as of `load`.
        revision: branch, tag or commit of a hub repository.
        ignore: as of `load`.

    Raises:
        CheckpointError: it cannot be found or is refused; the message lists everything wrong.
        ValueError: a dtype or source of another kind.

    Example:
        >>> from flax import nnx
        >>> shapes = nnx.state(jkv.models.outline("shakespeare").model)
        >>> sum(leaf.size for leaf in jax.tree.leaves(shapes))
        3859200
    """
    name = None if dtype is None else dtype_name(dtype)
    keys = check_ignore(ignore)
    directory = hub.resolve(source, revision, wanted=hub.ALL_BUT_WEIGHTS)
    problems: list[str] = []
    tokenizer = read_tokenizer(directory, problems)
    config = checkpoint.read_config(directory, ignore=keys, problems=problems)
    config = dataclasses.replace(config, dtype=name or checkpoint.usual_dtype(config.dtype))
    model = outline_model(config)
    return LM(model, config, tokenizer, os.fspath(source), directory, keys)


def dtype_name(dtype: DTypeLike, what: str = "load") -> str:
    """Return the name of a dtype that weights may have.

    Raises:
        ValueError: another one.
    """
    try:
        name = jnp.dtype(dtype).name
    except TypeError:
        name = ""
    if name not in _DTYPES:
        short = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32"}
        near = difflib.get_close_matches(str(dtype)[:50], [*_DTYPES, *short], 1, 0.8)
        meant = f"; did you mean {short.get(near[0], near[0])!r}?" if near else ""
        raise ValueError(
            f"{what} got dtype={brief(dtype)}; expected one of {', '.join(_DTYPES)}{meant}"
        )
    return name
