"""A sandbox for chat templates: no way into Python, and limits on work and memory.

A template is a program by the checkpoint's author. jinja2's sandbox keeps it away from Python's
internals, but lets it take all memory and run for ever. Here every operation is charged to a budget
of steps and bytes before it is done, by the sizes of what it reads and the most that it can make.
Operations are counted, not seconds: a template passes or fails alike on every machine, however
busy, and in every thread, and no child process has to start for each turn.

What is charged where:
* statements, each run of them when it begins: `CodeGenerator.blockvisit`;
* comparisons, ``~``, slices, and lists, tuples and mappings written down: `CodeGenerator`;
* arithmetic: `Sandbox.call_binop`; calls: `Sandbox.call`; filters and tests: `Sandbox._filter`
  and `_test`; ``{{ }}``: `Sandbox.text`.
Methods, filters and globals that are not listed are refused.
"""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import jinja2
import jinja2.ext
from jinja2 import nodes, runtime, sandbox, utils
from jinja2.exceptions import SecurityError

from jkv.models.template_compiler import CodeGenerator
from jkv.models.template_sizes import (
    GROWTH,
    Value,
    Weight,
    join_size,
    json_padding,
    shallow_bytes,
    weigh,
)

SOURCE_LIMIT = 256 << 10  # characters of a template; published ones have 30,000 at most
STEPS = 3_000_000  # some 2 s; published templates take 100 to 3000 for a message
MEMORY = 64 << 20  # bytes of all values made, those that are dropped again too

_LONGEST_INTEGER = 10_000  # bits
_WIDEST = 10_000  # characters to which a number or a text is padded by a format


class Namespace(utils.Namespace):
    """jinja2's `namespace`, which would store names that lead into Python's internals."""

    def __init__(*args: Value, **kwargs: Value) -> None:
        self, rest = args[0], args[1:]
        for name in dict(*rest, **kwargs):
            _check_name(name)
        utils.Namespace.__init__(self, *rest, **kwargs)

    def __setitem__(self, name: str, value: Value) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Value) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace with the name {name!r}")


class MakeDict:
    """`dict` as an object: the class itself has attributes to climb."""

    def __call__(self, *args: Value, **kwargs: Value) -> dict[Any, Any]:
        """Make a mapping."""
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Value) -> dict[Any, Any]:
        """Make a mapping with one value for all keys."""
        return dict.fromkeys(*args)


# What templates may call of Python's types. Others have none, or nothing of interest: `translate`
# and `encode` lead to texts and bytes whose size nothing here foresees.
_METHODS: tuple[tuple[type, frozenset[str]], ...] = (
    (
        str,
        frozenset(
            """
            capitalize casefold center count endswith expandtabs find index isalnum isalpha isascii
            isdecimal isdigit isidentifier islower isnumeric isprintable isspace istitle isupper
            join ljust lower lstrip partition removeprefix removesuffix replace rfind rindex rjust
            rpartition rsplit rstrip split splitlines startswith strip swapcase title upper zfill
            """.split()  # noqa: SIM905
        ),
    ),
    (dict, frozenset({"copy", "fromkeys", "get", "items", "keys", "values"})),
    (list, frozenset({"copy", "count", "index"})),
    (tuple, frozenset({"count", "index", "grouper", "list"})),  # the last two: of `groupby`
    (int, frozenset({"bit_length"})),
    (float, frozenset({"is_integer"})),
)
# Not jinja2's, and no names that a template can write.
_COUNTED, _SPREAD = "counted items", "arguments spread out"
# jinja2's own objects; what they have is jinja2's to say.
_OBJECTS = (
    runtime.Macro,
    runtime.LoopContext,
    runtime.TemplateReference,
    runtime.BlockReference,
    Namespace,
    MakeDict,
    utils.Cycler,
    utils.Joiner,
)
# Of jinja2's filters: those for HTML whose time grows with the square of a text, and a printer.
_NO_FILTERS = ("urlize", "xmlattr", "striptags", "pprint")
_GLOBALS = ("range", "cycler", "joiner")
# Filters that look at a value's own items or at none, and not at what those hold.
_SHALLOW = frozenset(
    """
    attr batch count d default first items last length list map reject rejectattr reverse select
    selectattr slice
    """.split()  # noqa: SIM905
)
# Tests that look at the type alone.
_OF_TYPE = frozenset(
    """
    boolean callable defined escaped false float integer iterable mapping none number sameas
    sequence string true undefined
    """.split()  # noqa: SIM905
)


