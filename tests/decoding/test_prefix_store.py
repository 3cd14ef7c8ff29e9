"""Generation in front of a store: the same tokens, cold, warm and after a restart, with hits."""

from __future__ import annotations

import weakref
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jkv
from jkv._pytree import replace
from jkv.cache import BlockTables, Cache, concat
from jkv.cache.spec import parse
from jkv.decoding import prefix_store
from jkv.ops import dispatch
from jkv.ops.pages import TpuPages
from jkv.store import Device, Disk, Memory, Store
from jkv.store.packing import converted, pack
from tests.decoding import oracle, texts
from tests.decoding.test_chat import NEW
from tests.ops.calls import needs

RNG = np.random.default_rng(11)
LONG = RNG.integers(0, 11, 50).tolist()
OTHER = RNG.integers(0, 11, 37).tolist()
HOW = {"max_new_tokens": 6, "stop": (), "slots": 128}


@pytest.fixture
def store():
    with Store(tiers=[Memory(1 << 26)]) as it:
        yield it


def test_cold_warm_and_a_batch_of_both(tiny_model, store):
    want = jkv.generate(tiny_model, [LONG, OTHER], **HOW).tokens.tolist()
    cold = jkv.generate(tiny_model, [LONG], store=store, **HOW)
    assert cold.reused.tolist() == [0]
    assert cold.tokens.tolist() == want[:1]
    warm = jkv.generate(tiny_model, [LONG, OTHER], store=store, **HOW)
    assert warm.reused.tolist() == [49, 0]  # all but the token whose logits are wanted
    assert warm.tokens.tolist() == want
    oracle.check_cache(tiny_model, warm)
    figures = store.stats()
    assert figures["hits"] == 1
    assert figures["accesses"] == figures["hits"] + figures["misses"] == 3


def test_an_answer_is_found_by_the_next_turn(tiny_model, store):
    first = jkv.generate(tiny_model, [LONG], store=store, **HOW)
    said = first.tokens[0].tolist()
    turn = LONG + said + [4, 4]
    second = jkv.generate(tiny_model, [turn], store=store, **HOW)
    # The last token said has no keys and values.
    assert second.reused.tolist() == [len(LONG) + len(said) - 1]
    assert second.tokens.tolist() == jkv.generate(tiny_model, [turn], **HOW).tokens.tolist()


def test_any_common_beginning_is_found_and_cut(tiny_model, store):
    jkv.generate(tiny_model, [LONG], store=store, **HOW)
    branch = [*LONG[:29], (LONG[29] + 1) % 11, 3, 3]
    out = jkv.generate(tiny_model, [branch], store=store, **HOW)
    assert out.reused.tolist() == [29]
    assert out.tokens.tolist() == jkv.generate(tiny_model, [branch], **HOW).tokens.tolist()


def test_by_sequence_id_however_short(tiny_model, store):
    jkv.generate(tiny_model, [[1, 2, 3], [4, 5]], store=store, sequence_ids=["a", "b"], **HOW)
    prompts = [[1, 2, 3, 9], [4, 5, 9], [4, 5, 9]]
    out = jkv.generate(tiny_model, prompts, store=store, sequence_ids=["a", "b", "c"], **HOW)
    assert out.reused.tolist() == [3, 2, 0]
    assert out.tokens.tolist() == jkv.generate(tiny_model, prompts, **HOW).tokens.tolist()


class Counting(Memory):
    """A tier that says what it was asked, as one that is waited for."""

    immediate = False

    def __init__(self):
        super().__init__()
        self.calls = []

    def read(self, key):
        self.calls.append(("read", 1))
        return super().read(key)

    def read_many(self, keys):
        self.calls.append(("read_many", len(keys)))
        return {key: Memory.read(self, key) for key in keys}

    def write_many(self, entries):
        self.calls.append(("write_many", len(entries)))
        return {key: self.write(key, entry) for key, entry in entries.items()}


def test_a_batch_is_read_and_written_at_once(tiny_model):
    tier = Counting()
    rows = [LONG, OTHER, [1, 2, 3, *OTHER], OTHER[:30]]
    with Store(tiers=[tier]) as store:
        jkv.generate(tiny_model, rows[:3], store=store, **HOW)
        assert tier.calls == [("write_many", 3)]
        tier.calls.clear()
        out = jkv.generate(tiny_model, rows, store=store, **HOW)
        assert out.reused.tolist() == [49, 36, 39, 29]
        assert tier.calls == [("read_many", 3), ("write_many", 4)]  # two rows have one beginning
        figures = store.stats()
        assert (figures["hits"], figures["misses"]) == (4, 3)
        assert figures["tokens_found"] == 49 + 36 + 39 + 29
        tier.calls.clear()
        ids = ["a", "b", "c", "d"]
        jkv.generate(tiny_model, rows, store=store, sequence_ids=ids, **HOW)
        tier.calls.clear()
        out = jkv.generate(tiny_model, rows, store=store, sequence_ids=ids, **HOW)
        assert out.reused.tolist() == [49, 36, 39, 29]
        assert tier.calls == [("read_many", 4), ("write_many", 4)]
    want = jkv.generate(tiny_model, rows, **HOW)
    assert out.tokens.tolist() == want.tokens.tolist()


