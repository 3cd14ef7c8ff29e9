"""Texts at their seams: prompt and answer, one turn and the next."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers

import jkv
from jkv.decoding.detokenize import Pieces, new_text
from jkv.errors import UnsupportedError
from tests.decoding import texts

SENTENCEPIECE = texts.sentencepiece()
EURO = [b + texts.BYTES for b in "€".encode()]


def spaced_bytes() -> Any:
    """Byte-level, with a space before each text."""
    tokenizer = texts.byte_level()
    tokenizer._tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return tokenizer


TOKENIZERS = {
    "byte level": texts.byte_level(),
    "byte level with a space": spaced_bytes(),
    **{prefix: texts.sentencepiece(prefix) for prefix in texts.PREFIXES},
    "with an end": texts.sentencepiece(eos=True),
}


@pytest.fixture(scope="module")
def lm(tiny_config: Any) -> jkv.LM:
    """A model whose tokenizer puts <s> and a space before a text."""
    return texts.noise(tiny_config, SENTENCEPIECE, layers=1)


def ids(text: str) -> list[int]:
    return SENTENCEPIECE.encode_continuation(text)


def forcing(*tokens: int) -> Any:
    filled = [*tokens, *[0] * (9 - len(tokens))]  # one size is one program
    script = texts.Script(jnp.asarray(filled, jnp.int32))
    return jkv.sampling.chain(script, jkv.sampling.greedy())


def generate(lm: jkv.LM, prompts: Any, *tokens: int, **how: Any) -> Any:
    """A result whose rows have said these tokens."""
    how = {"max_new_tokens": len(tokens), "sampler": forcing(*tokens), "stop": ()} | how
    return jkv.generate(lm, prompts, **how)


# Continuations


@pytest.mark.parametrize("name", list(TOKENIZERS))
@pytest.mark.parametrize("text", ["b", "a", " b", "  ab", "\n\nb:", "é", "", " ", "b c d"])
def test_a_continuation_goes_on_with_exactly_its_text(name, text):
    tokenizer = TOKENIZERS[name]
    before = tokenizer.encode("ab b")
    added = tokenizer.encode_continuation(text)
    assert tokenizer.decode([*before, *added]) == tokenizer.decode(before) + text
    assert not {texts.BOS, texts.EOS} & set(added) or name.startswith("byte")
    assert bool(added) == bool(text)


@pytest.mark.parametrize("prefix", texts.PREFIXES)
def test_a_continuation_is_as_ever_after_its_first_special_token(prefix):
    tokenizer = TOKENIZERS[prefix]
    whole = tokenizer.encode("ab</s>b a</s>", special=False)
    added = tokenizer.encode_continuation("b</s>b a</s>")
    at = whole.index(texts.EOS)
    assert added == [*tokenizer.encode_continuation("b"), *whole[at:]]
    # A character that the vocabulary has not is none, though <unk> may stand for it.
    assert tokenizer.encode_continuation("</s>b a</s>") == whole[at:]


def test_a_continuation_keeps_the_spaces_between_words():
    """T5's way: texts are split at spaces, and what is put before the words is those."""
    tokenizer = texts.sentencepiece("metaspace")
    inner = tokenizer._tokenizer
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), inner.pre_tokenizer]
    )
    assert tokenizer.decode([1, 260, *tokenizer.encode_continuation(" a b")]) == "a a b"


def test_a_resumed_text_has_no_start_token_and_no_space(lm):
    out = jkv.generate(lm, ["ab", "b"], max_new_tokens=5, stop=())
    more = jkv.generate(lm, ["b a", ""], max_new_tokens=4, resume=out, stop=())
    by_ids = jkv.generate(lm, [ids("b a"), []], max_new_tokens=4, resume=out, stop=())
    assert more.tokens.tolist() == by_ids.tokens.tolist()
    for row, (prompt, turn) in enumerate((("ab", "b a"), ("b", ""))):
        history = more.history[row].tolist()
        assert history == by_ids.history[row].tolist()
        assert history.count(texts.BOS) == 1 + out.tokens[row].tolist().count(texts.BOS)
        whole = prompt + out.texts[row] + turn + more.texts[row]
        assert whole == lm.tokenizer.decode(history)


