"""What type checkers see of jkv: as much as the interpreter does."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import jkv.cache.convert
import jkv.cache.evict  # noqa: F401 imported on first use
from tests import typecheck

ROOT = Path(__file__).resolve().parent.parent
LAZY = ["jkv", "jkv.engine", "jkv.store"]  # packages whose names resolve on first use

# What a user writes, with what pyright is to say of each line; of the others it says nothing.
SCRIPT = """
import jax
import numpy as np

import jkv

lm = jkv.load("shakespeare", dtype="bfloat16")
reveal_type(lm)  # is LM
out = jkv.generate(lm, ["ROMEO:", [1, 2]], max_new_tokens=16)
reveal_type(jkv.generate(lm, "ROMEO:", max_new_tokens=16))  # is Result
reveal_type(out.tokens)  # is ndarray[tuple[Any, ...], dtype[Any]]
reveal_type(out.text)  # is str
stream = jkv.stream(lm, "ROMEO:", max_new_tokens=16)
reveal_type(stream)  # is Stream
for block in stream:
    reveal_type(block.tokens)  # is ndarray[tuple[Any, ...], dtype[Any]]
reveal_type(jkv.beam_search(lm, np.zeros((1, 2), int), max_new_tokens=4))  # is Beams
reveal_type(jkv.score(lm, ["ROMEO:"]))  # is Scores
reveal_type(jkv.plan("llama-2-7b", seq_len=4096))  # is Plan
reveal_type(jkv.plan(lm, cache=["dense", "int4"]))  # is list[Plan]
chat = jkv.Chat(lm, system="Be brief.", on_full="drop")
reveal_type(chat.send("Hello"))  # is str
engine = jkv.Engine(lm, pages=16, cache="paged:16,int8")
reveal_type(engine)  # is Engine
reveal_type(engine.submit([1, 2], max_new_tokens=4))  # is Request
reveal_type(engine.submit("ROMEO:", max_new_tokens=4, samples=2))  # is list[Request]
reveal_type(engine.generate(["ROMEO:"], max_new_tokens=4))  # is list[Request]
reveal_type(jkv.shard(lm, jax.make_mesh((2,), ("heads",))))  # is LM
reveal_type(jkv.shard(lm.model, jax.make_mesh((2,), ("heads",))))  # is Decoder
logits, cache = jkv.prefill(lm.model, np.zeros((1, 2), int), out.cache)
reveal_type(logits)  # is Array
reveal_type(cache)  # is Cache
reveal_type(jkv.rollout(lm.model, logits, cache, steps=4))  # is Rollout
reveal_type(jkv.engine.PagePool)  # is type[PagePool]
cache = jkv.init_cache(lm.config, "int4", batch=1, slots=8)
reveal_type(cache)  # is Cache
reveal_type(cache.crop(4).take([0]).fork(2).convert(jkv.dense()))  # is Cache
reveal_type(cache.layers[0])  # is LayerCache
reveal_type(jkv.per_layer(["int4", jkv.window(4)]))  # is ListedKind | EndsKind
reveal_type(jkv.plan("llama-2-7b", cache="int4"))  # is Plan
reveal_type(jkv.plan(lm, cache=["int4", jkv.dense()]))  # is list[Plan]
store = jkv.store.Store([jkv.store.Memory(1 << 20)], jkv.store.LRU())
reveal_type(store)  # is Store


def twice(logits: jax.Array) -> jax.Array:
    return logits * 2


def last(history: jax.Array, lengths: jax.Array) -> jax.Array:
    return history[:, -1:]


rows: list[list[int]] = [[1, 2], [3]]
key = jax.random.key(0)
sampler = jkv.sampling.chain(jkv.sampling.temperature(0.8), jkv.sampling.top_k(4))
jkv.generate(lm, rows, max_new_tokens=1, sampler=sampler, key=key, draft=jkv.prompt_lookup())
jkv.generate(lm, rows, max_new_tokens=1, sampler=twice, draft=last, resume=out)
jkv.generate(lm, rows, max_new_tokens=1, store=store, sequence_ids=["a", "b"])
jkv.generate(lm.model, np.zeros((2, 2), int), max_new_tokens=1, stop=[[1], ["a", 2]])
jkv.generate(lm, [[1], np.zeros(2, int), jax.numpy.ones(3, int)], max_new_tokens=1, stop="a")
for kind in (jkv.dense(), jkv.none(), jkv.window(4), jkv.quantized(4), jkv.evicting(8), "int4"):
    jkv.generate(lm, rows, max_new_tokens=1, cache=kind)
chat.send({"role": "tool", "content": "22"})
jkv.Chat(lm, tools=[twice, {"type": "function"}], enable_thinking=False)

