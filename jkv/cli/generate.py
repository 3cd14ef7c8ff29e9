"""`jkv generate`: texts that go on from prompts, and what it took."""

from __future__ import annotations

import itertools
import json
import sys
import time
from typing import Annotated, Any

import typer

import jkv
from jkv._text import plural
from jkv.cli import options, process


def generate(
    prompts: Annotated[
        list[str] | None,
        typer.Argument(metavar="PROMPT", help="What to continue; several are one batch."),
    ] = None,
    prompt: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="A prompt too; repeatable.")
    ] = None,
    model: options.Model = "shakespeare",
    max_new_tokens: Annotated[int, typer.Option(help="New tokens per prompt, at most.")] = 64,
    temperature: options.Temperature = 0.0,
    top_k: options.TopK = None,
    top_p: options.TopP = None,
    min_p: options.MinP = None,
    repetition_penalty: options.Penalty = None,
    presence_penalty: options.Presence = None,
    frequency_penalty: options.Frequency = None,
    no_repeat_ngram: options.NoRepeat = None,
    min_new_tokens: options.MinNewTokens = None,
    seed: options.Seed = 0,
    stop: options.Stop = None,
    cache: options.CacheSpec = "dense",
    dtype: options.Dtype = None,
    ignore: options.Ignore = None,
    show_steps: Annotated[bool, typer.Option(help="Print the text after each token.")] = False,
    stream: Annotated[bool, typer.Option(help="Print the text as it comes.")] = False,
    as_json: options.AsJson = False,
) -> None:
    """Continue one or several prompts, as in jkv generate ROMEO:

    With --json, prompt_tokens and tokens are lists of ids, tokens the new ones only; times leave
    compilation out, which is compile_seconds; attention is the implementation of a decode step.
    """
    from jkv.cache.spec import parse

    texts = [*(prompts or ()), *(prompt or ())]
    if not texts:
        raise ValueError(
            "Missing option '--prompt', or an argument: expected a text to continue, as in "
            "jkv generate ROMEO:"
        )
    if stream and len(texts) > 1:
        raise ValueError("--stream shows one text as it comes: give one --prompt, or one argument")
    asked = {
        "max_new_tokens": max_new_tokens,
        "cache": parse(cache),
        "stop": stop or None,
        **options.drawing(
            temperature=temperature,
            seed=seed,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            presence_penalty=presence_penalty,
            frequency_penalty=frequency_penalty,
            no_repeat_ngram=no_repeat_ngram,
            min_new_tokens=min_new_tokens,
        ),
    }
    lm = process.load(model, dtype, ignore)
    ids = lm.encode(texts)
    screen = Screen(lm, texts, ids, steps=show_steps, stream=stream, as_json=as_json)
    result, speed = _measure(lm, ids, asked, screen, warm=not (stream or show_steps))
    rows = [row[:n].tolist() for row, n in zip(result.tokens, result.lengths, strict=True)]
    outputs = [
        {
            "prompt": text,
            "prompt_tokens": list(prompt_tokens),
            "tokens": row,
            "text": new,
            "finish_reason": reason,
        }
        for text, prompt_tokens, row, new, reason in zip(
            texts, ids, rows, result.texts, result.finish_reasons, strict=True
        )
    ]
    model_of = {"model": lm.source, "cache": cache, "dtype": lm.config.dtype}
    screen.end({**model_of, "outputs": outputs, **speed, "attention": _attention(lm, result)})


def _attention(lm: jkv.LM, result: jkv.Result) -> str:
    """Name the implementation that a decode step over this cache runs, see `jkv.ops.explain`."""
    import jax
    import jax.numpy as jnp

    from jkv.decoding.loop import decode_step
    from jkv.ops import dispatch

    token = jnp.zeros((result.cache.batch,), jnp.int32)
    with dispatch.record() as names:
        jax.eval_shape(lambda cache: decode_step(lm.model, token, cache), result.cache)
    return ", ".join(names)