def test_texts_and_ids_in_one_resumed_batch(lm):
    out = generate(lm, ["ab", [texts.BOS, *ids("b")]], *ids(" a"))
    more = generate(lm, [ids("ab"), "ab"], *ids("c"), resume=out)
    assert [lm.tokenizer.decode(row) for row in more.history] == ["ab aabc", "b aabc"]


def test_a_stream_goes_on_from_a_text(lm):
    out = generate(lm, "ab", *ids(" a"))
    blocks = jkv.stream(
        lm, "b", max_new_tokens=3, block=1, resume=out, sampler=forcing(*ids(" b "))
    )
    pieces = [block.texts[0] for block in blocks]
    assert "ab" + out.text + "b" + "".join(pieces) == "ab ab b "
    assert "".join(pieces) == blocks.result.text


def test_beams_go_on_from_a_text(lm):
    out = generate(lm, "ab", *ids(" a"))
    asked = {"max_new_tokens": 3, "beams": 2, "stop": (), "resume": out}
    beams = jkv.beam_search(lm, "b", **asked)
    by_ids = jkv.beam_search(lm, [ids("b")], **asked)
    assert beams.tokens.tolist() == by_ids.tokens.tolist()
    for text, tokens in zip(beams.texts[0], beams.tokens[0].tolist(), strict=True):
        assert "ab" + out.text + "b" + text == lm.tokenizer.decode(
            [*out.history[0], *ids("b"), *tokens]
        )


# Start tokens


@pytest.mark.parametrize("prefix", [*texts.PREFIXES, "with an end"])
def test_a_prompt_that_begins_with_the_start_token_has_one(prefix):
    tokenizer = TOKENIZERS[prefix]
    assert tokenizer.encode("<s>b a").count(texts.BOS) == 1
    assert tokenizer.encode("<s>b a") == tokenizer.encode("<s>b a", special=False) + (
        [texts.EOS] if prefix == "with an end" else []
    )
    assert tokenizer.encode("<s>")[:2].count(texts.BOS) == 1
    assert tokenizer.encode("b<s>").count(texts.BOS) == 2
    assert tokenizer.encode("")[0] == texts.BOS


def test_one_start_token_wherever_a_prompt_is_given(lm):
    asked = {"max_new_tokens": 2, "stop": ()}
    want = [texts.BOS, *lm.tokenizer.encode("<s>ab", special=False)[1:]]
    blocks = jkv.stream(lm, ["<s>ab"], **asked)
    list(blocks)
    with jkv.Engine(lm, pages=4, max_batch=1) as engine:
        request = engine.submit("<s>ab", max_new_tokens=1)
    histories = [
        jkv.generate(lm, ["<s>ab"], **asked).history[0],
        blocks.result.history[0],
        request.prompt,
        jkv.beam_search(lm, ["<s>ab"], beams=1, **asked).history[0],
        lm.encode("<s>ab")[0],
    ]
    for history in histories:
        assert list(history)[: len(want)] == want


# Texts of results and of what comes before them


def test_a_text_alone_is_one_row(lm):
    out = jkv.generate(lm, "ab", max_new_tokens=3, stop=())
    want = jkv.generate(lm, ["ab"], max_new_tokens=3, stop=())
    assert out.tokens.tolist() == want.tokens.tolist()
    assert out.text == want.texts[0]
    assert len(jkv.beam_search(lm, "ab", max_new_tokens=2, beams=2).tokens) == 1
    with pytest.raises(ValueError, match=r"1 prompts? for 2 rows"):
        jkv.generate(lm, "b", max_new_tokens=1, resume=generate(lm, ["a", "b"], 260))


def test_the_space_between_prompt_and_answer(lm):
    out = generate(lm, ["ab", "b"], *ids(" a b"))
    assert out.texts == (" a b", " a b")
    assert lm.tokenizer.decode(out.tokens[0]) == "a b"  # alone they lose it
    with pytest.raises(ValueError, match=r"2 rows.*use texts"):
        _ = out.text
    # Nothing has been shown before this one: its text begins without the space.
    assert generate(lm, [[texts.BOS]], *ids(" a b")).text == "a b"


