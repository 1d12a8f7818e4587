"""Ways to spoil a file, drawn from a seeded generator: its bytes, its JSON, the header of a safetensors file."""

from __future__ import annotations

import copy
import json
import random
import struct
from collections.abc import Callable
from typing import Any

NUMBERS = (0, -1, 1, 2, 3, 7, 64, 255, 256, 2**16, 2**31 - 1, 2**31, 2**32, 2**63 - 1, 2**63, 10**9, 10**30, 10**400)
FLOATS = (0.5, -0.5, 1e-30, 1e30, 1e308, float("inf"), float("-inf"), float("nan"))
TEXTS = (
    *("", " ", "a", "x" * 5000, "..", "../x", "/etc/passwd", "C:\\x", "a/b", "\0", "\n", "\x1b[2J\x07", "\ud800"),
    *("\u202e", "é", "(a+)+$", "((((", "[", "{}", "null", "1", "1e999", "torch.os.system", "__class__", "__metadata__"),
    *("https://example.org/x", "fp32", "FLOAT", "F64", "transformer.", "lora_A.weight", "{stem}", "%s"),
)


def hostile_value(r: random.Random) -> Any:
    """A JSON value of any type, of a kind that readers may not expect."""
    kind = r.randrange(8)
    if kind == 0:
        return r.choice(NUMBERS) * r.choice((1, 1, -1))
    if kind == 1:
        return r.choice(FLOATS)
    if kind == 2:
        return r.choice(TEXTS)
    if kind == 3:
        return r.choice((None, True, False, [], {}))
    if kind == 4:
        return [hostile_value(r) for _ in range(r.randrange(4))]
    if kind == 5:
        return {r.choice(TEXTS): hostile_value(r) for _ in range(r.randrange(4))}
    if kind == 6:
        return [r.choice(NUMBERS)] * r.choice((1, 3, 4, 70, 5000))
    deep: Any = 0
    for _ in range(r.choice((3, 50, 150))):
        deep = [deep]
    return deep


def _places(value: Any, way: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [way] if way else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, inner in items:
        found += _places(inner, (*way, name))
    return found


def spoiled(value: Any, r: random.Random) -> Any:
    """A JSON value with one to three of its parts replaced, removed, doubled or exchanged."""
    value = copy.deepcopy(value)
    for _ in range(r.choice((1, 1, 1, 2, 3))):
        places = _places(value)
        if not places or r.random() < 0.02:
            return hostile_value(r)
        way = r.choice(places)
        owner = value
        for step in way[:-1]:
            owner = owner[step]
        last, kind = way[-1], r.randrange(6)
        if kind == 0:
            del owner[last]
        elif kind == 1 and isinstance(owner, dict):
            owner[r.choice(TEXTS)] = owner.pop(last)
        elif kind == 2:
            other = value
            for step in r.choice(places):
                try:
                    other = other[step]
                except (KeyError, IndexError, TypeError):
                    break
            owner[last] = copy.deepcopy(other)
        elif kind == 3 and isinstance(owner[last], (int, float)) and not isinstance(owner[last], bool):
            owner[last] = owner[last] * r.choice((-1, 2, 10**6, 10**18)) + r.choice((0, 1, -1, 0.5))
        else:
            owner[last] = hostile_value(r)
    return value


def as_json(value: Any, r: random.Random) -> bytes:
    """The value as JSON text; now and then with wrong bytes in it, or nested far too deeply."""
    try:
        text = json.dumps(value).encode()
    except (ValueError, RecursionError):
        text = b"[" * 100_000
    kind = r.randrange(30)
    if kind == 0:
        return b'{"a":' * r.choice((10, 10_000, 200_000))
    if kind == 1:
        return b"\xef\xbb\xbf" + text
    if kind == 2:
        return bytes_spoiled(text, r)
    return text


def bytes_spoiled(data: bytes, r: random.Random) -> bytes:
    """The data with bytes changed, cut, inserted or doubled, or with whole numbers in it exchanged."""
    b = bytearray(data)
    for _ in range(r.choice((1, 1, 2, 5, 30))):
        if not b:
            return bytes(b)
        at, kind = r.randrange(len(b)), r.randrange(8)
        if r.random() < 0.5:
            at = min(at, r.choice((16, 64, 512, 4096))) % len(b)  # more often in a file's beginning, where headers are
        if kind <= 2:
            b[at] = r.randrange(256)
        elif kind == 3:
            b[at] ^= 1 << r.randrange(8)
        elif kind == 4:
            del b[at : at + r.choice((1, 4, 100, len(b)))]
        elif kind == 5:
            b[at:at] = r.choice(
                (bytes(r.choice((1, 8, 300))), b[at : at + 200], r.choice(TEXTS).encode(errors="ignore"))
            )
        else:
            size, form = r.choice(((4, "<I"), (8, "<Q"), (4, ">I"), (2, "<H")))
            b[at : at + size] = struct.pack(form, r.choice(NUMBERS) % 256**size)
    return bytes(b)


def safetensors_spoiled(data: bytes, r: random.Random, metadata: Callable[[Any], Any] | None = None) -> bytes:
    """A safetensors file with a spoiled header, or a spoiled JSON text in its metadata, or spoiled bytes."""
    length = struct.unpack("<Q", data[:8])[0]
    header, rest = json.loads(data[8 : 8 + length]), data[8 + length :]
    kind = r.randrange(10)
    if kind <= 1:
        return bytes_spoiled(data, r)
    if kind <= 5 and metadata is not None:
        metadata(header)
    elif kind == 6:
        for name in r.sample(sorted(header), min(len(header), r.choice((1, 2, 20)))):
            header[r.choice((name + "x", r.choice(TEXTS), r.choice(sorted(header))))] = header.pop(name, {})
    elif kind == 7 and len(header) > 1:  # another shape of as many numbers, or another type of as many bytes
        entry = header[r.choice([n for n in header if n != "__metadata__"])]
        shape = entry["shape"]
        entry["shape"] = r.choice(
            (shape[::-1], [1, *shape], [*shape, 1], [2**62, *shape], [0, 2**63 - 1], [-1, *shape])
        )
        entry["dtype"] = r.choice((entry["dtype"], "F32", "F16", "BF16", "I64", "U8", "BOOL", "F8_E4M3", "C64", "x"))
    else:
        header = spoiled(header, r)
    text = as_json(header, r)
    return struct.pack("<Q", len(text)) + text + rest
