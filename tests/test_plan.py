"""Plans beside what is then allocated, what is published, and what XLA counts."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import huggingface_hub
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import jkv
from jkv import _pytree
from jkv._bytes import parse_bytes
from jkv.cache import spec
from jkv.models import Config, Decoder, Rope, outline
from jkv.planning import PRESETS, memory, survey
from jkv.planning.plan import find_config
from tests.cache.kinds import KINDS
from tests.conftest import ROOT

pytestmark = pytest.mark.slow  # many programs: once is enough, on one version of JAX

GIB = 2**30
TINY = Config(
    vocab=512,
    layers=2,
    width=128,
    heads=8,
    kv_heads=2,
    head_dim=16,
    feed_forward=256,
    context=4096,
    rope=Rope(dims=16),
)
WINDOWED = dataclasses.replace(TINY, layers=4, windows=(64, None, 64, None))


# Bytes --------------------------------------------------------------------------------------------


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
    plan = jkv.plan(TINY, seq_len=64, device_memory=1000)
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


# Operations ---------------------------------------------------------------------------------------


def xla(
    config: Config, kind: Any, batch: int, slots: int, new: int
) -> tuple[dict[str, float], int]:
    """What XLA says of a pass of T tokens, compiled: its costs, and bytes of temporaries."""
    model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    cache = jax.eval_shape(lambda: jkv.init_cache(config, kind, batch=batch, slots=slots))
    tokens = jax.ShapeDtypeStruct((batch, new), jnp.int32)
    program = jax.jit(jkv.prefill, donate_argnums=2).lower(model, tokens, cache).compile()
    return program.cost_analysis(), program.memory_analysis().temp_size_in_bytes


# Of at most 128 slots, which attention takes at once: XLA counts the body of a loop once.
LENGTH = 128


@pytest.fixture(scope="module")
def counted() -> Any:
    """XLA's costs of a step with a cache, of one without, and of a prompt; each compiled once."""
    known: dict[Any, Any] = {}

    def count(config: Config) -> dict[str, Any]:
        if config not in known:
            known[config] = {
                "step": xla(config, jkv.dense(), 2, LENGTH, 1)[0],
                "step_without": xla(config, jkv.none(), 2, LENGTH, 1)[0],
                "prompt": xla(config, jkv.dense(), 2, LENGTH, LENGTH)[0],
            }
        return known[config]

    return count


ONE = dataclasses.replace(TINY, layers=1)
PLAIN = dataclasses.replace(ONE, gated=False, activation="relu", kv_heads=8, tied=True)


@pytest.mark.parametrize("config", [ONE, PLAIN], ids=["gated", "plain"])
@pytest.mark.parametrize("which", ["step", "step_without", "prompt"])
def test_operations_are_those_that_xla_counts(config, which, counted):
    """XLA counts norms, softmax, rotations and activations besides: 2 to 7 % at this width."""
    planned = getattr(jkv.plan(config, batch=2, seq_len=LENGTH), which)
    assert 1 < counted(config)[which]["flops"] / planned.flops < 1.08


PARTS = {
    "logits": {"vocab": 1024},
    "mlp": {"feed_forward": 512},
    # Twice as many query heads: twice the projections of queries and back, scores and values.
    "heads": {"heads": 16},
}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("which", ["step", "step_without"])
def test_each_part_is_what_xla_counts(part, which, counted):
    """Change what only one part depends on: the difference is that part's."""
    bigger = dataclasses.replace(ONE, **PARTS[part])
    small, big = (getattr(jkv.plan(c, batch=2, seq_len=LENGTH), which) for c in (ONE, bigger))
    names = ("projections", "scores", "values") if part == "heads" else (part,)
    difference = sum(getattr(big, name) - getattr(small, name) for name in names)
    assert difference == big.flops - small.flops
    xla_difference = counted(bigger)[which]["flops"] - counted(ONE)[which]["flops"]
    # Activations and the softmax again; of logits XLA counts the products and nothing else.
    assert 1 <= xla_difference / difference < (1.0001 if part == "logits" else 1.06)


