"""`LM.save`: what was written is what is read again, whatever goes wrong on the way."""

from __future__ import annotations

import dataclasses
import json
import os

import jax
import numpy as np
import pytest
from flax import nnx

import jkv
from jkv import _compat
from jkv.errors import CheckpointError, UnsupportedError
from jkv.models import save as save_module
from jkv.models.config_writer import write_config
from tests.models.conftest import GOLDEN
from tests.models.test_tokenizer import words

# One of each family, and each rule of rotary positions.
NAMES = """
gpt2 gpt2-old llama-gqa-old llama3 llama-linear-old llama-yarn mistral-window mistral-mha
qwen2-windows-old qwen3-gqa glm-gqa glm4-mha-old gemma2-gqa gemma2-mha
""".split()  # noqa: SIM905


def _same(a: jkv.LM, b: jkv.LM) -> bool:
    leaves = [jax.tree.leaves(nnx.state(lm.model)) for lm in (a, b)]
    return len(leaves[0]) == len(leaves[1]) and all(map(np.array_equal, *leaves))


@pytest.mark.parametrize("name", NAMES)
def test_round_trip(name, tmp_path):
    """With the configuration that was read, and with one written from `Config` alone."""
    lm = jkv.load(GOLDEN / name)
    assert lm.tokenizer is None
    lm.save(tmp_path / "own")
    own = jkv.load(tmp_path / "own")
    assert own.config == lm.config
    assert _same(lm, own)
    kept = json.loads((GOLDEN / name / "config.json").read_text())
    written = json.loads((tmp_path / "own" / "config.json").read_text())
    assert kept | {"dtype": 0, "torch_dtype": 0} == written | {"dtype": 0, "torch_dtype": 0}
    dataclasses.replace(lm, directory=None).save(tmp_path / "new")
    new = jkv.load(tmp_path / "new")
    assert _same(lm, new)
    assert dataclasses.replace(new.config, windows=()) == dataclasses.replace(lm.config, windows=())
    assert [new.config.window(i) for i in range(2)] == [lm.config.window(i) for i in range(2)]


def test_a_model_that_was_trained(checkpoint, tmp_path):
    """In place, and as a new module."""
    lm = jkv.load(checkpoint("llama-mqa").path)
    lm.model.norm.scale[...] = lm.model.norm.scale[...] * 3
    lm.save(tmp_path / "a")
    assert _same(lm, jkv.load(tmp_path / "a"))
    graph, state = nnx.split(lm.model)
    model = nnx.merge(graph, jax.tree.map(lambda x: x + 1, state))
    dataclasses.replace(lm, model=model).save(tmp_path / "b")
    assert _same(dataclasses.replace(lm, model=model), jkv.load(tmp_path / "b"))


def test_a_model_made_by_hand(tiny_config, tiny_model, tmp_path):
    """A family is found that describes it."""
    lm = jkv.LM(tiny_model, tiny_config, None, "by hand")
    lm.save(tmp_path / "x")
    again = jkv.load(tmp_path / "x")
    assert again.config == dataclasses.replace(tiny_config, family="llama")
    assert _same(lm, again)


@pytest.mark.parametrize(
    "changes",
    [
        {"post_norms": True},
        {"norm_offset": 1.0},
        {"embed_scale": 3.0},
        {"rope": None},
        {"windows": (4, None)},
        {"family": "gpt2"},
        {"rope": jkv.Rope(dims=4)},
    ],
)
def test_models_that_no_family_describes(changes, tiny_config):
    with pytest.raises(UnsupportedError, match="save cannot describe this model"):
        write_config(dataclasses.replace(tiny_config, **changes))


# Files --------------------------------------------------------------------------------------------


