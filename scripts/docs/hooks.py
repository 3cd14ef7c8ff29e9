"""What Sphinx cannot know of jkv: which names are public, and what a dataclass's fields hold."""

from __future__ import annotations

import ast
import functools
import inspect
import io
import pkgutil
import textwrap
import tokenize
from typing import Any

from docs.names import public_names


def connect(app: Any) -> None:
    """Connect the hooks to a build."""
    app.connect("autodoc-process-docstring", add_fields)
    app.connect("missing-reference", resolve)


@functools.cache
def canonical() -> dict[str, str]:
    """Map where public things are defined to their public names."""
    found = {}
    for one in public_names():
        if one.source is not None and one.kind != "data":
            found[f"{one.source}.{one.value.__qualname__}"] = one.name  # pyright: ignore
    return found


def resolve(app: Any, env: Any, node: Any, contnode: Any) -> Any:
    """Link a name that a docstring or a signature has in another form than its page.

    A docstring names `Cache.crop` or `top_k`, a signature `jkv.cache.base.Cache`. What is no name
    of jkv (an argument, a piece of code, a type of JAX) stays as it is; a name below `jkv.` which
    is neither public nor a module is a broken link.
    """
    if node.get("refdomain") != "py":
        return None
    target, called, _ = node["reftarget"].partition("(")
    if not all(part.isidentifier() for part in target.split(".")):
        return contnode
    domain = env.domains["py"]
    wanted = canonical().get(target, target)
    names = [wanted, f"jkv.{wanted}"]
    if called or "." in target or target[0].isupper():  # no argument's name
        ends = [name for name in domain.objects if name.endswith(f".{wanted}")]
        names += sorted(ends, key=lambda name: (name.count("."), name))[:1]
    for name in names:
        if name in domain.objects:
            return domain.resolve_xref(
                env, node["refdoc"], app.builder, "obj", name, node, contnode
            )
    return contnode if not target.startswith("jkv.") or exists(target) else None


def exists(target: str) -> bool:
    """Whether a name below `jkv.` is there at all, public or not."""
    try:
        pkgutil.resolve_name(target)
    except (ImportError, AttributeError):
        return False
    return True


def add_fields(
    app: Any, what: str, name: str, value: object, options: Any, lines: list[str]
) -> None:
    """Add the fields of a dataclass that the docstring does not list, with their comments."""
    del app, name, options
    if what != "class" or any(line.startswith("Attributes") for line in lines):
        return
    told = fields(value)
    if told and not any(":ivar" in line or ".. attribute" in line for line in lines):
        listed = ["", ".. rubric:: Fields", ""]
        for field, (kind, comment) in told.items():
            listed.append(f"* ``{field}`` (``{kind}``)" + (f": {comment}" if comment else ""))
        sections = [i for i, line in enumerate(lines) if line.startswith(".. rubric:: Example")]
        at = sections[0] if sections else len(lines)
        lines[at:at] = [*listed, ""]


def fields(cls: object) -> dict[str, tuple[str, str]]:
    """Return the annotated fields of a class body: type and comment of each."""
    if not hasattr(cls, "__dataclass_fields__"):
        return {}
    source = textwrap.dedent(inspect.getsource(cls))  # pyright: ignore[reportArgumentType]
    tree = ast.parse(source).body[0]
    comments = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    return {
        node.target.id: (ast.unparse(node.annotation), comments.get(node.end_lineno or 0, ""))
        for node in tree.body  # pyright: ignore[reportAttributeAccessIssue]
        if isinstance(node, ast.AnnAssign)
        and isinstance(node.target, ast.Name)
        and not node.target.id.startswith("_")
    }
