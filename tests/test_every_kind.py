"""Every kind of cache as people write it: in a conversation, and on the command line."""

from __future__ import annotations

import dataclasses
import io
import json
import sys
from typing import Any

import jax
import numpy as np
import pytest

import jkv
from jkv.cache import spec
from jkv.cli import main, process
from tests.cache.kinds import ALIKE, GO_ON
from tests.cache.test_file import same_bits
from tests.decoding import texts

pytestmark = pytest.mark.slow  # many programs: once is enough, on one version of JAX

NEW = 8
TURNS = ("hello, and hello again", "why")  # of few sizes: each is a program for each kind

# Kinds that let go of tokens cannot be rolled back to what two turns share.
LETS_GO = ("window", "evict:16", "pyramid", "per_layer")


@pytest.fixture(scope="module")
def lms(tiny_config: Any) -> dict[int, jkv.LM]:
    """By the number of layers: one is cheaper, two make a difference to kinds per layer."""
    return {n: texts.noise(dataclasses.replace(tiny_config, layers=n)) for n in (1, 2)}


@pytest.fixture
def lm(lms: dict[int, jkv.LM], text: str) -> jkv.LM:
    return lms[2 if text.startswith(("per_layer", "pyramid")) else 1]


@pytest.fixture
def run(lm: jkv.LM, capsys: Any, monkeypatch: Any) -> Any:
    """The command line with this model, in this process: standard output."""
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "unused")
    monkeypatch.setattr(process, "load", lambda *_: lm)

    def run(*arguments: str, said: str = "") -> str:
        monkeypatch.setattr(sys, "stdin", io.StringIO(said))
        with pytest.raises(SystemExit) as exit:
            main([*arguments, "--max-new-tokens", str(NEW)])
        heard = capsys.readouterr()
        assert exit.value.code == 0, heard.err
        return heard.out

    return run


def talk(lm: jkv.LM, text: str) -> tuple[jkv.Chat, list[tuple[int, int]]]:
    """A conversation, and how many tokens of each prompt were there already and were not."""
    chat = jkv.Chat(lm, max_new_tokens=NEW, cache=spec.parse(text))
    counts = []
    for turn in TURNS:
        chat.send(turn)
        counts.append((chat.reused, chat.prefilled))
        past = chat._past.result
        assert np.asarray(past.cache.check().lengths).tolist() == [len(past.history[0]) - 1]
        assert 1 <= int(past.lengths[0]) <= NEW
    return chat, counts


@pytest.mark.parametrize("text", [*ALIKE, *GO_ON])
def test_in_a_conversation_and_on_the_command_line(lm, run, compiles, text, tmp_path):
    chat, counts = talk(lm, text)
    messages = chat.messages
    for turn, (reused, prefilled) in enumerate(counts):
        prompt = lm.tokenizer.chat_ids(messages[: 2 * turn + 1])
        assert reused + prefilled == len(prompt)
    assert counts[1][0] > 0 or text.startswith(LETS_GO)
    for leaf in jax.device_get(jax.tree.leaves(chat._past.result.cache.layers)):
        assert leaf.ndim < 4 or np.all(np.isfinite(leaf))

    # The same programs from the command line.
    with compiles:
        replies = [message["content"] for message in messages[1::2]]
        assert run("chat", "--cache", text, said="\n".join(TURNS)) == "\n".join([*replies, ""])
        prompt = "x" * len(lm.tokenizer.chat_ids(messages[:1]))
        report = json.loads(run("generate", "--cache", text, "--prompt", prompt, "--json"))
        assert compiles.count < 5
    assert report["cache"] == text
    assert report["outputs"][0]["finish_reason"] in ("length", "stop")
    fresh = jkv.stream(lm, [prompt], max_new_tokens=NEW, cache=spec.parse(text))
    list(fresh)
    assert report["cache_bytes"] == fresh.result.cache.nbytes
    said = fresh.result.tokens[0][: fresh.result.lengths[0]]
    assert report["outputs"][0]["tokens"] == said.tolist()

    # Saved and loaded, it goes on as if it had stayed, by the same programs.
    past = chat._past.result
    past.save(tmp_path / "talk.safetensors")
    loaded = jkv.load_result(tmp_path / "talk.safetensors", lm)
    same_bits(loaded.cache, past.cache)
    assert loaded.texts == past.texts
    as_before = jkv.generate(lm, [[5]], max_new_tokens=NEW, resume=past)
    with compiles:
        on = jkv.generate(lm, [[5]], max_new_tokens=NEW, resume=loaded)
        assert compiles.count == 0
    assert on.tokens.tolist() == as_before.tokens.tolist()

    if text in ALIKE:
        whole = jkv.stream(
            lm,
            [lm.tokenizer.chat_ids(messages[:-1])],
            max_new_tokens=NEW,
            cache=spec.parse(text),
        )
        assert "".join(block.texts[0] for block in whole) == replies[-1]


def test_what_is_close_to_a_kind_is_told_apart(lms):
    with pytest.raises(TypeError, match=r"cache got 4; expected a kind .* or a text"):
        jkv.generate(lms[1], ["x"], max_new_tokens=1, cache=4)
    with pytest.raises(TypeError, match=r"snapkv\(\), with brackets"):
        jkv.evicting(64, score=jkv.scores.snapkv)


def test_no_kind_is_left_out():
    assert {text.partition(":")[0] for text in [*ALIKE, *GO_ON]} == set(spec.FORMS)
