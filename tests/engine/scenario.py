"""Requests through every call of an engine, any of them interrupted, and what must come out."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import jax

import jkv
from tests.engine.engines import HOT, PROMPTS, check_empty, make_engine
from tests.engine.interrupts import Interrupt


class Recorder(dict[int, Any]):
    """The live requests, and all that ever were: also those whose `submit` returned none."""

    def __init__(self) -> None:
        super().__init__()
        self.all: dict[int, Any] = {}

    def update(self, requests: dict[int, Any]) -> None:  # type: ignore[override]
        super().update(requests)
        self.all.update(requests)


class Scenario:
    """One engine, used again for each run; between two of them it must be empty.

    Args:
        how: of the engine.
        calls: the script: "steps", "waits" or "closes".
    """

    def __init__(self, lm: Any, alone: Any, calls: str, **how: Any):
        self.lm, self.calls = lm, calls
        self.store = how.get("store")
        self.engine = make_engine(lm, **how)
        self.engine.warm()  # with and without a sampler's structure, which an interrupt forgets
        self.engine.warm([HOT])
        text = lm.tokenizer.decode(alone(PROMPTS[6], 12))[3:6]
        stopped = jkv.generate(lm, [PROMPTS[6]], max_new_tokens=12, stop=[text], slots=64)
        hot = {"sampler": HOT, "key": jax.random.key(1)}
        self.asked: dict[str, dict[str, Any]] = {
            "long": {"prompt": PROMPTS[7], "max_new_tokens": 9, "stop": ()},
            "sampled": {"prompt": PROMPTS[7], "max_new_tokens": 8, "stop": (), **hot},
            "stopped": {"prompt": PROMPTS[6], "max_new_tokens": 12, "stop": [text]},
            "left": {"prompt": PROMPTS[5], "max_new_tokens": 10, "stop": ()},
            "short": {"prompt": PROMPTS[4], "max_new_tokens": 6, "stop": ()},
        }
        self.wanted = {
            "long": alone(PROMPTS[7], 9),
            "sampled": alone(PROMPTS[7], 8, **hot),
            "stopped": stopped.tokens[0, : stopped.lengths[0]].tolist(),
            "left": alone(PROMPTS[5], 10),
            "short": alone(PROMPTS[4], 6),
        }
        self.watched = ("sampled", "stopped")
        self.requests = Recorder()
        self.engine.core.scheduler.requests.live = self.requests
        self.turns, self._step = 0, self.engine.core.step
        self.engine.core.step = self.bounded  # a lost request would be waited for for ever

    def run(self, strikes: dict[int, Interrupt]) -> list[str]:
        """The calls, those of these places each under its interrupt; the names of all."""
        self.strikes, self.names = strikes, []
        self.told: dict[int, list[tuple[int, int]]] = {}
        self.ends: set[str] = set()  # requests that may be cancelled
        self.requests.all.clear()
        self.turns = 0
        before = self.engine.stats()
        getattr(self, self.calls)()
        self.engine.run()
        self.check(before)
        return self.names

    def bounded(self) -> bool:
        """A step, of not too many in a run."""
        self.turns += 1
        assert self.turns < 500, "the engine never rests"
        return self._step()

    def attempt(self, work: Callable[[], Any], name: str, again: bool = True) -> Any:
        """A call; where it is interrupted and `again`, once more in peace."""
        strike = self.strikes.get(len(self.names))
        self.names.append(name)
        if strike is None:
            return work()
        try:
            with strike:
                return work()
        except KeyboardInterrupt:
            self.unlocked(strike)
            return work() if again else None

    def unlocked(self, strike: Interrupt) -> None:
        """Other threads can go on, unless the interrupt came where Python delivers none."""
        got: list[bool] = []
        lock = self.engine._transactions.lock
        while lock._is_owned() and not strike.genuine:
            lock.release()

        def other() -> None:
            got.append(lock.acquire(blocking=False))
            if got[0]:
                lock.release()

        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        assert got == [True], "the interrupted thread kept the engine's lock"

    def submit(self, tag: str) -> Any:
        more = {"on_token": self.hear} if tag in self.watched else {}
        how = {**self.asked[tag], **more, "request_id": tag}
        return self.attempt(lambda: self.engine.submit(**how), "submit")

    def hear(self, request: Any, token: int) -> None:
        self.told.setdefault(request.number, []).append((len(request.tokens), token))

    def step(self) -> None:
        self.attempt(self.engine.step, "step", again=False)

    # Scripts.

    def steps(self) -> None:
        """Submit, step, cancel what runs and what waits, update, read figures."""
        requests = {tag: self.submit(tag) for tag in self.asked}
        self.ends |= {"left", "short"}
        for turn in range(14):
            self.step()
            if turn == 3:
                self.attempt(requests["short"].cancel, "cancel")
                assert requests["short"].finish_reason in ("cancelled", "length")
            if turn == 6:
                self.attempt(lambda: self.engine.update(self.lm), "update")
            if turn == 8:
                self.attempt(requests["left"].cancel, "cancel")
            if turn == 9:
                self.attempt(self.engine.stats, "stats")
        self.attempt(self.engine.run, "run")

    def waits(self) -> None:
        """Wait for tokens and results in each way there is; leave one iteration."""
        engine = self.engine
        left, long = self.submit("left"), self.submit("long")
        self.ends |= {"left", "iterated"}

        def leave() -> None:
            for i, _ in enumerate(left):
                if i == 2:
                    break

        self.attempt(leave, "break")
        engine.stats()  # where the interrupt came in the iterator's end, which swallows it
        assert left.state == "finished"
        assert self.attempt(long.result, "result") == self.wanted["long"]
        stopped = self.submit("stopped")
        self.attempt(lambda: list(stopped), "iterate")  # after an interrupt it has been left
        self.ends.add("stopped")
        engine.stats()
        assert stopped.state == "finished"
        how = {"max_new_tokens": 6, "stop": ()}

        def generate() -> Any:
            prompts = [PROMPTS[4], PROMPTS[4]]
            return engine.generate(prompts, request_ids=["short"] * 2, **how)

        self.ends.add("short")
        short = self.attempt(generate, "generate", again=False)
        self.attempt(engine.stats, "stats")
        if short is None:  # what is interrupted is cancelled
            assert not engine.core.scheduler.requests.live
            short = generate()
        assert [r.tokens for r in short] == [self.wanted["short"]] * 2

    def closes(self) -> None:
        """Close with requests that run, wait and are swapped; use the engine after that."""
        engine = self.engine
        self.attempt(lambda: engine.warm([HOT]), "warm")
        requests = {tag: self.submit(tag) for tag in ("long", "sampled", "left")}
        self.ends |= set(requests)
        for _ in range(40):
            engine.step()
            if any(r.swapped or r.preemptions for r in requests.values()):
                break
        self.attempt(engine.close, "close")
        assert all(r.state == "finished" for r in requests.values())
        figures = engine.stats()
        assert figures["pages"]["used"] == figures["swapped_bytes"] == 0
        self.attempt(engine.close, "close again")
        self.attempt(engine.run, "run closed")
        short = self.submit("short")
        assert self.attempt(short.result, "result closed") == self.wanted["short"]

    def check(self, before: dict[str, Any]) -> None:
        """Every request has ended as it would have in peace, and was counted once."""
        engine = self.engine
        for number, request in self.requests.all.items():
            tag, tokens, want = request.request_id, request.tokens, None
            want = self.wanted[tag]
            assert request.state == "finished", tag
            if request.finish_reason == "cancelled":
                assert tag in self.ends
                assert tokens == want[: len(tokens)]
            else:
                assert tokens == request.result() == want, tag
                assert request.finish_reason == ("stop" if tag == "stopped" else "length")
            heard = self.told.get(number, [])
            if tag in self.watched:  # none twice, and one not at all where an interrupt came
                assert all(tokens[at - 1] == token for at, token in heard)
                assert sorted(set(heard)) == heard
                assert len(tokens) - len(self.strikes) <= len(heard) <= len(tokens)
        check_empty(engine)
        assert engine.core.scheduler.requests.live == {}
        assert not engine.core.needs_sweep()
        after = engine.stats()
        requests = list(self.requests.all.values())
        assert after["finished"] - before["finished"] == len(requests)
        assert after["finished"] == sum(after["reasons"].values())
        assert after["tokens"] - before["tokens"] == sum(len(r.tokens) for r in requests)
        for reason in after["reasons"]:
            count = sum(r.finish_reason == reason for r in requests)
            assert after["reasons"][reason] - before["reasons"][reason] == count
        if self.store is not None:
            assert not self.store.waiting()


class Spied:
    """A store that knows which keys it was asked to keep for requests that wait."""

    def __init__(self, store: Any):
        self.store, self.saved_keys = store, {}
        for name in ("contains", "get", "get_many", "put_many", "remove", "reject"):
            setattr(self, name, getattr(store, name))

    def put(self, key: str, *args: Any, **how: Any) -> Any:
        """Remember the key."""
        self.saved_keys[key] = how["fingerprint"]
        return self.store.put(key, *args, **how)

    def waiting(self) -> list[str]:
        """Keys of requests that still are there."""
        it = self.saved_keys.items()
        there = [key for key, mark in it if self.store.contains(key, fingerprint=mark)]
        self.saved_keys.clear()
        return there
