"""`jkv engine`: answers, mistakes, figures; runs have the same shapes, and compile once."""

from __future__ import annotations

import importlib
import io
import json
import sys
import time
from types import SimpleNamespace
from typing import Any

import jax
import pytest
from rich.console import Console

import jkv
from jkv.cli import requests
from jkv.engine import Engine

pytestmark = pytest.mark.slow  # a process for some, programs for others

command = importlib.import_module("jkv.cli.engine")  # jkv.cli.engine is the function in it

HOT = {"prompt": "x", "temperature": 1.5, "seed": 3, "max_new_tokens": 9}
ASKED = [
    {"prompt": "he wo", "max_new_tokens": 30},
    HOT,
    None,  # an empty line
    {"prompt": [5, 6, 7], "max_new_tokens": 3, "priority": 1, "stop": None},
    {"prompt": "he wo", "max_new_tokens": 12, "tenant": "b", "temperature": 0},
]
SMALL = ["--max-batch", "2", "--pages", "24", "--cache", "paged:4"]


def written(path: Any, asked: list[Any]) -> str:
    """A file of requests, its name."""
    path.write_text("".join("\n" if a is None else json.dumps(a) + "\n" for a in asked))
    return str(path)


@pytest.fixture
def serve(run, tiny, tmp_path):
    """Runs the command on requests: status, answers, standard error."""

    def serve(asked: list[Any], *more: str, model: str = tiny) -> tuple[int, list[Any], str]:
        file = written(tmp_path / "asked.jsonl", asked)
        status, out, err = run("engine", "--requests", file, "--model", model, *SMALL, *more)
        return status, [json.loads(line) for line in out.splitlines()], err

    return serve


def samples(text: str) -> dict[str, float]:
    """Prometheus' text: every sample belongs to a family that was declared."""
    declared, found = set(), {}
    for line in text.splitlines():
        if line.startswith("#"):
            _, what, name, rest = line.split(maxsplit=3)
            assert what in ("HELP", "TYPE")
            if what == "TYPE":
                assert rest in ("gauge", "counter")
                assert name not in declared
                declared.add(name)
            continue
        name, value = line.rsplit(maxsplit=1)
        assert name.split("{")[0] in declared
        assert name not in found
        found[name] = float(value)
    return found


def test_answers_are_those_of_generate_and_come_as_they_end(serve, lm):
    status, answers, err = serve(ASKED)
    assert status == 0, err
    lines = [answer["line"] for answer in answers]
    assert sorted(lines) == [1, 2, 4, 5]
    assert lines[0] == 4  # the shortest, and first in rank
    for answer in answers:
        asked = ASKED[answer["line"] - 1]
        drawn = {"sampler": jkv.sampling.temperature(1.5), "key": jax.random.key(3)}
        how = {"max_new_tokens": asked["max_new_tokens"], "slots": 64}
        prompt = asked["prompt"]
        ids = lm.encode([prompt]) if isinstance(prompt, str) else [prompt]
        want = jkv.generate(lm.model, ids, **how, **(drawn if asked is HOT else {}))
        tokens = want.tokens[0, : want.lengths[0]].tolist()
        assert answer == {
            "line": answer["line"],
            "text": lm.decode(tokens),
            "tokens": tokens,
            "finish_reason": want.finish_reasons[0],
            "cached_tokens": 0,
        }
    assert len(err.splitlines()) == 1
    assert f"4 requests, {sum(len(a['tokens']) for a in answers)} tokens" in err


def test_a_stop_goes_beside_the_checkpoints_own(serve, lm):
    _, (_, plain), _ = serve([HOT, {"prompt": "he wo", "max_new_tokens": 12}])
    tokens = plain["tokens"]
    cut = next(i for i, t in enumerate(tokens) if i and t not in tokens[:i])
    for stop in (tokens[cut], [tokens[cut]]):
        _, answers, _ = serve([HOT, {"prompt": "he wo", "max_new_tokens": 12, "stop": stop}])
        (answer,) = [a for a in answers if a["line"] == 2]
        assert answer["tokens"] == tokens[: cut + 1]
        assert answer["finish_reason"] == "stop"


