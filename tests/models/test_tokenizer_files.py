"""Tokenizers from all of a checkpoint's files; the values are what transformers 5.24 gives."""

from __future__ import annotations

import base64
import json

import pytest
from tokenizers import Tokenizer as Fast
from tokenizers import models, normalizers, pre_tokenizers

import jkv
from jkv.errors import CheckpointError
from jkv.models.tokenizer import read_tokenizer
from tests.models.test_tokenizer import words

X, Y = {"content": "<x>"}, {"content": "<y>", "lstrip": True, "special": True}


def read(path, **files):
    """A tokenizer of words, 9 in number, with other files beside it."""
    problems: list[str] = []
    if not (path / "tokenizer.json").exists():
        words(path)
    for name, values in files.items():
        (path / f"{name}.json").write_text(json.dumps(values))
    return read_tokenizer(path, problems), problems


@pytest.mark.parametrize(
    ("files", "wanted"),
    [
        ({"added_tokens": {"<x>": 9, "<y>": 10}}, {"<x>": 9, "<y>": 10}),
        ({"added_tokens": {"<y>": 10, "<x>": 9}}, {"<x>": 9, "<y>": 10}),
        ({"tokenizer_config": {"added_tokens_decoder": {"10": Y, "9": X}}}, {"<x>": 9, "<y>": 10}),
        ({"tokenizer_config": {"added_tokens_decoder": {"2": {"content": "the"}}}}, {"the": 2}),
        ({"tokenizer_config": {"pad_token": "<pad>"}}, {"<pad>": 9}),
        ({"tokenizer_config": {"pad_token": {"content": "<pad>", "lstrip": True}}}, {"<pad>": 9}),
        ({"special_tokens_map": {"pad_token": "<pad>"}}, {"<pad>": 9}),
        (
            {"tokenizer_config": {"additional_special_tokens": ["<x>", "<y>"]}},
            {"<x>": 9, "<y>": 10},
        ),
        ({"tokenizer_config": {"extra_special_tokens": ["<x>", Y]}}, {"<x>": 9, "<y>": 10}),
        (
            {
                "tokenizer_config": {
                    "extra_special_tokens": {"image_token": "<x>"},
                    "a_token": "<y>",
                }
            },
            {"<y>": 9, "<x>": 10},
        ),
        (
            {"tokenizer_config": {"pad_token": "<y>", "added_tokens_decoder": {"9": X}}},
            {"<x>": 9, "<y>": 10},
        ),
        # The older files count only where there is no `added_tokens_decoder`.
        (
            {
                "tokenizer_config": {"added_tokens_decoder": {"9": X}},
                "added_tokens": {"<y>": 10},
                "special_tokens_map": {"pad_token": "<y>"},
            },
            {"<x>": 9, "<y>": None},
        ),
    ],
)
def test_tokens_of_other_files(files, wanted, tmp_path):
    tokenizer, problems = read(tmp_path, **files)
    assert problems == []
    assert {token: tokenizer.token_id(token) for token in wanted} == wanted
    for token, i in wanted.items():
        if i is not None:
            assert tokenizer.encode(f"cat {token}", special=False) == [3, i]


def test_what_is_special_is_left_out_of_texts(tmp_path):
    tokenizer, _ = read(
        tmp_path, tokenizer_config={"added_tokens_decoder": {"9": X, "10": Y}, "pad_token": "<x>"}
    )
    assert tokenizer.decode([3, 9, 10, 7]) == "cat mat"
    assert tokenizer.encode("cat   <y>", special=False) == [3, 10]
    extra = {"added_tokens_decoder": {"9": X}, "extra_special_tokens": ["<x>"]}
    stated, _ = read(tmp_path, tokenizer_config=extra)  # what says its id says whether it is one
    assert stated.decode([3, 9, 7]) == "cat <x> mat"
    plain, _ = read(tmp_path, tokenizer_config={}, added_tokens={"<x>": 9})
    assert plain.decode([3, 9, 7]) == "cat <x> mat"
    marked, _ = read(tmp_path, special_tokens_map={"additional_special_tokens": ["<x>"]})
    assert marked.decode([3, 9, 7]) == "cat mat"


def test_a_special_token_that_another_begins_with(tmp_path):
    tokenizer, _ = read(tmp_path, special_tokens_map={"extra_special_tokens": ["<x>", "<x>y"]})
    assert tokenizer.without_special("a<x>b<x>yc") == "abc"


