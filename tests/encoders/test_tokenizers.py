"""Tokenizers whose files would end the process, or name tokens that an encoder doesn't have."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mogle_rt import CheckpointError, ConfigError
from mogle_rt.bundle.bundle import Bundle
from mogle_rt.encoders.text import TextEncoders
from mogle_rt.encoders.tokenizers import check_charsmap, load_tokenizer


def trie(units: dict[int, int], size: int = 256) -> bytes:
    """A charsmap: a trie with these units at these places, all others empty, and the text A behind it."""
    table = np.full(size, 1 << 31, dtype="<u4")
    for place, unit in units.items():
        table[place] = unit
    return len(table.tobytes()).to_bytes(4, "little") + table.tobytes() + b"A\0"


LEAF, WIDE = 1 << 8, 1 << 9  # bits of a unit; from bit 10 on it holds an offset
# The root's offset is 0, so the letter a (97) leads to unit 97. Its offset is 1, so its leaf lies at 97 xor 1.
WHOLE = {0: 0, 97: (1 << 10) | LEAF | 97, 96: 0}


@pytest.mark.quick
def test_a_whole_charsmap() -> None:
    from tokenizers import normalizers

    check_charsmap(trie(WHOLE))
    assert normalizers.Precompiled(trie(WHOLE)).normalize_str("ab") == "Ab"


@pytest.mark.quick
@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "0 bytes can't hold a table of 0"),
        (b"\4\0\0\0", "4 bytes can't hold a table of 4"),
        (b"\xff\xff\xff\xff" + bytes(99), "can't hold a table of 4294967295"),
        (b"\5\0\0\0" + bytes(99), "can't hold a table of 5"),
        (trie(WHOLE)[:-2] + b"\xff", "its texts are not UTF-8"),
        (trie(WHOLE, 255), "a way leads out of its table"),
        (trie({0: 1 << 20}), "a way leads out of its table"),
        (trie(WHOLE | {97: (1 << 12) | WIDE | LEAF | 97}), "a way leads out of its table"),
        (trie(WHOLE | {96: 3}), "it names a text that it doesn't hold"),
        (trie(WHOLE | {96: 2**31 - 1}), "it names a text that it doesn't hold"),
        (trie(WHOLE | {96: 1})[:-2] + "é".encode(), "it names a text that it doesn't hold"),
    ],
)
def test_damaged_charsmaps(data: bytes, message: str) -> None:
    """With each of these the tokenizers library panics, when it reads the map or when it normalises the letter a."""
    with pytest.raises(ConfigError, match=message):
        check_charsmap(data)


def test_a_loop_in_a_charsmap_ends() -> None:
    check_charsmap(trie({0: 0, 97: (97 << 10) | 97}))  # the letter a leads back to the root, for ever


def files_with(bundle: Path, part: str, name: str, change: Callable[[Any], None]) -> dict[str, bytes]:
    files = Bundle(bundle).files(part)
    values = json.loads(files[name])
    change(values)
    return files | {name: json.dumps(values).encode()}


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("tokenizer_config.json", lambda v: v.update(extra_ids=10**9), "extra_ids must be from 0 to 10000"),
        ("tokenizer_config.json", lambda v: v.update(extra_ids=None), "extra_ids must be a whole number, got None"),
        ("tokenizer_config.json", lambda v: v.update(model_max_length=-1), "model_max_length must be from 1 to"),
        ("tokenizer_config.json", lambda v: v.update(model_max_length="x"), "model_max_length must be a number"),
        (
            "tokenizer.json",
            lambda v: v.update(
                normalizer={
                    "type": "Sequence",
                    "normalizers": [
                        {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(trie({0: 1 << 20})).decode()}
                    ],
                }
            ),
            "a way leads out of its table",
        ),
        ("tokenizer.json", lambda v: v.update(normalizer={"precompiled_charsmap": 5}), "is not base64"),
        ("tokenizer.json", lambda v: v["added_tokens"][0].update(id=10**9), "number must be from 0 to 1048576"),
        ("tokenizer_config.json", lambda v: v.update(added_tokens_decoder={str(10**9): {}}), "number must be from 0"),
        ("tokenizer_config.json", lambda v: v.update(added_tokens_decoder={"x": {}}), "must be a whole number"),
    ],
)
def test_what_a_tokenizer_may_not_say(
    name: str, change: Callable[[Any], None], message: str, tiny_bundle: Path
) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_tokenizer("tokenizer_2", files_with(tiny_bundle, "tokenizer_2", name, change))


def test_a_number_that_takes_gigabytes(tiny_bundle: Path) -> None:
    """For one such number in a file of 4 kB the library made a table of 11 GB, and ended the process without them."""
    files = files_with(tiny_bundle, "tokenizer", "vocab.json", lambda v: v.update(x=10**18))
    with pytest.raises(CheckpointError, match=r"vocab.json: a token's number must be from 0 to 1048576, got 10+$"):
        load_tokenizer("tokenizer", files)


@pytest.mark.parametrize("name", ["../x.json", "a/b.json", "C:x.json", ""])
def test_a_tokenizers_file_stays_in_its_folder(name: str) -> None:
    with pytest.raises(CheckpointError, match="must be the name of a file in the same folder"):
        load_tokenizer("tokenizer", {name: b"{}"})


def test_tokens_that_the_encoder_does_not_have(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def more_words(values: Any) -> None:
        values["model"]["vocab"] += [[f"▁w{i}", -1.0] for i in range(1000)]

    files = files_with(tiny_bundle, "tokenizer_2", "tokenizer.json", more_words)
    own = Bundle.files
    monkeypatch.setattr(Bundle, "files", lambda self, part: files if part == "tokenizer_2" else own(self, part))
    encoders = TextEncoders(Bundle(tiny_bundle), torch.device("cpu"), torch.float32)
    encoders.encode(["a hat"], 8)
    with pytest.raises(CheckpointError, match=r"T5's tokenizer gives .*: the bundle's parts don't fit each other"):
        encoders.encode(["w999 w998"], 8)
