"""The command line, mostly in this process; a new one costs seconds."""

from __future__ import annotations

import io
import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

import jkv
from jkv.cache import spec
from jkv.cli import main, process
from jkv.decoding.generation import Generation
from tests.decoding import texts

ROOT = Path(__file__).resolve().parent.parent
KEYS = [
    "model",
    "cache",
    "dtype",
    "outputs",
    "prefill_seconds",
    "decode_seconds",
    "tokens_per_second",
    "cache_bytes",
    "compile_seconds",
    "attention",
]
GENERATE = ("generate", "--model")
NINE = ("--max-new-tokens", "9")
CUTS = ("--top-k", "2", "--top-p", "0.5", "--min-p", "0.9")  # the likeliest is in all of them


def write_checkpoint(directory: Path, template: str | None = texts.TEMPLATE) -> str:
    """A Llama of one layer with random weights and the byte-level tokenizer."""
    directory.mkdir()
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": texts.VOCAB,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "eos_token_id": texts.END,
    }
    (directory / "config.json").write_text(json.dumps(config))
    tokenizer = texts.byte_level(template)
    (directory / "tokenizer.json").write_text(tokenizer._tokenizer.to_str())
    settings = {} if template is None else {"chat_template": template}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    shapes = {
        "embed_tokens": (texts.VOCAB, 16),
        "norm": (16,),
        "layers.0.input_layernorm": (16,),
        "layers.0.post_attention_layernorm": (16,),
        "layers.0.self_attn.q_proj": (16, 16),
        "layers.0.self_attn.k_proj": (8, 16),
        "layers.0.self_attn.v_proj": (8, 16),
        "layers.0.self_attn.o_proj": (16, 16),
        "layers.0.mlp.gate_proj": (24, 16),
        "layers.0.mlp.up_proj": (24, 16),
        "layers.0.mlp.down_proj": (16, 24),
    }
    rng = np.random.default_rng(1)
    weights = {
        f"model.{name}.weight": rng.normal(size=shape).astype(np.float32)
        for name, shape in shapes.items()
    }
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    return str(directory)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_checkpoint(tmp_path_factory.mktemp("cli") / "tiny")


