"""A trained checkpoint: the tokens of `transformers`, whatever way they are asked for."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np
import pytest

import jkv
from tests.decoding import oracle

pytestmark = pytest.mark.slow  # once, not on each Python

GOLDEN = json.loads(
    (Path(__file__).resolve().parent.parent / "golden" / "stories260k.json").read_text()
)
IDS = [case["ids"] for case in GOLDEN]
TOKENS = [case["tokens"] for case in GOLDEN]
NEW = len(TOKENS[0])
SLOTS = 128


@pytest.fixture(scope="module")
def lm(shared):
    path = shared / "models" / "stories260k"
    return jkv.load(path)


@pytest.fixture(params=["dense", "none"])
def kind(request):
    return {"dense": jkv.dense(), "none": jkv.none()}[request.param]


def test_the_tokenizer_gives_the_same_ids(lm):
    assert len(GOLDEN) >= 16
    assert len({len(ids) for ids in IDS}) > 5  # ragged, or the batches below show less
    assert lm.encode([case["prompt"] for case in GOLDEN]) == IDS


def test_one_ragged_batch(lm, kind):
    out = jkv.generate(lm.model, IDS, max_new_tokens=NEW, cache=kind, stop=(), slots=SLOTS)
    assert oracle.generated(out) == TOKENS


def test_each_alone(lm):
    for ids, tokens in zip(IDS, TOKENS, strict=True):
        out = jkv.generate(lm.model, [ids], max_new_tokens=NEW, stop=(), slots=SLOTS)
        assert oracle.generated(out) == [tokens]


def test_some_alone_without_a_cache(lm):
    for ids, tokens in list(zip(IDS, TOKENS, strict=True))[::4]:
        out = jkv.generate(
            lm.model, [ids], max_new_tokens=NEW, cache=jkv.none(), stop=(), slots=SLOTS
        )
        assert oracle.generated(out) == [tokens]


def test_texts_and_small_chunks(lm):
    prompts = [case["prompt"] for case in GOLDEN]
    out = jkv.generate(lm, prompts, max_new_tokens=NEW, stop=(), slots=SLOTS, prefill_chunk=16)
    assert oracle.generated(out) == TOKENS
    assert lm.decode(out.tokens)[0] == lm.decode(TOKENS[0])


def test_texts_of_turns_join(lm):
    """README's way: text prompts, resumed with texts, read from the results and from a stream."""
    prompts, turns = ["Once upon a time", "<s>Tom had a"], [" there was a", ""]
    asked = {"max_new_tokens": 9, "stop": (), "slots": SLOTS}
    out = jkv.generate(lm, prompts, **asked)
    more = jkv.stream(lm, turns, resume=out, **asked)
    pieces = ["".join(texts) for texts in zip(*(block.texts for block in more), strict=True)]
    assert tuple(pieces) == more.result.texts
    for row, prompt in enumerate(("Once upon a time", "Tom had a")):
        history = more.result.history[row].tolist()
        assert history.count(lm.tokenizer.token_id("<s>")) == 1
        assert prompt + out.texts[row] + turns[row] + pieces[row] == lm.decode(history)
    # Nothing added is the same row, told on.
    at_once = jkv.generate(lm, [prompts[1]], max_new_tokens=18, stop=(), slots=SLOTS)
    assert at_once.text == out.texts[1] + pieces[1]


def test_resumed_in_pieces(lm, kind):
    out, said = None, [[] for _ in IDS]
    for new in (1, 15, 2, NEW - 18):
        kwargs = {"cache": kind} if out is None else {"resume": out}
        prompts = IDS if out is None else [[] for _ in IDS]
        out = jkv.generate(lm.model, prompts, max_new_tokens=new, stop=(), slots=SLOTS, **kwargs)
        said = [a + b for a, b in zip(said, oracle.generated(out), strict=True)]
    assert said == TOKENS


def test_resumed_after_rows_ended_apart(lm, kind):
    """Each row stops at a token of its own, is told some of what it would have said, goes on."""
    stop = [[tokens[row]] for row, tokens in enumerate(TOKENS)]
    ended = [tokens.index(s) + 1 for tokens, (s,) in zip(TOKENS, stop, strict=True)]
    assert len(set(ended)) > 5
    out = jkv.generate(lm.model, IDS, max_new_tokens=20, cache=kind, stop=stop, slots=SLOTS)
    assert out.finish_reasons == ("stop",) * len(IDS)
    assert out.lengths.tolist() == ended
    told = [end + row % 5 for row, end in enumerate(ended)]
    turn = [t[a:b] for t, a, b in zip(TOKENS, ended, told, strict=True)]
    rest = NEW - max(told)
    out = jkv.generate(lm.model, turn, max_new_tokens=rest, stop=(), resume=out, slots=SLOTS)
    assert oracle.generated(out) == [t[n : n + rest] for t, n in zip(TOKENS, told, strict=True)]


def test_a_stop_string_in_real_text(lm):
    """Sentences: what is kept ends with the token that completes the full stop."""
    out = jkv.generate(lm, IDS, max_new_tokens=NEW, stop=". ", slots=SLOTS)
    for row, tokens in enumerate(TOKENS):
        end = next(n for n in range(1, NEW + 1) if n == NEW or ". " in lm.decode(tokens[:n]))
        assert oracle.generated(out)[row] == tokens[:end]
    assert "stop" in out.finish_reasons


def test_sampled_turns_equal_the_conversation_at_once(lm):
    sampler = jkv.sampling.chain(jkv.sampling.temperature(0.9), jkv.sampling.top_k(40))
    draw = {"sampler": sampler, "key": jax.random.key(0), "stop": (), "slots": SLOTS}
    whole = jkv.generate(lm.model, IDS, max_new_tokens=NEW, **draw)
    first = jkv.generate(lm.model, IDS, max_new_tokens=20, **draw)
    rest = jkv.generate(lm.model, [[] for _ in IDS], max_new_tokens=NEW - 20, resume=first, **draw)
    joined = np.concatenate([first.tokens, rest.tokens], axis=1)
    np.testing.assert_array_equal(joined, whole.tokens)
    assert oracle.generated(whole) != TOKENS
