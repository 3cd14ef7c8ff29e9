"""What a store would have found: small traces by hand, and the optimum against a search."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jkv.cli import main
from jkv.store.policy import FIFO, LFU, LRU, POLICIES, CostAware
from jkv.store.simulate import TraceBlock, TraceRequest, needed, read_trace, simulate, whole


def of(keys: str, size: int = 1) -> list[TraceRequest]:
    """Entries of one size."""
    blocks = [TraceBlock(key, size, size, float(size)) for key in keys]
    return [TraceRequest((block,), size, size, float(size)) for block in blocks]


@pytest.fixture
def written(tmp_path) -> Any:
    """Writes a trace, and reads it."""

    def write(*requests: Any, **more: Any) -> list[TraceRequest]:
        (tmp_path / "trace.jsonl").write_text("\n".join(map(json.dumps, requests)) + "\n\n")
        return read_trace(tmp_path / "trace.jsonl", **more)

    return write


@pytest.mark.parametrize(
    ("policy", "tokens", "evicted"), [(LRU(), 2, 2), (FIFO(), 1, 3), (LFU(), 2, 2), (None, 3, 0)]
)
def test_a_trace_by_hand(policy, tokens, evicted):
    """Two of a, b and c fit; who knows what comes does not keep c."""
    outcome = simulate(of("abacab", 5), policy, 10)
    assert (outcome.tokens, outcome.evicted) == (5 * tokens, evicted)
    assert outcome.token_hit_rate == outcome.byte_hit_rate == tokens / 6
    assert outcome.cost_saved == pytest.approx(tokens / 6)


def test_cost_and_bytes_are_counted_by_themselves():
    dear = TraceRequest((TraceBlock("dear", 1, 10, 90.0),), 1, 10, 90.0)
    long = TraceRequest((TraceBlock("long", 9, 10, 10.0),), 9, 10, 10.0)
    outcome = simulate([dear, dear, long, long, dear], LRU(), 10)
    assert outcome.asked == (21, 50, 290.0)
    assert (outcome.tokens, outcome.nbytes, outcome.cost) == (10, 20, 100.0)
    assert outcome.cost_saved == pytest.approx(100 / 290)
    small = [TraceRequest((TraceBlock(k, 1, 1, 1.0),), 1, 1, 1.0) for k in "abcdefgh"]
    trace = [dear, *small, dear]
    assert simulate(trace, LRU(), 14).tokens == 0
    assert simulate(trace, CostAware(), 14).cost == 90.0


def test_a_conversation_grows(written):
    trace = written(*({"key": "chat", "tokens": n, "bytes": 10 * n} for n in (2, 5, 4)))
    for policy in (*POLICIES.values(), None):
        outcome = simulate(trace, policy, 50)
        assert (outcome.tokens, outcome.asked[0]) == (2 + 4, 11)
        assert (outcome.nbytes, outcome.asked[1]) == (60, 110)
        # What grew too large stays as it was.
        if policy is not None:
            assert simulate(trace, policy, 40).tokens == 2 + 2
    assert whole(trace) == 50


def test_what_grows_pushes_others_out(written):
    trace = written(
        {"key": "a", "tokens": 2},
        {"key": "b", "tokens": 2},
        {"key": "b", "tokens": 3},
        {"key": "a", "tokens": 2},
    )
    assert simulate(trace, LRU(), 5).tokens == 2 + 2
    outcome = simulate(trace, LRU(), 4)
    assert (outcome.tokens, outcome.evicted) == (2, 2)


def test_prefixes_by_hand(written):
    """Blocks of 2: the fifth token is in none."""
    trace = written({"tokens": [1, 2, 3, 4, 5]}, {"tokens": [1, 2, 3, 4, 9]}, block=2)
    for policy in (*POLICIES.values(), None):
        assert simulate(trace, policy, 4).tokens == 4
        assert simulate(trace, policy, 4).asked[0] == 10
        assert simulate(trace, policy, 2).tokens == 2  # the beginning: the rest is of no use alone
    assert whole(trace) == 4


def test_what_is_behind_a_gap_is_not_found(written):
    """As in the pool: of a chain the end goes first, and the beginning is found."""
    one, two = [1, 1, 1, 1], [2, 2]
    trace = written({"tokens": one}, {"tokens": two}, {"tokens": one}, block=2)
    assert simulate(trace, LRU(), 4).tokens == 2
    assert simulate(trace, LRU(), 6).tokens == 4


def test_tenants_do_not_share(written):
    ids = [1, 2, 3, 4]
    same = written({"tokens": ids, "tenant": "a"}, {"tokens": ids, "tenant": "a"}, block=2)
    other = written({"tokens": ids, "tenant": "a"}, {"tokens": ids}, block=2)
    assert simulate(same, LRU(), 100).tokens == 4
    assert simulate(other, LRU(), 100).tokens == 0
    keys = written({"key": 1, "tenant": "a"}, {"key": 1}, {"key": 1})
    assert simulate(keys, LRU(), 100).tokens == 1


def test_bytes_of_blocks_are_a_share_of_all(written):
    (request,) = written({"tokens": [1, 2, 3, 4, 5, 6, 7], "bytes": 100, "cost": 0.7}, block=2)
    assert [block.nbytes for block in request.blocks] == [28, 29, 28]
    assert [block.cost for block in request.blocks] == pytest.approx([0.2] * 3)
    (request,) = written({"tokens": [1, 2, 3]}, block=2, bytes_per_token=8)
    assert (request.nbytes, request.blocks[0].nbytes) == (24, 16)


@given(
    keys=st.lists(st.sampled_from("abcdef"), max_size=40),
    capacity=st.integers(1, 5),
    size=st.sampled_from([1, 7]),
)
@settings(max_examples=60, deadline=None)
def test_no_policy_finds_more_than_the_optimum(keys, capacity, size):
    trace = of("".join(keys), size)
    best = simulate(trace, None, capacity * size)
    for policy in POLICIES.values():
        assert simulate(trace, policy, capacity * size).tokens <= best.tokens


@given(
    prompts=st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=6), max_size=15),
    capacity=st.integers(1, 6),
)
@settings(max_examples=60, deadline=None)
def test_no_policy_finds_more_prefixes_than_the_optimum(prompts, capacity):
    trace = []
    for ids in prompts:
        blocks = [TraceBlock(tuple(ids[:end]), 1, 1, 1.0) for end in range(1, len(ids) + 1)]
        trace.append(TraceRequest(tuple(blocks), len(ids), len(ids), float(len(ids))))
    best = simulate(trace, None, capacity)
    for policy in POLICIES.values():
        assert simulate(trace, policy, capacity).tokens <= best.tokens
    everything = {simulate(trace, p, 100).tokens for p in (*POLICIES.values(), None)}
    assert len(everything) == 1


def most_hits(keys: str, capacity: int) -> int:
    """Of all that could be kept after each request."""
    best = {frozenset(): 0}
    for key in keys:
        after: dict[frozenset, int] = {}
        for kept, hits in best.items():
            hits += key in kept
            for count in range(capacity + 1):
                for some in itertools.combinations(sorted(kept | {key}), count):
                    after[frozenset(some)] = max(hits, after.get(frozenset(some), 0))
        best = after
    return max(best.values())


@given(keys=st.text("abcd", max_size=10), capacity=st.integers(1, 3))
@settings(max_examples=40, deadline=None)
def test_the_optimum_is_the_best_of_all_choices(keys, capacity):
    assert simulate(of(keys), None, capacity).tokens == most_hits(keys, capacity)


def test_the_capacity_that_a_hit_rate_needs():
    trace = of("abcabcabc", 10)
    for policy, capacity in [(LRU(), 30), (FIFO(), 30), (None, 30)]:
        assert needed(trace, policy, 6 / 9) == capacity
        assert needed(trace, policy, 6.1 / 9) is None
    assert needed(trace, LRU(), 0.1) == 30  # it finds nothing with less
    assert needed(trace, None, 0.3) == 20
    big = of("abcabcabc", 10**9)
    assert 3 * 10**9 <= (needed(big, LRU(), 0.5) or 0) <= 3.02 * 10**9
    for target in (0, 1.1, float("nan")):
        with pytest.raises(ValueError, match="target got"):
            needed(trace, LRU(), target)
    with pytest.raises(ValueError, match="capacity got 0"):
        simulate(trace, LRU(), 0)
    with pytest.raises(ValueError, match="capacity got 0"):
        simulate(trace, None, 0)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("[1]", "expected an object"),
        ("{", "line 2"),
        ('{"key": "a", "size": 1}', "expected an object with key or tokens"),
        ("{}", "neither a key nor a list of tokens"),
        ('{"tokens": 5}', "neither a key nor a list of tokens"),
        ('{"tokens": []}', "whole numbers above 0"),
        ('{"tokens": [1, "a"]}', "whole numbers"),
        ('{"tokens": [1, 1.5]}', "whole numbers"),
        ('{"key": "a", "tokens": [1]}', "tokens is their number"),
        ('{"key": ["a"]}', "a text or a number"),
        ('{"key": "a", "tokens": 0}', "whole numbers above 0"),
        ('{"key": "a", "tokens": true}', "whole numbers above 0"),
        ('{"key": "a", "bytes": 1.5}', "whole numbers above 0"),
        ('{"key": "a", "cost": -1}', "a number from 0"),
        ('{"key": "a", "cost": NaN}', "a number from 0"),
        ('{"key": "a", "tenant": 5}', "expected a text"),
    ],
)
def test_what_is_no_request_is_named_by_its_line(tmp_path, line, says):
    (tmp_path / "bad").write_text('{"key": "a"}\n' + line)
    with pytest.raises(ValueError, match="bad, line 2") as error:
        read_trace(tmp_path / "bad", block=2)
    assert says in str(error.value)


def test_a_trace_without_requests(tmp_path):
    (tmp_path / "none").write_text("\n")
    with pytest.raises(ValueError, match="no requests"):
        read_trace(tmp_path / "none")
    with pytest.raises(ValueError, match="at least 1 of each"):
        read_trace(tmp_path / "none", block=0)


@pytest.fixture
def run(capsys) -> Any:
    def run(*arguments: object) -> tuple[Any, str, str]:
        with pytest.raises(SystemExit) as exit:
            main(["store", "simulate", *map(str, arguments)])
        heard = capsys.readouterr()
        return exit.value.code, heard.out, heard.err

    return run


@pytest.fixture
def trace(tmp_path) -> Any:
    path = tmp_path / "trace.jsonl"
    path.write_text("".join(json.dumps({"key": key, "bytes": 1024}) + "\n" for key in "abacab"))
    return path


def test_the_command(run, trace):
    asked = ("--capacity", "2KiB", "--capacity", "3072", "--policy", "lru", "--target", 0.5)
    status, out, err = run(trace, *asked)
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == "6 requests, 6 tokens, 6.0 KiB; 3.0 KiB hold all of it"
    assert lines[2].split() == ["tokens", "found", "2.0", "KiB", "3.0", "KiB"]
    assert lines[3].split() == ["optimum", "50.0", "%", "50.0", "%"]
    assert lines[4].split() == ["lru", "33.3", "%", "50.0", "%"]
    assert lines[-2].split() == ["optimum", "2.0", "KiB"]
    assert lines[-1].split() == ["lru", "3.0", "KiB"]
    _, out, _ = run(trace, *asked, "--json")
    told = json.loads(out)
    assert told["trace"] == {
        "requests": 6,
        "tokens": 6,
        "bytes": 6144,
        "distinct_bytes": 3072,
    }
    assert [round(one["token_hit_rate"], 3) for one in told["results"]] == [0.5, 0.5, 0.333, 0.5]
    assert told["target"] == 0.5
    assert 2048 <= told["needed"]["optimum"] <= 2060
    assert 3072 - 16 <= told["needed"]["lru"] <= 3072
    _, out, _ = run(trace, "--json")
    told = json.loads(out)
    assert {one["policy"] for one in told["results"]} == {"optimum", *POLICIES}
    assert {one["capacity"] for one in told["results"]} == {3072 >> shift for shift in range(6)}
    assert "needed" not in told
    _, out, _ = run(trace, "--target", 0.9)
    assert "cannot be reached" in out


def test_the_command_draws(run, trace, tmp_path):
    status, _, err = run(trace, "--plot", tmp_path / "rates.png")
    assert (status, err) == (0, "")
    assert (tmp_path / "rates.png").read_bytes().startswith(b"\x89PNG")
    status, _, err = run(trace, "--plot", tmp_path / "rates.none")
    assert status == 2
    assert "rates.png or rates.svg" in err


def test_the_command_says_what_is_wrong(run, trace, tmp_path):
    for arguments, says in [
        ((tmp_path / "missing",), "does not exist"),
        ((trace, "--policy", "newest"), "--policy got 'newest'; expected one of fifo, lru"),
        ((trace, "--capacity", "lots"), "capacity got 'lots'"),
        ((trace, "--target", 2), "target got 2"),
        ((trace, "--block", 0), "at least 1 of each"),
    ]:
        status, out, err = run(*arguments)
        assert (status, out) == (2, "")
        assert says in err
        assert err.count("\n") == 1


def test_the_command_does_not_wait_for_jax(trace):
    code = (
        "import sys; sys.modules['jax'] = sys.modules['numpy'] = None\n"
        "from jkv.cli import main\n"
        f"main(['store', 'simulate', {str(trace)!r}])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "optimum" in done.stdout
