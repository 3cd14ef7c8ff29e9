"""Bytes of a plan beside what is then allocated, and what is published."""

from __future__ import annotations

import dataclasses

import jax
import pytest
from flax import nnx

import jkv
from jkv import _pytree
from jkv._bytes import is_decimal, parse_bytes, size
from jkv.cache import spec
from jkv.models import Decoder
from jkv.planning import PRESETS, memory
from tests.cache.kinds import KINDS
from tests.planning.models import GIB, TINY, WINDOWED

pytestmark = pytest.mark.slow  # many programs: once is enough, on one version of JAX


def test_llama_2_7b_in_16_bits():
    """The figures that everybody knows."""
    sizes = {1024: 512 << 20, 4096: 2 * GIB, 131072: 64 * GIB}
    for length, nbytes in sizes.items():
        plan = jkv.plan("llama-2-7b", seq_len=length)
        assert plan.bytes_per_token == 524288
        flags = 4 + 1  # a length and a flag per row
        assert plan.cache_bytes == nbytes + flags
        assert plan.weight_bytes == 2 * 6_738_415_616
        assert plan.total_bytes == plan.weight_bytes + plan.cache_bytes + plan.activation_bytes
        assert (plan.fits, plan.max_seq_len, plan.max_batch) == (None, None, None)
    assert jkv.plan("llama-2-7b", dtype="float32").bytes_per_token == 2 * 524288
    assert jkv.plan("llama-2-7b", batch=3).cache_bytes == 3 * (2 * GIB + 5)


PARAMETERS = {
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "mistral-7b-v0.1": 7_241_732_096,
    "mistral-7b-v0.3": 7_248_023_552,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    "glm-4-9b": 9_399_951_360,
    "glm-4-9b-0414": 9_400_279_040,
    "gemma-2-2b": 2_614_341_888,
    "gemma-2-9b": 9_241_705_984,
    "gemma-2-27b": 27_227_128_320,
}


def test_presets_have_the_published_number_of_parameters():
    assert {name: memory.weights(config)[0] for name, config in PRESETS.items()} == PARAMETERS


@pytest.mark.parametrize("config", [PRESETS["gpt2"], WINDOWED], ids=["gpt2", "windowed"])
def test_weights_of_two_layers_tell_those_of_all(config):
    model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    leaves = jax.tree.leaves(model)
    assert memory.weights(config) == (sum(x.size for x in leaves), _pytree.nbytes(model))


@pytest.mark.parametrize("case", KINDS, ids=lambda c: c.name)
@pytest.mark.parametrize(("batch", "slots"), [(1, 300), (3, 77)])
def test_planned_is_what_nbytes_then_says(case, batch, slots):
    plan = jkv.plan(TINY, batch=batch, seq_len=slots, cache=case.kind)
    made = jkv.init_cache(TINY, case.kind, batch=batch, slots=slots)
    assert plan.cache_bytes == made.nbytes
    # What the searches use is the same number.
    assert memory.cache_sizer(TINY, case.kind)(batch, slots) == made.nbytes


@pytest.mark.parametrize("text", spec.examples())
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_spec_in_a_model_with_windows(text, dtype):
    plan = jkv.plan(WINDOWED, batch=2, seq_len=1500, cache=text, dtype=dtype)
    config = dataclasses.replace(WINDOWED, dtype=dtype)
    made = jkv.init_cache(config, spec.parse(text), batch=2, slots=1500)
    assert (plan.cache_bytes, plan.cache, plan.dtype) == (made.nbytes, text, dtype)


def test_bytes_per_token_of_kinds_worked_out_by_hand():
    """Of two layers with two heads of 16 channels, in float32."""
    numbers = 2 * 2 * 2 * 16  # of a token: keys and values
    per_token = {
        "dense": 4 * numbers,
        "none": 4,
        "window:256": 0,
        "evict:256": 0,
        "per_layer:window:256,first=1": 4 * numbers / 2,
    }
    for text, nbytes in per_token.items():
        assert jkv.plan(TINY, seq_len=1000, cache=text).bytes_per_token == nbytes, text


