"""Texts that the command line prints: at their seams, and on outputs that cannot write them."""

from __future__ import annotations

import io
import json
import sys
from typing import Any

import pytest

import jkv
from jkv.cli import main

NEW = ("--max-new-tokens", "4")


@pytest.fixture
def narrow(monkeypatch: Any) -> Any:
    """Runs the command with an output that takes ASCII only: its status, and what was written."""
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "unused")

    def narrow(*arguments: str) -> tuple[Any, bytes]:
        written = io.BytesIO()
        out = io.TextIOWrapper(written, encoding="ascii", errors="strict", write_through=True)
        monkeypatch.setattr(sys, "stdout", out)
        with pytest.raises(SystemExit) as exit:
            main(list(arguments))
        return exit.value.code, written.getvalue()

    return narrow


@pytest.mark.parametrize("how", [(), ("--stream",), ("--show-steps",)], ids=str)
def test_what_an_output_cannot_write_is_replaced(tiny, narrow, how):
    status, written = narrow("generate", "--model", tiny, "--prompt", "h€llo", *NEW, *how)
    assert status == 0
    assert b"h?llo" in written


def test_chat_replaces_what_cannot_be_written(tiny, narrow, say, monkeypatch):
    monkeypatch.setattr(jkv.Chat, "stream", lambda self, text: iter(["h€", "llo"]))
    say("hello\n")
    assert narrow("chat", "--model", tiny, *NEW) == (0, b"h?llo\n")


@pytest.mark.parametrize("line", ["h\u20acllo", "h\xe9llo"])
def test_chat_reads_what_its_input_has_no_encoding_for(tiny, narrow, monkeypatch, line):
    heard = []
    monkeypatch.setattr(jkv.Chat, "stream", lambda self, text: (heard.append(text), iter("ok"))[1])
    typed = io.TextIOWrapper(io.BytesIO(f"{line}\n".encode()), encoding="ascii")
    monkeypatch.setattr(sys, "stdin", typed)
    assert narrow("chat", "--model", tiny, *NEW) == (0, b"ok\n")
    assert heard == [line]


def test_chat_refuses_what_is_no_text(tiny, narrow, monkeypatch, capsys):
    typed = io.TextIOWrapper(io.BytesIO(b"h\xe9llo\n"), encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", typed)
    assert narrow("chat", "--model", tiny, *NEW)[0] == 2
    assert "no text in UTF-8" in capsys.readouterr().err


def test_texts_go_on_from_their_prompts(run, shared, tmp_path):
    """With SentencePiece, whose decoder strips the first space of what it is given."""
    source = str(shared / "models" / "stories260k")
    lm = jkv.load(source)
    out = run("generate", "--model", source, "--prompt", "<s>Once upon a", *NEW, "--json")[1]
    (output,) = json.loads(out)["outputs"]
    whole = [*output["prompt_tokens"], *output["tokens"]]
    assert whole.count(lm.tokenizer.token_id("<s>")) == 1
    assert "Once upon a" + output["text"] == lm.decode(whole)
    assert output["text"].startswith(" ")
    requests = tmp_path / "requests.jsonl"
    requests.write_text(json.dumps({"prompt": "<s>Once upon a", "max_new_tokens": 4}))
    out = run("engine", "--model", source, "--pages", "8", "--requests", str(requests))[1]
    assert json.loads(out)["text"] == output["text"]
    assert json.loads(out)["tokens"] == output["tokens"]


def test_an_empty_list_of_stops_switches_all_off(run, tmp_path, tiny, lm):
    free = jkv.generate(lm, ["he wo"], max_new_tokens=4, stop=()).tokens[0].tolist()
    own = [free[1]]
    asked = {"prompt": "he wo", "max_new_tokens": 4}
    requests = tmp_path / "requests.jsonl"
    lines = [asked | {"stop": []}, asked | {"stop": own}]
    requests.write_text("\n".join(map(json.dumps, lines)))
    out = run("engine", "--model", tiny, "--pages", "8", "--requests", str(requests))[1]
    answers = {a["line"]: a["tokens"] for a in map(json.loads, out.splitlines())}
    assert answers == {1: free, 2: free[:2]}