def test_json_ends_with_the_figures_that_prometheus_gets(serve, tmp_path):
    file = tmp_path / "figures.prom"
    status, out, err = serve(ASKED, "--json", "--prometheus", str(file))
    assert (status, err) == (0, "")
    stats = out.pop()["stats"]
    assert stats["finished"] == len(out) == 4
    assert stats["tokens"] == sum(len(answer["tokens"]) for answer in out)
    found = samples(file.read_text())
    assert found["jkv_engine_finished_total"] == 4
    assert found["jkv_engine_tokens_total"] == stats["tokens"]
    states = [found[f'jkv_engine_pages{{state="{s}"}}'] for s in ("used", "cached", "free")]
    assert sum(states) == 24
    assert [f.name for f in tmp_path.iterdir() if "figures" in f.name] == ["figures.prom"]


def test_the_clock_starts_when_the_programs_are_there(serve, monkeypatch):
    submit, warm, requests, ends = Engine.submit, Engine.warm, [], []

    def submitted(engine: Engine, *args: Any, **how: Any) -> Any:
        requests.append(submit(engine, *args, **how))
        return requests[-1]

    def warmed(engine: Engine, samplers: Any) -> None:
        warm(engine, samplers)
        assert len(requests) == 4  # mistakes would be known by now
        ends.append(time.perf_counter())

    monkeypatch.setattr(Engine, "submit", submitted)
    monkeypatch.setattr(Engine, "warm", warmed)
    assert serve(ASKED)[0] == 0
    assert all(request.submitted >= ends[0] for request in requests)


def test_the_file_is_kept_while_requests_run(serve, tmp_path, monkeypatch):
    texts = []
    plain = command.replace_file
    monkeypatch.setattr(
        command, "replace_file", lambda path, text: (texts.append(text), plain(path, text))
    )
    file = tmp_path / "figures.prom"
    serve(ASKED, "--prometheus", str(file))
    assert texts[0] == ""  # before the model is read, to see whether it can be written
    running = [samples(text)["jkv_engine_running"] for text in texts[1:]]
    assert running[0] > 0
    assert running[-1] == 0
    assert file.read_text() == texts[-1]


def test_what_was_done_is_kept_when_somebody_has_had_enough(serve, tmp_path, monkeypatch):
    step, steps = Engine.step, []

    def tired(engine: Engine) -> bool:
        if len(steps) == 5:
            raise KeyboardInterrupt
        steps.append(step(engine))
        return steps[-1]

    monkeypatch.setattr(Engine, "step", tired)
    file = tmp_path / "figures.prom"
    status, _, _ = serve(ASKED, "--prometheus", str(file))
    assert status == 130
    assert samples(file.read_text())["jkv_engine_steps_total"] == 5


def test_readers_see_the_old_file_or_the_new_one(tmp_path, monkeypatch):
    file = tmp_path / "figures.prom"
    command.replace_file(file, "old")
    command.replace_file(file, "new")
    assert file.read_text() == "new"

    def full(self: Any, target: Any) -> Any:
        assert (self.read_text(), file.read_text()) == ("newer", "new")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(file), "replace", full)
    with pytest.raises(ValueError, match="No space left"):
        command.replace_file(file, "newer")
    assert [f.name for f in tmp_path.iterdir()] == ["figures.prom"]
    assert file.read_text() == "new"


def test_a_file_that_cannot_be_written_is_known_at_once(serve, tmp_path):
    for path, match in ((tmp_path / "no" / "x", "No such file"), (tmp_path, "is no file")):
        status, _, err = serve(ASKED, "--prometheus", str(path), model="nowhere")
        assert status == 2
        assert str(path) in err
        assert match in err