def test_files_of_the_tokenizer_and_ignored_keys(checkpoint, tmp_path):
    copy = checkpoint("llama-mha")
    words(copy.path)
    copy.config(mystery=1, auto_map={"AutoModel": "x.Y"}, license="mit", eos_token_id=2)
    copy.json("generation_config.json", eos_token_id=[2, 3], temperature=0.5)
    copy.json("tokenizer_config.json", tokenizer_class="X")
    (copy.path / "chat_template.jinja").write_text("{{ messages }}")
    (copy.path / "additional_chat_templates").mkdir()
    (copy.path / "additional_chat_templates" / "rag.jinja").write_text("rag")
    (copy.path / "notes.txt").write_text("")
    lm = jkv.load(copy.path, ignore=("mystery",))
    lm.save(tmp_path / "deep" / "out")
    saved = {
        str(path.relative_to(tmp_path / "deep" / "out")): path.read_bytes()
        for path in (tmp_path / "deep" / "out").rglob("*")
        if path.is_file()
    }
    same = (
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        os.path.join("additional_chat_templates", "rag.jinja"),
    )
    assert {name: saved[name] for name in same} == {
        name: (copy.path / name).read_bytes() for name in same
    }
    rest = {"config.json", "generation_config.json", "model.safetensors"}
    assert saved.keys() == rest | set(same)
    assert {"mystery", "auto_map"}.isdisjoint(json.loads(saved["config.json"]))
    assert json.loads(saved["config.json"])["license"] == "mit"
    again = jkv.load(tmp_path / "deep" / "out")
    assert again.config.end_ids == (2, 3)
    assert os.listdir(tmp_path / "deep") == ["out"]


def test_a_tokenizer_that_was_not_read_from_files(checkpoint, tmp_path):
    copy = checkpoint("llama-mha")
    words(copy.path)
    lm = jkv.load(copy.path)
    assert lm.tokenizer is not None
    lm.tokenizer.directory = None
    lm.tokenizer.special["eos_token"] = "x"
    lm.tokenizer.templates |= {"default": "a", "rag": "b"}
    lm.save(tmp_path / "x")
    again = jkv.load(tmp_path / "x").tokenizer
    assert again is not None
    assert again.encode("a b") == lm.tokenizer.encode("a b")
    assert again.special == lm.tokenizer.special
    assert again.templates["default"] == "a"


