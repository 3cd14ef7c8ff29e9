"""Who is compared: the same checkpoint, run by jkv and by transformers."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import time
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from safetensors.numpy import save_file

import jkv


@dataclasses.dataclass(frozen=True)
class Shape:
    """GPT-2's sizes; the defaults are those of its smallest checkpoint, 124M parameters."""

    vocab: int = 50257
    layers: int = 12
    width: int = 768
    heads: int = 12
    context: int = 1024

    @property
    def weights_read(self) -> int:
        """Bytes of float32 weights that one step reads: all but the tables of which it takes rows.

        The embedding counts: it is the output projection too.
        """
        block = 12 * self.width**2 + 13 * self.width
        return 4 * (self.layers * block + 2 * self.width + self.vocab * self.width)

    def cache_read(self, tokens: float, rows: int = 1) -> float:
        """Bytes of float32 keys and values of that many tokens in each row."""
        return 4 * 2 * self.layers * self.width * tokens * rows


TINY = Shape(vocab=97, layers=2, width=32, heads=4, context=1024)


@dataclasses.dataclass(frozen=True)
class Trace:
    """One generation: what was said, and when."""

    tokens: np.ndarray  # [B, T]
    said: np.ndarray  # [M], tokens per row at each moment
    seconds: np.ndarray  # [M], since the call

    @property
    def first(self) -> float:
        """Seconds to the first token."""
        return float(self.seconds[0])

    @property
    def total(self) -> float:
        """Seconds to the last."""
        return float(self.seconds[-1])

    @property
    def step(self) -> float:
        """Seconds per token after the first."""
        return float((self.total - self.first) / (self.said[-1] - self.said[0]))


class Runner(Protocol):
    """Something that generates greedily."""

    name: str

    def __call__(self, prompts: np.ndarray, new: int, slots: int | None = None) -> Trace:
        """Continue ``[B, T]`` ids by exactly `new` tokens."""
        ...


class Jkv:
    """`jkv.stream` with one kind of cache."""

    def __init__(self, name: str, lm: jkv.LM, kind: Any):
        self.name, self.model, self.kind = name, lm.model, kind

    def __call__(self, prompts: np.ndarray, new: int, slots: int | None = None) -> Trace:
        """Continue by `new` tokens; a block counts when it has been read."""
        start = time.perf_counter()
        blocks = jkv.stream(
            self.model,
            prompts,
            max_new_tokens=new,
            block=32,
            cache=self.kind,
            stop=(),
            slots=slots,
        )
        pieces, seconds = [], []
        for block in blocks:
            pieces.append(block.tokens)
            seconds.append(time.perf_counter() - start)
        said = np.cumsum([piece.shape[1] for piece in pieces])
        return Trace(np.concatenate(pieces, axis=1), said, np.asarray(seconds))


class Transformers:
    """`model.generate` of transformers, with what it takes to choose a cache."""

    def __init__(self, name: str, model: Any, **how: Any):
        self.name, self.model, self.how = name, model, how

    def __call__(self, prompts: np.ndarray, new: int, slots: int | None = None) -> Trace:
        """Continue by `new` tokens; each counts when `generate` has it."""
        import torch

        del slots
        seconds: list[float] = []
        length = prompts.shape[1]

        def watch(ids: Any, scores: Any, **_: Any) -> Any:
            if ids.is_cuda:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
            return torch.zeros(ids.shape[0], dtype=torch.bool, device=ids.device)

        ids = torch.from_numpy(prompts.astype(np.int64)).to(self.model.device)
        start = time.perf_counter()
        out = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            stopping_criteria=[watch],
            **self.how,
        )
        said = np.arange(1, len(seconds) + 1)
        return Trace(out[:, length:].cpu().numpy(), said, np.asarray(seconds))


def have_transformers() -> bool:
    """Whether torch and transformers are there."""
    return all(importlib.util.find_spec(name) for name in ("torch", "transformers"))


def open_transformers(directory: Path) -> Any:
    """The checkpoint as transformers loads it, where jkv computes and on all cores."""
    import torch
    import transformers

    from bench.machine import cores

    torch.set_num_threads(cores())
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model = transformers.GPT2LMHeadModel.from_pretrained(directory, dtype=torch.float32)
    gpu = jax.default_backend() == "gpu" and torch.cuda.is_available()
    return model.eval().to("cuda" if gpu else "cpu")


def write_checkpoint(directory: Path, shape: Shape, seed: int = 0) -> None:
    """A GPT-2 checkpoint with random weights, drawn as GPT-2's were before training."""
    directory.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "activation_function": "gelu_new",
        "n_positions": shape.context,
        "n_embd": shape.width,
        "n_head": shape.heads,
        "n_layer": shape.layers,
        "vocab_size": shape.vocab,
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": True,
        "bos_token_id": shape.vocab - 1,
        "eos_token_id": shape.vocab - 1,
    }
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    random = np.random.default_rng(seed)
    tensors = {}
    for name, size in _tensors(shape).items():
        if len(size) == 2:
            tensors[name] = random.standard_normal(size, np.float32) * np.float32(0.02)
        else:
            scale = name.endswith("weight")
            tensors[name] = np.full(size, 1 if scale else 0, np.float32)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def _tensors(shape: Shape) -> dict[str, tuple[int, ...]]:
    width = shape.width
    sizes: dict[str, tuple[int, ...]] = {
        "transformer.wte.weight": (shape.vocab, width),
        "transformer.wpe.weight": (shape.context, width),
        "transformer.ln_f.weight": (width,),
        "transformer.ln_f.bias": (width,),
    }
    maps = {
        "attn.c_attn": (width, 3 * width),
        "attn.c_proj": (width, width),
        "mlp.c_fc": (width, 4 * width),
        "mlp.c_proj": (4 * width, width),
    }
    for i in range(shape.layers):
        for name, size in maps.items():
            sizes[f"transformer.h.{i}.{name}.weight"] = size
            sizes[f"transformer.h.{i}.{name}.bias"] = size[1:]
        for name in ("ln_1", "ln_2"):
            sizes[f"transformer.h.{i}.{name}.weight"] = (width,)
            sizes[f"transformer.h.{i}.{name}.bias"] = (width,)
    return sizes
