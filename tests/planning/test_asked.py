"""What a plan can be asked, and what it answers."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import huggingface_hub
import jax
import pytest
from flax import nnx

import jkv
from jkv import _pytree
from jkv.cache import spec
from jkv.models import Config, Decoder, outline
from jkv.planning import PRESETS, survey
from jkv.planning.plan import find_config
from tests.conftest import ROOT
from tests.planning.models import TINY

pytestmark = pytest.mark.slow  # many programs: once is enough, on one version of JAX


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


def test_past_the_context():
    within, past = (jkv.plan(TINY, seq_len=n) for n in (TINY.context, TINY.context + 1))
    assert (within.to_dict()["past_context"], past.to_dict()["past_context"]) == (False, True)
    said = "past the context: rows of 4,097 tokens, of a model that was made for 4,096 tokens"
    assert said in str(past)
    assert "past the context" not in str(within)


def test_print_shows_a_table(capsys):
    plan = jkv.plan("gpt2", device_memory="24GiB")
    print(plan)
    shown = capsys.readouterr().out
    assert "24.0 GiB of memory: fits" in shown
    assert f"{plan.total_bytes:,}" in shown
    assert repr(plan).count("\n") == 0
    assert "to_dict()" in (jkv.plan.__doc__ or "")
    assert "json.dumps" in (type(plan).__doc__ or "")


@pytest.mark.parametrize(
    ("written", "meant"),
    [("lama-3-8b", "llama-3-8b"), ("Qwen3-8", "qwen3-8b"), ("gemma2-9b!", "gemma-2-9b")],
)
def test_a_preset_that_is_misspelt_is_named(written, meant, monkeypatch):
    def refuse(name: str, **options: Any) -> str:
        raise huggingface_hub.errors.OfflineModeIsEnabled("offline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(jkv.CheckpointError, match=f"did you mean the preset '{meant}'.*neither a"):
        jkv.plan(written)
    with pytest.raises(jkv.CheckpointError, match=r"^another-team/thing is neither"):
        jkv.plan("another-team/thing")
