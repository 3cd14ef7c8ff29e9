"""How the commands' options, and the fields of requests, become a sampler."""

from __future__ import annotations

import json

import numpy as np
import pytest

from jkv import sampling
from jkv.cli import options, requests
from tests.cli.commands import reference

FIELDS = {
    "logit_bias": {"3": 2.5, "7": -100},
    "min_new_tokens": 4,
    "repetition_penalty": 1.1,
    "presence_penalty": 0.5,
    "frequency_penalty": -0.25,
    "no_repeat_ngram": 3,
    "top_k": 20,
    "top_p": 0.9,
    "min_p": 0.01,
}
FIRST = (
    sampling.logit_bias({3: 2.5, 7: -100}),
    sampling.min_new_tokens(4),
    sampling.repetition_penalty(1.1),
    sampling.presence_penalty(0.5),
    sampling.frequency_penalty(-0.25),
    sampling.no_repeat_ngram(3),
)
CUTS = (sampling.top_k(20), sampling.top_p(0.9), sampling.min_p(0.01))


@pytest.mark.parametrize("heat", [0, 0.7])
def test_fields_of_a_request_are_a_chain(tmp_path, heat):
    """What forbids and penalises first, what cuts after the temperature."""
    file = tmp_path / "asked.jsonl"
    file.write_text(json.dumps({"prompt": "x", "temperature": heat, **FIELDS}) + "\n")
    keywords = requests.Requests(file, 8).asked[1].keywords
    sampler = keywords["sampler"]
    want = [*FIRST, sampling.temperature(heat), *(CUTS if heat else ())]
    assert repr(sampler) == repr(sampling.chain(*want))
    np.testing.assert_array_equal(sampler.transforms[0].values, FIRST[0].values)
    assert (keywords["key"] is None) is (heat == 0)


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ({"logit_bias": {"a": 1}}, "expected token ids as names"),
        ({"logit_bias": 3}, "logit_bias got 3; expected a mapping"),
        ({"presence_penalty": "1"}, "presence_penalty got '1'"),
        ({"no_repeat_ngram": 0}, "no_repeat_ngram got 0"),
        ({"min_new_tokens": -1}, "min_new_tokens got -1"),
    ],
)
def test_bad_fields_of_a_request(tmp_path, field, message):
    file = tmp_path / "asked.jsonl"
    file.write_text(json.dumps({"prompt": "x", **field}) + "\n")
    assert message in requests.Requests(file, 8).bad[1]


def test_nothing_asked_is_no_sampler():
    assert options.drawing(0, 0, top_k=None, presence_penalty=None) == {
        "sampler": None,
        "key": None,
    }
    with pytest.raises(ValueError, match="top_p got 2"):
        options.drawing(0, 0, top_p=2)


@pytest.mark.slow
def test_options_of_generate(run, tiny, lm):
    out = run(
        *("generate", "he wo", "--model", tiny, "--max-new-tokens", "20", "--json"),
        *("--presence-penalty", "-0.5", "--frequency-penalty", "2", "--no-repeat-ngram", "2"),
        *("--min-new-tokens", "5"),
    )[1]
    sampler = sampling.chain(
        sampling.min_new_tokens(5),
        sampling.presence_penalty(-0.5),
        sampling.frequency_penalty(2),
        sampling.no_repeat_ngram(2),
        sampling.greedy(),
    )
    want = reference(lm, ["he wo"], max_new_tokens=20, sampler=sampler)
    tokens = want.tokens[0][: want.lengths[0]].tolist()
    assert json.loads(out)["outputs"][0]["tokens"] == tokens
    plain = reference(lm, ["he wo"], max_new_tokens=20)
    assert not np.array_equal(plain.tokens, want.tokens)
