"""Stop strings: searched like transformers', beside the checkpoint's ids, at a flat cost."""

from __future__ import annotations

import dataclasses
import functools
import importlib
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jkv
from jkv.decoding.stopping import StopMatch, first_stop
from tests.decoding import texts

TEMPLATE = "{% for m in messages %}<s>{{ m.role[0] }} {{ m.content }}</s>{% endfor %}<s>a#"
TOKENIZER = texts.sentencepiece(template=TEMPLATE)
EURO = [b + texts.BYTES for b in "€".encode()]
NEW = 8


@pytest.fixture(scope="module")
def lm(tiny_config: Any) -> jkv.LM:
    """Without end ids of its own."""
    return texts.noise(tiny_config, TOKENIZER, layers=1)


@pytest.fixture(scope="module")
def ending(lm: jkv.LM) -> jkv.LM:
    """The same with </s> as the end of text."""
    config = dataclasses.replace(lm.config, end_ids=(texts.EOS,))
    model = jkv.Decoder(config, rngs=texts.nnx.Rngs(1))
    return dataclasses.replace(lm, model=model, config=config)


def ids(text: str) -> list[int]:
    return TOKENIZER.encode_continuation(text)


def forcing(*tokens: int) -> dict[str, Any]:
    filled = [*tokens, *[ids("z")[0]] * (NEW - len(tokens))]
    script = texts.Script(jnp.asarray(filled, jnp.int32))
    sampler = jkv.sampling.chain(script, jkv.sampling.greedy())
    return {"max_new_tokens": NEW, "sampler": sampler}


def all_ways(lm: jkv.LM, tokens: list[int], stop: Any) -> list[int]:
    """How many tokens a row keeps: the same in `generate`, `stream` and the engine."""
    asked = forcing(*tokens) | {"stop": stop}
    out = jkv.generate(lm, ["ab"], **asked)
    blocks = jkv.stream(lm, ["ab"], block=2, **asked)
    list(blocks)
    with jkv.Engine(lm, pages=8, max_batch=1, block=2) as engine:
        request = engine.submit("ab", **asked)
        engine.run()
    assert request.tokens == out.tokens[0].tolist() == blocks.result.tokens[0].tolist()
    assert request.finish_reason == out.finish_reasons[0] == blocks.result.finish_reasons[0]
    return request.tokens


@pytest.mark.parametrize(
    ("stop", "kept"),
    [
        ("</s>", 3),  # a special token's text
        ("b</s>", 3),
        ("</s>c", 4),
        ("</s", 3),  # within it
        ("s>c", 4),
        ("€", 7),  # over three tokens
        ("c€", 7),
        (" a", 1),  # the first token's space
        ("b a", 1),  # begins in the prompt
        ("ab a", 1),
        ("ab", 2),  # not the prompt's
        ("zz", NEW),
        ("no", NEW),
        (["no", "c", "</s>c"], 4),
    ],
)
def test_a_row_ends_with_the_token_that_completes_a_string(lm, stop, kept):
    tokens = [*ids(" a"), *ids("b"), texts.EOS, *ids("c"), *EURO, *ids("z")]
    assert len(tokens) == NEW
    assert all_ways(lm, tokens, stop) == tokens[:kept]


@pytest.mark.parametrize(
    ("stop", "kept"),
    [
        (None, 3),
        ("no", 3),
        (["no"], 3),
        (ids("y"), 3),
        ([["no", *ids("y")]], 3),
        ("b", 2),
        (ids("b")[0], 2),
        ((), NEW),
        ([], NEW),
        ([()], NEW),
    ],
)
def test_one_rule_for_strings_and_ids(ending, stop, kept):
    """They come beside the checkpoint's; () switches all off."""
    tokens = [*ids("ab"), texts.EOS, *ids("c")]
    assert len(tokens) == 4
    assert all_ways(ending, tokens, stop) == [*tokens, *[ids("z")[0]] * 4][:kept]


def test_beams_end_at_the_checkpoints_ids_too(ending):
    asked = {"max_new_tokens": 6, "beams": 1}
    free = jkv.beam_search(ending, "ab", stop=(), **asked).tokens[0, 0].tolist()
    config = dataclasses.replace(ending.config, end_ids=(free[2],))
    model = jkv.Decoder(config, rngs=texts.nnx.Rngs(1))
    others = [i for i in range(config.vocab) if i not in free][:1]
    for stop in (None, others):
        beams = jkv.beam_search(model, [[1, 259, 261]], stop=stop, **asked)
        want = jkv.generate(model, [[1, 259, 261]], max_new_tokens=6, stop=free[2])
        assert beams.tokens[0, 0].tolist() == want.tokens[0].tolist()


@pytest.mark.parametrize(
    ("stop", "reply"),
    [
        ("##", "b"),  # the checkpoint's own ends it first
        ("</s>", "b"),
        ("b</s>", ""),
        ("#b", ""),  # begins in the prompt
        ((), "bczzzz"),
        ([], "bczzzz"),
        ("zz", "b"),
        (["c"], "b"),
    ],
)
def test_a_reply_ends_where_a_row_does(ending, stop, reply):
    asked = forcing(*ids("b"), texts.EOS, *ids("c")) | {"max_new_tokens": 7}
    chat = jkv.Chat(ending, stop=stop, **asked)
    pieces = list(chat.stream("ab"))
    assert "".join(pieces) == reply == chat.messages[-1]["content"]