@pytest.fixture(scope="session")
def mute(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Without a chat template."""
    return write_checkpoint(tmp_path_factory.mktemp("cli") / "mute", template=None)


@pytest.fixture(scope="session")
def lm(tiny: str) -> jkv.LM:
    return jkv.load(tiny)


def reference(lm: jkv.LM, prompts: list[str], **asked: Any) -> Any:
    """What `jkv.generate` returns, with the programs that the command has compiled."""
    blocks = jkv.stream(lm, prompts, **asked)
    list(blocks)
    return blocks.result


@pytest.fixture
def run(capsys: Any, monkeypatch: Any) -> Any:
    """Runs the command: its status, standard output and standard error."""
    # What is said about programs on disk must not stay in this process.
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "unused")

    def run(*arguments: str) -> tuple[Any, str, str]:
        with pytest.raises(SystemExit) as exit:
            main(list(arguments))
        heard = capsys.readouterr()
        return exit.value.code, heard.out, heard.err

    return run


@pytest.fixture
def say(monkeypatch: Any) -> Any:
    """Sets what comes through the pipe."""
    return lambda text: monkeypatch.setattr(sys, "stdin", io.StringIO(text))


def test_help_and_version_do_not_wait_for_jax():
    code = (
        "import sys\n"
        "from jkv.cli import main\n"
        "for arguments in ([], ['--help'], ['generate', '--help'], ['--version']):\n"
        "    try: main(arguments)\n"
        "    except SystemExit as e: assert e.code == 0, arguments\n"
        "assert not {'jax', 'numpy', 'flax'} & set(sys.modules), 'heavy'\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
    for word in ("generate", "chat", "score", "info", "--max-new-tokens", f"jkv {jkv.__version__}"):
        assert word in done.stdout


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


BAD = [
    ([], "Missing option '--prompt'"),
    (["--prompt", "x", "--max-new-tokens", "0"], "max_new_tokens got 0"),
    (["--prompt", "x", "--max-new-tokens", "many"], "valid int"),
    (["--prompt", "x", "--max-new-tokens", "500"], "context of 128"),
    (["--prompt", ""], "prompt 0 is empty"),
    (["--prompt", "x", "--temperature", "nan"], "temperature got nan"),
    (["--prompt", "x", "--temperature", "-1"], "temperature got -1.0"),
    (["--prompt", "x", "--top-p", "0"], "top_p got 0.0"),
    (["--prompt", "x", "--top-k", "0"], "top_k got 0"),
    (["--prompt", "x", "--min-p", "2"], "min_p got 2.0"),
    (["--prompt", "x", "--repetition-penalty", "0"], "repetition_penalty got 0.0"),
    (["--prompt", "x", "--seed", "-1"], "'--seed'"),
    (["--prompt", "x", "--stop", ""], "empty string"),
    (["--prompt", "x", "--cache", "ring"], "cache got 'ring'; expected dense[:grow]; none; window"),
    (["--prompt", "x", "--cache", "dense:3"], "in it '3'; expected dense[:grow]"),
    (["--prompt", "x", "--dtype", "int4"], "float32, bfloat16, float16"),
    (["--prompt", "x", "--model", "/not/there"], "'/not/there'"),
    (["--prompt", "x", "--model", str(ROOT / "tests")], "config.json"),
    (["--prompt", "x", "--prompt", "y", "--stream"], "give one --prompt"),
    (["--prompt", "x", "--colour"], "No such option"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[m for _, m in BAD])
def test_an_error_is_one_line_and_status_2(run, tiny, arguments, message):
    status, out, err = run("generate", "--model", tiny, *arguments)
    assert (status, out) == (2, "")
    assert message in err
    assert err.startswith("jkv: ")
    assert err.count("\n") == 1


def test_an_unknown_command_is_an_error_too(run):
    status, out, err = run("genrate")
    assert (status, out) == (2, "")
    assert "No such command 'genrate'. Did you mean 'generate'? See 'jkv --help'." in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("error", [ValueError, TypeError, KeyError])
def test_a_bug_is_not_taken_for_an_error_of_the_users(monkeypatch, error):
    def broken(*_: object) -> None:
        raise error("a bug")

    monkeypatch.setattr(process, "load", broken)
    with pytest.raises(error, match="a bug"):
        main(["generate", "--prompt", "x"])


def test_ctrl_c_is_status_130(run, tiny, monkeypatch, say):
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Generation, "dispatch", interrupted)
    status, _, err = run("generate", "--model", tiny, "--prompt", "x")
    assert status == 130
    assert "Traceback" not in err
    say("hello\n")
    assert run("chat", "--model", tiny)[0] == 130


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
        "512.0 MiB",
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
        " ".join(lines[3].split()) == "cache bytes/token cache total max tokens max rows step FLOP"
    )
    assert lines[4].split()[:2] == ["dense", "1,048,576"]
    assert lines[5].split()[:2] == ["window:256", "0"]
    assert "any" in lines[5]
    assert len(lines) == 6


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
        (["--device-memory", "80"], None),
        (["--device-memory", "lots"], "device_memory got 'lots'"),
        (["--dtype", "int4"], "float32, bfloat16, float16"),
        (["--model", "/not/there"], "'/not/there'"),
        (["--model", "gpt2", "--cache", "window:8,sinks=4"], "no rotary positions"),
        (["--model", "gpt2", "--cache", "per_layer:none"], "per_layer got"),
    ],
)
def test_plan_says_what_is_wrong(run, arguments, message):
    status, out, err = run("plan", "--model", "gpt2", *arguments)
    if message is None:
        assert (status, err) == (0, "")
        return
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


def test_chat_from_a_pipe(run, tiny, lm, say):
    arguments = ["chat", "--model", tiny, "--system", "Hear.", "--max-new-tokens", "8"]
    say("he who\n\nwhy\n/reset\nhe who\n/quit\nnot any more\n")
    status, out, err = run(*arguments)
    chat = jkv.Chat(lm, system="Hear.", max_new_tokens=8)
    first, second = chat.send("he who"), chat.send("why")
    assert (status, err) == (0, "")
    assert out == f"{first}\n{second}\n{first}\n"


def test_chat_samples_with_the_seed(run, tiny, lm, say):
    heard = []
    for seed in ("3", "3", "4"):
        say("he who\nwhy\n")
        arguments = ["--max-new-tokens", "8", "--temperature", "2", "--seed", seed]
        heard.append(run("chat", "--model", tiny, *arguments)[1])
    assert heard[0] == heard[1] != heard[2]


def test_chat_with_a_full_context(run, tiny, say):
    many = "".join(f"{i}\n" for i in range(12))
    arguments = ["chat", "--model", tiny, "--max-new-tokens", "30"]
    say(many)
    assert run(*arguments)[0] == 0
    say(many)
    status, _, err = run(*arguments, "--on-full", "raise")
    assert status == 2
    assert "more than the context of 128" in err
    assert err.count("\n") == 1


def test_chat_on_a_terminal_survives_what_cannot_be_said(run, tiny, monkeypatch):
    lines = iter(["x" * 200, "he who"])

    def typed(prompt: str) -> str:
        assert prompt == "> "
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", typed)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    status, out, err = run("chat", "--model", tiny, "--max-new-tokens", "8")
    assert status == 0
    assert "shorten the text" in err
    assert out.count("\n") == 1


def test_chat_without_a_template(run, mute, say):
    say("hello\n")
    status, out, err = run("chat", "--model", mute)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "no chat template" in err
    assert run("generate", "--model", mute, "--prompt", "x", "--max-new-tokens", "2")[0] == 0


def test_bars_are_for_terminals(run, tiny, monkeypatch):
    arguments = ["generate", "--model", tiny, "--prompt", "x", "--max-new-tokens", "3"]
    assert "loading" not in run(*arguments)[2]
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    status, out, err = run(*arguments)
    assert status == 0
    assert "loading" in err
    assert "prefill" in err
    assert out.startswith("x")
    assert "loading" not in out


def test_compiled_programs_are_kept_for_the_next_process(tiny, tmp_path):
    code = (
        "import atexit, collections, sys, jax.monitoring\n"
        "from jkv.cli import main\n"
        "events = collections.Counter()\n"
        "jax.monitoring.register_event_listener(lambda name, **_: events.update([name]))\n"
        "names = ['/jax/compilation_cache/cache_' + x for x in ('hits', 'misses')]\n"
        "atexit.register(lambda: print(*(events[name] for name in names)))\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    clean = {k: v for k, v in os.environ.items() if not k.startswith("JAX_COMPILATION")}
    # Every program is kept, whatever time it took to compile on this machine.
    clean |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "XDG_CACHE_HOME": str(tmp_path)}
    command = [sys.executable, "-c", code, "generate", "--model", tiny, "--prompt", "x"]
    counts, outputs = [], []
    for _ in range(2):
        done = subprocess.run(
            [*command, "--max-new-tokens", "5", "--json"],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env=clean,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, "")
        report, events = done.stdout.splitlines()
        outputs.append(json.loads(report)["outputs"])
        counts.append(tuple(map(int, events.split())))
    (hits, compiled), again = counts
    assert (hits, compiled > 0) == (0, True)
    assert again == (compiled, 0)
    assert list((tmp_path / "jkv" / "programs").iterdir())
    assert outputs[0] == outputs[1]


@pytest.fixture
def kept() -> Any:
    """Where JAX keeps programs, put back at the end."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    yield lambda: jax.config.jax_compilation_cache_dir
    for name, value in before.items():
        jax.config.update(name, value)


def test_where_programs_are_kept(kept, monkeypatch, tmp_path):
    before = kept()
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")
    process.keep_programs()
    assert kept() == before, "the user has said no"

    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/no/such/place")
    process.keep_programs()
    assert kept() == before, "there is nowhere to write"

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    process.keep_programs()
    assert kept() == str(tmp_path / "jkv" / "programs")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    process.keep_programs()
    assert kept() == str(tmp_path / "jkv" / "programs"), "what is set stays"


def test_the_clock_counts_overlapping_spans_once():
    clock = process.Clock()
    clock._spans = [(2.0, 3.0), (1.0, 4.0), (6.0, 7.0), (9.0, 20.0)]
    assert clock.working(0.0, 10.0) == pytest.approx(1 + 2 + 2)
    assert clock.working(2.5, 3.5) == 0.0
    assert clock.working(4.0, 6.0) == 2.0


def test_a_real_model_from_the_command_line(run, shared):
    source = str(shared / "models" / "stories260k")
    arguments = ["--prompt", "Once upon a time", "--max-new-tokens", "12"]
    status, out, _ = run("generate", "--model", source, *arguments)
    assert status == 0
    assert out == "Once upon a time, there was a little girl named Lily. She\n"
