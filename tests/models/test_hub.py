"""Where a checkpoint is looked for, with the hub's cache laid out as huggingface_hub does."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub import constants

import jkv
from jkv.errors import CheckpointError
from jkv.models.hub import resolve
from tests.models.conftest import GOLDEN
from tests.models.test_tokenizer import words

OLD, NEW = "1" * 40, "2" * 40


class Cache:
    """`HF_HOME/hub` with revisions of one repository: links to blobs, and refs."""

    def __init__(self, root: Path):
        self.root = root
        self.repo = root / "models--team--tiny"

    def add(self, commit: str, source: Path, ref: str | None = None) -> Path:
        snapshot = self.repo / "snapshots" / commit
        snapshot.mkdir(parents=True)
        (self.repo / "blobs").mkdir(exist_ok=True)
        for path in source.rglob("*"):
            if path.is_dir():
                continue
            data = path.read_bytes()
            blob = self.repo / "blobs" / hashlib.sha256(data).hexdigest()
            blob.write_bytes(data)
            link = snapshot / path.relative_to(source)
            link.parent.mkdir(exist_ok=True)
            link.symlink_to(os.path.relpath(blob, link.parent))
        if ref is not None:
            (self.repo / "refs").mkdir(exist_ok=True)
            (self.repo / "refs" / ref).write_text(commit)
        return snapshot


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """No connection, and nothing but this cache."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return Cache(tmp_path / "hub")


def test_main_branch_tag_and_commit(cache):
    cache.add(OLD, GOLDEN / "llama-mha", ref="v1")
    cache.add(NEW, GOLDEN / "mistral-mha", ref="main")
    assert jkv.load("team/tiny").config.family == "mistral"
    assert jkv.load("team/tiny", revision="v1").config.family == "llama"
    assert jkv.load("team/tiny", revision=OLD).config.family == "llama"
    assert jkv.load("team/tiny", revision=NEW).config.family == "mistral"


def test_shards_of_a_snapshot(cache, checkpoint):
    copy = checkpoint()
    copy.shard(("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"))
    cache.add(NEW, copy.path, ref="main")
    assert jkv.load("team/tiny").config.layers == 3


def test_templates_of_a_snapshot(cache, checkpoint):
    copy = checkpoint()
    words(copy.path)
    (copy.path / "chat_template.jinja").write_text("usual")
    (copy.path / "additional_chat_templates").mkdir()
    (copy.path / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    cache.add(NEW, copy.path, ref="main")
    tokenizer = jkv.load("team/tiny").tokenizer
    assert tokenizer.templates == {"default": "usual", "tool_use": "tools"}


def test_a_snapshot_with_a_file_missing(cache):
    snapshot = cache.add(NEW, GOLDEN / "llama-mha", ref="main")
    (snapshot / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors or .* is missing.*in the hub's"):
        jkv.load("team/tiny")


@pytest.mark.parametrize("revision", [None, "v2", "3" * 40])
def test_not_in_the_cache(revision, cache):
    if revision is not None:
        cache.add(NEW, GOLDEN / "llama-mha", ref="main")
    with pytest.raises(CheckpointError, match=r"hub cannot be reached.*hf download team/tiny") as e:
        jkv.load("team/tiny", revision=revision)
    assert "\n" not in str(e.value)
    assert (revision or "") in str(e.value)


def test_what_is_downloaded(monkeypatch, tmp_path):
    """No pickles, no code, nothing in folders, no second copy of the weights."""
    from huggingface_hub.utils import filter_repo_objects

    seen = {}

    def download(name, **options):
        seen.update(options, name=name)
        return str(GOLDEN / "llama-mha")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    jkv.load("team/tiny", revision="v1")
    files = [
        "config.json",
        "generation_config.json",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "additional_chat_templates/tool_use.jinja",
        "additional_chat_templates/config.json",
        "additional_chat_templates/old/rag.jinja",
        "additional_chat_templates2/rag.jinja",
        "additional_chat_template/rag.jinja",
        "additional/chat_template.jinja",
        "a/tool_use.jinja",
        "b/tool_use.jinja",
        "templates/tool_use.jinja",
        "pytorch_model.bin",
        "modeling.py",
        "consolidated.safetensors",
        "original/consolidated.00.pth",
        "onnx/config.json",
        "README.md",
    ]
    kept = filter_repo_objects(
        files, allow_patterns=seen["allow_patterns"], ignore_patterns=seen["ignore_patterns"]
    )
    assert list(kept) == files[:8]
    assert (seen["name"], seen["revision"]) == ("team/tiny", "v1")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        ("GatedRepoError", "accept its terms"),
        ("RepositoryNotFoundError", "neither a directory here, nor a repository"),
        ("RevisionNotFoundError", "has no revision 'v1'"),
        ("HfHubHTTPError", "the hub refused team/tiny"),
        ("LocalEntryNotFoundError", "cannot be reached"),
        ("OSError", "cannot be downloaded: no"),
    ],
)
def test_what_the_hub_says(error, message, monkeypatch, tmp_path):
    def download(name, **options):
        if error == "OSError":
            raise OSError("no")
        kind = getattr(huggingface_hub.errors, error)
        if error == "LocalEntryNotFoundError":
            raise kind("no")
        raise kind("no", response=SimpleNamespace(headers={}, request=None))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        jkv.load("team/tiny", revision="v1")


def test_a_directory_comes_before_the_hub(cache, checkpoint):
    cache.add(NEW, GOLDEN / "mistral-mha", ref="main")
    copy = checkpoint("llama-mha")
    Path("team").mkdir()
    copy.path.rename("team/tiny")
    assert jkv.load("team/tiny").config.family == "llama"
    assert jkv.load(Path("team/tiny")).config.family == "llama"
    with pytest.raises(ValueError, match="not a repository of the hub"):
        jkv.load("team/tiny", revision="main")


@pytest.mark.parametrize("source", ["", None, 3, ["team/tiny"]])
def test_sources_of_another_kind(source):
    with pytest.raises(ValueError, match="expected a built-in model"):
        resolve(source, None, show=False)


@pytest.mark.parametrize(
    "source", ["no/such/place", "/no/such/place", Path("nowhere"), "~/x", "a b", "-x/y--z"]
)
def test_sources_that_are_nowhere(source, cache):
    with pytest.raises(CheckpointError, match="neither a directory"):
        jkv.load(source)


def test_the_environment_is_heeded(tmp_path):
    """A process of its own, with HF_HOME and HF_HUB_OFFLINE as a user sets them."""
    Cache(tmp_path / "hub").add(NEW, GOLDEN / "llama-mha", ref="main")
    code = (
        "import jkv, numpy as np\n"
        "lm = jkv.load('team/tiny')\n"
        "print(float(np.abs(np.asarray(lm.model.embedding[...])).sum()))"
    )
    env = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "JAX_PLATFORMS": "cpu"}
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        env.pop(name, None)
    root = Path(jkv.__file__).parent.parent
    run = subprocess.run(
        [sys.executable, "-c", code], env=env, cwd=root, capture_output=True, text=True, check=True
    )
    wanted = np.abs(np.asarray(jkv.load(GOLDEN / "llama-mha").model.embedding[...])).sum()
    assert float(run.stdout) == pytest.approx(float(wanted))
    assert run.stderr == ""