def test_of_several_rows_one_at_a_time_is_copied(tiny_model, store, monkeypatch):
    """All of them would be a second cache on the device."""
    row_of, made = prefix_store.take_row, []

    def copied(cache, row):
        assert not any(ref() for ref in made)
        made.append(weakref.ref(it := row_of(cache, row)))
        return it

    monkeypatch.setattr(prefix_store, "take_row", copied)
    out = jkv.generate(tiny_model, [LONG, OTHER, OTHER[:20]], store=store, **HOW)
    assert len(made) == len(store) == len(out.tokens)


def test_another_process_finds_it_on_disk_to_the_bit(tiny_model, tmp_path):
    with Store(tiers=[Memory(1 << 26), Disk(tmp_path, 1 << 28)]) as store:
        first = jkv.generate(tiny_model, [LONG], store=store, sequence_ids=["a"], **HOW)
    with Store(tiers=[Memory(1 << 26), Disk(tmp_path, 1 << 28)]) as store:
        again = jkv.generate(tiny_model, [LONG], store=store, **HOW)
        assert again.reused.tolist() == [49]
        assert again.tokens.tolist() == first.tokens.tolist()
        with store.open("a", fingerprint=store_print(tiny_model)) as handle:
            held = jkv.store.unpack(handle.entry)
        length = int(held.lengths[0])
        pairs = zip(held.to_legacy(), first.cache.to_legacy(), strict=True)
        for got, want in pairs:
            for a, b in zip(got, want, strict=True):
                np.testing.assert_array_equal(
                    np.asarray(a)[:, :, :length], np.asarray(b)[:, :, :length]
                )


def store_print(model, kind=None):
    from jkv.cache.fingerprint import fingerprint

    return fingerprint(model, jkv.dense() if kind is None else kind)


def test_what_is_taken_stays_as_it_is(tiny_model, store):
    # A restored cache is given to programs that write into it.
    jkv.generate(tiny_model, [LONG], store=store, sequence_ids=["a"], **HOW)
    with store.open("a") as handle:
        before = {k: np.array(v) for k, v in handle.entry.arrays.items()}
        for tail in (1, 2):
            jkv.generate(tiny_model, [[*LONG, tail]], store=store, **HOW)
        for name, array in handle.entry.arrays.items():
            np.testing.assert_array_equal(np.asarray(array), before[name])


@pytest.mark.parametrize("change", ["weights", "kind", "tenant", "nothing"])
def test_what_another_made_is_never_found(tiny_model, store, change):
    jkv.generate(tiny_model, [LONG], store=store, **HOW)
    model, how = tiny_model, {}
    if change == "weights":
        leaves, tree = jax.tree.flatten(tiny_model)
        leaves[0] = leaves[0] * np.float32(1 + 1e-6)
        model = jax.tree.unflatten(tree, leaves)
    if change == "kind":
        how["cache"] = jkv.window(200)
    if change == "tenant":
        how["tenant"] = "somebody else"
    out = jkv.generate(model, [LONG], store=store, **HOW, **how)
    assert out.reused.tolist() == [49 if change == "nothing" else 0]


@pytest.mark.slow  # each kind is compiled twice
@pytest.mark.parametrize(
    ("spec", "found"), [("window:16", 55), ("paged:4", 55), ("evict:16,score=key_norm", 55)]
)
def test_other_kinds(tiny_model, store, spec, found):
    kind = parse(spec)
    first = jkv.generate(tiny_model, [LONG], store=store, cache=kind, **HOW)
    turn = LONG + first.tokens[0].tolist() + [4, 4]
    out = jkv.generate(tiny_model, [turn, OTHER], store=store, cache=kind, **HOW)
    assert out.reused.tolist() == [found, 0]
    resumed = jkv.generate(tiny_model, [[4, 4]], resume=first, max_new_tokens=6, stop=())
    assert out.tokens[0].tolist() == resumed.tokens[0].tolist()


