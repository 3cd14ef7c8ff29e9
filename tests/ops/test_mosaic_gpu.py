"""The kernels for Hopper GPUs: their arithmetic interpreted, the division of work, refusals."""

from __future__ import annotations

import dataclasses
import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jkv import _compat, ops
from jkv.ops import dispatch
from jkv.ops.codecs import Affine, Float8, Sparse
from jkv.ops.masks import AttentionSpec
from jkv.ops.mosaic_gpu import tiling
from jkv.ops.mosaic_gpu.tiling import Layout
from tests.ops import calls
from tests.ops.cached import Case, close, drawn

HERE = f"this is JAX {jax.__version__} on Python {sys.version_info.major}.{sys.version_info.minor}"
interpreted = pytest.mark.skipif(
    _compat.JAX < (0, 12),
    reason=f"NOT RUN: the arithmetic of the kernels for GPUs needs JAX 0.12 or newer, whose "
    f"interpreter knows them, and so Python 3.12 or newer; {HERE}",
)

# Every length at the edge of a block of 64, a row without tokens and one without queries.
EDGES = (0, 1, 63, 64, 65, 130)
CASES = {
    "lengths": Case(EDGES, groups=3),
    "several queries": Case((130, 0, 64, 3), new=5, groups=16, dim=128, padding=(2,)),
    "window": Case((191, 100, 66), new=3, window=70, sinks=4),
    "holes": Case((150, 100), has_slot_positions=True, window=90, dim=80, groups=1, softcap=5.0),
    "float16": Case((65, 192), form="float16", groups=1, dim=96),
    "fp8": Case((130, 0, 129), form="fp8", new=2, window=70),
    "int8": Case((130, 1), form="int8", dim=80),
    "int4": Case((130, 64), form="int4", kv_heads=2),
    "int4 by channel": Case((192, 64), form="int4 by channel", dim=128, new=5),
    "int4 in groups": Case((192, 66), form="int4 in groups", dim=128, groups=2),
    # Queries past what is filled, before its end, and so that a window ends within a block of it.
    "fewer filled than asked": Case((5, 63, 64, 130), new=2, ahead=(7, 1, 1, 40)),
    "more filled than asked": Case((130, 192, 100), ahead=(-70, -129, -1), groups=1),
    "window and fewer filled": Case((100, 150), window=70, sinks=3, ahead=(10, 60), new=2),
    "codes and fewer filled": Case((63, 129), form="int8", ahead=(2, 30), dim=128),
    "codes by channel and more": Case((192, 128), form="int4 by channel", dim=128, ahead=(-9, -64)),
    "pages and fewer filled": Case((49, 100), page=16, ahead=(3, -40)),
    "pages": Case((130, 0, 49), page=16, window=100),
    "pages of codes": Case((192, 70), form="int8", page=64, dim=64),
}


@pytest.fixture
def few_programs(monkeypatch):
    """A GPU of three multiprocessors: several lines for a program, several programs for a line."""
    small = tiling.tuning() | {"multiprocessors": 3}
    monkeypatch.setattr(tiling, "tuning", lambda: small)
    tiling.multiprocessors.cache_clear()
    yield
    tiling.multiprocessors.cache_clear()


@interpreted
@pytest.mark.usefixtures("few_programs")
@pytest.mark.filterwarnings("ignore:invalid value encountered")  # poison, in the interpreter
@pytest.mark.parametrize("name", CASES)
def test_arithmetic(name):
    from jax.experimental.pallas import mosaic_gpu as plgpu

    case = CASES[name]
    arguments, out, lse = drawn(case)
    from jkv.ops.attention import mosaic_gpu

    run = calls.by(mosaic_gpu.attention)
    assert mosaic_gpu.unsupported(*calls.operands(**arguments, **case.options)) is None
    interpret = plgpu.InterpretGPUParams(detect_races=True)
    got = jax.jit(functools.partial(run, **case.options, interpret=interpret))(**arguments)
    close(case, got, out, lse)


LAYOUT = Layout(
    batch=3,
    new=1,
    kv_heads=2,
    groups=4,
    dim=64,
    slots=512,
    page=None,
    chunks=2,
    columns=8,
    block=64,
    stages=2,
    programs=7,
)


