"""Text to ids and back, and whatever is wrong with the files that say how."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer as Fast
from tokenizers import decoders, models, pre_tokenizers, processors

import jkv
from jkv.errors import CheckpointError, UnsupportedError
from tests.models.conftest import GOLDEN


def words(path, **files) -> None:
    """A tokenizer that knows a few words, puts <s> first and cuts at three tokens if let."""
    known = ("<s>", "</s>", "the", "cat", "sat", "on", "a", "mat", "<unk>")
    vocab = {word: i for i, word in enumerate(known)}
    fast = Fast(models.WordLevel(vocab, unk_token="<unk>"))
    fast.pre_tokenizer = pre_tokenizers.Whitespace()
    fast.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    fast.add_special_tokens(["<s>", "</s>", "<unk>"])
    fast.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)]
    )
    fast.enable_truncation(3)
    fast.enable_padding(length=8)
    fast.save(str(path / "tokenizer.json"))
    for name, values in files.items():
        (path / f"{name}.json").write_text(json.dumps(values))


@pytest.fixture
def lm(checkpoint):
    copy = checkpoint()
    words(copy.path, tokenizer_config={"bos_token": "<s>", "eos_token": {"content": "</s>"}})
    return jkv.load(copy.path)


def test_encode(lm):
    """Nothing cut, nothing filled up, the start token where the post-processor says."""
    assert lm.encode("the cat sat on a mat") == [[0, 2, 3, 4, 5, 6, 7]]
    assert lm.encode(["the cat", "", "mat"]) == [[0, 2, 3], [0], [0, 7]]
    assert lm.encode(("dog",)) == [[0, 8]]
    assert lm.encode([]) == []
    assert lm.tokenizer.encode("the cat", special=False) == [2, 3]
    assert lm.tokenizer.vocab == 9
    assert lm.tokenizer.special == {"bos_token": "<s>", "eos_token": "</s>"}
    assert (lm.tokenizer.token_id("mat"), lm.tokenizer.token_id("dog")) == (7, None)


@pytest.mark.parametrize(
    "tokens",
    [
        [0, 2, 3, 1],
        (2, 3),
        [2, 3, -1, -1],
        np.array([2, 3, -1]),
        np.array([2, 3], np.uint8),
        jnp.array([0, 2, 3]),
        [jnp.int32(2), np.int64(3)],
    ],
)
def test_decode_a_row(lm, tokens):
    assert lm.decode(tokens) == "the cat"


@pytest.mark.parametrize(
    "tokens",
    [
        [[2, 3], [7]],
        [[2, 3, 1], np.array([7, -1])],
        np.array([[2, 3], [7, -1]]),
        jnp.array([[2, 3, 1], [0, 7, -1]]),
        ([2, 3], (7,)),
    ],
)
def test_decode_rows(lm, tokens):
    assert lm.decode(tokens) == ["the cat", "mat"]


def test_decode_nothing(lm):
    assert lm.decode([]) == ""
    assert lm.decode(np.zeros((0,), np.int32)) == ""
    assert lm.decode([[], [3]]) == ["", "cat"]
    assert lm.decode(np.zeros((2, 0), np.int32)) == ["", ""]
    assert lm.tokenizer.decode([0, 3], skip_special=False) == "<s> cat"
    assert lm.decode([3, 17]) == "cat"  # the model's vocabulary may be padded past the tokenizer's


@pytest.mark.parametrize(
    "tokens",
    [
        *([1.5], np.array([1.0]), [-2], [2**32], "the cat", b"the", [None], [["a"]], ["a"]),
        *(np.zeros((1, 2, 2), int), np.float32(3), 5, None, True),
    ],
)
def test_decode_something_else(lm, tokens):
    with pytest.raises(ValueError, match="decode got"):
        lm.decode(tokens)


@pytest.mark.parametrize("texts", [3, [3], b"the", [["the"]], None, "\ud800"])
def test_encode_something_else(lm, texts):
    with pytest.raises(ValueError, match="encode got"):
        lm.encode(texts)


def test_without_a_tokenizer():
    """Ids work; texts say what is missing."""
    lm = jkv.load(GOLDEN / "llama-mqa")
    assert lm.tokenizer is None
    logits, _ = jax.eval_shape(lm.model, jnp.asarray([[1, 2]]))
    assert logits.shape == (1, 2, lm.config.vocab)
    for call in (lambda: lm.encode("a"), lambda: lm.decode([1])):
        with pytest.raises(UnsupportedError, match=r"has no tokenizer\.json: use ids"):
            call()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("tokenizer.json", "{"),
        ("tokenizer.json", "{}"),
        ("tokenizer.json", '{"model": {"type": "Nothing"}}'),
        ("tokenizer_config.json", "[]"),
        ("tokenizer_config.json", '{"chat_template": 3}'),
        ("tokenizer_config.json", '{"chat_template": [{"name": "default"}]}'),
        ("special_tokens_map.json", "x"),
        ("chat_template.jinja", "\xff"),
    ],
)
def test_broken_files(name, text, checkpoint):
    copy = checkpoint()
    words(copy.path)
    jkv.load(copy.path)
    (copy.path / name).write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        jkv.load(copy.path)
