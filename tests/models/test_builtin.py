"""The model that comes with jkv: small enough, as good as its card says, and a play in a chat."""

from __future__ import annotations

import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jkv
import train
from tests import quick
from training.corpus import Corpus
from training.export import CHAT_TEMPLATE

HERE = Path(jkv.__file__).parent / "data" / "shakespeare"
CARD = (HERE / "README.md").read_text()


@pytest.fixture(scope="module")
def lm() -> jkv.LM:
    return jkv.load("shakespeare")


@pytest.fixture(scope="module")
def play(shared: Path) -> str:
    path = shared / "data" / "tinyshakespeare.txt"
    return path.read_text(encoding="utf-8")


def stated(pattern: str) -> str:
    found = re.search(pattern, CARD)
    assert found is not None, pattern
    return found[1]


def test_it_is_at_most_8_megabytes():
    assert sum(path.stat().st_size for path in HERE.rglob("*") if path.is_file()) <= 8_000_000
    assert {path.name for path in HERE.iterdir()} == {
        "README.md",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }


def test_the_card_describes_what_is_loaded(lm):
    config = lm.config
    assert int(stated(r"of ([\d,]+) parameters").replace(",", "")) == sum(
        p.size for p in (lm.model.embedding[...], lm.model.norm.scale[...])
    ) + config.layers * (
        2 * config.width
        + 2 * config.width * (config.heads + config.kv_heads) * config.head_dim
        + 3 * config.width * config.feed_forward
    )
    assert int(stated(r"context \| (\d+) tokens")) == config.context
    assert lm.model.embedding[...].dtype == jnp.float32
    assert float(stated(r"\*\*([\d.]+) nats per character")) <= 1.55


@pytest.mark.slow
def test_the_held_out_loss_is_what_the_card_states(lm, play):
    cut = int(len(play) * 0.9)
    held = play[cut:]
    ids = [0, *lm.encode(held)[0]]
    window, hop, total, rows = 512, 256, 0.0, []
    for start in range(0, max(1, len(ids) - 1 - hop), hop):
        tokens = ids[start : start + window + 1]
        new = len(tokens) - 1 - (0 if start == 0 else window - hop)
        rows.append((tokens, new))
    assert sum(new for _, new in rows) == len(ids) - 1
    losses = jax.jit(train.losses, compiler_options=quick.OPTIMISED)  # runs for long
    for start in range(0, len(rows), 4):
        part = rows[start : start + 4]
        padded = np.zeros((4, window + 1), np.int32)
        for row, (tokens, _) in enumerate(part):
            padded[row, : len(tokens)] = tokens
        found = np.asarray(losses(lm.model, jnp.asarray(padded)), np.float64)
        for row, (tokens, new) in enumerate(part):
            total += found[row, len(tokens) - 1 - new : len(tokens) - 1].sum()
    loss = float(stated(r"\*\*([\d.]+) nats per character"))
    assert total / len(held) == pytest.approx(loss, abs=0.01)


def test_its_tokenizer_is_the_training_parts_own(lm, play):
    corpus = Corpus(play, vocab=lm.config.vocab, held_out=0.1, dropout=0.0, seed=0)
    assert corpus.held_ids.tolist() == [0, *lm.encode(corpus.held)[0]]


def test_any_text_comes_back(lm):
    text = "Thou, \t\n\n é 漢字 🜁 <|endoftext| "
    assert lm.decode(lm.encode(text)) == [text]
    assert max(lm.encode(text)[0]) < lm.config.vocab


def test_it_speaks_in_speeches(lm):
    said = jkv.generate(lm.model, lm.encode("ROMEO:\n"), max_new_tokens=200)
    (text,) = lm.decode(said.tokens)
    names = re.findall(r"^[A-Z][A-Za-z ]+:$", text, re.MULTILINE)
    assert names, text


def test_a_chat_is_a_play(lm):
    messages = [
        {"role": "system", "content": "ACT I"},
        {"role": "user", "content": "Who are you? "},
        {"role": "assistant", "content": "Thy friend."},
        {"role": "user", "content": "Speak on."},
    ]
    assert json.loads((HERE / "tokenizer_config.json").read_text())["chat_template"] == (
        CHAT_TEMPLATE
    )
    assert lm.tokenizer is not None
    assert lm.tokenizer.chat(messages) == (
        "ACT I\n\nCITIZEN:\nWho are you?\n\nROMEO:\nThy friend.\n\nCITIZEN:\nSpeak on.\n\nROMEO:\n"
    )