@needs("mosaic_tpu")
@pytest.mark.parametrize(
    ("kind", "dim"), [(jkv.paged(), 48), (jkv.paged(bits=4), 64), (jkv.paged(codec=jkv.fp8()), 64)]
)
def test_pages_of_a_tpu_and_of_others_are_the_same_entries(kind, dim):
    """They lie otherwise in memory, of which an entry says nothing."""

    def new():
        return Cache.empty([kind.init(1, 64, 2, dim, jnp.float32)], 1, 64)

    def drawn(leaf):  # codes, steps and numbers of any kind, none of them NaN
        return jnp.asarray(RNG.integers(0, 2 if leaf.dtype == bool else 64, leaf.shape), leaf.dtype)

    empty = new()
    cache = replace(
        empty,
        layers=jax.tree.map(drawn, empty.layers),
        lengths=jnp.asarray([50], jnp.int32),
        shared=(BlockTables((jnp.asarray([[2, 0, 3, 1]], jnp.int32),)),),
    )
    entry = pack(cache)
    with dispatch.target("tpu"):
        there = jkv.store.unpack(entry)
        assert isinstance(there.layers[0].k_pages, TpuPages)
        both = concat([new(), there])  # as a batch of one row that is found and one that is not
        back = pack(both.take([1]))
    assert back.meta == entry.meta
    again = jkv.store.unpack(back)
    assert not isinstance(again.layers[0].k_pages, TpuPages)
    for a, b in zip(again.to_legacy(), cache.to_legacy(), strict=True):
        np.testing.assert_array_equal(a, b)
    assert concat([new(), again]).batch == 2


def test_a_tier_on_the_device(tiny_model):
    with Store(tiers=[Device(1 << 18), Memory(1 << 26)]) as store:
        for i in range(12):  # more than the device's share
            jkv.generate(tiny_model, [[i % 11] * 20], store=store, **HOW)
        for i in (11, 0):
            out = jkv.generate(tiny_model, [[i % 11] * 20], store=store, **HOW)
            assert out.reused.tolist() == [19]
            want = jkv.generate(tiny_model, [[i % 11] * 20], **HOW)
            assert out.tokens.tolist() == want.tokens.tolist()


def test_a_key_is_no_blindfold(tiny_model, store):
    jkv.generate(tiny_model, [LONG], store=store, **HOW)
    jkv.generate(tiny_model, [[LONG[0], 5, 5]], store=store, sequence_ids=["a"], **HOW)
    out = jkv.generate(tiny_model, [LONG], store=store, sequence_ids=["a"], **HOW)
    assert out.reused.tolist() == [49]


def test_what_it_took_adds_up(tiny_model, store):
    first = jkv.generate(tiny_model, [LONG], store=store, sequence_ids=["a"], **HOW)
    kept = store_seconds(store, "a")
    assert kept == pytest.approx(first.prefill_seconds + first.decode_seconds)
    turn = [*LONG, *first.tokens[0].tolist(), 4]
    jkv.generate(tiny_model, [turn], store=store, sequence_ids=["a"], **HOW)
    assert store_seconds(store, "a") > kept


def store_seconds(store, key):
    with store.open(key) as handle:
        return handle.entry.meta["seconds"]


@pytest.mark.slow
def test_a_tier_may_round_what_it_holds(tiny_model):
    with Store(tiers=[Memory(1 << 26)], forms={"memory": "int8"}) as store:
        jkv.generate(tiny_model, [LONG], store=store, sequence_ids=["a"], **HOW)
        with store.open("a") as handle:
            assert handle.entry.meta["form"] == "int8"
        out = jkv.generate(tiny_model, [LONG, OTHER], store=store, **HOW)
        assert out.reused.tolist() == [49, 0]
        want = jkv.generate(tiny_model, [OTHER], **HOW).tokens[0].tolist()
        assert out.tokens[1].tolist() == want


@pytest.mark.slow
@pytest.mark.parametrize(("tokens", "share"), [(400, 0.75), (50, 1.0)])
def test_a_rounded_form_takes_fewer_bytes_or_is_not_taken(tokens, share):
    keys = np.random.default_rng(0).standard_normal((1, 2, tokens, 8)).astype(np.float32)
    exact = jkv.store.pack(jkv.from_legacy([(keys, keys)]))
    rounded = converted(exact, "int4")
    assert rounded.meta["form"] == ("int4" if share < 1 else "exact")
    assert rounded.nbytes <= share * exact.nbytes
    again = jkv.store.unpack(converted(rounded, "exact")).to_legacy()[0][0]
    step = 0.0 if share == 1 else (keys.max() - keys.min()) / 15
    assert np.abs(np.asarray(again)[:, :, :tokens] - keys).max() <= step