@pytest.mark.parametrize("stop", [(), "a b", "</s>"])
def test_streams_samples_and_requests_give_the_same_texts(lm, stop):
    tokens = [*ids(" a"), *EURO, *ids(" b"), texts.EOS, *ids("c")]
    asked = {"max_new_tokens": len(tokens), "sampler": forcing(*tokens), "stop": stop}
    blocks = jkv.stream(lm, ["ab"], block=2, **asked)
    pieces = [block.texts[0] for block in blocks]
    out = blocks.result
    with jkv.Engine(lm, pages=8, max_batch=1) as engine:
        request = engine.submit("ab", **asked)
        engine.run()
    end = tokens.index(texts.EOS) + 1 if stop == "</s>" else len(tokens)
    assert request.tokens == out.tokens[0].tolist() == tokens[:end]
    assert "".join(pieces) == out.text == request.text
    assert "ab" + out.text == lm.tokenizer.decode(out.history[0])


@pytest.mark.parametrize("cut", [1, 2])
def test_a_character_that_begins_in_the_prompt_comes_whole(lm, cut):
    out = generate(lm, [[texts.BOS, *ids("ab"), *EURO[:cut]]], *EURO[cut:], *ids("c"))
    assert out.text == "€c"
    blocks = jkv.stream(
        lm, [[]], max_new_tokens=1, resume=generate(lm, "ab", *EURO[:cut]), sampler=forcing(1)
    )
    assert "".join(block.texts[0] for block in blocks) == ""
    first = generate(lm, "ab", *EURO[:cut])
    assert first.text == "\ufffd" * cut  # for now
    rest = generate(lm, "", *EURO[cut:], *ids("c"), resume=first)
    assert rest.text == "€c"


def test_without_a_tokenizer_there_are_no_texts(lm):
    out = jkv.generate(lm.model, [[1, 2]], max_new_tokens=2)
    beams = jkv.beam_search(lm.model, [[1, 2]], max_new_tokens=2)
    for read in (lambda: out.texts, lambda: out.text, lambda: beams.texts):
        with pytest.raises(UnsupportedError, match=r"pass lm instead of lm\.model"):
            read()


TOKEN = st.one_of(
    st.integers(0, 260),
    st.sampled_from([texts.SPACE, 260, *EURO, *EURO, texts.BOS, texts.EOS]),
)


@settings(max_examples=200, deadline=None)
@given(
    before=st.lists(TOKEN, max_size=6),
    blocks=st.lists(st.lists(TOKEN, max_size=4), min_size=1, max_size=8),
)
@pytest.mark.parametrize("name", ["byte level", "prepend"])
def test_pieces_after_a_prompt_join_to_the_new_text(name, before, blocks):
    tokenizer = TOKENIZERS[name]
    pieces = Pieces(tokenizer, before)
    heard = [pieces.push(b, last=i == len(blocks) - 1) for i, b in enumerate(blocks)]
    new = [token for block in blocks for token in block]
    text = new_text(tokenizer, before, new)
    assert "".join(heard) == text
    old, whole = tokenizer.decode(before), tokenizer.decode([*before, *new])
    assert whole.endswith(text)
    if whole.startswith(old):  # no character was cut in two
        assert old + text == whole


def test_a_token_without_a_text_takes_no_space_away():
    """Ids past the vocabulary are such tokens: models are padded to more rows."""
    pieces = Pieces(texts.byte_fallback())
    assert [pieces.push([token]) for token in (258, 300, 259)] == ["a", "", " the"]


def test_pieces_look_back_a_little_only(monkeypatch):
    """Also where special tokens follow each other, which have no text to look back at."""
    tokenizer = texts.sentencepiece()
    pieces = Pieces(tokenizer, tokenizer.encode("ab" * 500))
    assert pieces.push(ids("b")) == "b"
    sizes = []
    decode = tokenizer.decode
    monkeypatch.setattr(tokenizer, "decode", lambda t: (sizes.append(len(t)), decode(t))[1])
    for token in [texts.EOS, *ids("c"), texts.BOS] * 100:
        pieces.push([token])
    assert max(sizes) <= 4
