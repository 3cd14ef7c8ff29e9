"""What a fingerprint stands for, and what a hit has spared."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from flax import nnx

import jkv
from jkv.cache.fingerprint import fingerprint
from jkv.models import Decoder, Rope
from jkv.store import Entry, Memory, Store
from tests.store.fakes import entry

LONG = np.random.default_rng(11).integers(0, 11, 40).tolist()
HOW = {"max_new_tokens": 1, "stop": (), "slots": 64}
OTHERS = {
    "theta": {"rope": Rope(dims=8, theta=500.0)},
    "eps": {"norm_eps": 1e-3},
    "scale": {"attention_scale": 0.5},
    "windows": {"windows": (8, None)},
}


@pytest.mark.parametrize("other", [*OTHERS, "nothing"])
def test_the_same_weights_under_another_configuration_share_nothing(tiny_model, other):
    """Keys and values depend on all of it; the tokens that follow are those of a cold start."""
    config = dataclasses.replace(tiny_model.config, **OTHERS.get(other, {}))
    graph, state = nnx.split(tiny_model)
    model = nnx.merge(graph, state)
    twin = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    nnx.update(twin, nnx.state(model))
    with Store([Memory()]) as store:
        jkv.generate(tiny_model, [LONG], store=store, **HOW)
        out = jkv.generate(twin, [LONG], store=store, **HOW)
        assert out.reused.tolist() == [39 if other == "nothing" else 0]
        if other != "nothing":
            assert fingerprint(twin, jkv.dense()) != fingerprint(tiny_model, jkv.dense())
            assert out.tokens.tolist() == jkv.generate(twin, [LONG], **HOW).tokens.tolist()


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(Rope)])
def test_every_field_of_the_rope_is_in_it(tiny_model, field):
    rope = tiny_model.config.rope
    value = getattr(rope, field)
    changed = (value or 0) + 2 if isinstance(value, int | float | None) else ("changed", value)
    other = dataclasses.replace(tiny_model.config)
    object.__setattr__(other, "rope", _with(rope, field, changed))
    assert _print_of(tiny_model, other) != _print_of(tiny_model, tiny_model.config)


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(jkv.models.Config)])
def test_every_field_of_the_configuration_is_in_it(tiny_model, field):
    other = _with(tiny_model.config, field, "changed")
    assert _print_of(tiny_model, other) != _print_of(tiny_model, tiny_model.config)


def _with(value, field, changed):
    other = dataclasses.replace(value)
    object.__setattr__(other, field, changed)
    return other


def _print_of(model, config):
    """The fingerprint of a model's weights under a configuration that it need not run."""
    held = model.config
    try:
        model.config = config
        return fingerprint(model, jkv.dense())
    finally:
        model.config = held


def test_a_shared_half_spares_half_of_what_it_took():
    """40 tokens in 4 seconds, of which 20 are shared: 2.0."""
    with Store([Memory()], chunk=4) as store:
        store.put("k", entry(1), tokens=range(40), seconds=4.0)
        with store.longest_prefix([*range(20), 99]) as match:
            assert match.length == 20
        assert store.stats()["seconds_saved"] == pytest.approx(2.0)
        with store.longest_prefix([*range(10), 99]):
            pass
        assert store.stats()["seconds_saved"] == pytest.approx(3.0)
        assert store.get("k") is not None
        assert store.stats()["seconds_saved"] == pytest.approx(7.0)


def test_what_goes_on_from_a_half_has_cost_a_half(tiny_model):
    with Store([Memory()], timer=iter(np.arange(1e6).tolist()).__next__) as store:
        jkv.generate(tiny_model, [LONG], store=store, sequence_ids=["a"], **HOW)
        with store.open("a") as handle:
            arrays, meta, tokens = handle.entry.arrays, handle.entry.meta, handle.tokens
        mark = fingerprint(tiny_model, jkv.dense())
        costly = Entry(arrays, {**meta, "seconds": 4000.0})
        store.put("a", costly, tokens=tokens, fingerprint=mark, seconds=4000.0)
        half = [*LONG[:20], (LONG[20] + 1) % 11]
        out = jkv.generate(tiny_model, [half], store=store, sequence_ids=["b"], **HOW)
        assert out.reused.tolist() == [20]
        with store.open("b") as handle:
            took = handle.entry.meta["seconds"]
        assert 2000.0 <= took < 3000.0  # and what this one took
