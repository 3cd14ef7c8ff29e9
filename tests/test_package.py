"""What a user meets first: the README's examples, the metadata, what is in the package."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

import draw_decode
import jkv
from tests.conftest import ROOT
from tests.test_colab import COLAB

README = (ROOT / "README.md").read_text()
EXAMPLES = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def test_readme_has_short_examples():
    assert len(EXAMPLES) == 3
    assert all(len(example.splitlines()) <= 12 for example in EXAMPLES)


def test_readme_examples_run_as_written(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)  # one keeps caches in a directory
    names: dict = {}
    for example in EXAMPLES:
        exec(compile(example, "README.md", "exec"), names)
    assert names["out"].tokens.shape == (2, 32)
    assert names["more"].tokens.shape == (2, 16)
    assert names["rolled"].tokens.shape == (1, 8)
    assert [len(request.tokens) for request in names["requests"]] == [32, 32]
    written = capsys.readouterr().out
    story = names["lm"].decode(names["more"].history[0])
    assert story in written  # the results' texts join to it
    assert all(repr(request.text) in written for request in names["requests"])
    assert repr(names["lm"].decode(names["rolled"].tokens)) in written


def test_the_picture_shows_the_figures():
    """README's picture is drawn from the table of figures, whose numbers it has."""
    seconds = draw_decode.figures((draw_decode.RESULTS / "README.md").read_text())
    shown = draw_decode.PICTURE.read_text()
    for name, total in seconds.items():
        assert name in shown
        assert f"{1e3 * total / draw_decode.TOKENS:.0f} ms" in shown
    assert str(draw_decode.PICTURE.relative_to(ROOT)) in README
    with pytest.raises(ValueError, match="no row of GPT-2"):
        draw_decode.figures("")


def test_readme_says_what_the_metadata_says():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    jax_versions = next(d for d in project["dependencies"] if d.startswith("jax>"))
    oldest, below = re.fullmatch(r"jax>=([\d.]+),<0\.(\d+)", jax_versions).groups()
    assert f"from {oldest}," in README
    assert f"to 0.{int(below) - 1}." in README
    told = re.findall(r"Python :: (3\.\d+)", " ".join(project["classifiers"]))
    assert f"Python {told[0]} to {told[-1]}" in README
    for extra in re.findall(r"`\.\[(\w+)\]`", README):
        assert extra in project["optional-dependencies"]


def test_files_that_the_readme_names_are_there():
    named = set(re.findall(r"`((?:jkv|scripts|notebooks)/[\w/.]+)`", README))
    named |= set(re.findall(r"\]\(([\w/.]+)\)", README))
    named |= set(re.findall(r"bash ([\w/.]+)", README))
    assert len(named) > 5
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


def test_version_is_one_and_the_changelog_has_it():
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["version"]
    assert f'"{jkv.__version__}"' in (ROOT / build["path"]).read_text()
    assert f"## {jkv.__version__}" in (ROOT / "CHANGELOG.md").read_text()
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (citation["version"], citation["license"]) == (jkv.__version__, "Apache-2.0")


def workflow(name: str) -> dict:
    # YAML 1.1 reads the key "on" as true.
    text = (ROOT / ".github" / "workflows" / f"{name}.yml").read_text()
    return yaml.safe_load(re.sub(r"^on:", "'on':", text, flags=re.M))


@pytest.mark.parametrize("name", ["ci", "release"])
def test_workflows_run_what_is_there(name):
    """Every step runs a script of the repository, with stages that it has, or an action."""
    stages = re.search(r'^stages="(.*)"', (ROOT / ".ci" / "run").read_text(), re.M)
    assert stages is not None
    steps = [step for job in workflow(name)["jobs"].values() for step in job["steps"]]
    ran = [step["run"].split() for step in steps if "run" in step]
    for words in ran:
        if words[0] == ".ci/run":
            assert set(words[1:]) <= set(stages[1].split())
        elif words[0] == "bash":
            assert (ROOT / words[1]).exists()
    assert ran
    assert all("@" in step["uses"] for step in steps if "uses" in step)
    assert workflow(name)["permissions"] == {"contents": "read"}


def test_every_python_is_tested_that_is_promised():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    told = re.findall(r"Python :: (3\.\d+)", " ".join(project["classifiers"]))
    suite = workflow("ci")["jobs"]["suite"]
    assert suite["strategy"]["matrix"]["python"] == told
    assert project["requires-python"] == f">={told[0]}"


def test_only_a_tag_that_was_built_and_checked_is_published():
    flow = workflow("release")
    build, publish = flow["jobs"]["build"], flow["jobs"]["publish"]
    assert flow["on"]["push"] == {"tags": ["v*"]}
    assert publish["needs"] == "build"
    assert publish["if"] == "github.ref_type == 'tag'"
    assert publish["permissions"] == {"id-token": "write"}  # no token is kept anywhere
    assert "bash scripts/package.sh" in [step.get("run") for step in build["steps"]]
    check = next(step["run"] for step in build["steps"] if "__version__" in step.get("run", ""))
    for tag, status in ((f"v{jkv.__version__}", 0), ("v9.9.9", 1)):
        env = os.environ | {"GITHUB_REF_NAME": tag}
        assert subprocess.run(["bash", "-c", check], cwd=ROOT, env=env).returncode == status


def test_a_stage_that_does_not_exist_is_refused():
    command = ["bash", str(ROOT / ".ci" / "run"), "lint", "nothing"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "got nothing; expected some of: suite lint" in done.stderr


def test_import_is_light():
    """`import jkv` must not wait for JAX."""
    code = "import sys, jkv; print([m for m in ('jax', 'flax', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_comparisons_are_no_dependency():
    """What is there to compare with is in an extra of its own."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    needed = [*project["dependencies"], *extras["test"]]
    compared = ("torch", "transformers", "penzai", "cachetools", "diskcache")
    assert not [name for name in needed if name.startswith(compared)]
    assert {re.split("[>=]", name)[0] for name in extras["compare"]} == set(compared)
    assert {"test", "dev", "plot", "cuda12", "cuda13", "tpu", "compare"} <= extras.keys()
    imports = re.compile(rf"^\s*(?:import|from) ({'|'.join(compared)})\b", re.MULTILINE)
    assert not [p for p in Path(jkv.__file__).parent.rglob("*.py") if imports.search(p.read_text())]


def test_what_colab_has_installed_may_stay():
    """Continuous integration installs jkv beside these and sees that pip leaves them alone."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = [Requirement(text) for text in project["dependencies"]]
    pins = [text for text in COLAB if "==" in text]
    assert " ".join(pins) in (ROOT / ".ci" / "run").read_text()
    versions = dict(text.split("==") for text in pins)
    for name in ("jax", "flax", "numpy"):
        (one,) = [requirement for requirement in needed if requirement.name == name]
        assert one.specifier.contains(versions[name]), one
    for extra in ("cuda12", "cuda13", "tpu"):
        (one,) = [Requirement(text) for text in project["optional-dependencies"][extra]]
        assert one.specifier == next(each.specifier for each in needed if each.name == "jax")
        assert one.extras == {extra}


def test_package_data_is_small():
    """The built-in model is in the package, within its limit."""
    data = ROOT / "jkv" / "data" / "shakespeare"
    sizes = {path.name: path.stat().st_size for path in data.iterdir() if path.is_file()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= sizes.keys()
    assert sum(sizes.values()) <= 8 << 20
    assert (ROOT / "jkv" / "py.typed").exists()