def test_files_that_are_gone(checkpoint, tmp_path):
    copy = checkpoint("llama-mha")
    words(copy.path)
    lm = jkv.load(copy.path)
    (copy.path / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json.* is gone"):
        lm.save(tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_shards(tmp_path):
    lm = jkv.load(GOLDEN / "llama-mqa")
    lm.save(tmp_path, max_shard_size="4KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert set(index["weight_map"].values()) == set(files)
    assert index["metadata"]["total_size"] == sum(
        x.nbytes for x in jax.tree.leaves(nnx.state(lm.model))
    )
    assert max((tmp_path / name).stat().st_size for name in files) < 4000 + 2000  # of a header
    assert _same(lm, jkv.load(tmp_path))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dtype(dtype, tmp_path):
    lm = jkv.load(GOLDEN / "llama-mqa")
    lm.save(tmp_path, dtype=dtype)
    again = jkv.load(tmp_path, dtype="float32")
    assert jkv.models.read_config(tmp_path).dtype == dtype
    for a, b in zip(
        jax.tree.leaves(nnx.state(lm.model)), jax.tree.leaves(nnx.state(again.model)), strict=True
    ):
        np.testing.assert_array_equal(np.asarray(a).astype(jax.numpy.dtype(dtype)), b)


# Existing directories -----------------------------------------------------------------------------


def test_a_directory_that_is_not_empty(checkpoint, tmp_path):
    copy = checkpoint("llama-mqa")
    copy.shard()
    for name in ("a.safetensors", "b.safetensors"):
        (copy.path / name).rename(
            copy.path / f"model-0000{'ab'.index(name[0]) + 1}-of-00002.safetensors"
        )
    (copy.path / "notes.txt").write_text("mine")
    (copy.path / "added_tokens.json").write_text("{}")
    lm = jkv.load(GOLDEN / "gpt2")
    before = sorted(os.listdir(copy.path))
    with pytest.raises(FileExistsError, match="is not empty; give another directory, or overwrite"):
        lm.save(copy.path)
    assert sorted(os.listdir(copy.path)) == before
    lm.save(copy.path, overwrite=True)
    assert _same(lm, jkv.load(copy.path))
    kept = ["config.json", "golden.npz", "model.safetensors", "notes.txt"]
    assert sorted(os.listdir(copy.path)) == kept


def test_over_itself(checkpoint):
    """The tokenizer's files are copied before any is removed; links stay links."""
    copy = checkpoint("llama-mha")
    words(copy.path)
    link = copy.path.parent / "link"
    link.symlink_to(copy.path)
    lm = jkv.load(link)
    lm.model.norm.scale[...] = lm.model.norm.scale[...] * 3
    lm.save(link, overwrite=True)
    assert link.is_symlink()
    again = jkv.load(copy.path)
    assert _same(lm, again)
    assert again.tokenizer is not None


def test_a_file_in_the_way(tmp_path):
    (tmp_path / "x").write_text("")
    with pytest.raises(FileExistsError, match="which is a file"):
        jkv.load(GOLDEN / "llama-mqa").save(tmp_path / "x", overwrite=True)
    with pytest.raises(FileExistsError, match="x', which is a file; expected a directory"):
        jkv.load(GOLDEN / "llama-mqa").save(tmp_path / "x" / "y" / "z")


def test_no_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # which is empty, and what "" would be
    with pytest.raises(ValueError, match="save got ''; expected a directory to write"):
        jkv.load(GOLDEN / "llama-mqa").save("")


@pytest.mark.parametrize("exists", [True, False])
def test_a_failure_leaves_nothing_behind(exists, tmp_path, monkeypatch):
    """Whatever stood there is as it was."""
    lm = jkv.load(GOLDEN / "llama-mqa")
    target = tmp_path / "x"
    if exists:
        lm.save(target)
    before = sorted(os.listdir(tmp_path)), exists and (target / "config.json").read_bytes()

    def fail(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(save_module, "_write_json", fail)
    with pytest.raises(OSError, match="no space"):
        lm.save(target, overwrite=True)
    after = sorted(os.listdir(tmp_path)), exists and (target / "config.json").read_bytes()
    assert before == after
    assert not exists or len(os.listdir(target)) == 2


def test_an_interrupt_between_the_renames_leaves_no_mixture(checkpoint, monkeypatch):
    copy = checkpoint("llama-mqa")
    lm = jkv.load(GOLDEN / "gpt2")

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        lm.save(copy.path, overwrite=True)
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        jkv.load(copy.path)


# What cannot be written ---------------------------------------------------------------------------


def test_what_cannot_be_written(tmp_path):
    lm = jkv.load(GOLDEN / "llama-mqa")
    with pytest.raises(UnsupportedError, match="has a shape and no values"):
        jkv.models.outline(GOLDEN / "llama-mqa").save(tmp_path)
    with pytest.raises(ValueError, match="save got dtype='int8'"):
        lm.save(tmp_path, dtype="int8")
    with pytest.raises(ValueError, match="max_shard_size got '5 apples'"):
        lm.save(tmp_path, max_shard_size="5 apples")
    lm.model.norm.scale[...] = lm.model.norm.scale[...] * 1e30
    with pytest.raises(ValueError, match=r"model\.norm\.weight with values too large for float16"):
        lm.save(tmp_path, dtype="float16")
    lm.model.blocks[0].mlp.up.adapter = nnx.Param(jax.numpy.zeros(3))
    with pytest.raises(UnsupportedError, match=r"no place for blocks\.0\.mlp\.up\.adapter"):
        lm.save(tmp_path)
    assert os.listdir(tmp_path) == []


def test_weights_of_another_shape_or_dtype(tmp_path):
    lm = jkv.load(GOLDEN / "llama-mqa")
    scale = lm.model.norm.scale
    _compat.set_value(scale, scale[...].astype("bfloat16"))
    with pytest.raises(UnsupportedError, match="weights of bfloat16, float32; say in which dtype"):
        lm.save(tmp_path)
    lm.save(tmp_path / "x", dtype="float32")
    _compat.set_value(lm.model.norm.scale, jax.numpy.ones(5))
    with pytest.raises(UnsupportedError, match=r"model\.norm\.weight has shape \[5\]"):
        lm.save(tmp_path / "y")
