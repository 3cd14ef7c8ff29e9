"""A request without a token to draw ends alone, with the error, and leaves nothing behind."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

import jkv
from jkv.errors import NonFiniteError
from jkv.models import Decoder
from jkv.store import Memory, Store
from tests.decoding import oracle
from tests.decoding.test_nonfinite import BY_MODEL, BY_SAMPLER, CLOSING
from tests.engine.engines import check_empty, make_engine

NEW = 12
LONG = [4, 5, 6, 7, 8, 9, 10, 4, 5]
SHAPE = {"max_batch": 2, "prefill_rows": 1}


@pytest.fixture(scope="module")
def bad(tiny_config):
    """A model that cannot read token 3, and one of the same weights that can."""
    config = dataclasses.replace(tiny_config, layers=1, tied=False)
    good = jax.jit(lambda: Decoder(config, rngs=nnx.Rngs(0)))()
    good.embedding[...] = good.embedding[...] * 50
    good.head.kernel[...] = good.head.kernel[...] * 10
    model = nnx.clone(good)
    model.embedding[...] = model.embedding[...].at[3].set(np.nan)
    return model, good


def test_a_nonfinite_request_ends_alone_and_its_pages_are_not_reused(bad):
    model, good = bad
    want = oracle.generated(jkv.generate(good, [LONG, [1, 2]], max_new_tokens=NEW, stop=()))
    step = want[1].index(3) + 1
    with Store(tiers=[Memory(1 << 20)]) as store:
        engine = make_engine(oracle.lm(model), store=store, **SHAPE)
        others = engine.submit(LONG, max_new_tokens=NEW, stop=())
        late = engine.submit([1, 2], max_new_tokens=NEW, stop=())
        early = engine.submit([6, 5, 3, 1, 1, 1, 2, 2, 9], max_new_tokens=NEW, stop=())
        masked = engine.submit(LONG, max_new_tokens=NEW, stop=(), sampler=CLOSING)
        engine.run()
        assert (others.tokens, others.finish_reason) == (want[0], "length")
        assert (late.tokens, late.finish_reason) == (want[1][:step], "error")
        assert (early.tokens, early.finish_reason) == ([], "error")
        assert (masked.tokens, masked.finish_reason) == (want[0][:3], "error")
        with pytest.raises(NonFiniteError, match=f"at step {step} .*{BY_MODEL}"):
            late.result()
        with pytest.raises(NonFiniteError, match=f"at step 0 .*{BY_MODEL}"):
            list(early)
        with pytest.raises(NonFiniteError, match=f"at step 3 .*{BY_SAMPLER}"):
            masked.result()
        # The pages of those that the model failed are not found, in the pool or in the store.
        names = {name for name, _ in engine.core.pages.pools[0].cached()}
        whole = engine.core.pages.pools[0].sequence()
        assert names <= set(whole.names([*LONG, *want[0]]))
        assert len(names) >= len(LONG) // 4
        whole.close()
        engine.close()
        assert len(store) == len(names)
        check_empty(engine)


def test_shared_pages_are_withdrawn():
    from jkv.engine.page_pool import PagePool

    pool = PagePool(pages=6, page=2)
    first = pool.sequence()
    first.reserve(5)
    first.publish([1, 2, 3, 4, 5])
    second = pool.sequence()
    assert second.match([1, 2, 3, 4, 9]) == 4
    second.withdraw()
    pool.check()
    assert pool.sequence().match([1, 2, 3, 4]) == 0
    first.close()
    second.close()
    pool.check()
    assert (pool.cached(), pool.free_pages) == ([], 6)
