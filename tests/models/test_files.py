"""Reading a checkpoint's small files: what they may be, and how large."""

from __future__ import annotations

import os

import pytest

import jkv
from jkv.errors import CheckpointError
from jkv.models.files import read_bytes, read_json, read_text
from tests.models.test_tokenizer import words

NAMES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)


def test_a_file_as_large_as_the_limit_is_read(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"12345")
    assert read_bytes(path, 5) == b"12345"
    with pytest.raises(OSError, match="has 5 bytes; expected at most 4"):
        read_bytes(path, 4)


def test_a_size_that_is_not_stated_is_counted(tmp_path):
    """Files of /proc state the size 0."""
    link = tmp_path / "x"
    link.symlink_to("/proc/self/status")
    if not link.exists():
        pytest.skip("no /proc here")
    assert len(read_bytes(link, 100_000)) > 100
    with pytest.raises(OSError, match="has 101 bytes; expected at most 100"):
        read_bytes(link, 100)


def test_absence_is_a_problem_unless_it_is_optional(tmp_path):
    problems: list[str] = []
    assert read_json(tmp_path / "x.json", problems, optional=True) is None
    assert read_text(tmp_path / "x", problems, limit=1, optional=True) is None
    assert problems == []
    assert read_json(tmp_path / "x.json", problems) is None
    assert problems == ["x.json is missing"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["fifo", "/dev/zero", "/dev/null", "directory", "huge"])
def test_other_things_than_files(kind, name, checkpoint):
    """Each is refused by name; none blocks, and none is read for ever."""
    copy = checkpoint()
    words(copy.path)
    path = copy.path / name
    path.unlink(missing_ok=True)
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    elif kind == "huge":
        with path.open("wb") as file:
            file.truncate(1 << 40)  # a hole: it takes no space
    else:
        path.symlink_to(kind)
    with pytest.raises(CheckpointError, match=rf"{name}: cannot be read: (is a|has \d)") as error:
        jkv.load(copy.path)
    assert len(str(error.value)) < 1000


def test_an_error_does_not_repeat_a_long_file(checkpoint):
    copy = checkpoint()
    words(copy.path)
    (copy.path / "tokenizer.json").write_text('{"model": {"type": "' + "x" * 1_000_000 + '"}}')
    with pytest.raises(CheckpointError) as error:
        jkv.load(copy.path)
    assert len(str(error.value)) < 1000