class Sandbox(sandbox.ImmutableSandboxedEnvironment):
    """jinja2's sandbox with a budget: of one rendering, so it is made anew for each.

    Args:
        steps: statements and parts of values that a template may go through.
        memory: bytes of all values that it may make.
        own_filters: beside jinja2's, by name.
        own_globals: functions, by name.
        options: of jinja2's environment.
    """

    code_generator_class = CodeGenerator
    intercepted_binops = frozenset(sandbox.SandboxedEnvironment.default_binop_table)

    def __init__(
        self,
        *,
        steps: int = STEPS,
        memory: int = MEMORY,
        own_filters: dict[str, Callable[..., Any]],
        own_globals: dict[str, Any],
        **options: Value,
    ):
        self._steps, self._memory = steps, memory
        self._limits = steps, memory
        # Not optimised: constants would be computed while the template is compiled.
        super().__init__(finalize=self._finalize, optimized=False, **options)
        self.filters = {
            name: self._guard(self._filter, name, function)
            for name, function in (self.filters | own_filters).items()
            if name not in _NO_FILTERS
        }
        self.filters[_COUNTED] = self.counted
        self.filters[_SPREAD] = self.spread
        self.tests = {
            name: self._guard(self._test, name, test) for name, test in self.tests.items()
        }
        self.globals = {name: self.globals[name] for name in _GLOBALS} | own_globals

    # The budget

    def charge(self, steps: int, memory: int = 0) -> None:
        """Take from the budget.

        Raises:
            SecurityError: nothing is left.
        """
        self._steps -= steps
        self._memory -= memory
        if self._steps < 0:
            raise SecurityError(f"it takes more than {self._limits[0]} steps")
        if self._memory < 0:
            self._too_large()

    def reserve(self, memory: int) -> None:
        """Refuse what may make more than is left."""
        if memory > self._memory:
            self._too_large()

    def _too_large(self) -> NoReturn:
        raise SecurityError(f"it takes more than {self._limits[1]} bytes")

    def weigh(self, value: Value) -> Weight:
        """Charge for all parts of a value."""
        return weigh(value, self.charge)

    def made(self, value: Value) -> Value:
        """Charge for a new value, and return it."""
        self.charge(1, shallow_bytes(value))
        return value

    def _answered(self, value: Value) -> Value:
        """Charge for what a function has made, with the items of a list."""
        if isinstance(value, Iterator) and not isinstance(value, runtime.LoopContext):
            return self.counted(value)
        if isinstance(value, list | tuple):
            self.charge(len(value) >> 3, 56 * len(value))
        return self.made(value)

    def listed(self, value: Value) -> Value:
        """Make an iterator a list: iterators in iterators would nest without a limit."""
        if isinstance(value, Iterator) and not isinstance(value, runtime.LoopContext):
            return self.made(list(self.counted(value)))
        return value

    def counted(self, values: Value) -> Iterator[Value]:
        """Charge for each item."""
        for value in values:
            self.charge(1, 8)
            yield value

    def spread(self, values: Value) -> Value:
        """Charge for the copy of what is passed as ``*values`` or ``**values``."""
        values = self.listed(values)
        if hasattr(values, "__len__"):
            self.charge(len(values) >> 3, 64 * len(values))
        return values

    # Called by compiled templates

    @jinja2.pass_context  # so that no constant is written out at compile time
    def _finalize(self, context: runtime.Context, value: Value) -> Value:
        return self.text(value)

    def text(self, value: Value) -> Value:
        """Charge for the text of a value that is about to be written."""
        if isinstance(value, str):
            self.charge(1 + (len(value) >> 8), sys.getsizeof(value))
        else:
            chars = self.weigh(value).chars
            self.reserve(12 * chars)
            self.charge(1, chars)
        return value

    def operand(self, value: Value) -> Value:
        """Charge for a value that is about to be compared or hashed."""
        self.charge(1)
        if type(value) is str:
            self.charge(len(value) >> 8)
        else:
            self.weigh(value)
        return value

    def container(self, value: Value) -> Value:
        """Charge for what is about to be searched."""
        self.charge(1)
        if not isinstance(value, dict):
            self.weigh(value)
        return value

    def sliced(self, value: Value, part: slice) -> Value:
        """Take a slice."""
        if hasattr(value, "__len__"):
            self.charge(1 + (len(value) >> 6))
            self.reserve(shallow_bytes(value))
        return self.made(value[part])

    # jinja2's hooks

    def _generate(self, source: nodes.Template, *args: Value, **kwargs: Value) -> str:
        for loop in source.find_all(nodes.For):
            if loop.test is not None:  # items that it drops go through no body
                loop.iter = nodes.Filter(loop.iter, _COUNTED, [], [], None, None)
        for call in list(source.find_all((nodes.Call, nodes.Filter, nodes.Test))):
            for name in ("dyn_args", "dyn_kwargs"):
                if getattr(call, name) is not None:
                    spread = nodes.Filter(getattr(call, name), _SPREAD, [], [], None, None)
                    setattr(call, name, spread)
        return super()._generate(source, *args, **kwargs)

    def getitem(self, obj: Value, argument: Value) -> Value:
        """Subscribe an object."""
        if not isinstance(argument, str | int):  # it is hashed, or an error repeats it
            self.reserve(12 * self.weigh(argument).chars)
        return super().getitem(obj, argument)

    def is_safe_attribute(self, obj: Value, attr: str, value: Value) -> bool:
        """Return whether a template may read an attribute: only listed ones."""
        if isinstance(obj, _OBJECTS):
            return super().is_safe_attribute(obj, attr, value)
        return any(isinstance(obj, kind) and attr in names for kind, names in _METHODS)

    def wrap_str_format(self, value: Value) -> Callable[..., str] | None:
        """Replace the methods `format` and `format_map` of a text."""
        name = getattr(value, "__name__", None)
        owner = getattr(value, "__self__", None)
        if not isinstance(owner, str) or name not in ("format", "format_map"):
            return None
        formatter = _Formatter(self)

        def formatted(*args: Value, **kwargs: Value) -> str:
            if name == "format_map":
                return formatter.vformat(str(owner), (), *args, **kwargs)
            return formatter.vformat(str(owner), args, kwargs)

        return formatted

    def call_binop(self, context: Value, operator: str, left: Value, right: Value) -> Value:
        """Compute, after the size of the result."""
        self.charge(1)
        if isinstance(left, int | float) and isinstance(right, int | float):
            self._check_numbers(operator, left, right)
        elif operator == "%" and isinstance(left, str):
            self._check_percent(left, right)
        elif operator == "*":
            for many, times in ((left, right), (right, left)):
                if isinstance(times, int) and times > 0:
                    self.reserve(shallow_bytes(many) * times)
        elif operator == "-":  # of sets
            self.weigh((left, right))
        else:
            # Six: text marked as safe escapes what is added to it.
            self.reserve(6 * (shallow_bytes(left) + shallow_bytes(right)))
        return self.made(super().call_binop(context, operator, left, right))

    def _check_numbers(self, operator: str, left: int | float, right: int | float) -> None:
        bits = [x.bit_length() for x in (left, right) if isinstance(x, int)]
        if operator == "*":
            bits.append(sum(bits))
        elif operator == "**" and len(bits) == 2:
            bits.append(bits[0] * abs(int(right)))
        if max(bits, default=0) > _LONGEST_INTEGER:
            raise SecurityError("it computes with numbers that are too large")

    def _check_percent(self, form: str, values: Value) -> None:
        if re.search(r"\d{5}|%[^a-zA-Z%]*\*", form):
            raise SecurityError(f"it pads a text with % to more than {_WIDEST} characters")
        padding = _WIDEST if re.search(r"\d{3}", form) else 100
        chars = self.weigh(values).chars
        self.reserve(4 * len(form) + 4 * form.count("%") * (12 * chars + padding))

    def call(__self, __context: Value, __obj: Value, *args: Value, **kwargs: Value) -> Value:
        """Call what a template calls."""
        self, function = __self, __obj
        self.charge(4 + len(args) + len(kwargs))
        if isinstance(function, runtime.Macro | runtime.BlockReference):
            return super().call(__context, function, *args, **kwargs)
        if isinstance(function, runtime.LoopContext):
            args = tuple(self.counted(arg) for arg in args)
            return super().call(__context, function, *args, **kwargs)
        args = tuple(self.listed(arg) for arg in args)
        named = {name: kwargs[name] for name in kwargs.keys() - {"_loop_vars", "_block_vars"}}
        owner = getattr(function, "__self__", None)
        size = self.weigh((args, named)).chars
        if isinstance(owner, str | list | tuple | dict):
            size += len(owner)
            self.charge(len(owner) >> 8)
            growth = GROWTH.get(function.__name__)
            if function.__name__ == "join":
                size = join_size(size, args[0] if args else (), owner)
            elif growth is not None:
                size = growth(size, owner, *args, **named)
        self.reserve(12 * size)
        return self._answered(super().call(__context, function, *args, **kwargs))

    def _guard(self, method: Callable[..., Any], name: str, function: Value) -> Callable[..., Any]:
        """Make a filter or a test that charges; a partial, which is made quickly."""
        guarded = functools.partial(method, name, function)
        if hasattr(function, "jinja_pass_arg"):
            vars(guarded)["jinja_pass_arg"] = function.jinja_pass_arg
        return guarded

    def _filter(self, name: str, function: Value, *args: Value, **kwargs: Value) -> Value:
        """Charge for a filter's arguments and its result."""
        leading = int(hasattr(function, "jinja_pass_arg"))
        value, *rest = (self.listed(arg) for arg in args[leading:])
        self.charge(4 + len(rest))
        if name in _SHALLOW:
            self.charge(len(value) >> 4 if hasattr(value, "__len__") else 0)
            size = self.weigh((rest, kwargs))
        else:
            size = self.weigh((value, rest, kwargs))
        self._check_filter(name, size, value, rest, kwargs)
        return self._answered(function(*args[:leading], value, *rest, **kwargs))

    def _check_filter(
        self, name: str, size: Weight, value: Value, rest: list[Any], kwargs: dict[str, Any]
    ) -> None:
        """Refuse a filter whose result, or whose work, is too large."""
        chars = size.chars
        if name in ("sort", "unique", "groupby", "dictsort", "min", "max"):
            self.charge(chars)
        elif name == "sum":
            self.charge(len(value) * chars >> 6 if hasattr(value, "__len__") else 0)
        elif name == "wordwrap":  # each line is cut off what remains
            width = kwargs.get("width", rest[0] if rest else 79)
            self.charge(chars * chars // max(int(width), 1) >> 12)
        elif name == "format":
            self._check_percent(str(value), tuple(rest) or kwargs)
        elif name in ("round", "int"):
            numbers = [x for x in (value, *rest, *kwargs.values()) if isinstance(x, int)]
            self._check_numbers("+", max(map(abs, numbers), default=0), 0)
            if chars > 5000 or any(abs(x) > 300 for x in numbers if x is not value):
                raise SecurityError("it rounds or reads numbers that are too large")
        growth = GROWTH.get(name)
        if growth is not None:
            chars = growth(chars, value, *rest, **kwargs)
        elif name == "join":
            chars = join_size(chars, value, *rest, **kwargs)
        elif name == "tojson":
            # At least 4 characters are a part, which may begin a line.
            chars = 2 * chars + (chars * json_padding(*rest, **kwargs) * (size.depth + 1) >> 3)
        self.reserve(12 * chars)

    def _test(self, name: str, function: Value, *args: Value, **kwargs: Value) -> Value:
        """Charge for a test's arguments."""
        self.charge(4)
        leading = int(hasattr(function, "jinja_pass_arg"))
        if name in ("odd", "even", "divisibleby"):
            # They compute `value % 2`, which for a text is formatting.
            if not all(isinstance(arg, int | float) for arg in args):
                raise TypeError(f"the test {name} got something else than a number")
            self._check_numbers("%", args[0], 2)
        elif name not in _OF_TYPE:
            self.weigh((args[leading:], kwargs))
        return function(*args, **kwargs)


class _Formatter(sandbox.SandboxedFormatter):
    """`str.format` within the budget."""

    _env: Sandbox

    def convert_field(self, value: Value, conversion: Value) -> Value:
        return (
            value
            if conversion is None
            else super().convert_field(self._env.text(value), conversion)
        )

    def format_field(self, value: Value, format_spec: str) -> Value:
        if any(int(width) > _WIDEST for width in re.findall(r"\d{1,6}", format_spec)):
            raise SecurityError(f"it pads a text to more than {_WIDEST} characters")
        return self._env.made(super().format_field(self._env.text(value), format_spec))