jkv.genrate(lm, "ROMEO:", max_new_tokens=16)  # error reportAttributeAccessIssue
jkv.engine.Enigne  # error reportAttributeAccessIssue
jkv.store.Stoer  # error reportAttributeAccessIssue
out.token  # error reportAttributeAccessIssue
jkv.generate(lm, "ROMEO:", max_new_token=16)  # error reportCallIssue
jkv.generate(lm, "ROMEO:", max_new_tokens="abc")  # error reportArgumentType
jkv.generate(lm, [1, 2], max_new_tokens=16)  # error reportArgumentType
jkv.generate(lm, rows, max_new_tokens=1, cache=4)  # error reportArgumentType
jkv.generate(lm, rows, max_new_tokens=1, sampler=0.8)  # error reportArgumentType
jkv.generate(lm, rows, max_new_tokens=1, key=0)  # error reportArgumentType
jkv.generate(lm, rows, max_new_tokens=1, stop=1.5)  # error reportArgumentType
jkv.generate(lm, rows, max_new_tokens=1, resume="a")  # error reportArgumentType
jkv.generate(lm, rows, max_new_tokens=1, store="caches")  # error reportArgumentType
jkv.generate("shakespeare", rows, max_new_tokens=1)  # error reportArgumentType
jkv.stream(lm, "ROMEO:", max_new_tokens=16, block="a")  # error reportArgumentType
jkv.beam_search(lm, "ROMEO:", max_new_tokens=16, beams="a")  # error reportArgumentType
jkv.score(lm, "ROMEO:", top_logprobs="a")  # error reportArgumentType
jkv.plan(4)  # error reportArgumentType
jkv.load("shakespeare", dtype=16)  # error reportArgumentType
jkv.shard("shakespeare", key)  # error reportArgumentType
jkv.Chat(lm, on_full="never")  # error reportArgumentType
chat.send(1)  # error reportArgumentType
jkv.Engine(lm, pages="16")  # error reportArgumentType
jkv.Engine(lm, pages=16, cache=jkv.dense())  # error reportArgumentType
engine.submit("ROMEO:", max_new_tokens="abc")  # error reportArgumentType
engine.generate(["ROMEO:"], max_new_tokens="abc")  # error reportArgumentType
jkv.prefill(lm.model, rows, out.cache)  # error reportArgumentType
jkv.rollout(lm.model, logits, cache, steps="a")  # error reportArgumentType
jkv.init_cache(lm.config, 4, batch=1, slots=8)  # error reportArgumentType
jkv.window("4")  # error reportArgumentType
jkv.window(4, positions="here")  # error reportArgumentType
jkv.quantized(bits=4, residual="a")  # error reportArgumentType
jkv.evicting(8, score="h2o")  # error reportArgumentType
jkv.paged(16, codec=4)  # error reportArgumentType
cache.crop("a")  # error reportArgumentType
cache.convert(4)  # error reportArgumentType
cache.tables  # error reportAttributeAccessIssue
jkv.plan("llama-2-7b", batch="a")  # error reportArgumentType
"""


def seen_by_checkers(package: str) -> dict[str, str]:
    """The name and the full path of each import for type checkers alone, in a package's init."""
    path = ROOT.joinpath(*package.split("."), "__init__.py")
    tree = ast.parse(path.read_text())
    [block] = [
        node
        for node in tree.body
        if isinstance(node, ast.If)
        and ast.unparse(node.test) == "TYPE_CHECKING"
        and not any(isinstance(inner, ast.FunctionDef) for inner in node.body)
    ]
    seen = {}
    for node in block.body:
        assert isinstance(node, ast.ImportFrom)
        home = package if node.level else node.module
        for name in node.names:
            assert name.asname == name.name, f"{name.name} is re-exported as itself only"
            seen[name.name] = f"{home}.{name.name}"
    return seen


@pytest.mark.parametrize("package", LAZY)
def test_type_checkers_see_the_lazy_names(package):
    module = importlib.import_module(package)
    homes = {name: f"{home}.{name}" for name, home in vars(module)["_HOME"].items()}
    assert seen_by_checkers(package) == homes | vars(module).get("_MODULES", {})


@pytest.mark.parametrize("package", LAZY)
def test_functions_are_not_taken_for_the_modules_that_define_them(package):
    """By mypy, see `jkv._HOME`."""
    homes = vars(importlib.import_module(package))["_HOME"]
    assert [
        f"{home}.{name}"
        for name, home in homes.items()
        if ROOT.joinpath(*home.split("."), f"{name}.py").exists()
    ] == []


def test_public_modules_are_strict():
    """Each package's `__init__`: pyright then finds whatever has no type there."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pyright"]
    packages = {f"jkv/{path.parent.name}" for path in ROOT.glob("jkv/*/__init__.py")}
    private = {"jkv/cli"}
    inits = {"jkv/__init__.py"} | {f"{name}/__init__.py" for name in packages - private}
    assert inits <= set(settings["strict"])
    assert [name for name in settings["strict"] if not (ROOT / name).exists()] == []


def test_pyright_sees_types_and_mistakes_in_a_users_script(tmp_path):
    if importlib.util.find_spec("pyright") is None:
        pytest.skip("pyright is not installed: pip install -e '.[dev]'")
    (tmp_path / "script.py").write_text(SCRIPT)
    # This tree, and not what is installed of another.
    (tmp_path / "pyrightconfig.json").write_text(json.dumps({"extraPaths": [str(ROOT)]}))
    command = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable]
    done = subprocess.run([*command, "script.py"], cwd=tmp_path, capture_output=True, text=True)
    lines = SCRIPT.splitlines()
    diagnosed = set()
    for one in json.loads(done.stdout)["generalDiagnostics"]:
        line = lines[one["range"]["start"]["line"]].partition("  # ")[0]
        revealed = re.match('Type of .* is "(.*)"$', one["message"])
        diagnosed.add(f"{line}  # " + (f"is {revealed[1]}" if revealed else f"error {one['rule']}"))
    assert diagnosed == {line for line in lines if "  # " in line}


@pytest.mark.parametrize("package", typecheck.ENTRY_POINTS)
def test_entry_points_that_check_their_arguments_exist(package):
    for name in vars(importlib.import_module(package))["__all__"]:
        getattr(importlib.import_module(package), name)  # imports what is lazy
    assert set(typecheck.ENTRY_POINTS[package]) <= typecheck.found[package]
