"""What the engine makes of many requests at once, beside batches that wait for their last row.

    python -m bench engine --json engine.json
    python -m bench engine --only trace --model ../../shared/models/stories260k

Prompts and answers are as long as in ShareGPT (means of 161 and 338 tokens: Kwon et al. 2023,
figure 11), log-normal, cut so that both fit into 2048; for a shorter context all is scaled down. A
third of the prompts begin with one of four system prompts. Requests arrive at random times
(Poisson), by default faster than anybody serves them. The same trace for all, in turns: the engine;
`jkv.generate` in batches of what has arrived, each as long as its longest answer; `transformers`
likewise, and its own continuous batching, where it is installed with torch (the `compare` extra).
Only tokens that were asked for count. Weights of `42m` are random. With `--devices 2` jkv has each
half of the heads on a device of its own, which on a CPU is a core; torch uses all cores by itself.

Sections: trace, requests of mixed lengths; prefix, the first token after a prompt of 1000 tokens
that is in the cache, and that is not; host, the engine's own work per step at 256 lanes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from flax import nnx
from rich.console import Console
from rich.table import Table

import jkv
from bench import machine, report
from bench.store import LLAMA_42M
from jkv.engine import decode_state

MEANS, SPREAD = (161, 338), (1.0, 0.8)  # tokens; standard deviations of the logarithms
FULL = 2048  # tokens of context for which these are
SYSTEM = 64  # tokens of a system prompt
LONGEST = 600  # seconds that one may take for the trace
SECTIONS = ("trace", "prefix", "host")


@dataclasses.dataclass(frozen=True)
class Asked:
    """One request of the trace."""

    at: float  # seconds
    prompt: list[int]
    new: int


def trace(config: Any, count: int, rate: float, seed: int) -> list[Asked]:
    """Requests in the order of their arrival."""
    rng = np.random.default_rng(seed)
    scale = min(config.context / FULL, 1.0)
    context, first = int(FULL * scale), int(SYSTEM * scale)
    times = np.cumsum(rng.exponential(1 / rate, count))
    system = rng.integers(3, config.vocab, (4, first))
    asked = []
    for at in times:
        lengths = [
            np.clip(rng.lognormal(np.log(mean * scale) - spread**2 / 2, spread), 4, context // 2)
            for mean, spread in zip(MEANS, SPREAD, strict=True)
        ]
        prompt, new = int(lengths[0]) - first, int(lengths[1])
        tokens = rng.integers(3, config.vocab, max(prompt, 4))
        if rng.random() < 1 / 3:
            tokens = np.concatenate([system[rng.integers(4)], tokens])
        asked.append(Asked(float(at), tokens.tolist(), new))
    return asked


@dataclasses.dataclass
class Served:
    """How one contestant served the trace."""

    tokens: int
    seconds: float
    first: list[float]  # seconds from arrival to the first token that could be read
    more: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def rate(self) -> float:
        """Tokens per second that were asked for."""
        return self.tokens / self.seconds


def by_engine(engine: Any, asked: list[Asked]) -> Served:
    """All requests through an engine, submitted when they arrive."""
    start, left, requests = time.perf_counter(), list(asked), []
    before = engine.stats()
    more = True
    while left or more:
        now = time.perf_counter() - start
        while left and left[0].at <= now:
            one = left.pop(0)
            requests.append(engine.submit(one.prompt, max_new_tokens=one.new, stop=()))
        more = engine.step()
        if not more and left:
            time.sleep(max(0.0, left[0].at - (time.perf_counter() - start)))
    seconds = time.perf_counter() - start
    figures = engine.stats()
    first = [r.first_token - start - a.at for r, a in zip(requests, asked, strict=True)]
    found = figures["hit_tokens"] - before["hit_tokens"]
    return Served(
        sum(a.new for a in asked),
        seconds,
        first,
        {"waste": figures["waste"], "hits": found, "preemptions": figures["preemptions"]},
    )


def by_batches(run: Callable[[list[Asked]], None], asked: list[Asked], size: int) -> Served:
    """Batches of what has arrived, one after another; `run` serves one of them."""
    start, left, first = time.perf_counter(), list(asked), []
    while left:
        now = time.perf_counter() - start
        if left[0].at > now:
            time.sleep(left[0].at - now)
            continue
        batch = [one for one in left[:size] if one.at <= now]
        left = left[len(batch) :]
        run(batch)
        first += [time.perf_counter() - start - one.at for one in batch]
    return Served(sum(a.new for a in asked), time.perf_counter() - start, first)


def by_generate(model: Any, size: int, slots: int) -> Callable[[list[Asked]], None]:
    """Batches of `jkv.generate`, all of one size, so that nothing is compiled on the way."""

    def run(batch: list[Asked]) -> None:
        most = max(one.new for one in batch)
        rows = [one.prompt for one in batch] + [[0]] * (size - len(batch))
        jkv.generate(model, rows, max_new_tokens=most, stop=(), slots=slots)

    return run


def by_transformers(theirs: Any) -> Callable[[list[Asked]], None]:
    """Batches of `transformers`, padded on the left."""
    import torch

    def run(batch: list[Asked]) -> None:
        longest = max(len(one.prompt) for one in batch)
        most = max(one.new for one in batch)
        rows = [[0] * (longest - len(one.prompt)) + one.prompt for one in batch]
        mask = [[0] * (longest - len(one.prompt)) + [1] * len(one.prompt) for one in batch]
        with torch.inference_mode():
            theirs.generate(
                torch.tensor(rows),
                attention_mask=torch.tensor(mask),
                min_new_tokens=most,
                max_new_tokens=most,
                do_sample=False,
                pad_token_id=0,
            )

    return run


@contextlib.contextmanager
def by_continuous(theirs: Any, lanes: int) -> Iterator[Callable[[list[Asked]], Served]]:
    """The continuous batching of `transformers`, started before, with as many requests at once."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    how = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0)
    context = theirs.config.max_position_embeddings
    page = 256  # its own
    manager = theirs.init_continuous_batching(
        generation_config=how,
        # By default it takes most of the machine's memory, and a minute to do so.
        continuous_batching_config=ContinuousBatchingConfig(
            num_blocks=2 * lanes * -(-context // page),
            max_batch_tokens=max(256, lanes),
            max_requests_per_batch=lanes,
        ),
    )
    manager.start()

    def serve(asked: list[Asked]) -> Served:
        start, left, ended = time.perf_counter(), list(asked), {}
        while len(ended) < len(asked):
            now = time.perf_counter() - start
            while left and left[0].at <= now:
                one = left.pop(0)
                manager.add_request(
                    one.prompt,
                    request_id=str(len(asked) - len(left) - 1),
                    max_new_tokens=one.new,
                    record_timestamps=True,
                )
            out = manager.get_result(timeout=0.01)
            if out is not None and out.is_finished():
                if out.error:
                    raise RuntimeError(str(out.error))
                ended[int(out.request_id)] = out
            elif not manager.is_running():
                raise RuntimeError("it has stopped")
            elif time.perf_counter() - start > LONGEST:
                raise RuntimeError(f"{len(ended)} of {len(asked)} requests after {LONGEST} s")
        seconds = time.perf_counter() - start
        first = [ended[i].timestamps[0] - start - one.at for i, one in enumerate(asked)]
        return Served(sum(len(out.generated_tokens) for out in ended.values()), seconds, first)

    yield serve
    manager.stop(block=True, timeout=10)


def transformers_model(name: str, config: Any) -> Any:
    """The same shape there, or the reason why not."""
    try:
        import torch
        import transformers
    except ImportError as error:
        return f"not installed ({error.name})"
    torch.set_num_threads(machine.cores())
    if name != "42m":
        return transformers.AutoModelForCausalLM.from_pretrained(name).eval()
    shape = transformers.LlamaConfig(
        vocab_size=config.vocab,
        hidden_size=config.width,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        intermediate_size=config.feed_forward,
        max_position_embeddings=config.context,
    )
    return transformers.LlamaForCausalLM(shape).eval()


def ours(name: str, options: Any) -> Any:
    """The decoder, its heads over the devices that there are."""
    if name == "42m":
        model = jax.jit(lambda: jkv.Decoder(LLAMA_42M, rngs=nnx.Rngs(0)))()
    else:
        model = jkv.load(name).model
    return model if options.devices == 1 else jkv.shard(model, mesh(options.devices))


def mesh(devices: int) -> Any:
    """So many of them in a line."""
    return jax.make_mesh((devices,), ("heads",))


def engine_for(model: Any, options: Any, **changes: Any) -> Any:
    """An engine with as many pages as full rows would take."""
    lanes = changes.get("max_batch", options.lanes)
    pages = lanes * -(-min(model.config.context, FULL) // options.page)
    how = {"page": options.page, "max_batch": options.lanes, "block": options.block}
    return jkv.Engine(model, **({"pages": pages} | how | changes))


def measure_trace(
    name: str, options: Any, console: Console, stack: contextlib.ExitStack
) -> dict[str, Any]:
    """The trace, by everyone in turns."""
    model = ours(name, options)
    config = model.config
    theirs = transformers_model(name, config)
    rate = options.rate or (400.0 if name != "42m" else 4.0)
    engine = engine_for(model, options)
    engine.warm()
    lengths = (8, 16, 32, 64, 128, 256, 272, 288, 320, 384, 512)  # those that are programs
    warm = [[Asked(0.0, [3] * min(n, config.context - 2), 2)] for n in lengths]
    contestants: dict[str, Callable[[list[Asked]], Served]] = {
        "engine": lambda a: by_engine(engine, a),
        "jkv.generate, batches": lambda a: by_batches(
            by_generate(model, options.lanes, config.context), a, options.lanes
        ),
    }
    reasons = {}
    if isinstance(theirs, str):
        reasons["transformers"] = theirs
    else:
        contestants["transformers, batches"] = lambda a: by_batches(
            by_transformers(theirs), a, options.lanes
        )
        if not hasattr(theirs, "generate_batch"):
            reasons["transformers, continuous"] = "this version has none"
        else:
            name_of = "transformers, continuous"
            if name_of not in options.without:
                serve = stack.enter_context(by_continuous(theirs, options.lanes))
                contestants[name_of] = serve
    for n in options.without:
        contestants.pop(n, None)
        reasons[n] = "left out"
    served: dict[str, list[Served]] = {n: [] for n in contestants}
    for group in warm:
        for serve in contestants.values():
            serve(group)
    every: list[Asked] = []
    for turn in range(options.rounds):
        # Each round has texts of its own: nothing but the system prompts is found again.
        asked = trace(config, options.requests, rate, options.seed + turn)
        every += asked
        for n, serve in list(contestants.items()):
            try:
                one = serve(asked)
            except (RuntimeError, ValueError, TypeError, AttributeError, ImportError) as error:
                reasons[n] = f"{type(error).__name__}: {error}"[:200]
                del contestants[n]
                continue
            served[n].append(one)
            console.print(f"  {n}: {one.rate:.0f} tokens/s", highlight=False)
    rows = {}
    for n, runs in served.items():
        if not runs:
            continue
        first = sorted(s for run in runs for s in run.first)
        rows[n] = {
            "tokens_per_second": statistics.median(run.rate for run in runs),
            "first_token_p50": first[len(first) // 2] if first else None,
            "first_token_p99": first[int(0.99 * len(first))] if first else None,
            **(runs[-1].more),
        }
    means = {
        "prompt": statistics.mean(len(a.prompt) for a in every),
        "answer": statistics.mean(a.new for a in every),
    }
    return {"model": name, "rate": rate, "mean_lengths": means, "rows": rows, "not_run": reasons}


def measure_prefix(options: Any) -> dict[str, Any]:
    """Seconds to the first token after 1000 tokens that are known, and that are not."""
    model = ours("42m", options)
    engine = engine_for(model, options, pages=1024)
    engine.warm()
    rng = np.random.default_rng(options.seed)
    cold, warm = [], []
    for _ in range(options.rounds + 1):
        prefix = rng.integers(3, model.config.vocab, 1000).tolist()
        for times in (cold, warm):
            tail = rng.integers(3, model.config.vocab, 24).tolist()
            request = engine.submit(prefix + tail, max_new_tokens=4, stop=())
            request.result()
            engine.run()
            times.append(request.first_token - request.submitted)
    cold_s, warm_s = statistics.median(cold[1:]), statistics.median(warm[1:])
    return {"cold_seconds": cold_s, "warm_seconds": warm_s, "ratio": warm_s / cold_s}


def measure_host(block: int, options: Any) -> dict[str, Any]:
    """Seconds of the host's own work per pass with 256 lanes at work, and of JAX's dispatch."""
    config = dataclasses.replace(LLAMA_42M, layers=1, width=64, heads=1, kv_heads=1, vocab=512)
    config = dataclasses.replace(config, feed_forward=64, context=512)
    model = jax.jit(lambda: jkv.Decoder(config, rngs=nnx.Rngs(0)))()
    engine = engine_for(model, options, max_batch=256, pages=256 * 32, block=block)
    engine.warm()
    rng = np.random.default_rng(options.seed)
    prompts = rng.integers(3, config.vocab, (256, 16)).tolist()
    requests = [engine.submit(prompt, max_new_tokens=480, stop=()) for prompt in prompts]
    while requests[-1].first_token is None:  # its prompt is the last that is read
        engine.step()
    passes, times, calls = min(150, 200 // block), [], []
    dispatch, called = decode_state.decode_jit, 0.0

    def timed(*arguments: Any) -> Any:
        nonlocal called
        began = time.perf_counter()
        out = dispatch(*arguments)
        called += time.perf_counter() - began
        return out

    decode_state.decode_jit = timed
    for _ in range(passes):
        began, waited, before = time.perf_counter(), engine.core.runner.waited, called
        engine.step()
        calls.append(called - before)
        times.append(time.perf_counter() - began - (engine.core.runner.waited - waited) - calls[-1])
    decode_state.decode_jit = dispatch
    own, jax_own = statistics.median(times), statistics.median(calls)
    return {
        "lanes": 256,
        "tokens_per_pass": block,
        "passes": passes,
        "seconds_per_pass": own,
        "dispatch_seconds": jax_own,
    }


def main(arguments: list[str]) -> int:
    """Measure, write, show."""
    parser = report.parser("engine", __doc__)
    add = parser.add_argument
    add("--model", action="append", help="42m, or a checkpoint's directory; repeatable")
    add("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    add("--requests", type=int, default=40)
    add("--lanes", type=int, default=8, help="requests at once; rows of the others' batches")
    add("--devices", type=int, default=1, help="parts of the heads; on a CPU, cores at most")
    add("--page", type=int, default=16)
    add("--block", type=int, default=4, help="tokens per step")
    add("--rate", type=float, help="requests per second")
    add("--rounds", type=int, default=2)
    add("--seed", type=int, default=0)
    add("--without", nargs="+", default=[], metavar="NAME", help="contestants to leave out")
    options = parser.parse_args(arguments)
    if options.devices > 1:
        jax.config.update("jax_num_cpu_devices", options.devices)
    console = Console()
    made = report.Report("engine", options)
    if "trace" in options.only:
        traces: list[dict[str, Any]] = []
        for name in options.model or ["42m"]:
            with contextlib.ExitStack() as stack:
                found = measure_trace(name, options, console, stack)
            traces.append(found)
            made.add("trace", traces)
            console.print(table_of(found))
    if "prefix" in options.only:
        found = measure_prefix(options)
        made.add("prefix", found)
        console.print(
            f"first token after 1000 tokens: {found['cold_seconds']:.3f} s cold, "
            f"{found['warm_seconds']:.3f} s found: {found['ratio']:.3f}x",
            highlight=False,
        )
    if "host" in options.only:
        hosts = [measure_host(block, options) for block in sorted({1, options.block})]
        made.add("host", hosts)
        for found in hosts:
            console.print(
                f"the host's work at 256 lanes, {found['tokens_per_pass']} tokens of each per "
                f"pass: {1000 * found['seconds_per_pass']:.2f} ms per pass, and "
                f"{1000 * found['dispatch_seconds']:.2f} ms of JAX's to dispatch it",
                highlight=False,
            )
    report.show_machine(made.results, console)
    return 0


def table_of(found: dict[str, Any]) -> Table:
    """Who said how much in a second."""
    table = Table(title=f"{found['model']}, {found['rate']:.0f} requests/s")
    for head in ("", "tokens/s", "of the engine's", "first token p50", "p99", "waste"):
        table.add_column(head, justify="left" if not head else "right")
    best = found["rows"]["engine"]["tokens_per_second"]
    for name, row in found["rows"].items():
        times = [row["first_token_p50"], row["first_token_p99"]]
        table.add_row(
            name,
            f"{row['tokens_per_second']:.0f}",
            f"{row['tokens_per_second'] / best:.2f}",
            *("-" if t is None else f"{t:.2f} s" for t in times),
            f"{row['waste']:.1%}" if "waste" in row else "",
        )
    for name, reason in found["not_run"].items():
        table.add_row(name, f"not run: {reason}")
    return table
