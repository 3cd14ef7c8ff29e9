"""`jkv plan`, `jkv info` and `jkv caches`: what a model and its cache take, and what there is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import jkv
from jkv.cache import spec


def test_plan_ignores_keys_too(run, tiny, tmp_path):
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(tiny) / name, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"mystery": 1}))
    for command in (["plan", "--cache", "dense"], ["plan", "--seq-len", "8"], ["caches"]):
        arguments = [*command, "--model", str(tmp_path)]
        status, out, err = run(*arguments)
        assert (status, out) == (2, "")
        assert "mystery" in err
        assert run(*arguments, "--ignore", "mystery")[0] in (None, 0)
    status, _, err = run("plan", "--model", "gpt2", "--ignore", "mystery")
    assert status == 2
    assert "plan got ignore=('mystery',) with 'gpt2'; expected it with a checkpoint" in err


def test_info(run, tiny, lm):
    status, out, err = run("info", tiny, "--json")
    facts = json.loads(out)
    assert (status, err) == (0, "")
    weights = 261 * 16 + 3 * 16 + 2 * 16 * 16 + 2 * 8 * 16 + 3 * 24 * 16
    assert facts["parameters"] == weights
    assert facts["weight_bytes"] == 4 * weights
    assert facts["cache_bytes_per_token"] == 2 * 1 * 2 * 4 * 4  # k and v, layers, heads, dim, bytes
    assert facts["family"] == "llama"
    assert facts["chat_template"] is True
    half = json.loads(run("info", tiny, "--json", "--dtype", "bfloat16")[1])
    assert half["cache_bytes_per_token"] == facts["cache_bytes_per_token"] / 2
    assert half["weight_bytes"] == facts["weight_bytes"] / 2
    status, out, err = run("info", tiny)
    assert (status, err) == (0, "")
    assert f"{weights:,}" in out
    assert f"runs                   {jkv.about()}\n" in out
    assert run("info") == (0, f"{jkv.about()}\n", "")
    status, out, err = run("info", "/not/there")
    assert (status, out, err.count("\n")) == (2, "", 1)


def test_info_and_plan_read_no_weights(run, tiny, tmp_path):
    whole = run("info", tiny, "--json")[1]
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((Path(tiny) / name).read_bytes())
    status, out, err = run("info", str(tmp_path), "--json")
    assert (status, err) == (0, "")
    assert json.loads(out) == json.loads(whole) | {"model": str(tmp_path)}
    (tmp_path / "tokenizer.json").unlink()
    assert run("plan", "--model", str(tmp_path), "--cache", "dense")[0] == 0
    (tmp_path / "config.json").write_text("{}")
    for command in (["info", str(tmp_path)], ["plan", "--model", str(tmp_path)]):
        status, out, err = run(*command)
        assert (status, out, err.count("\n")) == (2, "", 1)
        assert "model_type" in err


LLAMA = ("plan", "--model", "llama-2-7b")


def test_plan_of_one_kind(run):
    arguments = [*LLAMA, "--seq-len", "1024", "--cache", "dense", "--device-memory", "80GB"]
    status, out, err = run(*arguments, "--json")
    assert (status, err) == (0, "")
    values = json.loads(out)
    assert values == jkv.plan("llama-2-7b", seq_len=1024, device_memory="80GB").to_dict()
    assert values["bytes_per_token"] == 524288
    status, out, err = run(*arguments)
    assert (status, err) == (0, "")
    for said in (
        "6,738,415,616 parameters in float16",
        "524,288 per token",
        "536.9 MB",
        f"{values['total_bytes']:,}",
        f"fits; at most {values['max_seq_len']:,} tokens",
        "feed-forward, FLOP",
        "between blocks [B, T, D]",
        "1,024 x",
    ):
        assert said in out
    assert "does not fit" in run(*arguments, "--device-memory", "8GB")[1]


def test_plan_of_several_kinds_is_a_table(run):
    arguments = [*LLAMA, "--batch", "4", "--dtype", "float32"]
    specs = ["--cache", "dense", "--cache", "window:256"]
    plans = json.loads(run(*arguments, *specs, "--json")[1])["plans"]
    wanted = jkv.plan("llama-2-7b", batch=4, dtype="float32", cache=["dense", "window:256"])
    assert plans == [plan.to_dict() for plan in wanted]
    status, out, err = run(*arguments, *specs, "--device-memory", "80GB")
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert "4 rows of 4,096 tokens" in lines[1]
    assert (
        " ".join(lines[3].split())
        == "cache bytes/token cache total fits max tokens max rows step FLOP"
    )
    assert lines[4].split()[:2] == ["dense", "1,048,576"]
    assert lines[5].split()[:2] == ["window:256", "0"]
    assert "any" in lines[5]
    assert len(lines) == 6


@pytest.mark.parametrize(("unit", "other"), [("GB", "GiB"), ("GiB", "GB")])
def test_a_table_has_one_unit_and_says_what_fits(run, unit, other):
    arguments = ["plan", "--model", "llama-3-8b", "--seq-len", "98304", "--cache", "dense"]
    memory = ["--device-memory", f"24{unit}"]
    status, out, err = run(*arguments, "--cache", "window:256", *memory)
    assert (status, err) == (0, "")
    assert f", of 24.0 {unit}\n" in out
    assert f" {other}" not in out
    lines = out.splitlines()
    assert lines[2] == (
        "past the context: rows of 98,304 tokens, of a model that was made for 8,192 tokens"
    )
    assert [lines[i].split()[6] for i in (5, 6)] == ["no", "yes"]
    out = run(*arguments, *memory)[1]
    assert lines[2] in out
    assert f" {other}" not in out


@pytest.mark.parametrize("written", ["32k", "32K", "32768"])
def test_lengths_as_people_write_them(run, tiny, written):
    plan = ["plan", "--model", "llama-3-8b", "--cache", "dense"]
    status, out, err = run(*plan, "--json", "--seq-len", written)
    assert (status, err) == (0, "")
    assert json.loads(out)["seq_len"] == 32768
    listed = json.loads(run("caches", "--model", tiny, "--seq-len", written, "--json")[1])
    assert listed["caches"][0]["seq_len"] == 32768


def test_plan_of_all_kinds(run):
    listed = json.loads(run("plan", "--model", "gpt2", "--json")[1])["plans"]
    assert [entry["cache"] for entry in listed] == spec.examples()
    status, out, err = run("plan", "--model", "gpt2")
    assert (status, err) == (0, "")
    lines = {line.split()[0]: line for line in out.splitlines()[4:]}
    assert list(lines) == spec.examples()
    assert "no: window(sinks=4" in lines["window:1020,sinks=4"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cache", "ring"], "expected dense[:grow]; none; window"),
        (["--cache", "dense", "--cache", "int4:bits=3"], "in it 'bits=3'; expected int4[:residual"),
        (["--batch", "0"], "batch=0"),
        (["--seq-len", "-3"], "seq_len=-3"),
        (["--seq-len", "32q"], "--seq-len got '32q'; expected a number of tokens, such as 8192"),
        (["--device-memory", "80"], "80 bytes; expected at least 1,000,000: write 80GB"),
        (["--device-memory", "lots"], "device_memory got 'lots'"),
        (["--dtype", "int4"], "float32, bfloat16, float16"),
        (["--model", "/not/there"], "'/not/there'"),
        (["--model", "gpt2", "--cache", "window:8,sinks=4"], "no rotary positions"),
        (["--model", "gpt2", "--cache", "per_layer:none"], "per_layer got"),
    ],
)
def test_plan_says_what_is_wrong(run, arguments, message):
    status, out, err = run("plan", "--model", "gpt2", *arguments)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert message in err


def test_caches_lists_every_kind(run, tiny):
    status, out, err = run("caches")
    assert (status, err) == (0, "")
    for name, form in spec.FORMS.items():
        assert f"{spec.usage(name)}\n    {form.says}\n" in out
    assert "llama-3.1-8b" in out
    assert "131,072" in out
    listed = json.loads(run("caches", "--model", tiny, "--seq-len", "100", "--json")[1])["caches"]
    assert [entry["cache"] for entry in listed] == spec.examples()
    dense = listed[0]
    assert dense == {
        "cache": "dense",
        "usage": "dense[:grow]",
        "description": spec.FORMS["dense"].says,
        "model": tiny,
        "seq_len": 100,
        "bytes_per_token": 2 * 2 * 4 * 4,
        "cache_bytes": 100 * 2 * 2 * 4 * 4 + 5,
    }


@pytest.mark.parametrize("text", ["window:60", "evict:60,score=tova", "near_far:recent=20,far=fp8"])
def test_specs_reach_the_model(run, tiny, text):
    """The same text as long as nothing has been let go of or rounded."""
    arguments = [
        "generate",
        "--model",
        tiny,
        "--prompt",
        "he wo",
        "--max-new-tokens",
        "3",
        "--json",
    ]
    plain, other = (json.loads(run(*arguments, "--cache", t)[1]) for t in ("dense", text))
    assert other["cache"] == text
    assert other["cache_bytes"] != plain["cache_bytes"]
    assert other["outputs"] == plain["outputs"]
