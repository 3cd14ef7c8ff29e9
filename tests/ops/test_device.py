"""What this process runs on, told as it is: the device, the attention on it, an unused GPU."""

from __future__ import annotations

import types
import warnings

import jax
import jax.numpy as jnp
import pytest

import jkv
from jkv import _compat, ops
from jkv.ops import device, dispatch

HALF = jnp.bfloat16
Q, K = jnp.ones((1, 1, 2, 64), HALF), jnp.ones((1, 2, 8, 64), HALF)


@pytest.fixture
def on_gpu(monkeypatch):
    """Have this process on a GPU of a capability, as far as can be seen."""

    def pretend(capability, name="Tesla T4"):
        monkeypatch.setattr(jax, "local_devices", lambda: [types.SimpleNamespace(device_kind=name)])
        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
        monkeypatch.setattr(dispatch, "capability", lambda: capability)

    dispatch.warn_of_dtype.cache_clear()
    yield pretend
    dispatch.warn_of_dtype.cache_clear()


@pytest.fixture
def installed(monkeypatch):
    """Have a GPU, and these distributions beside JAX."""

    def pretend(gpu="Tesla T4", platforms=None, **versions):
        found = {"jax": "0.7.2", "jaxlib": "0.7.2"} | {
            name.replace("_", "-"): version for name, version in versions.items()
        }
        monkeypatch.setattr(device, "_find_gpu", lambda: gpu)
        monkeypatch.setattr(_compat, "installed_version", found.get)
        monkeypatch.setattr(jax, "config", types.SimpleNamespace(jax_platforms=platforms))

    return pretend


def test_one_line_of_versions_device_and_attention(installed):
    installed(gpu=None)
    line = jkv.about()
    assert line == f"jkv {jkv.__version__}, JAX 0.7.2 on cpu; attention in float32: xla"


def test_a_gpu_without_bfloat16(on_gpu):
    on_gpu("7.5")
    line = jkv.about()
    assert "on Tesla T4 (compute capability 7.5); attention in float16: xla; " in line
    assert "computes bfloat16 as float32; use float16" in line
    assert "UNUSED" not in line
    chosen = ops.explain(Q, ops.ContiguousKV(K, K))
    assert chosen.name == "xla"
    assert str(chosen).splitlines()[0].startswith("xla runs; a GPU of compute capability 7.5")
    assert 'dtype="float16"' in str(chosen)
    half = ops.explain(Q.astype("float16"), ops.ContiguousKV(K, K))
    assert str(half).splitlines()[0] == "xla runs"
    assert ops.explain(Q, ops.ContiguousKV(K, K), platform="tpu").advice is None


def test_a_gpu_with_bfloat16(on_gpu, monkeypatch):
    on_gpu("8.9", "NVIDIA L4")
    monkeypatch.setattr(_compat, "JAX", (0, 7, 2))
    assert jkv.about().endswith("on NVIDIA L4 (compute capability 8.9); attention in bfloat16: xla")
    assert ops.explain(Q, ops.ContiguousKV(K, K)).advice is None


def test_bfloat16_warns_once(on_gpu):
    def attend(x):
        return jax.eval_shape(
            lambda: ops.attention(x, ops.ContiguousKV(K, K), jnp.zeros((1, 1), int)).out
        )

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        on_gpu("8.0")
        attend(Q)
        dispatch.warn_of_dtype.cache_clear()
        on_gpu("7.5")
        attend(Q.astype("float16"))
        assert caught == []
        attend(Q)
        attend(Q)
    (warning,) = caught
    assert warning.category is jkv.PerformanceWarning
    assert 'jkv.load(..., dtype="float16")' in str(warning.message)


@pytest.mark.parametrize(
    ("versions", "why"),
    [
        ({}, 'since JAX\'s plugin for it is not installed: install "jax[cuda12]==0.7.2"'),
        ({"jax_cuda12_plugin": "0.6.2"}, "since jax-cuda12-plugin 0.6.2 is not for jaxlib 0.7.2"),
        ({"jax_cuda13_plugin": "0.7.2"}, "which JAX could not start"),
        ({"platforms": "cpu"}, "since JAX_PLATFORMS is 'cpu': unset it"),
        ({"platforms": "cuda,cpu"}, "since JAX's plugin for it is not installed"),
    ],
)
def test_a_gpu_that_is_not_used(installed, versions, why):
    installed(**versions)
    assert f"; UNUSED: Tesla T4, {why}" in jkv.about()


def test_a_gpu_is_found_by_its_driver(monkeypatch, tmp_path):
    monkeypatch.setattr(device, "_DEVICES", tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert device._find_gpu() is None
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\nexit 9\n")  # installed, without a GPU
    tool.chmod(0o755)
    assert device._find_gpu() is None
    (tmp_path / "nvidia0").touch()
    assert device._find_gpu() == "an NVIDIA GPU"
    tool.write_text("#!/bin/sh\necho Tesla T4\necho Tesla T4\n")
    assert device._find_gpu() == "Tesla T4"
