"""jkv beside transformers in one process: fresh weights, and trained models."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jkv
from tests.compare import reference
from tests.models.cases import CASES, STORIES_PROMPTS

pytestmark = pytest.mark.compare
SEEDS = (101, 102)


@lru_cache
def _jitted():
    return jax.jit(lambda model, tokens: model(tokens)[0])


@pytest.mark.parametrize("name", CASES)
def test_logits_and_greedy_tokens(name, tmp_path):
    """One program for all seeds, and no cache: the weights are its arguments."""
    for seed in SEEDS:
        ours, theirs, prompts = _pair(name, seed, tmp_path)
        tokens = reference.greedy(theirs, prompts, 12)
        wanted = reference.logits(theirs, prompts)
        rows = jnp.asarray(np.concatenate([prompts, tokens[:, :-1]], axis=1), jnp.int32)
        logits = np.asarray(_jitted()(ours.model, rows))
        prompt = prompts.shape[1]
        error = np.abs(logits[:, :prompt] - wanted).max() / wanted.std()
        print(f"{name} seed {seed}: {error:.2e}")
        assert error <= 1e-4
        if not _close_call(theirs, prompts, tokens):
            np.testing.assert_array_equal(logits[:, prompt - 1 :].argmax(-1), tokens)


@pytest.mark.parametrize(
    "name", {case["model_type"]: name for name, case in CASES.items()}.values()
)
def test_generate(name, tmp_path):
    """One model of each family through the dense cache."""
    ours, theirs, prompts = _pair(name, 7, tmp_path)
    tokens = reference.greedy(theirs, prompts, 12)
    assert not _close_call(theirs, prompts, tokens)
    out = jkv.generate(ours.model, prompts.tolist(), max_new_tokens=12, stop=())
    np.testing.assert_array_equal(np.asarray(out.tokens), tokens)


def _pair(name, seed, tmp_path):
    """A random model in jkv and in transformers, and prompts."""
    path = tmp_path / str(seed)
    reference.save(reference.random_model(CASES[name], seed), path, CASES[name])
    theirs = reference.load(path)
    return jkv.load(path), theirs, reference.random_prompts(theirs, rows=3, length=16, seed=seed)


def _close_call(model, prompts, tokens) -> bool:
    """Whether some greedy token hangs on the last bits of its logit."""
    rows = np.concatenate([prompts, tokens], axis=1)
    logits = reference.logits(model, rows)[:, prompts.shape[1] - 1 :]
    best = np.sort(logits, axis=-1)
    return bool((best[..., -1] - best[..., -2]).min() < 1e-4 * logits.std())


def _same_texts(path: Path, prompts: list[str], new: int) -> None:
    ours, theirs = jkv.load(path), reference.load(path)
    tokenizer = reference.load_tokenizer(path)
    ids = ours.encode(prompts)
    assert ids == [tokenizer.encode(prompt) for prompt in prompts]
    out = jkv.generate(ours, prompts, max_new_tokens=new, stop=())
    for row, tokens in zip(ids, np.asarray(out.tokens), strict=True):
        wanted = reference.greedy(theirs, np.asarray([row]), new)[0]
        np.testing.assert_array_equal(tokens, wanted)
        assert ours.decode(wanted) == tokenizer.decode(
            wanted, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )


def test_stories(shared):
    path = shared / "models" / "stories260k"
    _same_texts(path, STORIES_PROMPTS, 100)


def test_the_built_in_model():
    path = Path(jkv.__file__).parent / "data" / "shakespeare"
    _same_texts(path, ["ROMEO:\n", "First Citizen:\nWe are", "KING HENRY", "\n"], 60)


@pytest.mark.parametrize("add", [True, False])
def test_chat_templates_are_written_the_same(add):
    """A template with what real ones use: loops, whitespace control, filters, namespaces."""
    from transformers.utils.chat_template_utils import render_jinja_template

    from jkv.models.template import render

    source = """{%- set ns = namespace(system='') -%}
{%- for m in messages if m.role == 'system' %}{% set ns.system = m.content %}{% endfor -%}
{{ bos_token }}{% if ns.system %}[{{ ns.system | trim }}]{% endif %}
{% for m in messages %}
    {% if m['role'] == 'user' %}
<u>{{ m['content'] | upper }}{{ eos_token }}
    {% elif m.role == 'assistant' %}
{% generation %}<a>{{ m.content }}{% endgeneration %} {{ m | tojson(indent=2) }}
    {% else %}
        {%- continue %}
    {% endif %}
{{ loop.index0 }}/{{ messages | length }}
{% endfor %}
{% if add_generation_prompt %}
<a>
{% endif %}
"""
    talk = [
        {"role": "system", "content": " Be brief. "},
        {"role": "user", "content": "Grüße <b>"},
        {"role": "assistant", "content": "Hé"},
    ]
    tokens = {"bos_token": "<s>", "eos_token": "</s>"}
    wanted, _ = render_jinja_template(
        conversations=[talk], chat_template=source, add_generation_prompt=add, **tokens
    )
    assert render(source, talk, add_generation_prompt=add, **tokens) == wanted[0]
