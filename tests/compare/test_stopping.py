"""Where rows end at stop strings, against transformers' criterion on any tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers.generation.stopping_criteria import StopStringCriteria

import jkv
from jkv.decoding.stopping import first_stop
from tests.compare import reference
from tests.decoding import texts

pytestmark = pytest.mark.compare

STRINGS = ["a", "ab", " a", "</s>", "b</s>", "€", "a€", "\n\n", "b a", "bc"]


def their_end(criterion: Any, prompt: list[int], tokens: list[int]) -> int | None:
    """How many tokens a row keeps: it is asked after each of them."""
    for n in range(1, len(tokens) + 1):
        ids = torch.tensor([[*prompt, *tokens[:n]]])
        if criterion(ids, None).item():
            return n
    return None


@pytest.mark.parametrize("string", STRINGS)
def test_rows_end_where_those_of_transformers_do(string):
    tokenizer = texts.sentencepiece()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer._tokenizer, bos_token="<s>", eos_token="</s>"
    )
    criterion = StopStringCriteria(fast, string)
    euro = [b + texts.BYTES for b in "€".encode()]
    newline = ord("\n") + texts.BYTES
    singles = [*tokenizer.encode_continuation("abc a"), *euro, newline, 1, 2, texts.SPACE]
    some = [*([token] for token in singles), euro, euro, [newline] * 2]
    rng = np.random.default_rng(0)
    ends = []
    for _ in range(40):
        row = [token for i in rng.integers(len(some), size=24) for token in some[i]]
        prompt, tokens = row[:4], row[4:]
        match = first_stop(tokenizer, [string], prompt, tokens, len(tokens))
        ends.append(None if match is None else match.kept)
        assert ends[-1] == their_end(criterion, prompt, tokens)
    assert len(set(ends)) > 1


def test_stories_end_where_those_of_transformers_do(shared):
    directory = shared / "models" / "stories260k"
    lm = jkv.load(directory)
    model, tokenizer = reference.load(directory), reference.load_tokenizer(directory)
    prompt = "Once upon a time"
    ids = tokenizer(prompt, return_tensors="pt")
    for string in (" little girl", "named", "y."):
        want = model.generate(
            **ids, max_new_tokens=40, do_sample=False, stop_strings=[string], tokenizer=tokenizer
        )
        out = jkv.generate(lm, prompt, max_new_tokens=40, stop=string)
        assert out.history[0].tolist() == want[0].tolist()
        assert out.finish_reasons == ("stop",)
        assert prompt + out.text == tokenizer.decode(want[0], skip_special_tokens=True)