def test_every_so_often(monkeypatch):
    clock = SimpleNamespace(now=5.0)
    monkeypatch.setattr(command, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    done = []
    perhaps = command._every(1.0, lambda: done.append(clock.now))
    for clock.now in (5.0, 5.5, 5.9, 6.1, 7.0, 7.2):
        perhaps()
    assert done == [5.0, 6.1, 7.2]


# Told before the model is read.
@pytest.mark.parametrize(
    ("text", "match"),
    [
        ('{"prompt": "x"}\n\n{"prompt": "x"\n', "line 3 is no JSON: Expecting ',' delimiter"),
        ('{"prompt": "x"}\n[1]\n', "line 2 is [1]; expected an object"),
        ('{"prompt": "x", "prioriti": 1}\n', "line 1 has prioriti; expected prompt and any of"),
        ('{"max_new_tokens": 4}\n', "line 1 has no prompt"),
        ('{"prompt": null}\n', "line 1 has no prompt"),
        ('{"prompt": "x", "temperature": "hot"}\n', "line 1: temperature got 'hot'"),
        ('{"prompt": "x", "seed": "a"}\n', "line 1: seed got 'a'"),
        ('{"prompt": "x", "seed": -1, "temperature": 1}\n', "line 1: seed got -1"),
        ('{"prompt": "x"}\n{"prompt": "x", "top_k": 2.5}\n', "line 2: top_k got 2.5"),
        ('{"prompt": "x", "id": 1.5}\n', "line 1: id got 1.5; expected a text or an integer"),
        ('{"prompt": "x", "id": true}\n', "line 1: id got True"),
        ('{"prompt": "x", "id": 7}\n{"prompt": "x", "id": 7}\n', "line 2: id 7 is line 1's"),
        ("[" * 100_000, "line 1 is no JSON that can be read"),
        ('{"prompt": "x", "seed": 1%s}' % ("0" * 5000), "line 1 is no JSON that can be read"),
        ("\n\n", "holds no requests"),
        ("\udcff", "is no text in UTF-8"),
    ],
)
def test_lines_that_are_wrong_in_themselves(run, tmp_path, text, match):
    file = tmp_path / "asked.jsonl"
    file.write_bytes(text.encode("utf-8", "surrogateescape"))
    status, out, err = run("engine", "--requests", str(file), "--model", "nowhere")
    assert (status, out) == (2, "")
    assert f"{file}" in err
    assert match in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"prompt": 3}, "line 2: prompt"),
        ({"prompt": [100_000]}, "line 2: prompt 0 has token 100000"),
        ({"prompt": [10**30]}, "line 2: "),
        ({"prompt": "\ud800"}, "line 2: "),
        ({"prompt": "x", "max_new_tokens": "4"}, "line 2: max_new_tokens got '4'"),
        ({"prompt": "x", "max_new_tokens": 200}, "line 2: a prompt of 1 token and"),
        ({"prompt": "x" * 40, "max_new_tokens": 80}, "need 30 pages of 4, and the pool has 24"),
        ({"prompt": "x", "stop": [3.5]}, "line 2: stop got 3.5"),
        ({"prompt": "x", "tenant": 3}, "line 2: tenant got 3"),
    ],
)
def test_lines_that_are_wrong_for_the_model(serve, fields, match):
    status, answers, err = serve([HOT, fields])
    assert (status, answers) == (2, [])
    assert match in err
    assert len(err.splitlines()) == 1


# Faults that lines have by themselves and some that only the model can find, in any order.
BAD = [
    {"prompt": "x", "max_new_tokens": 200},
    {"prompt": "x", "colour": 1},
    HOT | {"id": "hot"},
    {"prompt": "x", "top_k": 0},
    {"prompt": 3},
    {"prompt": "he wo", "max_new_tokens": 12, "id": 12},
    {"max_new_tokens": 3},
]


def test_all_bad_lines_are_told_at_once(serve):
    status, answers, err = serve(BAD)
    assert (status, answers) == (2, [])
    told = [int(line.split(" line ")[1].split(" ")[0].rstrip(":")) for line in err.splitlines()]
    assert sorted(told) == [1, 2, 4, 5, 7]


def test_the_good_ones_go_on_where_that_is_asked(serve):
    status, answers, err = serve(BAD, "--skip-bad")
    assert status == 0
    assert {answer["id"]: answer["line"] for answer in answers} == {"hot": 3, 12: 6}
    _, alone, _ = serve([None, None, BAD[2], None, None, BAD[5]])
    assert answers == alone
    assert "2 requests, " in err.splitlines()[-1]
    assert len(err.splitlines()) == 5 + 1
    status, answers, err = serve([BAD[1], BAD[4]], "--skip-bad")
    assert (status, answers) == (2, [])
    assert len(err.splitlines()) == 2


