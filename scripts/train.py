"""Train a small Llama on a text file, and write it as a checkpoint that jkv and transformers load.

    python scripts/train.py TEXT --out DIR

The last tenth of the text is held out. The run can be stopped at any moment, by Ctrl-C, by a
signal or by a power cut, and goes on from its last checkpoint when the same command is given
again, to the same weights bit for bit. DIR gets `config.json`, `model.safetensors`, the tokenizer
and a model card; `DIR/training` keeps the state of the run and may be deleted afterwards.

The defaults are those of the model that comes with jkv.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
import math
import os
import platform
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from jkv import Config, Decoder, Rope
from training import card, export, report, state
from training.corpus import Corpus, read_text

Array = jax.Array


@dataclasses.dataclass
class Run:
    """Where a run is: everything that its continuation depends on."""

    model: Decoder
    moments: Any  # of optax
    step: int = 0
    best: float = math.inf  # held-out nats per character
    best_step: int = 0
    seconds: float = 0.0

    def tree(self) -> dict[str, Any]:
        """What is stored as arrays."""
        return {"model": self.model, "moments": self.moments}

    def facts(self) -> dict[str, Any]:
        """What is stored beside them."""
        names = ("step", "best", "best_step", "seconds")
        return {name: getattr(self, name) for name in names}


class Parser(argparse.ArgumentParser):
    """Errors in one line."""

    def error(self, message: str) -> NoReturn:
        """Exit with code 2."""
        self.exit(2, f"train.py: {message}\n")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser("train.py", description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("text", type=Path, help="a file of UTF-8 text")
    add("--out", type=Path, help="directory for the model (default: runs/ and the text's name)")
    add("--steps", type=int, default=1000)
    add("--vocab-size", type=int, default=1024, help="tokens, 256 bytes and the end among them")
    add("--layers", type=int, default=5)
    add("--width", type=int, default=256)
    add("--heads", type=int, default=4)
    add("--kv-heads", type=int, default=2)
    add("--head-dim", type=int, default=64)
    add("--feed-forward", type=int, default=680)
    add("--batch-tokens", type=int, default=2048, help="predicted in each step")
    add("--context", type=int, default=128, help="tokens in a window at first")
    add("--long-context", type=int, default=512, help="and at the end; also the model's context")
    add("--long-from", type=float, default=0.7, help="share of the steps before the long windows")
    add("--learning-rate", type=float, default=1.5e-3, help="its peak")
    add("--warmup", type=int, default=100, help="steps of linear warm-up before the cosine")
    add("--weight-decay", type=float, default=0.1)
    add("--clip", type=float, default=1.0, help="largest norm of the gradient")
    add("--dropout", type=float, default=0.1, help="of the embedding and of each branch")
    add("--bpe-dropout", type=float, default=0.1, help="on half of the text, short windows only")
    add("--held-out", type=float, default=0.1, help="share of the text, from its end")
    add("--seed", type=int, default=0)
    add("--eval-every", type=int, default=250, help="steps between looks at the held-out text")
    add("--save-every", type=int, default=100, help="steps between checkpoints")
    args = parser.parse_args(argv)
    args.out = args.out or Path("runs") / args.text.stem
    return args


def check(args: argparse.Namespace) -> None:
    """Refuse what cannot be trained.

    Raises:
        ValueError: the first thing that is wrong.
    """
    positive = ("steps", "layers", "width", "heads", "kv_heads", "head_dim", "feed_forward")
    for name in (*positive, "batch_tokens", "context", "long_context", "eval_every", "save_every"):
        if getattr(args, name) < 1:
            raise ValueError(f"{_flag(name)} is {getattr(args, name)}; expected at least 1")
    for name in ("long_from", "dropout", "bpe_dropout", "held_out"):
        if not 0 <= getattr(args, name) <= 1 or (getattr(args, name) == 1 and name != "long_from"):
            raise ValueError(f"{_flag(name)} is {getattr(args, name)}; expected a share below 1")
    if args.vocab_size < 257:
        raise ValueError(
            f"--vocab-size is {args.vocab_size}; expected at least 257, the bytes and the end"
        )
    if not 0 <= args.warmup < args.steps:
        raise ValueError(
            f"--warmup is {args.warmup}; expected fewer steps than the {args.steps} of the run"
        )
    for name in ("context", "long_context"):
        if args.batch_tokens % getattr(args, name):
            raise ValueError(
                f"--batch-tokens is {args.batch_tokens}; expected a multiple of {_flag(name)}, "
                f"{getattr(args, name)}"
            )


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def read_corpus(args: argparse.Namespace) -> Corpus:
    """The text, cut into tokens.

    Raises:
        ValueError: too little of it.
    """
    text = read_text(args.text)
    # Every token costs at least a character, mostly more than two.
    least = math.ceil(4 * (max(args.context, args.long_context) + 2) / (1 - args.held_out))
    if len(text) < least or len(text) * args.held_out < 100:
        raise ValueError(
            f"{args.text} has {len(text)} characters; expected at least {least} for windows of "
            f"{max(args.context, args.long_context)} tokens, and 100 held out: take a longer text"
        )
    corpus = Corpus(
        text,
        vocab=args.vocab_size,
        held_out=args.held_out,
        dropout=args.bpe_dropout,
        seed=args.seed,
    )
    if len(corpus.plain) < max(args.context, args.long_context) + 2:
        raise ValueError(
            f"{args.text} makes {len(corpus.plain)} tokens; expected more than a window of "
            f"{max(args.context, args.long_context)}: take a longer text or a shorter context"
        )
    return corpus


def fresh_model(args: argparse.Namespace, vocab: int) -> Decoder:
    """A decoder with initial weights: normal, 0.02, branches that add to the stream narrower."""
    config = Config(
        family="llama",
        vocab=vocab,
        layers=args.layers,
        width=args.width,
        heads=args.heads,
        kv_heads=args.kv_heads,
        head_dim=args.head_dim,
        feed_forward=args.feed_forward,
        context=max(args.context, args.long_context),
        rope=Rope(theta=10000.0, dims=args.head_dim),
        tied=True,
        end_ids=(0,),
    )
    model = Decoder(config, rngs=nnx.Rngs(args.seed))
    key = jax.random.key(args.seed)
    named, structure = jax.tree_util.tree_flatten_with_path(model)

    def draw(i: int, name: str, leaf: Array) -> Array:
        if leaf.ndim == 1:
            return leaf
        narrow = ".attention.o." in name or ".mlp.down." in name
        scale = 0.02 / math.sqrt(2 * args.layers) if narrow else 0.02
        if not name.startswith(".embedding"):  # drawn as [inputs, outputs]
            return scale * jax.random.normal(jax.random.fold_in(key, i), leaf.shape[::-1]).T
        return scale * jax.random.normal(jax.random.fold_in(key, i), leaf.shape)

    leaves = [draw(i, jax.tree_util.keystr(path), leaf) for i, (path, leaf) in enumerate(named)]
    return jax.tree.unflatten(structure, leaves)


def losses(model: Decoder, tokens: Array, branch: Callable[..., Array] | None = None) -> Array:
    """Negative log-likelihood ``[B, T]`` of each token of ``[B, T + 1]`` but the first."""
    inputs = tokens[:, :-1]
    logits, _ = model(inputs) if branch is None else model(inputs, branch=branch)
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])


def make_optimizer(args: argparse.Namespace) -> optax.GradientTransformation:
    """AdamW under a cosine with warm-up; norms are not decayed."""
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, args.learning_rate, args.warmup, args.steps, 0.02 * args.learning_rate
    )
    return optax.chain(
        optax.clip_by_global_norm(args.clip),
        optax.adamw(
            schedule,
            b2=0.99,
            weight_decay=args.weight_decay,
            mask=lambda tree: jax.tree.map(lambda leaf: leaf.ndim > 1, tree),
        ),
    )


def make_step(optimizer: optax.GradientTransformation, dropout: float, seed: int) -> Callable:
    """``(model, moments, tokens [B, T + 1], number) -> (model, moments, loss)``, compiled."""
    level = round(dropout * 256)  # 8 random bits for each value are enough, and a quarter the cost

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(model: Decoder, moments: Any, tokens: Array, number: Array):
        key = jax.random.fold_in(jax.random.key(seed + 7), number)

        def branch(x: Array, i: int) -> Array:
            if level == 0:
                return x
            keep = jax.random.bits(jax.random.fold_in(key, i), x.shape, jnp.uint8) >= level
            return jnp.where(keep, x / (1 - level / 256), 0.0)

        def mean_loss(model: Decoder) -> Array:
            return losses(model, tokens, branch).mean()

        loss, gradient = jax.value_and_grad(mean_loss)(model)
        updates, moments = optimizer.update(gradient, moments, model)  # pyright: ignore[reportArgumentType]
        return optax.apply_updates(model, updates), moments, loss  # pyright: ignore[reportArgumentType]

    return step


_held_losses = jax.jit(losses)


def held_out_loss(model: Decoder, corpus: Corpus, length: int, rows: int) -> float:
    """Nats per character of the held-out text, in windows of `length` tokens."""
    windows, total = list(corpus.held_windows(length)), 0.0
    for start in range(0, len(windows), rows):
        part = windows[start : start + rows]
        tokens = np.zeros((rows, length + 1), np.int32)
        for row, (ids, _, _) in enumerate(part):
            tokens[row] = ids
        found = np.asarray(_held_losses(model, tokens), np.float64)
        total += sum(found[row, first:last].sum() for row, (_, first, last) in enumerate(part))
    return float(total / len(corpus.held))


def window(args: argparse.Namespace, step: int) -> tuple[int, bool]:
    """Length of the windows of a step, and whether they are the long ones."""
    long = step >= round(args.long_from * args.steps)
    return (args.long_context if long else args.context), long


def train(args: argparse.Namespace, run: Run, corpus: Corpus, facts: dict[str, Any]) -> int:
    """Run to the end or to a signal; 0 or the signal's number."""
    optimizer = make_optimizer(args)
    step = make_step(optimizer, args.dropout, args.seed)
    home = args.out / "training"

    def save() -> None:
        state.save_tree(home / "state.safetensors", run.tree(), {"run": facts, **run.facts()})

    began = time.monotonic() - run.seconds
    with state.Signals() as signals, report.reporter(args.steps, run.step) as tell:
        while run.step < args.steps and not signals.caught:
            length, long = window(args, run.step)
            rows = args.batch_tokens // length
            tokens = corpus.windows(run.step, rows, length, plain=long)
            run.model, run.moments, loss = step(run.model, run.moments, tokens, run.step)
            run.step += 1
            tell.step(run.step, float(loss), args.batch_tokens)
            last = run.step == args.steps
            if last or run.step % args.eval_every == 0:
                found = held_out_loss(run.model, corpus, length, rows)
                if found < run.best:
                    run.best, run.best_step = found, run.step
                    state.save_tree(home / "best.safetensors", run.model, {"step": run.step})
                tell.held_out(run.step, found)
            run.seconds = time.monotonic() - began
            if last or signals.caught or run.step % args.save_every == 0:
                save()
    return signals.caught if run.step < args.steps else 0


