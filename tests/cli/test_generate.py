"""`jkv generate`, mostly in this process; a new one costs seconds."""

from __future__ import annotations

import itertools
import json
import shutil

import jax
import pytest

import jkv
from tests.cli.commands import CUTS, GENERATE, KEYS, NINE, reference


def test_the_text_goes_to_standard_output_and_the_figures_do_not(run, tiny, lm):
    status, out, err = run(*GENERATE, tiny, "--prompt", "he wo", *NINE)
    want = reference(lm, ["he wo"], max_new_tokens=9)
    assert status == 0
    assert out == f"he wo{lm.decode(want.tokens[0])}\n"
    assert len(err.splitlines()) == 1
    assert "cache dense" in err


def test_json_is_one_object_and_all_there_is(run, tiny, lm):
    prompts = ["he wo", "x"]
    arguments = ["--prompt", "he wo", "--prompt", "x", *NINE]
    status, out, err = run("generate", "--model", tiny, *arguments, "--json")
    report = json.loads(out)
    assert (status, err) == (0, "")
    assert out.count("\n") == 1
    assert list(report) == KEYS
    assert (report["model"], report["cache"], report["dtype"]) == (tiny, "dense", "float32")
    want = jkv.generate(lm, prompts, max_new_tokens=9)
    for i, output in enumerate(report["outputs"]):
        tokens = want.tokens[i][: want.lengths[i]].tolist()
        assert output == {
            "prompt": prompts[i],
            "prompt_tokens": lm.encode(prompts[i])[0],
            "tokens": tokens,
            "text": lm.decode(tokens),
            "finish_reason": want.finish_reasons[i],
        }
    assert report["cache_bytes"] == want.cache.nbytes
    said = int(want.lengths.sum()) - 2
    assert report["tokens_per_second"] == pytest.approx(said / report["decode_seconds"])
    assert report["prefill_seconds"] > 0
    assert report["compile_seconds"] > 0
    assert report["attention"] == "xla"


def test_json_has_standard_output_for_itself(run, tiny):
    arguments = ["--model", tiny, "--prompt", "x", "--max-new-tokens", "5", "--json"]
    plain = json.loads(run("generate", *arguments)[1])["outputs"]
    for flag in ("--show-steps", "--stream"):
        _, out, err = run("generate", *arguments, flag)
        assert json.loads(out)["outputs"] == plain
        assert err.startswith("step 1: x" if flag == "--show-steps" else "x")


def test_one_token_has_no_speed(run, tiny):
    _, out, _ = run("generate", "--model", tiny, "--prompt", "x", "--max-new-tokens", "1", "--json")
    report = json.loads(out)
    assert report["tokens_per_second"] is None
    assert len(report["outputs"][0]["tokens"]) == 1


def test_every_kind_of_cache_says_the_same(run, tiny):
    reports = {}
    for kind in ("dense", "none"):
        arguments = ["--prompt", "he wo", "--prompt", "x", *NINE]
        _, out, _ = run("generate", "--model", tiny, *arguments, "--cache", kind, "--json")
        reports[kind] = json.loads(out)
        assert reports[kind]["cache"] == kind
    assert reports["dense"]["outputs"] == reports["none"]["outputs"]
    assert reports["dense"]["cache_bytes"] > reports["none"]["cache_bytes"]


def test_dtype(run, tiny):
    arguments = ["generate", "--model", tiny, "--prompt", "x", "--max-new-tokens", "3", "--json"]
    plain, half = (json.loads(run(*arguments, *more)[1]) for more in ([], ["--dtype", "bfloat16"]))
    assert half["dtype"] == "bfloat16"
    assert half["cache_bytes"] < 0.6 * plain["cache_bytes"]


def test_ignore(run, tiny, tmp_path):
    """The message names the key, and the option takes it."""
    model = tmp_path / "model"
    shutil.copytree(tiny, model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"mystery": 1}))
    status, _, error = run("info", str(model))
    assert status == 2
    assert "mystery" in error
    for command in (["info", str(model)], ["generate", "--model", str(model), "--prompt", "x"]):
        assert run(*command, "--ignore", "mystery")[0] in (None, 0)


