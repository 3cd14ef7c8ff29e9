"""After warm-up nothing is compiled again, whatever is asked within the same sizes."""

from __future__ import annotations

import jax
import numpy as np

import jkv
from tests.decoding import oracle

LONGEST, MOST = 64, 40  # prompt tokens, new tokens
BATCHES = (1, 3)


def rows(rng, batch, longest):
    """Random prompts, the first of them of the length that is asked for."""
    lengths = [longest, *rng.integers(1, longest + 1, size=batch - 1)]
    return [rng.integers(0, 11, size=n).tolist() for n in rng.permutation(lengths)]


def test_a_thousand_mixed_requests_compile_nothing(tiny_model, compiles):
    rng = np.random.default_rng(0)
    with compiles:
        for batch in BATCHES:
            for longest in (1, 16, 17, 32, 33, LONGEST):
                for new in (1, 2, MOST):
                    jkv.generate(tiny_model, rows(rng, batch, longest), max_new_tokens=new)
        assert 0 < compiles.count < 60, "few programs serve all sizes"

    seen = set()
    with compiles:
        for _ in range(1000):
            batch = int(rng.choice(BATCHES))
            longest = int(rng.integers(1, LONGEST + 1))
            # Mostly short answers, so that a thousand take seconds; all lengths occur.
            new = int(np.clip(rng.geometric(0.12), 1, MOST))
            out = jkv.generate(tiny_model, rows(rng, batch, longest), max_new_tokens=new)
            assert out.lengths.tolist() == [new] * batch
            seen.add((batch, longest, new))
        assert compiles.count == 0
    assert len(seen) > 500
    assert {new for _, _, new in seen} >= set(range(1, 20))


def test_nor_do_other_stops_keys_heats_and_turns(tiny_model, compiles):
    """All that may vary from call to call, in one size of batch."""
    rng = np.random.default_rng(1)
    lm = oracle.lm(tiny_model)

    def request(turn):
        stop = [(), 3, [1, 2], "hi", ["ab", 4, "c"], [[1], ["k"], [2, 3, 4]]][turn % 6]
        # (Not `jnp.asarray`, which compiles a program of its own for each shape.)
        form = (np.ndarray.tolist, list, jax.device_put)[turn % 3]
        prompts = rng.integers(0, 11, size=(3, int(rng.integers(1, 17))), dtype=np.int32)
        out = jkv.generate(
            lm,
            form(prompts),
            max_new_tokens=int(rng.integers(1, 9)),
            stop=stop,
            sampler=jkv.sampling.temperature(float(rng.uniform(0.2, 3))),
            key=jax.random.key(turn),
            return_logprobs=bool(turn % 2),
        )
        added = rng.integers(1, 17, size=3)
        added[turn % 3] = 16 if turn % 2 else 1
        jkv.generate(
            lm,
            [rng.integers(0, 11, size=n - 1).tolist() for n in added],
            max_new_tokens=int(rng.integers(1, 9)),
            resume=out,
            stop=stop,
            sampler=jkv.sampling.temperature(float(rng.uniform(0.2, 3))),
            key=jax.random.key(-turn),
        )

    for turn in range(12):
        request(turn)
    with compiles:
        for turn in range(60):
            request(turn)
        assert compiles.count == 0


def test_the_counter_counts(tiny_model, compiles):
    """What must compile does: the test above cannot pass by counting nothing."""
    jkv.generate(tiny_model, [[1]] * 7, max_new_tokens=1)
    with compiles:
        jkv.generate(tiny_model, [[1]] * 7, max_new_tokens=1)
        assert compiles.count == 0
        jkv.generate(tiny_model, [[1]] * 8, max_new_tokens=1)
        assert compiles.count > 0
