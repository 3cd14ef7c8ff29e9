"""`jkv score`."""

from __future__ import annotations

import json

import pytest

import jkv


def test_score(run, tiny, lm):
    texts = ["he wo", "x", "why, " * 20]
    arguments = ["score", "--model", tiny, "--cache", "int8", *texts]
    scores = jkv.score(lm, texts, top_logprobs=2, cache="int8")
    status, out, err = run(*arguments, "--top-logprobs", "2", "--json")
    report = json.loads(out)
    assert (status, err) == (0, "")
    assert list(report) == ["model", "cache", "dtype", "outputs"]
    assert (report["model"], report["cache"], report["dtype"]) == (tiny, "int8", "float32")
    for row, output in enumerate(report["outputs"]):
        count = scores.lengths[row]
        assert output["text"] == texts[row]
        assert output["tokens"] == lm.encode(texts[row])[0]
        assert output["logprob"] == scores.totals[row]
        for name in ("logprobs", "top_tokens", "top_logprobs"):
            first, *others = output[name]
            assert first is None
            assert others == getattr(scores, name)[row, 1:count].tolist()
    assert report["outputs"][0]["perplexity"] == scores.perplexities[0]
    assert report["outputs"][1]["perplexity"] is None

    status, out, err = run(*arguments)
    assert (status, err) == (0, "")
    head, first, second, third = out.splitlines()
    assert head.split() == ["log-probability", "perplexity", "tokens", "text"]
    figures = [f"{scores.totals[0]:.4f}", f"{scores.perplexities[0]:.4g}", str(scores.lengths[0])]
    assert first.split() == [*figures, "he", "wo"]
    assert second.split() == ["0.0000", "-", "1", "x"]
    assert third.endswith(f"  {('why, ' * 20)[:57]}...")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Missing argument 'TEXT"),
        ([""], "prompt 0 is empty"),
        (["x", "--top-logprobs", "2"], "give --json too"),
        (["x", "--top-logprobs", "-1", "--json"], "top_logprobs got -1"),
        (["x", "--cache", "ring"], "cache got 'ring'"),
        (["x" * 200], "context of 128"),
    ],
)
def test_score_says_what_is_wrong(run, tiny, arguments, message):
    status, out, err = run("score", "--model", tiny, *arguments)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert message in err
