"""The model card that a run writes beside its weights: what was done, and what came of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_CARD = """\
---
library_name: jkv
pipeline_tag: text-generation
---

# {name}

A Llama-style decoder of {parameters:,} parameters, trained from nothing on one text.

| | |
| --- | --- |
| data | `{text}`, {characters:,} characters, sha256 `{sha256}`; the last {held_out:.0%} held out |
| tokenizer | byte-level BPE of the training part, {vocab} tokens, {ratio:.2f} characters each |
| architecture | {layers} layers, width {width}, {heads} query and {kv_heads} key/value heads of \
{head_dim}, SwiGLU of {feed_forward}, RMSNorm, RoPE (theta 10000), tied embeddings |
| context | {context} tokens |
| weights | bfloat16 on disk, to be read as float32; {megabytes:.2f} MB |
| training | {steps} steps of {tokens} tokens ({epochs:.1f} times the text), AdamW, \
{seconds:.0f} s on {hardware} |
| command | `{command}` |
| **held-out loss** | **{loss:.4f} nats per character** |

The loss is the sum of the negative log-likelihoods of the held-out tokens, cut without dropout and
with `<|endoftext|>` in front, divided by the number of held-out characters. Windows of {context}
tokens overlap by half, so that each token is predicted once, from at least {half} tokens before
it where there are as many. The weights are the stored, rounded ones. {chosen}

The model knows this text and nothing else: no facts, no instructions, no other language. It never
saw a token at a position past {last}, and it never ends a text by itself. The chat template
writes a conversation as a play between CITIZEN (the user) and ROMEO (the model).
"""


def card(facts: Mapping[str, Any]) -> str:
    """The card of a finished run.

    Args:
        facts: all names in the text above, except those that follow from others.
    """
    best = facts["best_step"]
    chosen = (
        "They are those of the last step."
        if best == facts["steps"]
        else f"They are those of step {best}, the best on the held-out text when it was looked at "
        "between steps."
    )
    context = facts["context"]
    return _CARD.format(**facts, chosen=chosen, half=context // 2, last=context - 1)
