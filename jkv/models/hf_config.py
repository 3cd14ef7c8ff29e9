"""The reader of a `config.json`: every key is used, known to be irrelevant, or a problem."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from jkv._text import brief, printable
from jkv.models.hf_keys import equal

_ABSENT: Any = object()


class HFConfig:
    """The keys of one JSON object, marked as they are read.

    A value that cannot be used is added to `problems`, and reading continues with a placeholder, so
    that all problems of a checkpoint are found at once. `broken` says that a placeholder was
    returned: the values read must not be used.

    Args:
        values: the object.
        problems: problems are appended to this list.
        ignored: keys to treat as absent; ``a.b`` is the key b of the object a. Each is removed
            from this set once it has been met.
        path: of the object within `config.json`, such as ``rope_scaling.``.
    """

    def __init__(
        self,
        values: Mapping[str, Any],
        problems: list[str],
        ignored: set[str] | None = None,
        path: str = "",
    ):
        self.problems, self.broken = problems, False
        self._ignored = set() if ignored is None else ignored
        self._path = path
        self.where = f"config.json: {path.rstrip('.')}".removesuffix(": ")
        dropped = {key for key in values if path + key in self._ignored}
        self._ignored -= {path + key for key in dropped}
        self.values = {key: value for key, value in values.items() if key not in dropped}
        self.seen: set[str] = set()

    def problem(self, text: str) -> None:
        """Report a problem that makes the values unusable."""
        self.problems.append(f"{self.where}: {text}")
        self.broken = True

    def raw(self, key: str, default: object = None) -> Any:
        """Return the value unchecked; `default` where the key is absent."""
        self.seen.add(key)
        return self.values.get(key, default)

    def alias(self, key: str, other: str) -> None:
        """Read a key under another name too, where it is absent under its own."""
        if key not in self.values and other in self.values:
            self.values[key] = self.values.pop(other)

    def integer(
        self, key: str, default: object = _ABSENT, *, null: object = _ABSENT, most: int = 2**31 - 1
    ) -> Any:
        """Read an integer from 1 to `most`; `null` replaces a JSON null where one is allowed."""
        return self._read(
            key,
            default,
            null,
            f"an integer from 1 to {most}",
            lambda v: isinstance(v, int) and not isinstance(v, bool) and 1 <= v <= most,
            1,
        )

    def number(self, key: str, default: object = _ABSENT, *, null: object = _ABSENT) -> Any:
        """Read a finite number above 0, as a float."""

        def fits(value: object) -> bool:
            if isinstance(value, bool) or not isinstance(value, int | float):
                return False
            return abs(value) < 1e300 and math.isfinite(value) and value > 0

        value = self._read(key, default, null, "a finite number above 0", fits, 1.0)
        return float(value) if isinstance(value, int) else value

    def flag(self, key: str, default: object = _ABSENT) -> bool:
        """Read true or false; null counts as false where the default is false."""
        null = False if default is False else _ABSENT
        return self._read(key, default, null, "true or false", lambda v: isinstance(v, bool), False)

    def choice(self, key: str, options: Mapping[str, str], default: object = _ABSENT) -> str:
        """Read one of the words of `options`, and return its value there."""
        wanted = "one of " + ", ".join(options)
        value = self._read(
            key,
            default,
            _ABSENT,
            wanted,
            lambda v: isinstance(v, str) and v in options,
            next(iter(options)),
        )
        return options[value]

    def words(self, key: str, options: Iterable[str], count: int) -> list[str] | None:
        """Read a list of `count` words, or None where there is none."""
        options = tuple(options)
        return self._read(
            key,
            None,
            None,
            f"a list of {count} of {', '.join(options)}",
            lambda v: isinstance(v, list) and len(v) == count and all(w in options for w in v),
            None,
        )

    def group(self, key: str) -> HFConfig | None:
        """Read an inner object, with the same list of problems; None where there is none."""
        value = self.raw(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            self.problem(f"{key} is {brief(value)}; expected an object or null")
            return None
        return HFConfig(value, self.problems, self._ignored, f"{self._path}{key}.")

    def expect(self, key: str, *allowed: object) -> None:
        """Report any value of a key but these; absence and null are allowed."""
        value = self.raw(key)
        if value is not None and not any(equal(value, a) for a in allowed):
            wanted = " or ".join(brief(a) for a in allowed)
            self.problems.append(
                f"{self.where}: {key} is {brief(value)}, which is not implemented; expected "
                f"{wanted}{self._remedy(key)}"
            )

    def _remedy(self, key: str) -> str:
        return f" (to load it as if the key were absent: ignore=({brief(self._path + key)},))"

    def ignore(self, *keys: str) -> None:
        """Mark keys as irrelevant."""
        self.seen.update(keys)

    def finish(self, stated: Mapping[str, tuple[Any, ...]] | None = None) -> None:
        """Report every key that was not read and is not null.

        Args:
            stated: for keys that are never read, the values that change nothing.
        """
        for key in sorted(set(self.values) - self.seen):
            value, allowed = self.values[key], (stated or {}).get(key, ())
            if value is None or any(equal(value, a) for a in allowed):
                continue
            wanted = [brief(a) for a in allowed if a is not None]
            what = f"; here only {' or '.join(wanted)} would change nothing" if wanted else ""
            self.problems.append(
                f"{self.where}: unknown key {printable(key)} = {brief(value)}, which may change "
                f"what the model computes{what}{self._remedy(key)}"
            )

    def _read(
        self,
        key: str,
        default: object,
        null: object,
        wanted: str,
        fits: Callable[[Any], bool],
        placeholder: object,
    ) -> Any:
        value = self.raw(key, _ABSENT)
        if value is _ABSENT:
            if default is not _ABSENT:
                return default
            self.problem(f"{key} is missing; expected {wanted}")
            return placeholder
        if value is None and null is not _ABSENT:
            return null
        if not fits(value):
            self.problem(f"{key} is {brief(value)}; expected {wanted}")
            return placeholder
        return value
