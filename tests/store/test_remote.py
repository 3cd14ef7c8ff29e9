"""Remotes that are slow, dead, or an S3 server; waits are bounded, and a breaker spares them."""

from __future__ import annotations

import importlib.util
import socket
import socketserver
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from jkv.errors import CorruptError, TierError
from jkv.store import Memory, Remote, Store
from jkv.store.codec import blob_name
from jkv.store.remote import Breaker
from tests.store.fakes import check, entry, number
from tests.store.victim import number_of, value

ROOT = Path(__file__).resolve().parents[2]


class Server(socketserver.ThreadingTCPServer):
    """Takes requests and never answers, or says that there is nothing, or that it is broken."""

    allow_reuse_address = daemon_threads = True
    answer: bytes | None = None
    requests = 0

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(socketserver.StreamRequestHandler):
    server: Server

    def handle(self) -> None:
        while line := self.rfile.readline():
            if line == b"\r\n":
                self.server.requests += 1
                if self.server.answer is None:
                    time.sleep(30)
                    return
                self.wfile.write(self.server.answer)


MISSING = b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n"
BROKEN = b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 0\r\n\r\n"


@pytest.fixture
def server(monkeypatch) -> Iterator[Server]:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    with Server(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join(30)


def remote(endpoint: str, **options) -> Remote:
    url = "s3://bucket-of-tests/prefix"
    return Remote(url, endpoint=endpoint, region="us-east-1", **options)


def test_a_dead_remote_is_waited_for_and_then_left_alone(server):
    now = [0.0]
    breaker = Breaker(failures=3, wait=10.0, clock=lambda: now[0])
    tier = remote(server.endpoint, timeout=0.2, breaker=breaker)
    calls = (lambda: tier.read("k"), lambda: tier.write("k", value(1)), tier.scan)
    for call in calls:
        with pytest.raises(TierError, match=r"no answer in 0.2 s"):
            call()
    asked = server.requests
    assert asked >= 3
    for call in (*calls, lambda: tier.delete("k"), tier.verify):
        with pytest.raises(TierError, match="not asked to"):
            call()
    assert server.requests == asked  # nothing was asked, so that nothing was waited for
    now[0] = 10.0  # a trial, which is not answered either: twice as long
    with pytest.raises(TierError, match="no answer"):
        tier.read("k")
    now[0] = 29.0
    with pytest.raises(TierError, match="not asked to"):
        tier.read("k")
    assert server.requests <= asked + 2  # the trial's own, with tensorstore's second try
    server.answer = MISSING
    now[0] = 30.0
    assert tier.read("k") is None  # it is back
    assert tier.read("k") is None
    counts = tier.stats()
    assert (counts["failures"], counts["opened"], counts["trials"]) == (4, 1, 2)
    assert (counts["refused"], counts["open"]) == (6, 0)


def test_a_store_above_a_dead_remote(server):
    """Every wait is bounded, what is not there is a miss, and soon nobody asks any more."""
    tier = remote(server.endpoint, timeout=0.2, breaker=Breaker(failures=2, wait=60.0))
    with Store([Memory(), tier]) as store:
        store.put("here", entry(1))
        assert number(store.get("here")) == 1
        assert store.get("not here") is None
        asked = server.requests
        assert store.get_many([f"other {i}" for i in range(50)]) == [None] * 50
        assert number(store.get("here")) == 1
        assert server.requests == asked
        figures = check(store, accesses=53)
        assert figures["hits"] == 2
        assert figures["tiers"]["remote"]["errors"] > 50
    assert store.stats()["entries"] == 1


def test_a_broken_remote(server):
    server.answer = BROKEN
    tier = remote(server.endpoint, timeout=5.0, retries=1)
    with pytest.raises(TierError, match="read 'k' at s3://"):
        tier.read("k")
    server.answer = MISSING
    assert tier.read("k") is None


def test_nobody_listens(server):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        tier = remote(f"http://127.0.0.1:{unused.getsockname()[1]}", timeout=0.5)
        with pytest.raises(TierError):
            tier.read("k")


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """A server of S3, in a process of its own."""
    for module in ("moto", "flask", "flask_cors", "boto3"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"no {module}: pip install 'jkv-jax[s3]' for a server of S3")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    endpoint = f"http://127.0.0.1:{port}"
    try:
        bucket = urllib.request.Request(f"{endpoint}/bucket-of-tests", method="PUT")
        for _ in range(300):
            try:
                urllib.request.urlopen(bucket, timeout=30).close()
                break
            except urllib.error.URLError:
                assert process.poll() is None
                time.sleep(0.1)
        yield endpoint
    finally:
        process.terminate()
        process.wait(30)


OTHER = """
import sys
from jkv.store import Remote
from tests.store.victim import number_of, value
tier = Remote("s3://bucket-of-tests/prefix", endpoint=sys.argv[1], region="us-east-1")
tier.write("from the other", value(8))
print(number_of(tier.read("a/b")))
"""


def test_s3(s3, server):
    tier = remote(s3, timeout=20.0)
    keys = ["", "a/b", "../x", "naïve 漢字", "k" * 300]
    assert tier.scan() == {}
    assert tier.read("a/b") is None
    sizes = {key: tier.write(key, value(number)) for number, key in enumerate(keys)}
    assert [number_of(tier.read(key)) for key in keys] == list(range(5))
    assert tier.scan() == sizes
    tier.write("a/b", value(6))
    assert number_of(tier.read("a/b")) == 6
    tier.delete("")
    tier.delete("never there")
    assert tier.read("") is None

    other = subprocess.run(
        [sys.executable, "-c", OTHER, s3], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert other.stdout == "6\n", other.stderr
    assert number_of(tier.read("from the other")) == 8

    name = blob_name("a/b")
    blob = tier._kvstore[name]
    tier._kvstore[name] = blob[:-1] + bytes([blob[-1] ^ 1])
    with pytest.raises(CorruptError, match="payload is damaged"):
        tier.read("a/b")
    assert tier.read("a/b") is None
    tier._kvstore["kempty.jkv"] = b""
    assert set(tier.scan()) == {*keys[2:], "from the other"}
    assert set(tier.verify()) == {"kempty.jkv"}
    assert tier.verify() == {}


ANOTHER = """
import sys
from jkv.store import Memory, Remote, Store
from tests.store.fakes import entry, number
tier = Remote("s3://bucket-of-tests/shared", endpoint=sys.argv[1], region="us-east-1", timeout=20)
with Store([Memory(), tier], chunk=4, write_through=True) as store:
    store.drain()
    with store.longest_prefix([*range(12), 99]) as match:
        print(match.key, match.length, number(match.value), number(store.get("by name")))
    store.put("answer", entry(3), tokens=range(50, 70))
    store.remove("by name")
"""


def test_two_processes_share_a_store_on_s3(s3, server):
    tier = Remote("s3://bucket-of-tests/shared", endpoint=s3, region="us-east-1", timeout=20.0)
    with Store([Memory(), tier], chunk=4, write_through=True) as store:
        store.put("by name", entry(1))
        store.put("by tokens", entry(2), tokens=range(20))
        other = subprocess.run(
            [sys.executable, "-c", ANOTHER, s3], cwd=ROOT, capture_output=True, text=True
        )
        assert other.stdout == "by tokens 12 2 1\n", other.stderr
        assert number(store.get("answer")) == 3
        with store.longest_prefix([*range(50, 60), 1]) as match:
            assert (match.key, match.length) == ("answer", 10)
        check(store, accesses=2)
    with Store([tier], chunk=4) as store:  # and what one removed is not found by the next
        assert store.get("by name") is None
        assert len(store) == 2
