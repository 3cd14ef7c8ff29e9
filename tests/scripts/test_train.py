"""Training from a text file: it learns, survives being stopped, and refuses what it cannot use."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import jkv
import train
from training import state

pytestmark = pytest.mark.slow  # once, not on each Python

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
TINY = [
    *("--steps=48", "--warmup=4", "--learning-rate=0.01", "--layers=1", "--width=32"),
    *("--heads=2", "--kv-heads=1", "--head-dim=16", "--feed-forward=48", "--vocab-size=280"),
    *("--batch-tokens=128", "--context=16", "--long-context=32"),
    *("--eval-every=16", "--save-every=8"),
]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few kB with something to learn: sentences of four kinds of words."""
    rng = random.Random(0)
    words = [["The", "A", "One"], ["cat", "dog", "hen"], ["sees", "hears"], ["it.", "her.", "us."]]
    lines = [" ".join(rng.choice(kind) for kind in words) for _ in range(400)]
    path = tmp_path_factory.mktemp("text") / "pets.txt"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def whole(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run that nothing interrupted."""
    out = tmp_path_factory.mktemp("whole") / "pets"
    assert train.main([str(text), "--out", str(out), *TINY]) == 0
    return out


def stored(out: Path) -> dict[str, bytes]:
    """All that a run leaves, but for what names the time and the place."""
    names = ("config.json", "model.safetensors", "tokenizer.json", "training/best.safetensors")
    return {name: (out / name).read_bytes() for name in names}


def arrays(path: Path) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    return load_file(path)


def loss_in_card(out: Path) -> float:
    found = re.search(r"\*\*([\d.]+) nats per character\*\*", (out / "README.md").read_text())
    assert found is not None
    return float(found[1])


def test_it_learns_and_the_directory_loads(whole, text):
    lm = jkv.load(whole)
    assert lm.config.layers == 1
    assert lm.config.context == 32
    assert lm.encode(["The cat sees"]) != [[]]
    # Bytes at random would cost log(256) = 5.5; the four kinds of words cost about 0.3.
    assert loss_in_card(whole) < 1.0

    card = (whole / "README.md").read_text()
    assert "python scripts/train.py pets.txt --steps=48" in card
    assert str(whole.parent) not in card

    said = jkv.generate(lm.model, lm.encode(["The cat sees it.\n"]), max_new_tokens=12)
    assert set(lm.decode(said.tokens)[0].split()) <= set(text.read_text().split()) | {""}


def test_the_card_states_the_loss_of_what_is_stored(whole, text):
    args = train.parse([str(text), *TINY])
    corpus = train.read_corpus(args)
    again = train.held_out_loss(jkv.load(whole).model, corpus, length=32, rows=4)
    assert again == pytest.approx(loss_in_card(whole), abs=1e-4)


def test_a_signal_ends_it_after_a_step_and_it_goes_on_bit_for_bit(
    text, whole, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "pets"
    lines = train.report.Lines
    counted = lines.step

    def step(self: Any, number: int, loss: float, tokens: int) -> None:
        counted(self, number, loss, tokens)
        if number in (21, 43):  # between checkpoints, in short windows and in long ones
            os.kill(os.getpid(), signal.SIGTERM if number == 21 else signal.SIGINT)

    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(lines, "step", step)
    assert train.main([str(text), "--out", str(out), *TINY]) == 128 + signal.SIGTERM
    assert "stopped by SIGTERM after step 21 of 48" in capsys.readouterr().out
    assert not (out / "model.safetensors").exists()
    assert train.main([str(text), "--out", str(out), *TINY]) == 128 + signal.SIGINT
    assert "going on after step 21" in capsys.readouterr().out
    assert before == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))
    assert train.main([str(text), "--out", str(out), *TINY]) == 0

    assert stored(out) == stored(whole)
    mine, theirs = (
        arrays(out / "training/state.safetensors"),
        arrays(whole / "training/state.safetensors"),
    )
    assert mine.keys() == theirs.keys()
    assert all(np.array_equal(mine[name], theirs[name]) for name in mine)


def test_a_kill_costs_the_steps_since_the_last_checkpoint_and_nothing_else(text, whole, tmp_path):
    out = tmp_path / "pets"
    code = (
        "import os, signal, sys, train\n"
        "step = train.report.Lines.step\n"
        "def killed(self, number, *rest):\n"
        "    step(self, number, *rest)\n"
        "    if number == 11:\n"  # three after the first checkpoint
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "train.report.Lines.step = killed\n"
        "sys.exit(train.main(sys.argv[1:]))\n"
    )
    command = [sys.executable, "-c", code, str(text), "--out", str(out), *TINY]
    paths = os.pathsep.join([str(SCRIPTS.parent), str(SCRIPTS)])
    quiet = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": paths}
    done = subprocess.run(command, env=quiet, stdout=subprocess.DEVNULL, check=False)
    assert done.returncode == -signal.SIGKILL
    assert state.read_facts(out / "training/state.safetensors")["step"] == 8
    assert not (out / "model.safetensors").exists()
    assert train.main([str(text), "--out", str(out), *TINY]) == 0
    assert stored(out) == stored(whole)


def test_a_finished_run_is_written_again_and_not_trained_again(text, whole, capsys):
    before = stored(whole)
    assert train.main([str(text), "--out", str(whole), *TINY]) == 0
    assert "held out" not in capsys.readouterr().out
    assert stored(whole) == before


def test_a_checkpoint_is_the_old_one_until_the_new_one_is_whole(tmp_path, monkeypatch):
    path = tmp_path / "state.safetensors"
    train.state.write_bytes(path, b"old")

    def crash(descriptor: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(train.state.os, "fsync", crash)
    with pytest.raises(OSError, match="no space"):
        train.state.write_bytes(path, b"new")
    assert path.read_bytes() == b"old"


REFUSED = {
    "no file": (["nowhere.txt"], "no text file at nowhere.txt"),
    "too short": (["{short}"], "has 11 characters; expected at least"),
    "not text": (["{binary}"], "is not UTF-8"),
    "other hyper-parameters": (
        ["{text}", "--out", "{whole}", *TINY, "--dropout", "0.2"],
        "is of another run (dropout=0.1 there, 0.2 now)",
    ),
    "another text": (["{other}", "--out", "{whole}", *TINY], "is of another run (text="),
    "no steps": (["{text}", "--steps", "0"], "--steps is 0; expected at least 1"),
    "a word for a number": (["{text}", "--steps", "many"], "invalid int value: 'many'"),
    "few tokens": (["{text}", "--vocab-size", "256"], "expected at least 257"),
    "long warm-up": (["{text}", "--steps", "5", "--warmup", "5"], "--warmup is 5"),
    "ragged batch": (["{text}", *TINY, "--batch-tokens", "100"], "a multiple of --context"),
    "all dropped": (["{text}", "--dropout", "1"], "expected a share below 1"),
    "wrong heads": (["{text}", *TINY, "--kv-heads", "3"], "expected a multiple"),
    "no text": ([], "the following arguments are required: text"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_are_one_line(text, whole, tmp_path, monkeypatch, capsys, case):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "short.txt").write_text("hello world")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00" * 4000)
    (tmp_path / "other.txt").write_text(text.read_text()[::-1])
    names = {name: tmp_path / f"{name}.txt" for name in ("short", "binary", "other")}
    before = stored(whole)
    argv, message = REFUSED[case]
    try:
        code = train.main([a.format(text=text, whole=whole, **names) for a in argv])
    except SystemExit as exit_:
        code = exit_.code
    error = capsys.readouterr().err
    assert code == 2
    assert message in error
    assert error.startswith("train.py: ")
    assert error.count("\n") == 1
    assert stored(whole) == before


def test_a_damaged_checkpoint_is_named(text, tmp_path, capsys):
    out = tmp_path / "pets"
    (out / "training").mkdir(parents=True)
    (out / "training/state.safetensors").write_bytes(b"not a checkpoint")
    assert train.main([str(text), "--out", str(out), *TINY]) == 2
    assert "is not a checkpoint of this script" in capsys.readouterr().err


def test_a_terminal_gets_a_bar(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "200")
    with train.report.reporter(10, 3) as tell:
        assert isinstance(tell, train.report.Bar)
        tell.step(4, 2.5, 100)
        tell.held_out(4, 1.25)
    out = capsys.readouterr().out
    assert "4/10" in out
    assert "loss 2.500/token" in out
    assert "held out 1.250/character" in out


@pytest.fixture(scope="module")
def corpus(text: Path) -> train.Corpus:
    return train.Corpus(text.read_text(), vocab=280, held_out=0.1, dropout=0.3, seed=3)


class TestCorpus:
    def test_words_are_cut_as_the_tokenizer_cuts_them(self, corpus):
        assert corpus.plain.tolist() == corpus.tokenizer.encode(corpus.training).ids

    def test_dropout_changes_the_cuts_and_not_the_text(self, corpus):
        ids = corpus._dropped(0)
        assert len(ids) > len(corpus.plain)
        assert corpus.tokenizer.decode(ids.tolist()) == corpus.training
        assert corpus._dropped(1).tolist() != ids.tolist()

    def test_windows_are_a_function_of_the_step(self, corpus):
        first = corpus.windows(5, 4, 8, plain=False)
        corpus.windows(500, 4, 8, plain=False)
        np.testing.assert_array_equal(first, corpus.windows(5, 4, 8, plain=False))
        assert first.shape == (4, 9)

    @pytest.mark.parametrize("length", [7, 8, 100, 10_000])
    def test_every_held_out_token_is_predicted_once(self, corpus, length):
        seen = [
            i
            for ids, first, last in corpus.held_windows(length)
            for i in ids[first + 1 :][: last - first]
        ]
        assert seen == corpus.held_ids[1:].tolist()
        assert all(len(ids) == length + 1 for ids, _, _ in corpus.held_windows(length))


def test_dropout_is_on_the_embedding_and_each_branch_while_training_only(text):
    args = train.parse([str(text), *TINY])
    model = train.fresh_model(args, 280)
    tokens = jnp.arange(18).reshape(2, 9)
    places = []
    with_hook = train.losses(model, tokens, lambda x, i: places.append(i) or x)
    assert places == [0, 1, 2]
    np.testing.assert_array_equal(with_hook, train.losses(model, tokens))
