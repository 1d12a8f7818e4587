"""CLIP's and T5's tokenizers, from files that a bundle holds: checked before the library that reads them sees them.

That library is written in Rust. What it takes to be impossible ends in a panic, which is no `Exception` and, in a thread of
its own, ends the process. The one part of a tokenizer's file that it believes without a check is the compiled table of
SentencePiece's normalisation; so that is walked here from end to end.
"""

from __future__ import annotations

import base64
import binascii
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from mogle_rt.encoders.text_models import loading
from mogle_rt.encoders.vae import one_line_reason
from mogle_rt.errors import CheckpointError, ConfigError
from mogle_rt.values import Range, file_name, read_json, real, whole

LARGEST_FILE = 64 << 20  # bytes; T5's tokenizer.json has 2.4 MB
TOKENS = Range(0, 1 << 20)  # numbers of tokens; CLIP has 49,408, T5 32,128
EXTRA_IDS = Range(0, 10_000)  # T5 has 100
MAX_LENGTH = Range(1, 1e31)  # tokens; transformers writes 1e30 where there is no limit

T = TypeVar("T")


def load_tokenizer(part: str, files: Mapping[str, bytes]) -> Any:
    """CLIP's (``tokenizer``) or T5's (``tokenizer_2``) tokenizer from its files.

    Raises:
        CheckpointError: the files are not those of such a tokenizer.
    """
    from transformers import CLIPTokenizer, T5Tokenizer

    try:
        _check_files(files)
    except (ConfigError, ValueError) as error:
        raise CheckpointError(f"{part}: its files can't be read: {error}") from None

    def load() -> Any:
        with tempfile.TemporaryDirectory() as folder:
            for name, data in files.items():
                (Path(folder) / name).write_bytes(data)
            with loading():
                return (CLIPTokenizer if part == "tokenizer" else T5Tokenizer).from_pretrained(folder)

    tokenizer = without_panic(load, f"{part}: its files can't be read")
    try:
        real(tokenizer.model_max_length, "model_max_length", MAX_LENGTH)
        _check_tables(read_json(tokenizer.backend_tokenizer.to_str()))  # of files that are not JSON, too
    except (ConfigError, ValueError) as error:
        raise CheckpointError(f"{part}: {error}") from None
    return tokenizer


def without_panic(run: Callable[[], T], what: str) -> T:
    """What ``run`` gives.

    Raises:
        CheckpointError: transformers' parsers or layers raise whatever they do, or the library beneath them panics.
    """
    try:
        return run()
    except CheckpointError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise CheckpointError(f"{what}: {one_line_reason(error)}") from None


def _check_files(files: Mapping[str, bytes]) -> None:
    for name, data in files.items():
        file_name(name, "a tokenizer's file")
        if len(data) > LARGEST_FILE:
            raise ConfigError(f"{name} has {len(data):,} bytes, at most {LARGEST_FILE:,} are read")
        if name.endswith(".json"):
            try:
                values = read_json(data)
            except ValueError as error:
                raise ConfigError(f"{name}: not readable as JSON: {error}") from None
            if not isinstance(values, dict):
                raise ConfigError(f"{name} must hold a JSON object")
            if name == "tokenizer_config.json":
                whole(values.get("extra_ids", 0), "extra_ids", EXTRA_IDS)
            for token in _numbers(name, values):
                whole(token, f"{name}: a token's number", TOKENS)
            _check_tables(values)


def _numbers(name: str, values: dict[str, Any]) -> Iterator[Any]:
    """Every number that a file gives to a token. The library makes tables as long as the largest."""
    if name in ("vocab.json", "added_tokens.json"):
        yield from values.values()
    if name == "tokenizer.json":
        model, added = values.get("model"), values.get("added_tokens")
        if isinstance(model, dict) and isinstance(model.get("vocab"), dict):
            yield from model["vocab"].values()
        yield from (one.get("id") for one in (added if isinstance(added, list) else ()) if isinstance(one, dict))
    if name == "tokenizer_config.json" and isinstance(values.get("added_tokens_decoder"), dict):
        yield from (int(key) if key.isdecimal() and len(key) < 20 else key for key in values["added_tokens_decoder"])


def _check_tables(values: Any) -> None:
    """Every compiled normalisation in a tokenizer's description."""
    for table in _tables(values.get("normalizer")):
        try:
            data = base64.b64decode(table)
        except (TypeError, ValueError, binascii.Error):
            raise ConfigError("its precompiled_charsmap is not base64") from None
        check_charsmap(data)


def _tables(normalizer: Any) -> Iterator[Any]:
    waiting = [normalizer]
    while waiting:
        one = waiting.pop()
        if isinstance(one, list):
            waiting += one
        elif isinstance(one, dict):
            waiting += [v for v in one.values() if isinstance(v, (dict, list))]
            if one.get("precompiled_charsmap"):
                yield one["precompiled_charsmap"]


def check_charsmap(data: bytes) -> None:
    """Walk SentencePiece's compiled normalisation: no way through it may lead out of it.

    It is the size of a double-array trie, the trie itself in units of 32 bits, and then texts, each ending in a zero byte.
    A way through the trie goes by the bytes of the text to be normalised; a leaf holds where the text in its place
    begins. (Darts-clone's format: bits 10 and up of a unit are its offset, bit 9 says that the offset is shifted by 8,
    bit 8 that a leaf lies there, bit 31 and the lowest 8 bits are its label.)

    Raises:
        ConfigError: it is cut short, or a way leads out of the trie or into the middle of a letter.
    """
    size = int.from_bytes(data[:4], "little")
    if len(data) < 4 or size % 4 or not 4 <= size <= len(data) - 4:
        raise ConfigError(f"its precompiled_charsmap is damaged: {len(data)} bytes can't hold a table of {size}")
    units = np.frombuffer(data, "<u4", size // 4, 4).astype(np.int64)
    texts = np.frombuffer(data, np.uint8, offset=4 + size)
    try:
        data[4 + size :].decode()
    except UnicodeDecodeError:
        raise ConfigError("its precompiled_charsmap is damaged: its texts are not UTF-8") from None
    begins = np.append((texts & 0xC0) != 0x80, True)  # not within a letter of several bytes
    offsets, labels = (units >> 10) << ((units & 0x200) >> 6), units & 0x800000FF
    letters = np.arange(1, 256)
    seen = np.zeros(len(units), dtype=bool)
    places = offsets[:1]
    while places.size:
        if (places | 255).max() >= len(units):
            raise ConfigError("its precompiled_charsmap is damaged: a way leads out of its table")
        places = np.unique(places[~seen[places]])
        seen[places] = True
        reached = (places[:, None] ^ letters).ravel()
        taken = reached[labels[reached] == np.tile(letters, len(places))]
        places = taken ^ offsets[taken]
        leaves = places[(units[taken] >> 8) & 1 == 1]
        if leaves.size and leaves.max() >= len(units):
            raise ConfigError("its precompiled_charsmap is damaged: a way leads out of its table")
        values = units[leaves] & 0x7FFFFFFF
        if values.size and (values.max() >= len(begins) or not begins[values].all()):
            raise ConfigError("its precompiled_charsmap is damaged: it names a text that it doesn't hold")
