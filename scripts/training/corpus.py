"""A text as tokens: its tokenizer, its training windows, its held-out windows."""

from __future__ import annotations

import functools
import json
import math
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

END = "<|endoftext|>"  # id 0, before the held-out text and nowhere else
_CHUNK = 512  # words that are cut alike: all plainly, or all with BPE-dropout


def read_text(path: Path) -> str:
    """The text of a file.

    Raises:
        ValueError: no such file, or not UTF-8.
    """
    if not path.is_file():
        raise ValueError(f"no text file at {path}; pass the path of a file in UTF-8")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 (byte {error.start}); convert it, for example with iconv"
        ) from None


def train_tokenizer(text: str, vocab: int) -> Tokenizer:
    """Byte-level BPE of at most `vocab` tokens, all 256 bytes among them: no text is unknown."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text], trainer)
    return tokenizer


class Corpus:
    """A text split into a training part and a held-out end, with the tokenizer of the former."""

    def __init__(self, text: str, *, vocab: int, held_out: float, dropout: float, seed: int):
        cut = int(len(text) * (1 - held_out))
        self.training, self.held = text[:cut], text[cut:]
        self.dropout, self.seed = dropout, seed
        self.tokenizer = train_tokenizer(self.training, vocab)
        self.vocab = self.tokenizer.get_vocab_size()
        self._ids = self.tokenizer.get_vocab()
        merges = json.loads(self.tokenizer.to_str())["model"]["merges"]
        self._ranks = {tuple(pair): rank for rank, pair in enumerate(merges)}
        split = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(self.training)
        self._words = [word for word, _ in split]
        self._plain = {word: self._segment(word, 0.0, None) for word in set(self._words)}
        self.plain = np.array([i for w in self._words for i in self._plain[w]], np.int32)
        held = self.tokenizer.encode(self.held).ids
        self.held_ids = np.array([self._ids[END], *held], np.int32)

    def windows(self, step: int, rows: int, length: int, *, plain: bool) -> np.ndarray:
        """Random windows ``[rows, length + 1]`` for one step: a function of seed and step alone.

        Args:
            step: its number, from 0.
            rows: windows.
            length: tokens to be predicted in each.
            plain: without BPE-dropout.
        """
        epoch = step * rows * length // len(self.plain)
        ids = self.plain if plain or not self.dropout else self._dropped(epoch)
        starts = np.random.default_rng([self.seed, step]).integers(0, len(ids) - length - 1, rows)
        return np.stack([ids[start : start + length + 1] for start in starts])

    def held_windows(self, length: int, limit: int | None = None) -> Iterator[tuple]:
        """Windows over the held-out text, each overlapping the one before by half.

        Yields:
            (tokens ``[length + 1]``, zeros after the text's end; first and one past the last of
            the predictions that count). Every token counts once, with at least ``length / 2``
            tokens of context where the text has them.
        """
        hop = length // 2
        count = 1 + max(0, math.ceil((len(self.held_ids) - 1 - length) / hop))
        for i in range(count if limit is None else min(count, limit)):
            tokens = self.held_ids[i * hop : i * hop + length + 1]
            last = len(tokens) - 1
            first = 0 if i == 0 else length - hop
            yield np.pad(tokens, (0, length - last)), first, last

    @functools.lru_cache(maxsize=1)  # noqa: B019 - one corpus, which lives as long as the run
    def _dropped(self, epoch: int) -> np.ndarray:
        """The training tokens with half of the chunks cut by BPE-dropout (Provilkov et al.)."""
        rng = random.Random(1000003 * self.seed + epoch)
        ids: list[int] = []
        for start in range(0, len(self._words), _CHUNK):
            share = self.dropout if rng.random() < 0.5 else 0.0
            for word in self._words[start : start + _CHUNK]:
                ids.extend(self._segment(word, share, rng) if share else self._plain[word])
        return np.array(ids, np.int32)

    def _segment(self, word: str, dropout: float, rng: random.Random | None) -> tuple[int, ...]:
        """Ids of a word; each merge is left out with the probability `dropout` at each turn.

        `tokenizers` can do this too, with a generator that nobody can seed.
        """
        parts = list(word)
        while True:
            best, at = None, 0
            for i in range(len(parts) - 1):
                rank = self._ranks.get((parts[i], parts[i + 1]))
                if rank is None or (best is not None and rank >= best):
                    continue
                if rng is None or rng.random() >= dropout:
                    best, at = rank, i
            if best is None:
                return tuple(self._ids[part] for part in parts)
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
