"""Values from files are of the right types and ranges or are refused, and error messages quote them in short."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import pytest

from mogle_rt import CheckpointError, ConfigError, MogleError, OutputError
from mogle_rt.errors import LONGEST_MESSAGE
from mogle_rt.values import Count, FileName, OneOf, Range, Sha256, parsed, quoted, read_json, real, whole

pytestmark = pytest.mark.quick


@dataclass(frozen=True)
class Part:
    size: Count
    name: Annotated[str, OneOf("a", "b")] = "a"


@dataclass(frozen=True)
class Whole:
    parts: Mapping[str, Part]
    sides: tuple[Annotated[int, Range(1, 8)], ...] | None = None
    corner: tuple[float, float] = (0.0, 0.0)
    file: FileName = "x"
    hash: Sha256 = ""
    more: Any = None


def test_a_structure_comes_out_as_its_types() -> None:
    raw = {"parts": {"p": {"size": 3, "name": "b"}}, "sides": [1, 8], "corner": [1, 2.5], "more": [None]}
    assert parsed(Whole, raw, "whole") == Whole({"p": Part(3, "b")}, (1, 8), (1.0, 2.5), more=[None])
    assert parsed(Whole, {"parts": {}, "sides": None}, "whole") == Whole({})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"parts": None}, "whole.parts must be an object, got None"),
        ({"parts": {"p": {}}}, "whole.parts.p has no entry 'size'"),
        ({"parts": {"p": {"size": True}}}, "whole.parts.p.size must be a whole number, got True"),
        ({"parts": {"p": {"size": 1.0}}}, "whole.parts.p.size must be a whole number, got 1.0"),
        ({"parts": {"p": {"size": 10**5000}}}, "size must be from 0 to .*, got a number of more than 80 digits"),
        ({"parts": {"p": {"size": 1, "name": "c"}}}, "whole.parts.p.name must be one of a, b, got 'c'"),
        ({"sides": [0]}, r"whole.sides\[0\] must be from 1 to 8, got 0"),
        ({"sides": "12"}, "whole.sides must be a list, got '12'"),
        ({"corner": [1]}, "whole.corner must hold 2 values, got 1"),
        ({"corner": [1, float("nan")]}, r"whole.corner\[1\] must be a finite number, got nan"),
        ({"corner": [1, 10**400]}, r"whole.corner\[1\] must be a finite number, got a number of"),
        ({"corner": [1, "2"]}, r"whole.corner\[1\] must be a number, got '2'"),
        ({"file": ""}, "whole.file must be the name of a file in the same folder, got ''"),
        ({"file": "a/b"}, "must be the name of a file in the same folder"),
        ({"file": "a\\b"}, "must be the name of a file in the same folder"),
        ({"file": "C:b"}, "must be the name of a file in the same folder"),
        ({"file": "a\0b"}, "must be the name of a file in the same folder"),
        ({"hash": "A" * 64}, "whole.hash must be a SHA-256 of 64 hexadecimal digits"),
        ({"else": 1}, "whole has the unknown entry 'else'"),
    ],
)
def test_what_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parsed(Whole, {"parts": {}} | change, "whole")


def test_single_numbers() -> None:
    assert whole(3, "n", Range(1, 3)) == 3
    assert real(3, "n", Range(1, 3)) == 3.0
    for value in (None, True, "3", 4, float("inf"), 10**400, [3]):
        with pytest.raises(ConfigError, match=r"^n must be"):
            real(value, "n", Range(1, 3))
        with pytest.raises(ConfigError, match=r"^n must be"):
            whole(value, "n", Range(1, 3))


def test_json_of_a_thousand_brackets() -> None:
    """Python's parser raises RecursionError here, but callers that read JSON expect ValueError."""
    with pytest.raises(ValueError, match="nested too deeply"):
        read_json("[" * 100_000)


def test_quotes_are_cut_and_escaped() -> None:
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    for value in (
        "x" * 10**7,
        "\x1b[2J",
        "a\nb",
        "\ud800",
        10**5000,
        -(10**5000),
        [10**5000],
        deep,
        {"a": b"\xff" * 999},
    ):
        text = quoted(value)
        assert text.isprintable()
        assert len(text) <= 80
        text.encode()
    assert quoted("it's") == '"it\'s"'
    del deep[:]


@pytest.mark.parametrize("kind", [MogleError, CheckpointError, OutputError])
def test_every_message_is_one_printable_line(kind: type[MogleError]) -> None:
    """Terminal escapes, line ends and lone surrogates in a message are written out, wherever they came from."""
    error = kind("/a  b/é.bin: \x1b[31mred\r\n\ud800 \u202e" + "x" * 10**6 + "; take another")
    assert str(error).startswith("/a  b/é.bin: \\x1b[31mred \\ud800 \\u202e")
    assert str(error).endswith("; take another")
    assert str(error).isprintable()
    assert len(str(error)) < LONGEST_MESSAGE + 10
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
