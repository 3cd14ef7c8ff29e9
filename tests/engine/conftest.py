"""A tiny model for engines, its tokens for one request alone, and an engine."""

from __future__ import annotations

import pytest

import jkv
from tests.decoding import oracle
from tests.engine.engines import check_empty, make_engine


@pytest.fixture(scope="module")
def lm(tiny_model):
    return oracle.lm(tiny_model)


@pytest.fixture(scope="module")
def alone(tiny_model):
    """Return the tokens of a request by itself, from `jkv.generate`."""
    known = {}

    def generate(prompt, new, sampler=None, key=None, **how):
        which = (tuple(prompt), new, id(sampler), None if key is None else str(key), str(how))
        if which not in known:
            how = {"slots": 64, "stop": (), "sampler": sampler, "key": key} | how
            out = jkv.generate(tiny_model, [prompt], max_new_tokens=new, **how)
            known[which] = out.tokens[0, : out.lengths[0]].tolist()
        return known[which]

    return generate


@pytest.fixture
def engine(lm):
    """An engine with pages for all its requests; at the end none of them is held."""
    it = make_engine(lm)
    yield it
    check_empty(it)
