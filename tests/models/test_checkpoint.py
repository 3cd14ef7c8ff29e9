"""Weights: everything that is wrong with them is said at once, and what is right loads."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import jkv
from jkv.errors import CheckpointError


def _leaves(model):
    return {
        "/".join(map(str, path)): np.asarray(leaf[...])
        for path, leaf in nnx.to_flat_state(nnx.state(model))
    }


def _refused(copy, *parts: str) -> str:
    with pytest.raises(CheckpointError) as error:
        jkv.load(copy.path)
    for part in parts:
        assert part in str(error.value)
    return str(error.value)


def _rename(tensors, old, new):
    tensors[new] = tensors.pop(old)


Q = "model.layers.1.self_attn.q_proj.weight"


def test_missing_extra_and_misshapen_in_one_error(checkpoint):
    copy = checkpoint()

    def spoil(tensors):
        del tensors[Q]
        del tensors["model.layers.0.mlp.up_proj.weight"]
        del tensors["model.layers.2.mlp.up_proj.weight"]
        tensors["model.norm.weight"] = np.zeros(5, np.float32)
        tensors["model.layers.0.self_attn.q_proj.bias"] = np.zeros(24, np.float32)
        tensors["extra.weight"] = np.zeros(2, np.float32)

    copy.tensors(spoil)
    text = _refused(
        copy,
        f"missing tensor {Q}",
        "missing tensor model.layers.{0,2}.mlp.up_proj.weight",
        "model.norm.weight has shape [5]; expected [12]",
        "unknown tensor model.layers.0.self_attn.q_proj.bias",
        "unknown tensor extra.weight",
    )
    assert text.count("\n  - ") == 5
    jkv.load(checkpoint().path)


def test_more_layers_than_the_configuration_says(checkpoint):
    copy = checkpoint()
    copy.config(num_hidden_layers=2)
    _refused(copy, "unknown tensor model.layers.2.mlp.up_proj.weight")
    copy.config(num_hidden_layers=4)
    _refused(copy, "missing tensor model.layers.3.mlp.up_proj.weight")
    copy.config(num_hidden_layers=1000)
    _refused(copy, "missing tensor model.layers.{3-999}.mlp.up_proj.weight")
    copy.config(num_hidden_layers=3)
    jkv.load(copy.path)


def test_transposed_tensor_is_misshapen(checkpoint):
    copy = checkpoint()
    copy.tensors(lambda t: t.update({Q: t[Q].T.copy()}))
    _refused(copy, f"tensor {Q} has shape [12, 24]; expected [24, 12]")


@pytest.mark.parametrize("dtype", [np.int8, np.uint8])
def test_dtypes_that_are_no_weights(dtype, checkpoint):
    copy = checkpoint()
    copy.tensors(lambda t: t.update({Q: t[Q].astype(dtype)}))
    _refused(copy, f"tensor {Q} is ", "expected F32, F16, BF16")


def test_rotary_buffers_of_old_checkpoints_load(checkpoint):
    copy = checkpoint()
    buffer = np.ones(3, np.float32)
    copy.tensors(lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": buffer}))
    jkv.load(copy.path)
    copy.tensors(lambda t: t.update({"model.layers.0.self_attn.rotary_emb.theta": buffer}))
    _refused(copy, "unknown tensor model.layers.0.self_attn.rotary_emb.theta")


def test_gpt2_with_and_without_its_prefix_and_masks(checkpoint):
    copy = checkpoint("gpt2")
    before = _leaves(jkv.load(copy.path).model)

    def strip(tensors):
        for name in list(tensors):
            _rename(tensors, name, name.removeprefix("transformer."))
        tensors["h.0.attn.bias"] = np.tril(np.ones((1, 1, 4, 4), np.uint8))
        tensors["h.1.attn.masked_bias"] = np.array(-1e4, np.float32)

    copy.tensors(strip)
    after = _leaves(jkv.load(copy.path).model)
    assert before.keys() == after.keys()
    for name, value in before.items():
        np.testing.assert_array_equal(after[name], value)
    copy.tensors(lambda t: t.update({"transformer.wte.weight": t["wte.weight"]}))
    _refused(copy, "with and without the prefix transformer.")


def test_tied_head_that_is_saved_too(checkpoint):
    """It loads when it is the embedding, and is refused when it is another matrix."""
    copy = checkpoint("llama-mha")
    copy.tensors(lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"]}))
    assert jkv.load(copy.path).model.head is None
    copy.tensors(lambda t: t.update({"lm_head.weight": t["lm_head.weight"] + 1}))
    _refused(copy, "lm_head.weight differs from the embedding")
    copy = checkpoint("llama-mqa")
    copy.tensors(lambda t: t.pop("lm_head.weight"))
    _refused(copy, "missing tensor lm_head.weight")


FLOATS = [np.float64, np.float32, np.float16, ml_dtypes.bfloat16]


@pytest.mark.parametrize(
    ("embedding", "head"),
    [
        (np.float32, ml_dtypes.bfloat16),
        (ml_dtypes.bfloat16, np.float32),
        (np.float16, ml_dtypes.bfloat16),
        (np.float64, np.float16),
    ],
)
def test_tied_head_in_another_dtype(embedding, head, checkpoint):
    """Both are roundings of one matrix, or they are refused."""
    copy = checkpoint("llama-mha")
    name = "model.embed_tokens.weight"
    values = np.random.default_rng(0).normal(size=(19, 12))

    def tie(tensors):
        # What is narrower was rounded from what is wider, or both from the same.
        wide = values.astype(embedding) if np.dtype(embedding).itemsize > 2 else values
        tensors[name] = wide.astype(embedding)
        tensors["lm_head.weight"] = wide.astype(head)
        if np.dtype(head).itemsize > np.dtype(embedding).itemsize:
            tensors[name] = tensors["lm_head.weight"].astype(embedding)

    def change(tensors):
        tie(tensors)
        tensors["lm_head.weight"][3, 4] *= 1.02

    _cast(copy, tie)
    assert jkv.load(copy.path).model.head is None
    copy = checkpoint("llama-mha")
    _cast(copy, change)
    _refused(copy, "lm_head.weight differs from the embedding")


@pytest.mark.parametrize("stored", FLOATS)
@pytest.mark.parametrize("wanted", [None, "float32", "bfloat16", jnp.float16])
def test_dtypes_on_disk_and_in_memory(stored, wanted, checkpoint):
    copy = checkpoint()
    exact = {}

    def cast(tensors):
        for name in tensors:
            tensors[name] = tensors[name].astype(stored)
        exact.update({name: value.astype(np.float32) for name, value in tensors.items()})

    _cast(copy, cast)
    lm = jkv.load(copy.path, dtype=wanted)
    dtype = jnp.dtype(wanted or "float32")
    assert lm.config.dtype == dtype.name
    assert {leaf.dtype for leaf in _leaves(lm.model).values()} == {dtype}
    got = np.asarray(lm.model.blocks[1].attention.q.kernel[...])
    np.testing.assert_array_equal(got, exact[Q].astype(dtype))
    logits, _ = jax.eval_shape(lm.model, jnp.asarray([[1, 2, 3]]))
    assert logits.dtype == jnp.float32


def _cast(copy, change):
    """`safetensors.numpy` writes BF16, and cannot read it again: one way is enough here."""
    tensors = load_file(copy.weights)
    change(tensors)
    save_file(tensors, copy.weights)


def test_the_checkpoints_own_dtype_where_products_are_fast(checkpoint, monkeypatch):
    copy = checkpoint()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    copy.config(dtype="bfloat16")
    assert jkv.load(copy.path).config.dtype == "bfloat16"
    copy.config(dtype=..., torch_dtype="float16")
    assert jkv.load(copy.path).config.dtype == "float16"
    copy.config(torch_dtype=...)
    assert jkv.load(copy.path).config.dtype == "float32"  # as it lies on disk
    copy.config(dtype="float64")
    assert jkv.load(copy.path).config.dtype == "float32"
    copy.config(dtype=...)
    copy.tensors(lambda t: t.update({k: v.astype(np.float64) for k, v in t.items()}))
    assert jkv.load(copy.path).config.dtype == "float32"


def test_loaded_weights_do_not_alias_the_file(checkpoint):
    """Truncating or rewriting the file afterwards changes nothing."""
    copy = checkpoint()
    lm = jkv.load(copy.path)
    before = _leaves(lm.model)
    copy.weights.write_bytes(b"\0" * copy.weights.stat().st_size)
    copy.weights.write_bytes(b"")
    for name, value in _leaves(lm.model).items():
        np.testing.assert_array_equal(value, before[name])


def test_a_file_cut_short_while_it_is_read(checkpoint):
    copy = checkpoint()

    def cut(done, total):
        del total
        if done == 0:
            copy.weights.write_bytes(copy.weights.read_bytes()[:3000])

    with pytest.raises(CheckpointError, match="ended inside of"):
        jkv.load(copy.path, progress=cut)


def test_progress_tells_bytes(checkpoint):
    copy = checkpoint()
    calls = []
    jkv.load(copy.path, progress=lambda done, total: calls.append((done, total)))
    done, total = zip(*calls, strict=True)
    assert (done[0], done[-1]) == (0, total[0])
    assert list(done) == sorted(done)
    assert set(total) == {
        sum(4 * leaf.size for leaf in _leaves(jkv.load(copy.path).model).values())
    }


# Shards -------------------------------------------------------------------------------------------


def test_shards(checkpoint):
    whole, copy = checkpoint(), checkpoint()
    copy.shard()
    before = _leaves(jkv.load(whole.path).model)
    after = _leaves(jkv.load(copy.path).model)
    for name, value in before.items():
        np.testing.assert_array_equal(after[name], value)


@pytest.mark.parametrize(
    "name",
    [
        "../a.safetensors",
        "/etc/a.safetensors",
        "sub/a.safetensors",
        "..\\a.safetensors",
        "C:a.safetensors",
        "a.bin",
        "..",
        "",
        "a\0.safetensors",
        7,
        None,
    ],
)
def test_shard_names_that_leave_the_directory(name, checkpoint):
    copy = checkpoint()
    index = copy.shard()
    # There is a good file where the name leads, so that only the name can be the reason.
    (copy.path / "sub").mkdir()
    for place in (copy.path.parent, copy.path / "sub"):
        (place / "a.safetensors").write_bytes((copy.path / "a.safetensors").read_bytes())
    first = next(k for k, v in index["weight_map"].items() if v == "a.safetensors")
    copy.index(index)
    jkv.load(copy.path)
    index["weight_map"][first] = name
    copy.index(index)
    _refused(copy, "is no shard's name")


def test_index_and_shards_that_disagree(checkpoint):
    copy = checkpoint()
    index = copy.shard()
    names = list(index["weight_map"])
    index["weight_map"]["ghost.weight"] = "a.safetensors"
    index["weight_map"][names[0]] = "b.safetensors"
    index["weight_map"][names[-1]] = "c.safetensors"
    copy.index(index)
    _refused(
        copy,
        "ghost.weight is not in its shard",
        f"a.safetensors: holds {names[0]}, which",
        "c.safetensors is missing",
    )


def test_a_tensor_in_two_shards(checkpoint):
    copy = checkpoint()
    index = copy.shard()
    copy.weights.symlink_to(copy.path / "b.safetensors")
    first = next(iter(index["weight_map"]))
    extra = np.zeros(2, np.float32)
    copy.tensors(lambda t: t.update({first: extra}))
    copy.weights.rename(copy.path / "b.safetensors")
    _refused(copy, f"b.safetensors: {first} is in a.safetensors too")


def test_harmless_tensors_that_the_index_and_the_shards_disagree_about(checkpoint):
    copy = checkpoint("llama-mha")
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(3, np.float32)}
    index = copy.shard()
    tensors = load_file(copy.path / "a.safetensors")
    head = {"lm_head.weight": tensors["model.embed_tokens.weight"]}
    for extra in (buffer, buffer | head):
        save_file(tensors | extra, copy.path / "a.safetensors")
        jkv.load(copy.path)
    index["weight_map"]["model.layers.1.self_attn.rotary_emb.inv_freq"] = "b.safetensors"
    copy.index(index)
    jkv.load(copy.path)
    del index["weight_map"]["model.norm.weight"]
    copy.index(index)
    _refused(copy, "holds model.norm.weight, which model.safetensors.index.json does not list")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {}}'])
def test_index_that_is_none(text, checkpoint):
    copy = checkpoint()
    copy.shard()
    (copy.path / "model.safetensors.index.json").write_text(text)
    _refused(copy, "model.safetensors.index.json")


def test_symlinks_as_the_hub_cache_makes_them_load(checkpoint):
    copy = checkpoint()
    blobs = copy.path.parent / "blobs"
    blobs.mkdir()
    for path in list(copy.path.iterdir()):
        path.rename(blobs / path.name)
        path.symlink_to(f"../blobs/{path.name}")
    jkv.load(copy.path)


# Pickles ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickles_are_never_opened(name, checkpoint):
    copy = checkpoint()
    weights = copy.weights.read_bytes()
    copy.weights.unlink()
    (copy.path / name).mkdir()  # opening it would raise another error
    _refused(copy, name, "convert the weights to safetensors")
    copy.weights.write_bytes(weights)
    jkv.load(copy.path)


def test_weights_of_another_name(checkpoint):
    copy = checkpoint()
    copy.weights.rename(copy.path / "adapter_model.safetensors")
    _refused(copy, "found adapter_model.safetensors")


def test_dangling_link(checkpoint):
    copy = checkpoint()
    copy.weights.unlink()
    copy.weights.symlink_to("nowhere")
    assert re.search(r"model\.safetensors.* is missing", _refused(copy))