def test_scores_and_values_grow_with_the_slots(counted):
    half = xla(ONE, jkv.dense(), 2, LENGTH // 2, 1)[0]["flops"]
    small, big = (jkv.plan(ONE, batch=2, seq_len=n).step for n in (LENGTH // 2, LENGTH))
    assert big.scores == 2 * small.scores
    assert big.values == 2 * small.values
    assert (big.mlp, big.projections) == (small.mlp, small.projections)
    planned = big.flops - small.flops
    assert 1 <= (counted(ONE)["step"]["flops"] - half) / planned < 1.2


def test_what_a_cache_saves():
    """The questions that people ask, answered in numbers."""
    plan = jkv.plan("llama-2-7b", seq_len=4096)
    step, without = plan.step, plan.step_without
    # Of self-attention: the projections of all tokens but one, and all rows of scores but one.
    assert without.projections == 4096 * step.projections
    assert without.scores == 4096 * step.scores
    assert without.values == 4096 * step.values
    # The feed-forward layers do per token what they did, for one token rather than for all.
    assert without.mlp == 4096 * step.mlp
    # The logits of one token are wanted either way.
    assert without.logits == step.logits == 2 * 4096 * 32000
    # One token's stream goes from block to block, [B, 1, D] rather than [B, S, D].
    assert step.between_blocks == 4096 * 2
    assert without.between_blocks == 4096 * step.between_blocks
    # One step's operations: two per weight that is multiplied, and four per cached number of H.
    weights = plan.parameters - 32000 * 4096 - (2 * 32 + 1) * 4096
    assert step.flops == 2 * weights + 4 * 32 * 4096 * 4096
    # What it costs: the cache is read at each step.
    assert step.read - (plan.cache_bytes - 5) == plan.weight_bytes - (32000 - 1) * 4096 * 2
    assert step.written == plan.bytes_per_token


def test_xla_reads_what_is_planned(counted):
    """At one token per row it is weights and cache that are read; XLA counts every operand, also
    what one operation hands to the next, and tables that are looked up as if they were read whole.
    """
    for config in (ONE, PLAIN):
        step = jkv.plan(config, batch=2, seq_len=LENGTH).step
        assert 1 < counted(config)["step"]["bytes accessed"] / step.read < 2.5
    # Twice the feed-forward weights are read once more.
    bigger = dataclasses.replace(ONE, feed_forward=512)
    planned = [jkv.plan(c, batch=2, seq_len=LENGTH).step.read for c in (ONE, bigger)]
    seen = [counted(c)["step"]["bytes accessed"] for c in (ONE, bigger)]
    assert 1 < (seen[1] - seen[0]) / (planned[1] - planned[0]) < 1.05


def test_windows_bound_what_a_step_looks_at():
    full = dataclasses.replace(WINDOWED, windows=())
    far = {c: jkv.plan(c, seq_len=4096).step for c in (WINDOWED, full)}
    # Two layers of four look at 64 tokens.
    assert far[WINDOWED].scores == far[full].scores * (4096 + 64) // (2 * 4096)
    assert far[WINDOWED].read < far[full].read
    ring = jkv.plan(full, seq_len=4096, cache="window:60,sinks=4")
    assert ring.step.scores == far[full].scores * 64 // 4096
    cache = ring.cache_bytes - 5
    assert ring.step.read == far[full].read - (jkv.plan(full, seq_len=4096).cache_bytes - 5) + cache
    assert jkv.plan(full, seq_len=32, cache="window:60,sinks=4").step.scores == (
        jkv.plan(full, seq_len=32).step.scores
    )


def test_a_prompt_comes_in_chunks():
    one, two = (jkv.plan(TINY, seq_len=n) for n in (256, 512))
    assert one.prompt.scores == one.step_without.scores
    # The second chunk looks at both, the first at itself.
    assert two.prompt.scores == 3 * one.prompt.scores
    assert two.prompt.mlp == 2 * one.prompt.mlp == two.step_without.mlp
    assert two.prompt.logits == one.prompt.logits
    nothing = jkv.plan(TINY, seq_len=512, cache="none")
    assert nothing.step == nothing.step_without
    assert nothing.prompt.flops == nothing.step.flops


WIDE = dataclasses.replace(
    ONE, vocab=8192, width=1024, head_dim=128, feed_forward=2752, rope=Rope(dims=128)
)
LEARNED = dataclasses.replace(WIDE, rope=None, heads=16, kv_heads=16, head_dim=64, gated=False)


@pytest.mark.parametrize("config", [WIDE, LEARNED], ids=["llama", "gpt2"])
@pytest.mark.parametrize("kind", [jkv.dense(), jkv.none()], ids=["dense", "none"])
def test_activations_are_about_the_temporaries_of_the_largest_pass(config, kind):
    plan = jkv.plan(config, batch=2, seq_len=1024, cache=kind)
    _, temporaries = xla(config, kind, 2, 1024, 256)
    assert 0.6 < temporaries / plan.activation_bytes < 1.2


# What is asked ------------------------------------------------------------------------------------


def test_ways_to_name_a_model():
    named = jkv.plan("llama-2-7b")
    for other in ("Llama-2-7B", "llama2 7b", PRESETS["llama-2-7b"]):
        plan = jkv.plan(other)
        assert dataclasses.replace(plan, model="llama-2-7b") == named
    assert jkv.plan("Llama-2-7B").model == "llama-2-7b"
    model = nnx.eval_shape(lambda: Decoder(TINY, rngs=nnx.Rngs(0)))
    lm = jkv.LM(model=model, config=TINY, tokenizer=None, source="somewhere")
    assert jkv.plan(lm).model == "somewhere"
    assert dataclasses.replace(jkv.plan(model), model="somewhere") == jkv.plan(lm)
    # A checkpoint: its own dtype, whatever this machine would load it in.
    golden = ROOT / "tests" / "golden" / "llama-gqa-old"
    plan = jkv.plan(golden, dtype="float16")
    assert plan.dtype == "float16"
    assert plan.weight_bytes == _pytree.nbytes(jkv.load(golden, dtype="float16").model)


def test_only_the_configuration_is_read(tmp_path):
    golden = ROOT / "tests" / "golden" / "llama-gqa-old"
    values = json.loads((golden / "config.json").read_text())
    for dtype in ("bfloat16", None):
        values = {k: v for k, v in values.items() if k not in ("torch_dtype", "dtype")}
        if dtype is not None:
            values["torch_dtype"] = dtype
        (tmp_path / "config.json").write_text(json.dumps(values))
        plan = jkv.plan(str(tmp_path))
        assert plan.dtype == (dtype or "float32")
        assert plan.parameters == jkv.plan(golden).parameters
    with pytest.raises(jkv.CheckpointError, match="neither a directory"):
        jkv.plan("/not/there")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(jkv.CheckpointError, match="model_type"):
        jkv.plan(tmp_path)


def test_of_a_repository_only_the_configuration_is_downloaded(monkeypatch, tmp_path):
    asked = []

    def download(name: str, **options: Any) -> str:
        asked.append((name, options["allow_patterns"]))
        return str(ROOT / "tests" / "golden" / "llama-gqa-old")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    assert jkv.plan("team/tiny").model == "team/tiny"
    lm = outline("team/tiny")
    assert lm.config.family == "llama"
    # Presets are not looked for anywhere.
    jkv.plan("gpt2")
    assert asked == [
        ("team/tiny", ["config.json", "generation_config.json"]),
        ("team/tiny", ["*.json", "*.jinja"]),
    ]


def test_an_outline_is_what_would_be_loaded():
    golden = ROOT / "tests" / "golden" / "gemma2-gqa"
    for dtype in (None, "bfloat16"):
        made, loaded = outline(golden, dtype=dtype), jkv.load(golden, dtype=dtype)
        assert made.config == loaded.config
        shapes = [
            [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(lm.model)]
            for lm in (made, loaded)
        ]
        assert shapes[0] == shapes[1]
        assert not any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(made.model))


def test_kinds_texts_and_lists():
    kinds = [jkv.dense(), "dense", None]
    plans = jkv.plan(TINY, cache=kinds)
    assert [plan.cache for plan in plans] == ["dense"] * 3
    assert jkv.plan(TINY, cache=jkv.window(1024)).cache == "window:1024"
    assert jkv.plan(TINY, cache=jkv.window(77)).cache == repr(jkv.window(77))
    assert jkv.plan(TINY, cache=[]) == []
    assert jkv.plan(TINY).seq_len == TINY.context


def test_all_kinds_and_why_not():
    found = {entry.cache: entry.to_dict() for entry in survey("gpt2", batch=2, dtype="float32")}
    assert list(found) == spec.examples()
    assert found["dense"]["cache_bytes"] == jkv.plan("gpt2", batch=2).cache_bytes
    assert found["dense"]["model"] == "gpt2"
    refused = {text for text, entry in found.items() if "refused" in entry}
    assert refused == {text for text in spec.examples() if "sinks=" in text}
    assert "no rotary positions" in found["window:1020,sinks=4"]["refused"]
    with pytest.raises(jkv.UnsupportedError, match="no rotary positions"):
        jkv.plan("gpt2", cache="window:1020,sinks=4")


def test_json():
    values = json.loads(json.dumps(jkv.plan("gpt2", device_memory="24GiB").to_dict()))
    names = {"bytes_per_token", "cache_bytes", "weight_bytes", "max_seq_len", "max_batch"}
    assert names <= values.keys()
    assert values["bytes_per_token"] == 2 * 12 * 12 * 64 * 4
    assert values["step"]["flops"] == sum(
        values["step"][part] for part in ("projections", "scores", "values", "mlp", "logits")
    )


@pytest.mark.parametrize(
    ("asked", "error", "message"),
    [
        ({"batch": 0}, ValueError, "batch=0"),
        ({"batch": 1.5}, ValueError, "batch=1.5"),
        ({"seq_len": 0}, ValueError, "seq_len=0"),
        ({"seq_len": True}, ValueError, "seq_len=True"),
        ({"seq_len": 2**31}, ValueError, "seq_len=2147483648"),
        ({"dtype": "int8"}, ValueError, "float32, bfloat16, float16"),
        ({"device_memory": "much"}, ValueError, "device_memory got 'much'"),
        ({"cache": "ring"}, ValueError, "cache got 'ring'"),
        ({"cache": 3}, TypeError, "cache got 3"),
        ({"cache": jkv.dense}, TypeError, "cache got"),
        ({"cache": [jkv.dense(), 3]}, TypeError, "cache got 3"),
        ({"model": 3}, TypeError, "plan got a int"),
        ({"model": Config}, TypeError, "plan got a type"),
        ({"model": "no such/model at all"}, jkv.CheckpointError, "neither a directory"),
    ],
)
def test_bad_questions(asked, error, message):
    with pytest.raises(error, match=message):
        jkv.plan(**({"model": TINY} | asked))


def test_presets_are_found_by_name_only():
    for name, config in PRESETS.items():
        assert find_config(name) == (name, config)


def test_what_is_kept_of_a_row():
    kept = {
        text: jkv.plan("gemma-2-2b", seq_len=5000, cache=text).kept_tokens
        for text in ("dense", "none", "window:64", "window", "evict:32", "pyramid:64", "int4")
    }
    assert kept == {
        "dense": None,
        "none": None,
        "window:64": 64,
        "window": None,  # every other layer sees all
        "evict:32": 32,
        "pyramid:64": 64,
        "int4": None,
    }