def test_nothing_is_allocated():
    held = len(jax.live_arrays())
    kinds = ["dense", "int4", "evict:1024", "window:1020,sinks=4"]
    plans = jkv.plan("llama-2-70b", seq_len=131072, cache=kinds, device_memory="80GB")
    assert all(plan.total_bytes > 100 * GIB for plan in plans)
    assert len(jax.live_arrays()) == held


@pytest.mark.parametrize("text", spec.examples())
def test_what_fits_fits_and_one_more_does_not(text):
    there = 64 << 20
    plan = jkv.plan(TINY, batch=2, seq_len=200, cache=text, device_memory=there)
    assert plan.fits is (plan.total_bytes <= there)

    def total(batch: int, length: int) -> int:
        return jkv.plan(TINY, batch=batch, seq_len=length, cache=text).total_bytes

    rows = plan.max_batch
    assert rows is not None
    assert rows > 0
    assert total(rows, 200) <= there < total(rows + 1, 200)
    if plan.max_seq_len is None:  # stops growing
        assert jkv.plan(TINY, seq_len=10**6, cache=text).bytes_per_token == 0
        assert total(2, memory.LONGEST) <= there
    else:
        assert total(2, plan.max_seq_len) <= there < total(2, plan.max_seq_len + 1)


def test_nothing_fits():
    plan = jkv.plan(TINY, seq_len=64, device_memory="1MB")
    assert (plan.fits, plan.max_seq_len, plan.max_batch) == (False, 0, 0)


def test_a_table_of_positions_is_a_limit():
    plan = jkv.plan("gpt2", device_memory="80GB")
    assert (plan.seq_len, plan.max_seq_len) == (1024, 1024)
    with pytest.raises(ValueError, match=r"seq_len=1025.*at most 1024.*table of as many positions"):
        jkv.plan("gpt2", seq_len=1025)


def test_the_search():
    for limit in range(1, 40):
        for top in (0, 1, 2, 3, 16, 17, 31, 32, 50):
            assert memory.most(lambda n, top=top: n <= top, limit) == min(top, limit)


@pytest.mark.parametrize(
    ("written", "count"),
    [
        ("80GB", 80 * 10**9),
        ("24GiB", 24 << 30),
        (" 1.5 gib ", 3 << 29),
        ("512MB", 512 * 10**6),
        ("1KiB", 1024),
        ("123", 123),
        ("7B", 7),
        (456, 456),
    ],
)
def test_bytes_as_written(written, count):
    assert parse_bytes(written) == count


@pytest.mark.parametrize(
    "written", ["", "GB", "80G", "8 0GB", "-1GB", "nanGB", "0", 0, -1, 1.5, True]
)
def test_bytes_that_nobody_understands(written):
    with pytest.raises(ValueError, match=r"device_memory got .*'80GB' or '24GiB'"):
        parse_bytes(written)


@pytest.mark.parametrize("written", [24, "24", " 24 ", "24B"])
def test_memory_whose_unit_was_forgotten(written):
    with pytest.raises(ValueError, match=r"device_memory got .*24.* is 24 bytes; .*write 24GB$"):
        jkv.plan(TINY, device_memory=written)
    with pytest.raises(ValueError, match=r"is 999999 bytes; expected at least 1,000,000: write 24"):
        jkv.plan(TINY, device_memory=999_999)
    assert jkv.plan(TINY, device_memory=10**6).device_memory == 10**6


@pytest.mark.parametrize(
    ("written", "shown"),
    [("24GB", "24.0 GB"), ("24GiB", "24.0 GiB"), ("1.5GB", "1.5 GB"), ("512MiB", "512.0 MiB")],
)
def test_a_size_is_shown_in_the_unit_it_was_written_in(written, shown):
    count = parse_bytes(written)
    assert size(count, decimal=is_decimal(count)) == shown