def _measure(
    lm: jkv.LM, ids: list[list[int]], asked: dict[str, Any], screen: Screen, *, warm: bool
) -> tuple[jkv.Result, dict[str, Any]]:
    """Generate, and measure how long it took without compilation.

    The first use of a program costs more than what JAX reports as tracing and compiling, which is
    left out in any case. With `warm` the beginning is therefore done twice: the prompts and two
    blocks. Without, the first word is shown as soon as it is there.
    """
    import jax

    from jkv.decoding.stream import stream

    clock = process.clock()
    with process.bar("compiling, prefill", "tokens") as progress:
        # Given even when nothing is shown: only chunks that are waited for can be
        # told from compiling.
        asked = asked | {"progress": progress or (lambda done, total: None)}
        if warm:
            blocks = stream(lm, ids, **asked)
            for _ in itertools.islice(blocks, 2):
                pass
            jax.block_until_ready(jax.live_arrays())  # of the block that is not read
            del blocks
        marks = [time.perf_counter()]
        blocks = stream(lm, ids, **asked)
        begin = [next(blocks)]
        marks.append(time.perf_counter())
        if not warm:
            # Its program is compiled now, while nothing has been written but the bar.
            begin += itertools.islice(blocks, 1)
    for block in itertools.chain(begin, blocks):
        screen.block(block)
    marks.append(time.perf_counter())
    result = blocks.result
    prefill, decode = (clock.working(a, b) for a, b in itertools.pairwise(marks))
    decoded = int(result.lengths.sum()) - len(result.lengths)  # each row's first is prefill
    return result, {
        "prefill_seconds": prefill,
        "decode_seconds": decode,
        "tokens_per_second": decoded / decode if decoded and decode > 0 else None,
        "cache_bytes": result.cache.nbytes,
        "compile_seconds": clock.compile_seconds,
    }


class Screen:
    """What is shown while tokens come, and at the end."""

    def __init__(
        self,
        lm: jkv.LM,
        prompts: list[str],
        ids: list[list[int]],
        *,
        steps: bool,
        stream: bool,
        as_json: bool,
    ):
        from jkv.decoding.detokenize import Pieces

        self._steps, self._stream, self._as_json = steps, stream and not steps, as_json
        self._texts, self._count = list(prompts), 0
        self._begun = False
        # Texts have been encoded by now.
        self._pieces = [Pieces(lm.tokenizer, row) for row in ids if lm.tokenizer is not None]
        # With --json nothing but the object goes to standard output.
        self._out = sys.stderr if as_json else sys.stdout

    def block(self, block: jkv.decoding.Block) -> None:
        """Show what is new, where that is wanted while it comes."""
        if self._steps:
            self._show_steps(block)
        elif self._stream:
            if not self._begun:
                print(self._texts[0], end="", file=self._out)
                self._begun = True
            tokens = block.tokens[0][block.tokens[0] >= 0].tolist()
            piece = self._pieces[0].push(tokens, last=bool(block.done[0]))
            print(piece, end="", file=self._out, flush=True)

    def _show_steps(self, block: jkv.decoding.Block) -> None:
        for step in range(block.tokens.shape[1]):
            self._count += 1
            for row, token in enumerate(block.tokens[:, step].tolist()):
                if token < 0:
                    continue
                last = bool(block.done[row]) and not (block.tokens[row, step + 1 :] >= 0).any()
                self._texts[row] += self._pieces[row].push([token], last=last)
                which = f" [{row + 1}]" if len(self._texts) > 1 else ""
                line = self._texts[row].replace("\n", "\\n")
                print(f"step {self._count}{which}: {line}", file=self._out)
        self._out.flush()

    def end(self, report: dict[str, Any]) -> None:
        """Print the object, or the texts and a line about their speed."""
        if self._stream:
            print(file=self._out)
        if self._as_json:
            print(json.dumps(report))
            return
        outputs = report["outputs"]
        if not self._steps and not self._stream:
            for row, pieces in enumerate(self._pieces):
                self._texts[row] += pieces.push(outputs[row]["tokens"], last=True)
            print("\n\n".join(self._texts))
        sys.stdout.flush()
        read = sum(len(output["prompt_tokens"]) for output in outputs)
        generated = sum(len(output["tokens"]) for output in outputs)
        speed = report["tokens_per_second"]
        print(
            f"{plural(read, 'prompt token')} in {report['prefill_seconds']:.3f} s, "
            f"{generated} generated in "
            f"{report['decode_seconds']:.3f} s{f' ({speed:.0f} tokens/s)' if speed else ''}; "
            f"cache {report['cache']}, {process.size(report['cache_bytes'])}; "
            f"{report['compile_seconds']:.1f} s of compilation not counted",
            file=sys.stderr,
        )
