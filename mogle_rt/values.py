"""Values from files that others made: JSON read into typed structures, each number with its range; how a value is quoted.

A file's author may be anyone. So nothing that a file says is believed before it has the type and lies in the range that
is written down for it, and nothing that it says goes into a message longer, or with other characters, than a person reads.
"""

from __future__ import annotations

import dataclasses
import json
import math
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import PurePosixPath, PureWindowsPath
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

from mogle_rt.errors import ConfigError, printable

LONGEST_QUOTE = 80  # characters of a value that a message repeats


def quoted(value: object) -> str:
    """A value as a message repeats it: as Python writes it, printable, and cut where it is long."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10**LONGEST_QUOTE:
        return "a number of more than 80 digits"  # Python refuses to write numbers of more than 4300
    try:
        text = printable(repr(value[: LONGEST_QUOTE + 1] if isinstance(value, str) else value))
    except (RecursionError, ValueError):  # nested too deeply; a long number within
        text = f"a {type(value).__name__}"
    return text if len(text) <= LONGEST_QUOTE else f"{text[: LONGEST_QUOTE - 1]}…"


def read_json(text: str | bytes) -> Any:
    """What a JSON text says.

    Raises:
        ValueError: it is not JSON, or nested too deeply for Python's parser.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


@dataclass(frozen=True)
class Range:
    """The numbers from ``least`` to ``most``, both included."""

    least: float
    most: float

    def __call__(self, value: Any, what: str) -> None:
        """Check a number.

        Raises:
            ConfigError: it lies outside.
        """
        if not self.least <= value <= self.most:
            raise ConfigError(f"{what} must be from {self.least} to {self.most}, got {quoted(value)}")


class OneOf:
    """Some texts, of which a value must be one."""

    def __init__(self, *allowed: str) -> None:
        self.allowed = allowed

    def __call__(self, value: str, what: str) -> None:
        """Check a text.

        Raises:
            ConfigError: it is none of them.
        """
        if value not in self.allowed:
            raise ConfigError(f"{what} must be one of {', '.join(self.allowed)}, got {quoted(value)}")


def whole(value: object, what: str, allowed: Range) -> int:
    """A whole number in a range.

    Raises:
        ConfigError: another type, or outside.
    """
    number = _whole(value, what)
    allowed(number, what)
    return number


def real(value: object, what: str, allowed: Range) -> float:
    """A number in a range.

    Raises:
        ConfigError: another type, not finite, or outside.
    """
    number = _real(value, what)
    allowed(number, what)
    return number


def file_name(value: str, what: str) -> None:
    """Check the name of a file that lies beside the one that names it.

    Raises:
        ConfigError: it is empty, or leads elsewhere: it is absolute, or has a folder in it.
    """
    plain = value not in ("", ".", "..") and "\0" not in value
    if not plain or PurePosixPath(value).name != value or PureWindowsPath(value).name != value:
        raise ConfigError(f"{what} must be the name of a file in the same folder, got {quoted(value)}")


def hexadecimal(value: str, what: str) -> None:
    """Check a hash, or that there is none.

    Raises:
        ConfigError: it is neither 64 hexadecimal digits nor empty.
    """
    if value and (len(value) != 64 or set(value) - set("0123456789abcdef")):
        raise ConfigError(f"{what} must be a SHA-256 of 64 hexadecimal digits, got {quoted(value)}")


Count = Annotated[int, Range(0, 2**62)]  # of bytes or rows; sums of a few still fit into 64 bits
FileName = Annotated[str, file_name]
Sha256 = Annotated[str, hexadecimal]


def parsed(kind: Any, value: Any, what: str) -> Any:
    """A value out of JSON as the type that it must have.

    Args:
        kind: a dataclass, whose fields are then read in the same way; ``tuple[X, ...]``; ``Mapping[str, X]``; ``X | Y``;
            ``str``, ``int``, ``float`` or ``bool``; ``Annotated[X, check, ...]`` with checks like a `Range`; ``Any``.
        what: names the value in messages.

    Raises:
        ConfigError: it has another type, a name is missing or unknown, or a check refuses it.
    """
    if kind is Any:
        return value
    if dataclasses.is_dataclass(kind):
        return _structure(kind, value, what)
    if kind in _READERS:
        return _READERS[kind](value, what)
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        result = parsed(arguments[0], value, what)
        for check in arguments[1:]:
            check(result, what)
        return result
    if origin is Mapping:
        return {k: parsed(arguments[1], v, f"{what}.{_short(k)}") for k, v in _mapping(value, what).items()}
    if origin is tuple:
        return _tuple(arguments, value, what)
    assert origin in (Union, types.UnionType), f"no way to read a {kind}"
    return _one_of(arguments, value, what)


def _tuple(arguments: tuple[Any, ...], value: Any, what: str) -> tuple[Any, ...]:
    if not isinstance(value, (list, tuple)):
        raise _another_type("a list", value, what)
    kinds = [arguments[0]] * len(value) if arguments[-1] is ... else list(arguments)
    if len(kinds) != len(value):
        raise ConfigError(f"{what} must hold {len(kinds)} values, got {len(value)}")
    return tuple(parsed(k, v, f"{what}[{i}]") for i, (k, v) in enumerate(zip(kinds, value, strict=True)))


def _one_of(arguments: tuple[Any, ...], value: Any, what: str) -> Any:
    error = None
    for kind in arguments:
        try:
            return parsed(kind, value, what)
        except ConfigError as refused:
            error = error or refused
    assert error is not None
    raise error


def _structure(kind: Any, value: Any, what: str) -> Any:
    given, hints = _mapping(value, what), _hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for name in given:
        if name not in fields:
            raise ConfigError(f"{what} has the unknown entry {quoted(name)}")
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in given:
            raise ConfigError(f"{what} has no entry {name!r}")
    return kind(**{name: parsed(hints[name], v, f"{what}.{name}") for name, v in given.items()})


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind, include_extras=True)


def _short(name: str) -> str:
    return name if name.isidentifier() and len(name) <= LONGEST_QUOTE else quoted(name)


def _another_type(wanted: str, value: object, what: str) -> ConfigError:
    return ConfigError(f"{what} must be {wanted}, got {quoted(value)}")


def _mapping(value: Any, what: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        raise _another_type("an object", value, what)
    return value


def _text(value: object, what: str) -> str:
    if not isinstance(value, str):
        raise _another_type("a text", value, what)
    return value


def _flag(value: object, what: str) -> bool:
    if not isinstance(value, bool):
        raise _another_type("true or false", value, what)
    return value


def _whole(value: object, what: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise _another_type("a whole number", value, what)
    return value


def _real(value: object, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise _another_type("a number", value, what)
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise _another_type("a finite number", value, what)
    return number


def _nothing(value: object, what: str) -> None:
    if value is not None:
        raise _another_type("null", value, what)


_READERS: Mapping[Any, Callable[[Any, str], Any]] = {
    str: _text,
    bool: _flag,
    int: _whole,
    float: _real,
    type(None): _nothing,
}
