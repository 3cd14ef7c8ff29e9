"""What README says of the kinds of cache, against what they are."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import jkv
from jkv.cache import spec

TEXT = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def rows() -> list[tuple[str, str, str]]:
    """The table of kinds: as text, in code, what it keeps."""
    table = TEXT.split("| kind, as text |")[1].split("\n\n")[0]
    lines = [line.strip("| ").split(" | ") for line in table.splitlines()[2:]]
    return [(texts, code, keeps) for texts, code, keeps in lines]


def marked(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


@pytest.mark.parametrize(("texts", "code", "keeps"), rows(), ids=[row[0] for row in rows()])
def test_a_row_of_the_table(texts, code, keeps):
    """Every text names a kind, and what is in code in full is one that a text names."""
    kinds = [jkv.parse(text) for text in marked(texts)]
    for call in marked(code):
        if "..." not in call:
            assert eval(call, {"jkv": jkv}) in kinds
    if "rounded" in keeps:
        exact = {text: jkv.parse(text).recent for text in marked(texts)}
        assert {text for text, recent in exact.items() if recent} == set(marked(keeps))
        for text in marked(keeps):
            assert f"the newest {exact[text]} exact" in keeps


def test_what_the_list_of_kinds_says_of_exact_tokens():
    for name, form in spec.FORMS.items():
        stated = re.search(r"newest (\d+) stay exact", form.says)
        if stated:
            assert jkv.parse(name).recent == int(stated[1])
    assert [jkv.parse(name).recent for name in ("int8", "fp8", "int4", "int2")] == [0, 0, 128, 128]
