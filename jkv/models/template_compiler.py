"""Compiling chat templates to Python that charges for what it does."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from jinja2 import compiler, nodes

if TYPE_CHECKING:
    from jkv.models.sandbox import Sandbox


class CodeGenerator(compiler.CodeGenerator):
    """jinja2's compiler to Python, which adds calls that charge."""

    environment: Sandbox

    def blockvisit(self, statements: Iterable[nodes.Node], frame: compiler.Frame) -> None:
        """Charge for statements, and compile them."""
        statements = list(statements)
        steps, memory = _count(statements)
        self.writeline(f"environment.charge({steps}, {memory})")
        super().blockvisit(statements, frame)

    def visit_ScopedEvalContextModifier(
        self, node: nodes.ScopedEvalContextModifier, frame: compiler.Frame
    ) -> None:
        """Refuse the tag `autoescape`."""
        self.fail("a chat template writes plain text: autoescape is not known", node.lineno)

    def visit_Compare(self, node: nodes.Compare, frame: compiler.Frame) -> None:
        """Charge for what is compared."""
        self.write("(")
        self._wrap("operand", node.expr, frame)
        for operand in node.ops:
            self.write(f" {compiler.operators[operand.op]} ")
            searched = operand.op in ("in", "notin")
            self._wrap("container" if searched else "operand", operand.expr, frame)
        self.write(")")

    def visit_Concat(self, node: nodes.Concat, frame: compiler.Frame) -> None:
        """Charge for what ``~`` joins."""
        self.write("str_join((")
        for part in node.nodes:
            self._wrap("text", part, frame)
            self.write(", ")
        self.write("))")

    def visit_Getitem(self, node: nodes.Getitem, frame: compiler.Frame) -> None:
        """Charge for slices."""
        if not isinstance(node.arg, nodes.Slice):
            super().visit_Getitem(node, frame)
            return
        self.write("environment.sliced(")
        self.visit(node.node, frame)
        self.write(", slice(")
        for bound in (node.arg.start, node.arg.stop, node.arg.step):
            if bound is None:
                self.write("None")
            else:
                self.visit(bound, frame)
            self.write(", ")
        self.write("))")

    def visit_Tuple(self, node: nodes.Tuple, frame: compiler.Frame) -> None:
        """Charge for a tuple."""
        if node.ctx != "load":
            super().visit_Tuple(node, frame)
            return
        self.write("environment.made(")
        super().visit_Tuple(node, frame)
        self.write(")")

    def visit_List(self, node: nodes.List, frame: compiler.Frame) -> None:
        """Charge for a list."""
        self.write("environment.made(")
        super().visit_List(node, frame)
        self.write(")")

    def visit_Dict(self, node: nodes.Dict, frame: compiler.Frame) -> None:
        """Charge for a mapping and its keys."""
        self.write("environment.made({")
        for item in node.items:
            self._wrap("operand", item.key, frame)
            self.write(": ")
            self.visit(item.value, frame)
            self.write(", ")
        self.write("})")

    def _wrap(self, method: str, node: nodes.Node, frame: compiler.Frame) -> None:
        self.write(f"environment.{method}(")
        self.visit(node, frame)
        self.write(")")


def _count(statements: Sequence[nodes.Node]) -> tuple[int, int]:
    """Nodes of statements, and bytes of the text among them, without the statements within.

    Those are charged for when they are run.
    """
    todo, count, size = list(statements), 1, 0
    while todo:
        node = todo.pop()
        count += 1
        if isinstance(node, nodes.TemplateData):
            size += sys.getsizeof(node.data)
        todo += node.iter_child_nodes(exclude=("body", "else_"))
    return count, size