@pytest.mark.parametrize("special", [False, True])
def test_special_tokens_are_looked_for_as_they_are_written(special, tmp_path):
    """Others are found in the normalized text, as in transformers."""
    words(tmp_path)
    values = json.loads((tmp_path / "tokenizer.json").read_text())
    text = json.dumps(values | {"normalizer": {"type": "Lowercase"}})
    (tmp_path / "tokenizer.json").write_text(text)
    marked = {"additional_special_tokens": ["<X>"]} if special else {}
    tokenizer, problems = read(tmp_path, added_tokens={"<X>": 9}, special_tokens_map=marked)
    assert problems == []
    assert 9 in tokenizer.encode("cat <X>", special=False)
    assert (9 in tokenizer.encode("cat <x>", special=False)) == (not special)


@pytest.mark.parametrize(
    ("files", "wanted"),
    [
        (
            {"tokenizer_config": {"pad_token": "a"}, "special_tokens_map": {"pad_token": "b"}},
            {"pad_token": "b"},
        ),
        (
            {
                "tokenizer_config": {"pad_token": "a", "added_tokens_decoder": {}},
                "special_tokens_map": {"pad_token": "b", "cls_token": "c"},
            },
            {"pad_token": "a"},
        ),
        (
            {
                "tokenizer_config": {
                    "extra_special_tokens": {"image_token": "<x>"},
                    "add_bos_token": 1,
                }
            },
            {"image_token": "<x>"},
        ),
    ],
)
def test_names_that_templates_see(files, wanted, tmp_path):
    assert read(tmp_path, **files)[0].special == wanted


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"added_tokens": {"<x>": 600}}, "gives the token '<x>' the id 600; .* it has 9"),
        (
            {"tokenizer_config": {"added_tokens_decoder": {"5": {"content": "the"}}}},
            "id 5; .* has 2",
        ),
        ({"added_tokens": {"<x>": "9"}}, "added_tokens.json holds .*; expected tokens and ids"),
        ({"tokenizer_config": {"added_tokens_decoder": [X]}}, "expected ids and tokens"),
        ({"tokenizer_config": {"added_tokens_decoder": {"x": X}}}, "expected ids and tokens"),
        ({"tokenizer_config": {"added_tokens_decoder": {"9": {}}}}, "expected ids and tokens"),
        ({"added_tokens": {"": 9}}, "{'': 9}; expected tokens and ids"),
        ({"added_tokens": {"\ud800": 9}}, "expected tokens and ids"),  # no UTF-8
        ({"added_tokens": {"<x>": 2**32}}, "4294967296}; expected tokens and ids"),
        ({"added_tokens": {"<x>": -1}}, "-1}; expected tokens and ids"),
        (
            {"tokenizer_config": {"added_tokens_decoder": {"9": {"content": "a\udc00"}}}},
            "expected ids and tokens",
        ),
        (
            {"tokenizer_config": {"added_tokens_decoder": {"9" * 5000: X}}},
            "holds .{,150}; expected ids and tokens",
        ),
        (
            {"tokenizer_config": {"added_tokens_decoder": {str(2**32): X}}},
            "4294967296'.*; expected ids and tokens",
        ),
    ],
)
def test_tokens_that_cannot_be_added(files, message, checkpoint):
    copy = checkpoint()
    read(copy.path, **files)
    with pytest.raises(CheckpointError, match=message):
        jkv.load(copy.path)


def test_names_of_tokens_that_are_no_texts(tmp_path):
    """Left out like those of null: a template that needs them says so."""
    config = {"pad_token": "\ud800", "bos_token": "", "eos_token": {"content": 3}}
    files = {"tokenizer_config": config | {"extra_special_tokens": ["\udfff", None]}}
    tokenizer, problems = read(tmp_path, **files)
    assert (tokenizer.special, tokenizer.vocab, problems) == ({}, 9, [])


# Classes whose parts are made anew --------------------------------------------------------------


def pieces(path, model_type, **config):
    """SentencePiece's letters, with a space before every text, as older files have it."""
    alphabet = ["<s>", "</s>", "▁", "a", "b", "▁a"]
    model = models.BPE({c: i for i, c in enumerate(alphabet)}, [("▁", "a")], byte_fallback=True)
    fast = Fast(model)
    fast.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    fast.add_special_tokens(["<s>", "</s>"])
    fast.save(str(path / "tokenizer.json"))
    (path / "config.json").write_text(json.dumps({"model_type": model_type}))
    return read(path, tokenizer_config=config)[0].encode("a</s>a b", special=False)


FIRST, ALWAYS, NEVER = [5, 1, 3, 2, 4], [5, 1, 5, 2, 4], [3, 1, 3, 2, 4]


