"""Operations and temporaries of a pass, worked out by hand."""

from __future__ import annotations

import dataclasses

import pytest

import jkv
from jkv.ops.attention.xla import BLOCK
from jkv.planning import memory
from jkv.planning.work import work

# Rows, new tokens in each, and slots whose scores exist at one time.
ROWS, NEW, TOGETHER = 2, 3, 100
TOKENS = ROWS * NEW


def test_the_operations_of_a_pass(tiny_config):
    """Two layers of width 16: 4 query heads of 8 channels, 2 key/value heads, 24 wide within."""
    done = work(tiny_config, ROWS, NEW, looks=10, widest=5, read=7, written=9)
    assert dataclasses.asdict(done) == {
        "tokens": TOKENS,
        "projections": 2 * TOKENS * (16 * 4 * 8 + 2 * 16 * 2 * 8 + 4 * 8 * 16) * 2,
        "scores": 2 * ROWS * 4 * 8 * 10,
        "values": 2 * ROWS * 4 * 8 * 10,
        "mlp": 2 * TOKENS * 3 * 16 * 24 * 2,
        "logits": 2 * ROWS * 16 * 11,
        "between_blocks": 4 * ROWS * 5 * 16,
        "read": 7,
        "written": 9,
    }
    assert done.flops == done.projections + 2 * done.scores + done.mlp + done.logits
    plain = dataclasses.replace(tiny_config, gated=False)
    assert work(plain, ROWS, NEW, looks=10, widest=5, read=7, written=9).mlp == done.mlp * 2 // 3


def test_the_temporaries_of_a_pass(tiny_config):
    """In float32: the stream and a branch of it, and the largest of what a block makes."""
    stream = 4 * 2 * TOKENS * 16
    queries_and_output, keys_and_values = 4 * 2 * TOKENS * 32, 4 * 2 * TOKENS * 16
    summed = 4 * TOKENS * 32  # the output before it is rounded
    scores = 4 * TOKENS * 4 * TOGETHER
    attention = queries_and_output + keys_and_values + summed + 2 * scores  # and their weights
    assert memory.activations(tiny_config, ROWS, NEW, TOGETHER) == stream + attention
    half = dataclasses.replace(tiny_config, dtype="bfloat16")
    assert memory.activations(half, ROWS, NEW, TOGETHER) == (
        (stream + queries_and_output + keys_and_values) // 2 + summed + 2 * scores
    )
    wide = dataclasses.replace(tiny_config, feed_forward=2400)
    assert memory.activations(wide, ROWS, NEW, TOGETHER) == stream + 4 * TOKENS * 3 * 2400
    plain = dataclasses.replace(wide, gated=False)
    assert memory.activations(plain, ROWS, NEW, TOGETHER) == stream + 4 * TOKENS * 2 * 2400
    many = dataclasses.replace(tiny_config, vocab=10**6)
    assert memory.activations(many, ROWS, NEW, TOGETHER) == 2 * 4 * ROWS * 10**6


@pytest.mark.parametrize("limit", [1, 2, 3, 7, 8, 9, 100])
def test_the_most_that_fits(limit):
    for least in range(limit + 3):
        assert memory.most(lambda n, least=least: n <= least, limit) == min(least, limit)


def test_passes_add_up(tiny_config):
    """Seven tokens in chunks of 256, and in a ring of 4: what each looks at, reads and writes."""
    plan = jkv.plan(tiny_config, batch=2, seq_len=300)
    chunks = [(256, 256), (44, 300)]  # new tokens, and those they look at
    assert plan.prompt.scores == sum(2 * 2 * 4 * 8 * 2 * new * all for new, all in chunks)
    assert plan.prompt.tokens == 2 * 300
    numbers = 4 * 2 * 2 * 2 * 8 * 2  # bytes of a token of both rows in both layers
    assert plan.prompt.written == numbers * 300
    assert plan.step.written == numbers
    step = memory.weights_read(tiny_config, 2) + numbers * 300
    assert plan.step.read == step
    ring = jkv.plan(tiny_config, batch=2, seq_len=300, cache="window:16")
    assert ring.step.scores == 2 * 2 * 4 * 8 * 2 * 16
    assert ring.prompt.written == numbers * 16 * 2  # all that is left of each chunk


def test_rows_of_tables_are_read_and_not_tables(tiny_config):
    count, nbytes = memory.weights(tiny_config)
    assert nbytes == 4 * count
    row = 4 * 16
    assert memory.weights_read(tiny_config, 3) == nbytes - (11 - 3) * row
    assert memory.weights_read(tiny_config, 50) == nbytes, "each row once"
    tied = dataclasses.replace(tiny_config, tied=True)
    assert memory.weights_read(tied, 3) == memory.weights(tied)[1], "all for the logits"


def test_weights_of_all_that_is_kept_exist_at_one_time(tiny_config):
    """Of a kind that keeps tokens by what looks at them, and of its largest layer."""
    assert memory.looked_at_together(tiny_config, jkv.dense(), 10**6, 3) == BLOCK
    assert memory.looked_at_together(tiny_config, jkv.dense(), 5, 3) == 5
    kind = jkv.pyramid(64, ratio=3)
    assert kind.budgets(2) == [96, 32]
    assert memory.looked_at_together(tiny_config, kind, 500, 3) == 96 + 3