@pytest.mark.parametrize("lie", ["tokens", "lengths", "layers", "depth", "nothing"])
def test_lies_are_misses(tiny_model, store, lie):
    jkv.generate(tiny_model, [LONG], store=store, sequence_ids=["a"], **HOW)
    with store.open("a") as handle:
        arrays, meta = dict(handle.entry.arrays), dict(handle.entry.meta)
        tokens = np.asarray(arrays["tokens"])
    if lie == "tokens":
        arrays["tokens"] = np.concatenate([tokens, tokens])
    if lie == "lengths":
        arrays["lengths"] = np.asarray([7], np.int32)
    if lie == "layers":
        meta["cache"] = {"class": "jkv.cache.base:Cache", "fields": {}}
    if lie == "depth":
        for _ in range(3000):
            meta["cache"] = {"tuple": [meta["cache"]]}
    kept = {"tokens": tokens, "fingerprint": store_print(tiny_model)}
    store.put("a", jkv.store.Entry(arrays, meta), **kept)
    out = jkv.generate(tiny_model, [LONG], store=store, **HOW)
    assert out.reused.tolist() == [49 if lie == "nothing" else 0]
    assert out.tokens.tolist() == jkv.generate(tiny_model, [LONG], **HOW).tokens.tolist()


def mine(keys, weights, positions, step):
    """A score of a user's own."""
    return keys[..., 0]


def test_what_other_processes_would_not_know_is_refused_at_once(tiny_model, store):
    from jkv.cache.fingerprint import describe

    kind = jkv.evicting(16, score=jkv.scores.key_norm)
    assert "key_norm" in describe(kind)
    assert "0x" not in describe(kind)  # an address, another one in each process
    own = jkv.evicting(16, score=mine)
    with pytest.raises(jkv.UnsupportedError, match="expected kinds and scores of jkv"):
        jkv.generate(tiny_model, [LONG], store=store, cache=own, **HOW)


@pytest.mark.parametrize(
    ("bad", "error", "match"),
    [
        ({"store": "dir"}, TypeError, r"expected a jkv\.store\.Store"),
        ({"store": Mock(spec=["longest_prefix", "put"])}, TypeError, "without open, open_many"),
        ({"store": None, "sequence_ids": ["a"]}, ValueError, "expected store="),
        ({"sequence_ids": "a"}, TypeError, "a list of texts"),
        ({"sequence_ids": [3]}, TypeError, "expected texts"),
        ({"sequence_ids": ["a", "b"]}, ValueError, "for 1 row"),
        ({"tenant": 3}, TypeError, "a text"),
    ],
)
def test_bad_arguments(tiny_model, store, bad, error, match):
    with pytest.raises(error, match=match):
        jkv.generate(tiny_model, [LONG], **(HOW | {"store": store} | bad))


def test_a_conversation_goes_on_after_a_restart(tiny_config, tmp_path):
    lm = texts.noise(tiny_config, layers=1)
    whole = jkv.Chat(lm, system="Hear.", max_new_tokens=NEW)
    asked = ["hello", "why", "he who"]
    want = [whole.send(text) for text in asked]
    said = []
    for text in asked:  # a process for each turn
        with Store(tiers=[Memory(1 << 26), Disk(tmp_path, 1 << 28)]) as store:
            chat = jkv.Chat(lm, system="Hear.", max_new_tokens=NEW, store=store, sequence_id="us")
            assert len(chat.messages) == 1 + 2 * len(said)
            said.append(chat.send(text))
            assert (chat.reused > 0) == (len(said) > 1)
    assert said == want
    with Store(tiers=[Disk(tmp_path, 1 << 28)]) as store:
        again = jkv.Chat(lm, system="Hear.", max_new_tokens=NEW, store=store, sequence_id="us")
        assert again.messages == whole.messages
        # A key under which something else is: a new conversation.
        jkv.generate(lm, ["hello"], max_new_tokens=2, store=store, sequence_ids=["text"])
        assert jkv.Chat(lm, system="Hear.", store=store, sequence_id="text").messages == [
            {"role": "system", "content": "Hear."}
        ]
        with pytest.raises(TypeError, match="sequence_id='us' without a store; pass the store"):
            jkv.Chat(lm, sequence_id="us")


def test_what_a_tool_said_is_there_after_a_restart(tiny_config, tmp_path):
    lm = texts.noise(tiny_config, layers=1)
    asked = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f"}}]}
    said = [asked, {"role": "tool", "content": [{"type": "text", "text": "22"}]}]
    with Store(tiers=[Disk(tmp_path, 1 << 28)]) as store:
        chat = jkv.Chat(lm, max_new_tokens=NEW, store=store, sequence_id="us")
        chat.send([{"role": "user", "content": "hello"}, *said])
    with Store(tiers=[Disk(tmp_path, 1 << 28)]) as store:
        again = jkv.Chat(lm, max_new_tokens=NEW, store=store, sequence_id="us")
        assert again.messages == chat.messages
        assert again.messages[1:3] == said