@pytest.mark.parametrize(
    ("stop", "reply"), [("c</s>e", "bcdzzzz"), ("c</s>d", "b"), ("c</s>", "b"), ("c", "b")]
)
def test_what_may_become_a_stop_string_is_held_back(lm, monkeypatch, stop, reply):
    tokens = [*ids("bc"), texts.EOS, *ids("dzzzz")]
    # One token at a time, as a reader of a slow model gets them.
    module = importlib.import_module("jkv.decoding.chat")
    monkeypatch.setattr(module, "stream", functools.partial(module.stream, block=1))
    chat = jkv.Chat(lm, stop=stop, **forcing(*tokens))
    assert "".join(chat.stream("ab")) == reply


def test_an_engine_takes_sixteen_ids_beside_the_checkpoints(ending):
    with jkv.Engine(ending, pages=8, max_batch=1) as engine:
        others = list(range(100, 116))
        tokens = [*ids("b"), texts.EOS]
        request = engine.submit("ab", stop=others, **forcing(*tokens))
        by_id = engine.submit("ab", stop=others, **forcing(*ids("b"), 115))
        engine.run()
        assert request.tokens == tokens
        assert by_id.tokens == [*ids("b"), 115]
        with pytest.raises(ValueError, match=r"18 ids .* own; an engine takes at most 16"):
            engine.submit("ab", max_new_tokens=1, stop=[*others, 99])


# The search itself


class Counting:
    """A tokenizer that counts the tokens it is asked about."""

    def __init__(self) -> None:
        self.asked = 0

    def token_bytes(self, token: int) -> bytes:
        self.asked += 1
        return TOKENIZER.token_bytes(token)

    def is_special(self, token: int) -> bool:
        return TOKENIZER.is_special(token)

    def decode(self, tokens: Any, **_: Any) -> str:
        self.asked += len(tokens)
        return TOKENIZER.decode(tokens)

    def encode(self, text: str) -> list[int]:
        return TOKENIZER.encode(text)

    encode_continuation = encode


@pytest.mark.parametrize("length", [20, 20_000])
def test_the_search_costs_the_same_however_long_the_row_is(length):
    tokenizer = Counting()
    tokens = ids("a") * length
    assert first_stop(tokenizer, ["bc", "a b"], ids("a") * length, tokens, 4) is None
    assert tokenizer.asked == 4 + 2  # the new ones, and those in which a string could begin


def test_generation_decodes_nothing_to_find_stop_strings(lm):
    counting = Counting()
    asked = forcing(*ids("b")) | {"max_new_tokens": 64, "stop": "no"}
    counted = SimpleNamespace(model=lm.model, tokenizer=counting)
    out = jkv.generate(counted, ["ab"], **asked)
    assert out.lengths.tolist() == [64]
    # Each token once, and once a block a few of those before it.
    assert counting.asked <= 64 + 4 * len("no")


PIECES = st.sampled_from(
    [*ids("a"), *ids(" a"), *ids("bc"), *EURO, *EURO, texts.EOS, texts.SPACE, 0, 287, 300]
)


@settings(max_examples=300, deadline=None)
@given(
    prompt=st.lists(PIECES, max_size=5),
    blocks=st.lists(st.lists(PIECES, max_size=4), max_size=6),
    strings=st.lists(
        st.text("ab c€</s>", min_size=1, max_size=3) | st.sampled_from(["</s>", "a</s>", "€€"]),
        min_size=1,
        max_size=3,
    ),
)
def test_blocks_are_searched_like_the_whole(prompt, blocks, strings):
    tokens = [token for block in blocks for token in block]
    before = b"".join(map(TOKENIZER.token_bytes, prompt))

    def complete(n: int) -> bool:
        size = len(before) + len(b"".join(map(TOKENIZER.token_bytes, tokens[: n - 1])))
        whole = before + b"".join(map(TOKENIZER.token_bytes, tokens[:n]))
        wanted = [s.encode() for s in strings]
        return any(whole.find(w, max(0, size - len(w) + 1)) >= 0 for w in wanted)

    want = next((n for n in range(1, len(tokens) + 1) if complete(n)), None)
    row: list[int] = []
    found: StopMatch | None = None
    for block in blocks:
        row += block
        found = first_stop(TOKENIZER, strings, prompt, row, len(block))
        if found:
            break
    assert (found.kept if found else None) == want


@pytest.mark.parametrize(
    ("prompt", "tokens", "stop", "visible"),
    [
        ([], [256], "e", "e"),  # "he": its first letter is no part of the string
        ([], [256, 257], "e w", "e w"),
        ([256], [257], "he w", " w"),  # the prompt's part is not the row's
        ([], [256, 257], " ", " w"),  # what follows in the last token goes with it
        ([], [256, texts.END, 257], "<|end|> ", " w"),
    ],
)
def test_what_is_visible_of_a_stop_string(prompt, tokens, stop, visible):
    match = first_stop(texts.byte_level(), [stop], prompt, tokens, len(tokens))
    assert match == StopMatch(len(tokens), visible)


@pytest.mark.parametrize("tokenizer", [texts.byte_level(), texts.byte_fallback(), TOKENIZER])
def test_the_bytes_of_a_row_are_its_text(tokenizer):
    tokens = tokenizer.encode("a the €\n", special=False)
    assert b"".join(map(tokenizer.token_bytes, tokens)).decode().lstrip() == "a the €\n"
    assert tokenizer.token_bytes(tokenizer.vocab + 7) == b""


def test_special_tokens_have_bytes():
    assert TOKENIZER.token_bytes(texts.EOS) == b"</s>"
    assert texts.byte_level().token_bytes(texts.END) == b"<|end|>"
    assert TOKENIZER.without_special("a</s>b<s>") == "ab"