@pytest.mark.parametrize("programs", [1, 7, 200])
@pytest.mark.parametrize("counts", [(1, 1, 1), (8, 1, 3), (1, 8, 8)])
def test_every_block_belongs_to_one_program(counts, programs):
    layout = dataclasses.replace(LAYOUT, programs=programs)
    starts, spans = map(np.asarray, tiling.shares(layout, jnp.asarray(counts)))
    blocks = [
        (row * 4 + head, block)
        for row, count in enumerate(counts)
        for head in range(4)
        for block in range(count)
    ]
    done, places = 0, {}
    for program, (line, block, many, lines) in enumerate(starts):
        mine = blocks[done : done + many]
        assert many in (len(blocks) // programs, -(-len(blocks) // programs))
        if many:
            assert (line, block) == mine[0]
            assert lines == len({at for at, _ in mine})
        for at, _ in mine:
            places.setdefault(program + at, set()).add((program, at))
            assert spans[at, 0] <= program <= spans[at, 1]
        done += many
    assert done == len(blocks)
    # Where a program keeps what it found of a line is nobody else's, and a line's lie together.
    assert all(len(keepers) == 1 for keepers in places.values())
    for line in range(layout.lines):
        kept = [at for keepers in places.values() for _, at in keepers if at == line]
        assert len(kept) == spans[line, 1] - spans[line, 0] + 1


@pytest.mark.parametrize(
    ("window", "sinks", "want"),
    [
        (None, 0, [(8, 0), (1, 0), (2, 0)]),
        (65, 0, [(2, 6), (1, 0), (2, 0)]),  # positions 446 to 510 lie in blocks 6 and 7
        (63, 0, [(1, 7), (1, 0), (2, 0)]),  # 449 to 511: one block
        (63, 1, [(2, 6), (1, 0), (2, 0)]),  # and that of the sink
        (63, 65, [(3, 5), (1, 0), (2, 0)]),
    ],
)
def test_blocks_outside_of_the_window_are_left_out(window, sinks, want):
    spec = AttentionSpec(1.0, window, sinks)
    last = 510 if window == 65 else 511
    positions = jnp.asarray([[last], [-1], [64]])
    rows = tiling.rows(LAYOUT, spec, positions, jnp.asarray([512, 0, 65]), in_order=True)
    assert [tuple(row) for row in np.asarray(rows)[:, :2].tolist()] == want
    assert np.asarray(rows)[:, 2].tolist() == [last + 1, 0, 65]
    anywhere = tiling.rows(LAYOUT, spec, positions, None, in_order=False)
    assert np.asarray(anywhere)[:, :3].tolist() == [[8, 0, 512]] * 3


def test_queries_are_split_where_their_sums_would_not_fit():
    assert tiling.parts(1, 128) == (1, 8)
    assert tiling.parts(20, 128) == (1, 24)
    assert tiling.parts(80, 128) == (3, 32)
    assert tiling.parts(256, 64) == (4, 64)
    assert tiling.parts(33, 256) == (3, 16)


def operands(form="bfloat16", new=1, dim=128, slots=512, groups=4, q=jnp.bfloat16):
    queries = jax.ShapeDtypeStruct((2, new, 2 * groups, dim), q)
    codec = {
        "int8": Affine(8),
        "fp8": Float8(),
        "int4": Affine(4),
        "int2": Affine(2),
        "groups": Affine(8, group=64),
        "small groups": Affine(8, group=32),
        "units": Affine(4, axis="channel", group=64),
        "short units": Affine(4, axis="channel", group=32),
        "sparse": Sparse(0.25),
    }.get(form)
    if codec is None:
        cache = jax.ShapeDtypeStruct((2, 2, slots, dim), jnp.dtype(form))
    else:
        cache = jax.eval_shape(lambda: codec.empty(2, 2, slots, dim, jnp.bfloat16))
    keys = cache
    if form == "small groups":
        keys = jax.eval_shape(lambda: Affine(8).empty(2, 2, slots, dim, jnp.bfloat16))
    return queries, keys, cache


@pytest.fixture
def launch(monkeypatch):
    """What is refused whatever the version, on any that can import it: nothing is compiled."""
    if _compat.JAX < (0, 10):
        pytest.skip(f"the kernels' modules need names that Pallas has from JAX 0.10 on; {HERE}")
    from jkv.ops.mosaic_gpu import launch

    monkeypatch.setattr(_compat, "JAX", _compat.MOSAIC_GPU)
    return launch


@pytest.mark.usefixtures("launch")
@pytest.mark.parametrize("form", ["bfloat16", "fp8", "int8", "int4"])
@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize(("new", "groups"), [(1, 1), (5, 16), (16, 16)])
def test_what_is_supported(launch, form, dim, new, groups):
    q, k, v = operands(form, new, dim, groups=groups)
    if form == "int4" and dim == 80:  # 40 bytes: no multiple of the 16 that are copied at least
        assert "80 channels in codes of 4 bits" in launch.refusal(q, ops.ContiguousKV(k, v))
        return
    assert launch.refusal(q, ops.ContiguousKV(k, v)) is None
    layout = launch.layout_of(q, k, v, None, 512)
    assert layout.chunks * layout.columns >= new * groups
    assert layout.stages >= 2
    # Programs that share a multiprocessor share its memory.
    programs = layout.programs // tiling.multiprocessors()
    size = launch._shared_bytes(*launch._operands(k, v), layout)
    assert programs * (size + 1024) <= tiling.tuning()["shared_memory"]


@pytest.mark.usefixtures("launch")
@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"new": 17}, "17 new tokens"),
        ({"dim": 72}, "72 channels"),
        ({"dim": 32}, "32 channels"),
        ({"slots": 500}, "500 slots"),
        ({"form": "float32", "q": jnp.float32}, "keys: float32"),
        ({"q": jnp.float32}, "bfloat16 beside queries in float32"),
        ({"form": "float16"}, "float16 beside queries in bfloat16"),
        ({"form": "int8", "q": jnp.float16}, "bfloat16 beside queries in float16"),
        ({"form": "int2"}, "codes of 2 bits"),
        ({"form": "groups"}, "keys: 2 scales per token"),
        ({"form": "small groups"}, "values: 4 scales per token of 128 channels"),
        ({"form": "units"}, "values: a scale per channel"),
        ({"form": "short units"}, "a scale for 32 tokens"),
        ({"form": "sparse"}, "numbers stored as SparseArray"),
    ],
)
def test_what_is_refused_and_why(changes, why):
    q, k, v = operands(**changes)
    chosen = calls.explain(q, k, v, platform="cuda")
    assert chosen.name == "xla"
    assert why in chosen.refused["mosaic_gpu"]
    q, k, v = operands()
    assert calls.explain(q, k, v, platform="cuda").name == "mosaic_gpu"


