"""A stored conversation that cannot go on as asked is refused, and stays as it is."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import pytest
from flax import nnx

import jkv
from jkv.store import Memory, Store
from tests.decoding import texts

NEW = 4


@pytest.fixture(scope="module")
def lm(tiny_config: Any) -> jkv.LM:
    return texts.noise(tiny_config, layers=1)


@pytest.fixture(scope="module")
def store(lm: jkv.LM):
    with Store([Memory()]) as store:
        for sequence_id, system in (("z", "Hear."), ("plain", None)):
            chat = jkv.Chat(
                lm, system=system, max_new_tokens=NEW, store=store, sequence_id=sequence_id
            )
            chat.send("hello")
        yield store


def other_weights(lm: jkv.LM) -> jkv.LM:
    graph, state = nnx.split(lm.model)
    return dataclasses.replace(lm, model=nnx.merge(graph, jax.tree.map(lambda x: x * 2, state)))


@pytest.mark.parametrize(
    ("sequence_id", "change", "match"),
    [
        (
            "z",
            {"system": "Speak."},
            "the system prompt 'Hear.'; got system='Speak.'. Pass the same",
        ),
        ("plain", {}, "of 2 messages .* no system prompt; got system='Hear.'"),
        ("z", {"cache": "int4"}, r"3 messages .* with the cache DenseKind\(.*\); got .*bits=4"),
        ("z", {"lm": other_weights}, "of another model, or of other weights"),
    ],
)
def test_another_prompt_kind_or_model_is_refused(lm, store, sequence_id, change, match):
    how = {"system": "Hear.", "store": store, "sequence_id": sequence_id} | change
    model = how.pop("lm", lambda lm: lm)(lm)
    with pytest.raises(ValueError, match=match) as error:
        jkv.Chat(model, **how)
    assert f"store.remove('{sequence_id}')" in str(error.value)
    system = "Hear." if sequence_id == "z" else None
    kept = jkv.Chat(lm, system=system, store=store, sequence_id=sequence_id)
    assert [message["role"] for message in kept.messages][-2:] == ["user", "assistant"]


def test_what_the_error_says_to_do_does_it(lm):
    with Store([Memory()]) as store:
        how: dict[str, Any] = {"store": store, "sequence_id": "a", "tenant": "me"}
        jkv.Chat(lm, max_new_tokens=NEW, **how).send("hello")
        with pytest.raises(ValueError, match=r"store\.remove\('a', tenant='me'\)"):
            jkv.Chat(lm, cache="int4", **how)
        assert store.remove("a", tenant="me")
        assert jkv.Chat(lm, cache="int4", **how).messages == []


def test_what_is_no_conversation_of_another_kind_begins_anew(lm):
    with Store([Memory()]) as store:
        jkv.generate(lm, ["hello"], max_new_tokens=2, store=store, sequence_ids=["text"])
        assert jkv.Chat(lm, cache="int4", store=store, sequence_id="text").messages == []
