"""Entries under the right fingerprint that are not what this model would have kept."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jkv
from jkv.cache.fingerprint import fingerprint
from jkv.cache.init import init_cache
from jkv.cache.spec import examples, parse
from jkv.errors import CorruptError
from jkv.store import Disk, Entry, Memory, Store
from jkv.store.packing import check_like, pack, unpack
from tests.decoding import texts

LONG = np.random.default_rng(11).integers(0, 11, 50).tolist()
HOW = {"max_new_tokens": 4, "stop": (), "slots": 128}


def layer(meta, i):
    return meta["cache"]["fields"]["layers"]["tuple"][i]


def as_type(dtype):
    def change(arrays, meta):
        for name, array in arrays.items():
            if name.startswith("layers.") and array.dtype == np.float32:
                arrays[name] = array.astype(dtype)

    return change


def sliced(where):
    def change(arrays, meta):
        for name, array in arrays.items():
            if name.startswith("layers."):
                arrays[name] = array[where]

    return change


def one_array(arrays, meta):
    name = next(name for name in arrays if name.startswith("layers."))
    arrays[name] = arrays[name][..., :-1, :]


def a_layer_more(arrays, meta):
    meta["cache"]["fields"]["layers"]["tuple"].append(layer(meta, 0))


def a_layer_less(arrays, meta):
    del meta["cache"]["fields"]["layers"]["tuple"][1:]


def no_layers(arrays, meta):
    meta["cache"]["fields"]["layers"] = {"tuple": []}


def layers_of_numbers(arrays, meta):
    meta["cache"]["fields"]["layers"]["tuple"] = [1, 2]


def another_class(arrays, meta):
    layer(meta, 0)["class"] = "jkv.cache.base:Cache"


def no_class(arrays, meta):
    layer(meta, 0)["class"] = ["jkv"]


def a_program(arrays, meta):
    layer(meta, 0)["class"] = "jkv.cli.process:size"


def a_text(arrays, meta):
    meta["cache"] = "cache"


def a_number_for_an_array(arrays, meta):
    layer(meta, 1)["fields"]["values"] = 0


def an_array_for_a_setting(arrays, meta):
    layer(meta, 1)["fields"]["grows"] = {"array": "tokens"}


def a_list_for_a_setting(arrays, meta):
    layer(meta, 1)["fields"]["grows"] = [False]


def two_things_in_one(arrays, meta):
    layer(meta, 0)["fields"]["keys"]["tuple"] = 5


def two_things_in_one_of_another_form(arrays, meta):
    two_things_in_one(arrays, meta)
    meta["form"] = "int8"


def longer_than_it_is(arrays, meta):
    meta["length"] = 10**6


def below_nothing(arrays, meta):
    arrays["lengths"] = np.asarray([-53], np.int32)


def of_two_rows(arrays, meta):
    arrays["lengths"] = np.asarray([53, 53], np.int32)


def tokens_of_two_rows(arrays, meta):
    arrays["tokens"] = np.stack([arrays["tokens"]] * 2)


def tokens_of_another_kind(arrays, meta):
    arrays["tokens"] = arrays["tokens"].astype(np.float64)


def no_tokens(arrays, meta):
    del arrays["tokens"]


def lacking_an_array(arrays, meta):
    del arrays[next(name for name in arrays if name.startswith("layers."))]


def meta_of(**values):
    return lambda arrays, meta: meta.update(values)


LIES = {
    "int32 keys": as_type(np.int32),
    "float16 keys": as_type(np.float16),
    "fewer heads": sliced(np.s_[:, :1]),
    "wider heads": sliced(np.s_[..., :4]),
    "fewer slots": sliced(np.s_[:, :, :32]),
    "one array of another length": one_array,
    "no axis": sliced(np.s_[0]),
    "a layer too many": a_layer_more,
    "a layer too few": a_layer_less,
    "no layers": no_layers,
    "layers of numbers": layers_of_numbers,
    "a layer of another class": another_class,
    "a class that is no text": no_class,
    "a name of another module": a_program,
    "a text for a cache": a_text,
    "a number for an array": a_number_for_an_array,
    "an array for a setting": an_array_for_a_setting,
    "a list for a setting": a_list_for_a_setting,
    "an array that is a tuple too": two_things_in_one,
    "the same, rounded": two_things_in_one_of_another_form,
    "another length": longer_than_it_is,
    "a length below 0": below_nothing,
    "two rows": of_two_rows,
    "tokens of two rows": tokens_of_two_rows,
    "float tokens": tokens_of_another_kind,
    "no tokens": no_tokens,
    "an array that is not there": lacking_an_array,
    "another version": meta_of(jkv=2),
    "a version that is a list": meta_of(jkv=[1]),
    "a form that is a list": meta_of(form=["int8"]),
    "seconds that are a text": meta_of(seconds="soon"),
}


def lied(store, key, change, **kept):
    """Put an entry anew, changed, past what `put` would refuse."""
    with store.open(key) as handle:
        arrays = {name: np.array(array) for name, array in handle.entry.arrays.items()}
        meta = json.loads(json.dumps(dict(handle.entry.meta)))
        tokens = handle.tokens
    change(arrays, meta)
    seconds = meta.pop("seconds", None)
    store.put(key, Entry(arrays, meta), tokens=tokens, **kept)
    if isinstance(seconds, str):
        entry = store._index.tiers[0].tier.read(store._index.records[f"0::{key}"].name)
        store._index.tiers[0].tier.write(
            f"0::{key}", Entry(entry.arrays, {**entry.meta, "seconds": seconds})
        )


@pytest.fixture(scope="module")
def plain(tiny_model):
    return jkv.generate(tiny_model, [LONG], **HOW).tokens.tolist()


@pytest.mark.parametrize("lie", LIES)
def test_they_are_misses_counted_and_put_aside(tiny_model, tmp_path, plain, lie):
    mark = fingerprint(tiny_model, jkv.dense())
    with Store([Disk(tmp_path)]) as store:
        jkv.generate(tiny_model, [LONG], store=store, sequence_ids=["a"], **HOW)
        lied(store, "a", LIES[lie], fingerprint=mark)
        for ids in (["a"], None):
            out = jkv.generate(tiny_model, [LONG], store=store, sequence_ids=ids, **HOW)
            # It is right before and after the good one has taken its place.
            assert out.tokens.tolist() == plain
            if ids is not None:
                assert out.reused.tolist() == [0]
        assert out.reused.tolist() == [49]
        assert store.stats()["tiers"]["disk"]["corrupt"] >= 1
    assert len(list((tmp_path / "quarantine").iterdir())) == 1


def test_one_that_is_right_is_not(tiny_model, tmp_path, plain):
    mark = fingerprint(tiny_model, jkv.dense())
    with Store([Disk(tmp_path)]) as store:
        jkv.generate(tiny_model, [LONG], store=store, sequence_ids=["a"], **HOW)
        lied(store, "a", lambda arrays, meta: None, fingerprint=mark)
        out = jkv.generate(tiny_model, [LONG], store=store, sequence_ids=["a"], **HOW)
        assert out.reused.tolist() == [49]
        assert out.tokens.tolist() == plain
        assert store.stats()["tiers"]["disk"]["corrupt"] == 0


@pytest.mark.parametrize("spec", examples())
def test_what_a_model_keeps_of_any_kind_is_like_it(tiny_config, spec):
    """Before and after it was stored, in any number of slots; and not like that of another."""
    kind = parse(spec)
    for slots in (64, 200):
        cache = init_cache(tiny_config, kind, batch=1, slots=slots, dtype="float32")
        check_like(cache, tiny_config, kind)
        check_like(unpack(pack(cache)), tiny_config, kind)
    rows = jax.tree.map(lambda x: jnp.concatenate([x, x]) if x.ndim else x, cache)
    for other in (jkv.window(4, sinks=3), jkv.none()):
        with pytest.raises(CorruptError, match="an entry"):
            check_like(cache, tiny_config, other if other != kind else jkv.window(9, sinks=2))
    if spec != "none":
        with pytest.raises(CorruptError, match="an entry"):
            check_like(rows, tiny_config, kind)


def bits(arrays, meta):
    layer(meta, 0)["fields"]["keys"]["fields"]["bits"] = 4


def bits_that_are_an_array(arrays, meta):
    layer(meta, 0)["fields"]["keys"]["fields"]["bits"] = {"array": "tokens"}


ROUNDED_LIES = {
    "another form": meta_of(form="int4"),
    "fewer bits": bits,
    "bits that are an array": bits_that_are_an_array,
}


@pytest.mark.parametrize("lie", ROUNDED_LIES)
def test_of_a_tier_that_rounds_they_are_misses_too(tiny_model, tmp_path, plain, lie):
    mark = fingerprint(tiny_model, jkv.dense())
    with Store([Disk(tmp_path)], forms={"disk": "int8"}) as store:
        jkv.generate(tiny_model, [LONG], store=store, sequence_ids=["a"], **HOW)
        out = jkv.generate(tiny_model, [LONG], store=store, sequence_ids=["a"], **HOW)
        assert out.reused.tolist() == [49]
        lied(store, "a", ROUNDED_LIES[lie], fingerprint=mark)
        out = jkv.generate(tiny_model, [LONG], store=store, sequence_ids=["a"], **HOW)
        assert out.reused.tolist() == [0]
        assert out.tokens.tolist() == plain
        assert store.stats()["tiers"]["disk"]["corrupt"] == 1


def test_what_cannot_be_rounded_stays_as_it_is(tiny_model, tmp_path):
    with Store([Disk(tmp_path)], forms={"disk": "int8"}) as store:
        entry = pack(jkv.generate(tiny_model, [LONG], **HOW).cache)
        arrays, meta = dict(entry.arrays), dict(entry.meta)
        one_array(arrays, meta)
        assert store.put("a", Entry(arrays, meta)) == "a"
        assert store.get_entry("a").meta["form"] == "exact"


CHATS = [
    {"messages": 7},
    {"messages": "text"},
    {"messages": [7]},
    {"messages": [{"role": "user"}]},
    {"messages": [{"role": 1, "content": "hello"}]},
    {"messages": [{"role": "tool", "content": 7}]},
    {"turns": "many"},
    {"turns": -1},
    {"turns": 1.5},
]


@pytest.mark.parametrize("lie", CHATS, ids=map(str, CHATS))
def test_conversations_that_are_none(tiny_config, lie):
    lm = texts.noise(tiny_config, layers=1)
    mark = fingerprint(lm.model, jkv.dense())
    with Store([Memory()]) as store:
        how = {"store": store, "sequence_id": "a", "max_new_tokens": 4}
        first = jkv.Chat(lm, **how)
        reply = first.send("hello")
        assert jkv.Chat(lm, **how).messages == first.messages
        lied(store, "a", meta_of(**lie), fingerprint=mark)
        chat = jkv.Chat(lm, **how)
        assert chat.messages == []
        assert chat.send("hello") == reply
        assert store.stats()["tiers"]["memory"]["corrupt"] == 1