def test_many_bad_lines_are_counted(serve):
    err = serve([{}] * 150, model="nowhere")[2]
    assert len(err.splitlines()) == 101
    assert err.splitlines()[-1].endswith("has 50 bad lines more")


def test_requests_from_standard_input(run, tiny, monkeypatch):
    greedy = {"prompt": "he wo", "max_new_tokens": 12}
    text = f"\ufeff{json.dumps(HOT)}\n{json.dumps(greedy)}\n{{"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode()), "ascii"))
    status, out, err = run("engine", "--requests", "-", "--model", tiny, *SMALL, "--skip-bad")
    assert status == 0
    assert sorted(json.loads(line)["line"] for line in out.splitlines()) == [1, 2]
    assert "standard input, line 3 is no JSON" in err


def test_other_mistakes(run, serve, tmp_path):
    missing = str(tmp_path / "none.jsonl")
    status, _, err = run("engine", "--requests", missing, "--model", "nowhere")
    assert status == 2
    assert f"{missing}: No such file" in err
    assert serve([HOT], "--cache", "dense")[0] == 2
    assert serve([HOT], "--pages", "0")[0] == 2


def test_texts_may_hold_any_end_of_line(tmp_path):
    file = tmp_path / "asked.jsonl"
    file.write_text('\ufeff{"prompt": "a\u2028b\x85c"}\r\n{"prompt": "d"}\r\n', "utf-8")
    asked = requests.Requests(file, 4).asked
    assert [asked[line].keywords["prompt"] for line in (1, 2)] == ["a\u2028b\x85c", "d"]


def test_a_request_that_failed_says_why():
    fields = {"tokens": [4], "finish_reason": "error", "cached_tokens": 0}
    request = SimpleNamespace(error=KeyError("gone"), **fields)
    answer = command._answer(7, "a", request, SimpleNamespace(tokenizer=object()))
    assert answer == {"line": 7, "id": "a", "text": None, "error": "KeyError('gone')"} | fields


def figures() -> dict[str, Any]:
    return {
        "running": 3,
        "waiting": 12,
        "finished": 40,
        "pages": {"pages": 60, "used": 30, "free": 20, "shared": 7, "cached": 10},
        "hit_rate": 0.25,
        "preemptions": {"recompute": 2, "swap": 1},
        "time_to_first_token": {"p50": 0.012, "p99": 0.3456},
        "time_between_tokens": {"p50": None, "p99": None},
        "tokens": 5000,
        "tokens_per_second": 321.4,
    }


def test_the_view_shows_the_figures():
    console = Console(width=100, force_terminal=False)
    with console.capture() as capture:
        console.print(command.view(figures()))
    said = capture.get()
    for part in (
        "3 running, 12 waiting, 40 finished",
        "█" * 15 + "▒" * 5 + "░" * 10 + " 30 of 60 in use, 7 of them shared, 10 kept",
        "25% of their tokens found",
        "2 recomputed, 1 swapped",
        "p50 12.0 ms, p99 345.6 ms",
        "321 tokens/s, 5000 tokens",
    ):
        assert part in said
    assert ["between", "-"] in [line.split() for line in said.splitlines()]


def test_one_is_no_plural():
    one = figures() | {"finished": 1, "tokens": 1, "reasons": {"error": 0}}
    assert command._summary(one).startswith("1 request, 1 token, 321 tokens/s")


@pytest.mark.parametrize("both", [False, True])
def test_on_a_terminal_the_answers_go_where_they_went(serve, monkeypatch, capsys, both):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "400")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: both)
    status, answers, err = serve(ASKED)
    assert status == 0, err
    assert "running" in err  # the table
    # On one terminal they are written above the table, by whom the table is written.
    assert len(answers) == (0 if both else 4)
    assert err.count('"line"') == (4 if both else 0)
