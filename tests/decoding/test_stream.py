"""Blocks of tokens and pieces of text: the same as `generate`'s, only sooner."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jkv
from jkv.decoding.detokenize import Pieces
from jkv.decoding.generation import Generation
from jkv.decoding.stream import Stream, stream
from tests.decoding import texts

PROMPTS = [[1, 2, 3, 4, 5], [6], [7, 8, 9]]


TOKENIZERS = {"byte level": texts.byte_level(), "byte fallback": texts.byte_fallback()}


@pytest.fixture(scope="module")
def lm(tiny_config: Any) -> jkv.LM:
    """What it says is noise."""
    return texts.noise(tiny_config, layers=1)


@pytest.fixture(scope="module")
def stop(tiny_model: Any) -> list[list[int]]:
    """Stops with which the three rows end at different times, the first not at all."""
    free = jkv.generate(tiny_model, PROMPTS, max_new_tokens=20, stop=()).tokens
    return [[], [int(free[1, 5])], [int(free[2, 1])]]


def generated(blocks: list[Any], row: int) -> list[int]:
    return [int(t) for block in blocks for t in block.tokens[row] if t >= 0]


@pytest.mark.parametrize("block", [1, 4])
def test_tokens_are_those_of_generate(tiny_model, stop, block):
    want = jkv.generate(tiny_model, PROMPTS, max_new_tokens=20, stop=stop)
    assert set(want.finish_reasons) == {"stop", "length"}

    got = stream(tiny_model, PROMPTS, max_new_tokens=20, stop=stop, block=block)
    blocks = list(got)

    for row in range(3):
        assert generated(blocks, row) == want.tokens[row][: want.lengths[row]].tolist()
    assert max(b.tokens.shape[1] for b in blocks) <= block
    assert all(b.texts is None for b in blocks)
    np.testing.assert_array_equal(got.result.tokens, want.tokens)
    np.testing.assert_array_equal(got.result.lengths, want.lengths)
    assert got.result.finish_reasons == want.finish_reasons
    assert got.result.cache.lengths.tolist() == want.cache.lengths.tolist()


def test_done_says_when_each_row_ended(tiny_model, stop):
    blocks = list(stream(tiny_model, PROMPTS, max_new_tokens=9, stop=stop, block=4))
    want = jkv.generate(tiny_model, PROMPTS, max_new_tokens=9, stop=stop)
    assert len(set(want.lengths)) > 1
    for row in range(3):
        heard = 0
        for block in blocks:
            heard += int((block.tokens[row] >= 0).sum())
            assert block.done[row] == (heard == want.lengths[row])
    assert blocks[-1].done.all()
    assert not blocks[0].done.all()


def test_samples_and_logprobs_are_those_of_generate(tiny_model):
    asked = {
        "max_new_tokens": 11,
        "sampler": jkv.sampling.temperature(1.5),
        "key": jax.random.key(3),
        "return_logprobs": True,
    }
    want = jkv.generate(tiny_model, PROMPTS, **asked)
    got = stream(tiny_model, PROMPTS, block=4, **asked)
    assert len(list(got)) == 4  # 1 + 4 + 4 + 2
    np.testing.assert_array_equal(got.result.tokens, want.tokens)
    assert want.logprobs is not None
    np.testing.assert_allclose(got.result.logprobs, want.logprobs, rtol=1e-5)


def test_a_stream_can_be_resumed_and_resume(tiny_model):
    whole = jkv.generate(tiny_model, PROMPTS, max_new_tokens=12)
    first = stream(tiny_model, PROMPTS, max_new_tokens=5, block=4)
    list(first)
    second = stream(tiny_model, [[], [], []], max_new_tokens=7, resume=first.result)
    list(second)
    joined = np.concatenate([first.result.tokens, second.result.tokens], axis=1)
    np.testing.assert_array_equal(joined, whole.tokens)


def test_texts_join_to_the_decoded_tokens(lm):
    hot = jkv.sampling.temperature(50.0)  # as good as uniform: most bytes are no characters
    got = stream(
        lm, ["hello", "wo"], max_new_tokens=60, block=4, sampler=hot, key=jax.random.key(0)
    )
    blocks = list(got)
    for row in range(2):
        text = lm.tokenizer.decode(got.result.tokens[row])
        assert "".join(b.texts[row] for b in blocks) == text
        assert text.count("\ufffd") < len(text)


def test_a_stop_string_ends_the_texts_with_the_tokens(lm):
    free = jkv.generate(lm, ["hello", "wo"], max_new_tokens=20)
    text = lm.tokenizer.decode(free.tokens[0][:12])
    stop = text[5:8]
    got = stream(lm, ["hello", "wo"], max_new_tokens=20, stop=[[stop], []], block=4)
    blocks = list(got)
    assert got.result.finish_reasons == ("stop", "length")
    heard = "".join(b.texts[0] for b in blocks)
    assert heard == lm.tokenizer.decode(got.result.tokens[0][: got.result.lengths[0]])
    assert stop in heard
    assert not any(b.texts[0] for b in blocks[6:])


def test_a_character_cut_in_two_comes_whole():
    tokenizer = TOKENIZERS["byte level"]
    ids = tokenizer.encode("a€b")
    assert len(ids) == 5
    pieces = Pieces(tokenizer)
    assert [pieces.push([i]) for i in ids] == ["a", "", "", "€", "b"]


def test_what_is_never_completed_comes_at_the_end():
    tokenizer = TOKENIZERS["byte level"]
    ids = tokenizer.encode("a€")[:-1]
    pieces = Pieces(tokenizer)
    heard = [pieces.push([i], last=i == ids[-1]) for i in ids]
    assert heard == ["a", "", "\ufffd"]


def test_bytes_that_may_still_turn_out_to_be_none_are_held_back():
    """A byte-fallback decoder gives up on the whole run of bytes if its last is incomplete."""
    tokenizer = TOKENIZERS["byte fallback"]
    euro = [b + 1 for b in "€".encode()]
    letter = 258
    pieces = Pieces(tokenizer)
    assert [pieces.push([i]) for i in [*euro, letter]] == ["", "", "", "€a"]
    pieces = Pieces(tokenizer)
    assert [pieces.push([i]) for i in [*euro, euro[0], letter]][-1] == "\ufffd" * 4 + "a"


def test_pieces_after_a_prompt_keep_the_space_that_decoding_alone_strips():
    tokenizer = TOKENIZERS["byte fallback"]
    the, letter = 259, 258
    assert tokenizer.decode([the]) == "the"
    assert Pieces(tokenizer, before=[letter]).push([the]) == " the"
    assert Pieces(tokenizer).push([the]) == "the"


@pytest.mark.parametrize("name", list(TOKENIZERS))
@settings(max_examples=200, deadline=None)
@given(
    blocks=st.lists(
        st.lists(
            st.one_of(
                st.integers(0, 260),
                st.sampled_from([257, 259, 227, 131, 173]),  # spaces, and the bytes of a euro sign
            ),
            max_size=4,
        ),
        max_size=12,
    )
)
def test_pieces_join_to_the_whole_for_any_tokens_and_cuts(name, blocks):
    tokenizer = TOKENIZERS[name]
    pieces = Pieces(tokenizer)
    heard = [pieces.push(b, last=i == len(blocks) - 1) for i, b in enumerate(blocks)]
    assert "".join(heard) == tokenizer.decode([t for b in blocks for t in b])


BAD = [
    ({"max_new_tokens": 0}, ValueError, "max_new_tokens got 0"),
    ({"block": 0}, ValueError, "block got 0"),
    ({"block": 2.5}, ValueError, "block got 2.5"),
    ({"resume": "yesterday"}, TypeError, "resume got str"),
    ({"prompts": []}, ValueError, "no prompts"),
    ({"prompts": [[11]]}, ValueError, "token 11"),
    ({"prompts": ["text"]}, TypeError, "no tokenizer"),
    ({"sampler": jkv.sampling.temperature(1.0)}, ValueError, "needs key"),
    ({"stop": ["text"]}, ValueError, "need the tokenizer"),
    ({"slots": 3}, jkv.CacheFullError, "slots=3"),
    ({"prompts": "text"}, TypeError, "prompt 0 is a text, and there is no tokenizer"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_arguments_are_refused_at_the_call(tiny_model, change, error, message):
    asked = {"prompts": PROMPTS, "max_new_tokens": 4}
    assert isinstance(stream(tiny_model, **asked), Stream)
    with pytest.raises(error, match=message):
        stream(tiny_model, **(asked | change))


def test_no_result_before_the_end(tiny_model):
    got = stream(tiny_model, PROMPTS, max_new_tokens=8, block=4)
    next(got)
    with pytest.raises(jkv.JkvError, match="has not ended"):
        _ = got.result
    list(got)
    assert got.result.tokens.shape == (3, 8)
    assert list(got) == []


def test_an_interrupted_stream_has_no_result(tiny_model, monkeypatch):
    got = stream(tiny_model, PROMPTS, max_new_tokens=8, block=4)
    next(got)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Generation, "dispatch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        next(got)
    with pytest.raises(jkv.JkvError, match="interrupted"):
        next(got)
    with pytest.raises(jkv.JkvError):
        _ = got.result


def test_the_next_block_is_dispatched_before_the_last_is_read(tiny_model, monkeypatch):
    order = []
    dispatch, read = Generation.dispatch, Generation.read
    monkeypatch.setattr(Generation, "dispatch", lambda *a: (order.append("go"), dispatch(*a))[1])
    monkeypatch.setattr(Generation, "read", lambda *a: (order.append("read"), read(*a))[1])
    list(stream(tiny_model, PROMPTS, max_new_tokens=13, block=4))
    assert order == ["read", "go", "go", "read", "go", "read", "read"]


def test_the_compiled_block_is_reused(tiny_model, compiles):
    list(stream(tiny_model, PROMPTS, max_new_tokens=5, block=4))
    with compiles:
        assert len(list(stream(tiny_model, PROMPTS, max_new_tokens=30, block=4))) == 9
        list(stream(tiny_model, [[1], [2, 3], [4]], max_new_tokens=3, block=4))
        assert compiles.count == 0