@pytest.mark.parametrize(
    ("model_type", "config", "wanted"),
    [
        ("llama", {"tokenizer_class": "LlamaTokenizer"}, FIRST),
        ("llama", {"tokenizer_class": "LlamaTokenizerFast", "legacy": False}, FIRST),
        ("llama", {"tokenizer_class": "LlamaTokenizer", "legacy": True}, ALWAYS),
        ("llama", {"tokenizer_class": "LlamaTokenizer", "add_prefix_space": False}, NEVER),
        (
            "llama",
            {"tokenizer_class": "PreTrainedTokenizerFast", "add_prefix_space": False},
            ALWAYS,
        ),
        ("llama", {}, ALWAYS),
        ("mistral", {"tokenizer_class": "LlamaTokenizer"}, ALWAYS),
    ],
)
def test_llama_tokenizers(model_type, config, wanted, tmp_path):
    assert pieces(tmp_path, model_type, **config) == wanted


@pytest.mark.parametrize(
    ("model_type", "config", "before", "wanted"),
    [
        ("gpt2", {"add_prefix_space": True}, False, [1, 0]),
        ("gpt2", {}, True, [0]),
        ("gpt2", {"tokenizer_class": "GPT2TokenizerFast", "add_prefix_space": True}, False, [1, 0]),
        ("qwen2", {"tokenizer_class": "Qwen2Tokenizer", "add_prefix_space": False}, True, [0]),
        ("gpt2", {"tokenizer_class": "PreTrainedTokenizerFast"}, True, [1, 0]),
        ("llama", {"tokenizer_class": "LlamaTokenizer"}, True, [1, 0]),
    ],
)
@pytest.mark.parametrize("nested", [False, True])
def test_a_space_before_bytes(nested, model_type, config, before, wanted, tmp_path):
    fast = Fast(models.BPE({"a": 0, "Ġ": 1}, []))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=before)
    if nested:
        fast.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(), fast.pre_tokenizer])
    fast.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    assert read(tmp_path, tokenizer_config=config)[0].encode("a", special=False) == wanted


# Files that would end the process ---------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [
        (2**32 - 16).to_bytes(4, "little") + bytes(64),  # 4 GB: the Rust library aborts
        (2**31 - 1).to_bytes(4, "little"),
        (1024).to_bytes(4, "little") + bytes(1020),
        (16).to_bytes(4, "little") + bytes(16),  # an index that ends inside of a block
        bytes(8),
        b"",
    ],
)
@pytest.mark.parametrize("nested", [False, True])
def test_a_charsmap_that_states_another_size(nested, data, checkpoint):
    copy = checkpoint()
    words(copy.path)
    part = {
        "type": "Precompiled",
        "precompiled_charsmap": base64.b64encode(data).decode(),
    }
    values = json.loads((copy.path / "tokenizer.json").read_text())
    values["normalizer"] = {"type": "Sequence", "normalizers": [part]} if nested else part
    (copy.path / "tokenizer.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match="precompiled_charsmap is damaged"):
        jkv.load(copy.path)


def test_what_is_checked_is_what_is_built(checkpoint):
    """Of a key that stands twice, the part that was checked is the one that counts."""
    copy = checkpoint()
    words(copy.path)
    text = (copy.path / "tokenizer.json").read_text().rstrip().removesuffix("}")
    large = base64.b64encode((2**32 - 16).to_bytes(4, "little") + bytes(64)).decode()
    part = '{"type": "Precompiled", "precompiled_charsmap": "' + large + '"}'
    text = text.replace("{", '{"normalizer": ' + part + ",", 1) + ', "normalizer": null}'
    (copy.path / "tokenizer.json").write_text(text)
    assert jkv.load(copy.path).encode("the cat") == [[0, 2, 3]]


def test_a_folder_of_too_many_templates(tmp_path):
    folder = tmp_path / "additional_chat_templates"
    folder.mkdir()
    (folder / "notes.txt").write_text("no template")
    for i in range(100):
        (folder / f"t{i:03}.jinja").write_text(str(i))
    tokenizer, problems = read(tmp_path)
    assert (tokenizer.templates["t099"], len(tokenizer.templates), problems) == ("99", 100, [])
    (folder / "u.jinja").write_text("one more")
    tokenizer, problems = read(tmp_path)
    assert problems == [
        "additional_chat_templates: holds 101 templates; expected at most 100",
    ]
    assert "u" not in tokenizer.templates


def test_a_template_that_is_no_text(tmp_path):
    folder = tmp_path / "additional_chat_templates"
    folder.mkdir()
    (folder / "rag.jinja").write_bytes(b"\xff")
    tokenizer, problems = read(tmp_path)
    assert problems == ["rag.jinja: cannot be read: it is not UTF-8 (invalid start byte)"]
    assert tokenizer.templates == {}
