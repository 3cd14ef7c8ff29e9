"""The command as a process: imports, errors, interrupts, bars, compiled programs, clocks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import pytest

import jkv
from jkv.cli import main, process
from jkv.decoding.generation import Generation

ROOT = Path(__file__).resolve().parent.parent.parent


def test_help_and_version_do_not_wait_for_jax():
    code = (
        "import sys\n"
        "from jkv.cli import main\n"
        "for arguments in ([], ['--help'], ['generate', '--help'], ['--version']):\n"
        "    try: main(arguments)\n"
        "    except SystemExit as e: assert e.code == 0, arguments\n"
        "assert not {'jax', 'numpy', 'flax'} & set(sys.modules), 'heavy'\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
    for word in ("generate", "chat", "score", "info", "--max-new-tokens", f"jkv {jkv.__version__}"):
        assert word in done.stdout


BAD = [
    ([], "Missing option '--prompt'"),
    (["--prompt", "x", "--max-new-tokens", "0"], "max_new_tokens got 0"),
    (["--prompt", "x", "--max-new-tokens", "many"], "valid int"),
    (["--prompt", "x", "--max-new-tokens", "500"], "context of 128"),
    (["--prompt", ""], "prompt 0 is empty"),
    (["--prompt", "x", "--temperature", "nan"], "temperature got nan"),
    (["--prompt", "x", "--temperature", "-1"], "temperature got -1.0"),
    (["--prompt", "x", "--top-p", "0"], "top_p got 0.0"),
    (["--prompt", "x", "--top-k", "0"], "top_k got 0"),
    (["--prompt", "x", "--min-p", "2"], "min_p got 2.0"),
    (["--prompt", "x", "--repetition-penalty", "0"], "repetition_penalty got 0.0"),
    (["--prompt", "x", "--seed", "-1"], "'--seed'"),
    (["--prompt", "x", "--stop", ""], "empty string"),
    (["--prompt", "x", "--cache", "ring"], "cache got 'ring'; expected dense[:grow]; none; window"),
    (["--prompt", "x", "--cache", "dense:3"], "in it '3'; expected dense[:grow]"),
    (["--prompt", "x", "--dtype", "int4"], "float32, bfloat16, float16"),
    (["--prompt", "x", "--model", "/not/there"], "'/not/there'"),
    (["--prompt", "x", "--model", str(ROOT / "tests")], "config.json"),
    (["--prompt", "x", "--prompt", "y", "--stream"], "give one --prompt"),
    (["--prompt", "x", "--colour"], "No such option"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[m for _, m in BAD])
def test_an_error_is_one_line_and_status_2(run, tiny, arguments, message):
    status, out, err = run("generate", "--model", tiny, *arguments)
    assert (status, out) == (2, "")
    assert message in err
    assert err.startswith("jkv: ")
    assert err.count("\n") == 1


def test_an_unknown_command_is_an_error_too(run):
    status, out, err = run("genrate")
    assert (status, out) == (2, "")
    assert "No such command 'genrate'. Did you mean 'generate'? See 'jkv --help'." in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("error", [ValueError, TypeError, KeyError])
def test_a_bug_is_not_taken_for_an_error_of_the_users(monkeypatch, error):
    def broken(*_: object) -> None:
        raise error("a bug")

    monkeypatch.setattr(process, "load", broken)
    with pytest.raises(error, match="a bug"):
        main(["generate", "--prompt", "x"])


def test_ctrl_c_is_status_130(run, tiny, monkeypatch, say):
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Generation, "dispatch", interrupted)
    status, _, err = run("generate", "--model", tiny, "--prompt", "x")
    assert status == 130
    assert "Traceback" not in err
    say("hello\n")
    assert run("chat", "--model", tiny)[0] == 130


def test_bars_are_for_terminals(run, tiny, monkeypatch):
    arguments = ["generate", "--model", tiny, "--prompt", "x", "--max-new-tokens", "3"]
    assert "loading" not in run(*arguments)[2]
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    status, out, err = run(*arguments)
    assert status == 0
    assert "loading" in err
    assert "prefill" in err
    assert out.startswith("x")
    assert "loading" not in out


def test_compiled_programs_are_kept_for_the_next_process(tiny, tmp_path):
    code = (
        "import atexit, collections, sys, jax.monitoring\n"
        "from jkv.cli import main\n"
        "events = collections.Counter()\n"
        "jax.monitoring.register_event_listener(lambda name, **_: events.update([name]))\n"
        "names = ['/jax/compilation_cache/cache_' + x for x in ('hits', 'misses')]\n"
        "atexit.register(lambda: print(*(events[name] for name in names)))\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    clean = {k: v for k, v in os.environ.items() if not k.startswith("JAX_COMPILATION")}
    # Every program is kept, whatever time it took to compile on this machine.
    clean |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "XDG_CACHE_HOME": str(tmp_path)}
    command = [sys.executable, "-c", code, "generate", "--model", tiny, "--prompt", "x"]
    counts, outputs = [], []
    for _ in range(2):
        done = subprocess.run(
            [*command, "--max-new-tokens", "5", "--json"],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env=clean,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, "")
        report, events = done.stdout.splitlines()
        outputs.append(json.loads(report)["outputs"])
        counts.append(tuple(map(int, events.split())))
    (hits, compiled), again = counts
    assert (hits, compiled > 0) == (0, True)
    assert again == (compiled, 0)
    assert list((tmp_path / "jkv" / "programs").iterdir())
    assert outputs[0] == outputs[1]


@pytest.fixture
def kept() -> Any:
    """Where JAX keeps programs, put back at the end."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    yield lambda: jax.config.jax_compilation_cache_dir
    for name, value in before.items():
        jax.config.update(name, value)


def test_where_programs_are_kept(kept, monkeypatch, tmp_path):
    before = kept()
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")
    process.keep_programs()
    assert kept() == before, "the user has said no"

    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/no/such/place")
    process.keep_programs()
    assert kept() == before, "there is nowhere to write"

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    process.keep_programs()
    assert kept() == str(tmp_path / "jkv" / "programs")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    process.keep_programs()
    assert kept() == str(tmp_path / "jkv" / "programs"), "what is set stays"


def test_the_clock_counts_overlapping_spans_once():
    clock = process.Clock()
    clock._spans = [(2.0, 3.0), (1.0, 4.0), (6.0, 7.0), (9.0, 20.0)]
    assert clock.working(0.0, 10.0) == pytest.approx(1 + 2 + 2)
    assert clock.working(2.5, 3.5) == 0.0
    assert clock.working(4.0, 6.0) == 2.0