def resume(args: argparse.Namespace, run: Run, facts: dict[str, Any]) -> Run:
    """The run as its last checkpoint has it, or as given where there is none.

    Raises:
        ValueError: the checkpoint is of another run.
    """
    path = args.out / "training" / "state.safetensors"
    if not path.exists():
        return run
    seen = state.read_facts(path)
    other = state.differences(seen.pop("run"), facts)
    if other:
        raise ValueError(
            f"{path} is of another run ({other}); give the same values, or another --out"
        )
    tree = state.load_tree(path, run.tree())
    print(f"going on after step {seen['step']} of {path}", flush=True)
    return Run(**tree, **seen)


def finish(args: argparse.Namespace, run: Run, corpus: Corpus) -> None:
    """Write the best weights as a checkpoint, with a card that states the loss as stored."""
    best = state.load_tree(args.out / "training" / "best.safetensors", run.model)
    stored = jax.tree.map(lambda leaf: jnp.asarray(export.rounded(np.asarray(leaf))), best)
    stored = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), stored)
    context = best.config.context
    loss = held_out_loss(stored, corpus, context, max(1, args.batch_tokens // context))
    parameters = sum(leaf.size for leaf in jax.tree.leaves(best))
    text = corpus.training + corpus.held
    facts = vars(args) | {
        "name": args.out.name,
        "text": args.text.name,
        "characters": len(text),
        "sha256": hashlib.sha256(text.encode()).hexdigest(),
        "parameters": parameters,
        "vocab": corpus.vocab,
        "ratio": len(corpus.held) / (len(corpus.held_ids) - 1),
        "context": context,
        "megabytes": 2 * parameters / 1e6,
        "tokens": args.batch_tokens,
        "epochs": args.steps * args.batch_tokens / len(corpus.plain),
        "seconds": run.seconds,
        "hardware": f"{os.cpu_count()} CPU cores ({platform.machine()}), jax {jax.__version__}"
        if jax.default_backend() == "cpu"
        else f"{jax.devices()[0].device_kind}, jax {jax.__version__}",
        "command": " ".join(["python scripts/train.py", args.text.name, *args.given]),
        "best_step": run.best_step,
        "loss": loss,
    }
    size = export.write_directory(args.out, best, corpus.tokenizer, card.card(facts))
    print(f"{args.out}: {size:,} bytes, held-out loss {loss:.4f} nats per character", flush=True)


def main(argv: list[str] | None = None) -> int:
    """Train, or go on training; the exit code."""
    given = sys.argv[1:] if argv is None else argv
    args = parse(given)
    args.given = _settings(given)
    try:
        check(args)
        corpus = read_corpus(args)
        digest = hashlib.sha256((corpus.training + corpus.held).encode()).hexdigest()
        facts = {k: v for k, v in vars(args).items() if k not in ("out", "given", "save_every")}
        facts["text"] = digest
        model = fresh_model(args, corpus.vocab)
        run = resume(args, Run(model, make_optimizer(args).init(model)), facts)  # pyright: ignore[reportArgumentType]
        caught = train(args, run, corpus, facts)
        if caught:
            print(
                f"stopped by {signal.Signals(caught).name} after step {run.step} of {args.steps}; "
                "saved: the same command goes on from here",
                flush=True,
            )
            return 128 + caught
        finish(args, run, corpus)
    except (ValueError, OSError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2
    return 0


def _settings(argv: list[str]) -> list[str]:
    """The flags as given, without the paths: for the model card."""
    kept: list[str] = []
    skip = False
    for item in argv:
        if skip or item.startswith("--out="):
            skip = False
        elif item == "--out":
            skip = True
        elif item.startswith("--") or kept:
            kept.append(item)
    return kept


if __name__ == "__main__":
    sys.exit(main())