@pytest.mark.usefixtures("launch")
@pytest.mark.parametrize(
    ("form", "page", "why"),
    [
        ("bfloat16", 16, None),
        ("bfloat16", 64, None),
        ("bfloat16", 256, None),
        ("int8", 64, None),
        ("bfloat16", 24, "pages of 24 slots"),
        ("bfloat16", 4, "pages of 4 slots"),
        ("int8", 16, "codes in pages of 16 slots"),
    ],
)
def test_pages(launch, form, page, why):
    q, k, v = operands(form, slots=page)
    table, lengths = (jax.ShapeDtypeStruct(x, jnp.int32) for x in ((2, 8), (2,)))
    refused = launch.refusal(q, ops.PagedKV(k, v, table, lengths))
    assert refused is None if why is None else why in refused


def test_another_gpu_is_refused(launch, monkeypatch):
    monkeypatch.setattr(dispatch, "capability", lambda: "8.0")
    q, k, v = operands()
    assert "compute capability 8.0" in launch.refusal(q, ops.ContiguousKV(k, v))


@pytest.mark.usefixtures("launch")
def test_channels_come_back_in_order():
    from jkv.ops.mosaic_gpu import convert

    x = jnp.arange(96).reshape(2, 48)
    assert not jnp.array_equal(convert.permute_channels(x), x)
    np.testing.assert_array_equal(convert.restore_channels(convert.permute_channels(x)), x)


@interpreted
@pytest.mark.usefixtures("few_programs")
@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_derivatives_are_those_of_xla(monkeypatch):
    from jax.experimental.pallas import mosaic_gpu as plgpu

    from jkv.ops.attention import mosaic_gpu

    arguments, _, _ = drawn(Case((70, 9), groups=2))
    options = CASES["lengths"].options
    run = functools.partial(mosaic_gpu.attention, interpret=plgpu.InterpretGPUParams())
    monkeypatch.setattr(mosaic_gpu, "attention", run)

    def total(q, implementation):
        rest = {**arguments, "q": q, **options, "implementation": implementation}
        return jnp.sum(calls.attention(**rest).out ** 2)

    with dispatch.target("cuda"):
        got = jax.jit(jax.grad(functools.partial(total, implementation="mosaic_gpu")))
        got = got(arguments["q"])
    want = jax.jit(jax.grad(functools.partial(total, implementation="xla")))(arguments["q"])
    np.testing.assert_allclose(got.astype(float), want.astype(float), atol=2e-2)