def test_sampling_options_are_a_chain(run, tiny, lm):
    options = {
        "--temperature": "1.5",
        "--top-k": "40",
        "--top-p": "0.9",
        "--min-p": "0.01",
        "--repetition-penalty": "1.2",
    }
    arguments = [
        "generate",
        "--model",
        tiny,
        "--prompt",
        "he wo",
        "--max-new-tokens",
        "9",
        "--json",
    ]
    for name, value in options.items():
        arguments += [name, value]
    said = [
        json.loads(run(*arguments, "--seed", seed)[1])["outputs"][0]["tokens"]
        for seed in ("3", "3", "4")
    ]
    sampling = jkv.sampling
    chain = sampling.chain(
        sampling.repetition_penalty(1.2),
        sampling.temperature(1.5),
        sampling.top_k(40),
        sampling.top_p(0.9),
        sampling.min_p(0.01),
    )
    want = reference(lm, ["he wo"], max_new_tokens=9, sampler=chain, key=jax.random.key(3))
    assert said[0] == want.tokens[0][: want.lengths[0]].tolist()
    assert said[0] == said[1] != said[2]


def test_a_penalty_counts_without_a_temperature(run, tiny, lm):
    arguments = ["generate", "--model", tiny, "--prompt", "hello", *NINE, "--json"]
    plain, penalised, unlikely = (
        json.loads(run(*arguments, *more)[1])["outputs"][0]["tokens"]
        for more in ([], ["--repetition-penalty", "1.9"], ["--repetition-penalty", "1.9", *CUTS])
    )
    sampler = jkv.sampling.chain(jkv.sampling.repetition_penalty(1.9), jkv.sampling.greedy())
    want = reference(lm, ["hello"], max_new_tokens=9, sampler=sampler)
    assert penalised == unlikely == want.tokens[0][: want.lengths[0]].tolist()
    assert penalised != plain, "this prompt shows nothing"


def test_stop_texts(run, tiny, lm):
    text = lm.decode(reference(lm, ["he wo"], max_new_tokens=9).tokens[0])
    stop = text[1:4]
    arguments = [
        "generate",
        "--model",
        tiny,
        "--prompt",
        "he wo",
        "--max-new-tokens",
        "9",
        "--json",
    ]
    out = run(*arguments, "--stop", "not there", "--stop", stop)[1]
    output = json.loads(out)["outputs"][0]
    assert output["finish_reason"] == "stop"
    assert stop in output["text"]
    assert text.startswith(output["text"])
    assert len(output["text"]) < len(text)
    assert json.loads(run(*arguments, "--stop", "not there")[1])["outputs"][0]["text"] == text


def test_show_steps_prints_the_text_after_each_token(run, tiny):
    arguments = [*GENERATE, tiny, "--prompt", "he wo", *NINE]
    whole = run(*arguments)[1].rstrip("\n")
    _, out, _ = run(*arguments, "--show-steps")
    lines = out.removesuffix("\n").split("\n")
    assert [line.split(":")[0] for line in lines] == [f"step {i}" for i in range(1, 10)]
    shown = [line.split(": ", 1)[1] for line in lines]
    assert all(b.startswith(a) for a, b in itertools.pairwise(shown))
    assert shown[-1] == whole.replace("\n", "\\n")
    out = run(*arguments, "--prompt", "x", "--show-steps")[1]
    assert out.startswith("step 1 [1]: he wo")
    assert "\nstep 1 [2]: x" in out


def test_stream_says_the_same(run, tiny):
    arguments = [*GENERATE, tiny, "--prompt", "he wo", *NINE]
    assert run(*arguments, "--stream")[1] == run(*arguments)[1]


def test_a_real_model_from_the_command_line(run, shared):
    source = str(shared / "models" / "stories260k")
    arguments = ["--prompt", "Once upon a time", "--max-new-tokens", "12"]
    status, out, _ = run("generate", "--model", source, *arguments)
    assert status == 0
    assert out == "Once upon a time, there was a little girl named Lily. She\n"
