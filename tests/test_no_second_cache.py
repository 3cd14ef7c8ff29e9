"""No second cache: the compiled decode loop holds its cache once and copies none of it.

For this machine's CPU; `scripts/compile_check.py` asks the same of compilers for TPUs and GPUs.
"""

from __future__ import annotations

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

import compile_check
from bench import cases
from bench.loops import Case
from jkv._pytree import pytree, static
from jkv.cache import CacheKind, LayerCache
from jkv.cache.protocol import Step
from tests.conftest import ROOT

pytestmark = [
    pytest.mark.slow,  # many programs: once is enough, on one version of JAX
    pytest.mark.usefixtures("fused"),
]

CASES = cases.cases("cpu")


@pytest.mark.parametrize("name", CASES)
def test_decode_loop(name):
    report = compile_check.measure(CASES[name])
    assert report.copies == 0, report
    assert report.share < 0.1, report


@pytest.mark.parametrize(("form", "page"), [("exact", 16), ("int4", 64)])
def test_pages(form, page):
    report = compile_check.measure(cases.paged_cases("cpu")[f"{form} in pages of {page} B=8 G=4"])
    assert report.copies == 0, report
    assert report.share < 0.1, report


@pytest.mark.parametrize("name", ["dense", "window", "int8", "int4"])
def test_prefill_copies_nothing(name):
    """A chunk's activations are temporaries, and no share of the cache; copies there are none."""
    kind = CASES[f"{name} B=1 G=1 float32 H=64"].kind
    assert compile_check.measure(Case(kind, 1, 4, new=32, slots=4096)).copies == 0


@pytree
class Textbook(LayerCache):
    """The cache that everybody writes first: two axes of rows and heads, update, then product."""

    keys: jax.Array
    values: jax.Array
    capacity: int = static(default=4096)

    def attend(self, q, k, v, step: Step, spec):
        def put(buffer, new):
            start = (0, 0, step.start[0], 0)
            return jax.lax.dynamic_update_slice(buffer, jnp.swapaxes(new, 1, 2), start)

        cache = Textbook(put(self.keys, k), put(self.values, v), self.capacity)
        scores = jnp.einsum("btkh,bksh->bkts", q, cache.keys) * spec.scale
        seen = jnp.arange(self.capacity)[None, None, None] < step.stop[0]
        weights = jax.nn.softmax(jnp.where(seen, scores, -1e30))
        return jnp.einsum("bkts,bksh->btkh", weights, cache.values), cache

    append = take = resize = crop = concat = to_legacy = None  # a decode loop asks for none


class TextbookKind(CacheKind):
    def init(self, batch, slots, kv_heads, head_dim, dtype):
        shape = (batch, kv_heads, slots, head_dim)
        return Textbook(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), slots)


def test_a_second_cache_is_seen():
    """The check itself: a loop that is known to copy does not pass it."""
    report = compile_check.measure(Case(TextbookKind(), 1, 1, slots=4096))
    assert not report.free, report
    assert report.copies or report.share > 0.5


def test_copies_are_counted():
    text = """
      %copy.1 = f32[4,128,64]{2,1,0} copy(%p)
      %c = (f32[1,4,128,64]{3,2,1,0}, f32[1,4,128,64]{3,2,1,0}, u32[]) copy-start(%p)
      ROOT %copy.2 = bf16[128,256]{1,0:T(8,128)(2,1)S(1)} copy(%q)
      %copy.3 = f32[4,128]{1,0} copy(%r)
      %fusion = f32[4,128,64]{2,1,0} fusion(%p), calls=%copy_computation
    """
    assert compile_check.count_copies(text, 4 * 128 * 64) == 3
    assert compile_check.count_copies(text, 4 * 128) == 1


def test_a_copy_that_is_none_is_not_counted():
    """In place, under another tiling's name; and one that is."""
    text = """
%copy_fusion.1 (input.1: u8[32,128]) -> u8[32,128] {
  ROOT %copy.1 = u8[32,128]{1,0:T(8,128)(4,1)} copy(%input.1)
}
%copy_fusion.2 (input.2: u8[32,128]) -> u8[32,128] {
  ROOT %copy.2 = u8[32,128]{1,0:T(8,128)(4,1)} copy(%input.2)
}
  %f = u8[32,128]{1,0} fusion(%p), kind=kLoop, ALIASED, calls=%copy_fusion.1
  %g = u8[32,128]{1,0} fusion(%p), kind=kLoop, calls=%copy_fusion.2
    """.replace("ALIASED", "output_to_operand_aliasing={{}: (0, {})}")
    assert compile_check.count_copies(text, 32 * 128) == 1


@pytest.mark.tpu_compile
@pytest.mark.slow
@pytest.mark.timeout(2500)
@pytest.mark.parametrize("target", ["tpu", "h200"])
def test_other_compilers(target):
    """In a process of its own: a compiler for another device is loaded once and for good."""
    done = subprocess.run(
        [sys.executable, "scripts/compile_check.py", "--target", target],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        timeout=2400,
        check=False,
    )
    if done.returncode == compile_check.SKIPPED:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
