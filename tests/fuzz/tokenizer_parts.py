"""A tokenizer with parts that its library knows, and that a bundle's author may have chosen to do harm. See `readers`."""

from __future__ import annotations

import base64
import json
import random
from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np

from mogle_rt.encoders.tokenizers import load_tokenizer, without_panic
from tests.fuzz.mutators import NUMBERS, TEXTS, as_json

PROMPTS = [
    "",
    "a young woman",
    "a" * 40 + "!",
    "ａ①ﬁ ﷺ 中文 \u200b é" + "ü" * 40,
    "x" * 3000,
    "<pad></s> <|endoftext|>",
]
REGEXES = (
    "(a+)+$",
    "(a|aa)+$",
    "(?=a)",
    "",
    "$",
    "(((((a*)*)*)*)*)*b",
    "\\p{L}+",
    "(?<=a{1,99999})",
    "[",
    "(.*)*x",
    "\\1",
)
COUNTS = (*NUMBERS[:-1], 17, 10**6, 2**40, 10**18)


def tokenizer_parts(files: Mapping[str, Mapping[str, bytes]], r: random.Random) -> None:
    """Exchange one to three parts of CLIP's or T5's tokenizer, load it, and let it split prompts."""
    part = r.choice(sorted(files))
    held = dict(files[part])
    values = json.loads(_whole(part, tuple(sorted(held.items()))))  # CLIP's files may hold its words and pairs alone
    for _ in range(r.choice((1, 1, 2, 3))):
        name = r.choice(sorted(_PARTS))
        if name == "model":
            _PARTS[name](values["model"], r)
        else:
            values[name] = _PARTS[name](r)
    held["tokenizer.json"] = json.dumps(values).encode() if r.random() < 0.9 else as_json(values, r)
    tokenizer = load_tokenizer(part, held)
    prompts = r.sample(PROMPTS, 3)
    without_panic(lambda: tokenizer(prompts, padding="max_length", truncation=True, max_length=16).input_ids, part)


@cache
def _whole(part: str, files: tuple[tuple[str, bytes], ...]) -> str:
    text: str = load_tokenizer(part, dict(files)).backend_tokenizer.to_str()
    return text


def _pattern(r: random.Random) -> dict[str, str]:
    return {"Regex": r.choice(REGEXES)} if r.random() < 0.7 else {"String": r.choice(("", "a", *TEXTS[:4]))}


def _charsmap(r: random.Random) -> str:
    """A compiled normalisation that is nearly right: a table of 256 to 1024 units, some of which lead anywhere."""
    units = np.full(r.choice((256, 512, 1024)), 1 << 31, dtype="<u4")
    units[[0, 96, 97]] = 0, 0, 1 << 10 | 1 << 8 | 97
    for _ in range(r.choice((0, 1, 1, 3, 40))):
        label = r.randrange(256)
        at = r.choice((label, label ^ 1, r.randrange(len(units))))
        units[at] = r.choice((0, 1, r.randrange(len(units)), 2**21 - 1)) << 10 | r.randrange(4) << 8 | label
    texts = r.choice((b"A\0", b"", b"A", "é中\0".encode(), b"\xff\0", bytes(50), b"B" * 4000))
    size = 4 * len(units) + r.choice((0, 0, 0, 0, 4, -4, 1, 2**31))
    return base64.b64encode((size % 2**32).to_bytes(4, "little") + units.tobytes() + texts).decode()


def _normalizer(r: random.Random, depth: int = 0) -> Any:
    kinds: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": _pattern(r), "content": r.choice(("", "a", "aa" * 1000))},
        {"type": "Prepend", "prepend": r.choice(("", "x" * 10**5))},
        {"type": "Strip", "strip_left": True, "strip_right": r.choice((True, False))},
        {"type": r.choice(("NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents", "Nmt", "ByteLevel"))},
        *[{"type": "Precompiled", "precompiled_charsmap": _charsmap(r)}] * 5,
    ]
    if depth < 4 and r.random() < 0.3:
        return {"type": "Sequence", "normalizers": [_normalizer(r, depth + 1) for _ in range(r.randrange(4))]}
    return r.choice(kinds)


def _pre_tokenizer(r: random.Random, depth: int = 0) -> Any:
    if depth < 4 and r.random() < 0.3:
        return {"type": "Sequence", "pretokenizers": [_pre_tokenizer(r, depth + 1) for _ in range(r.randrange(4))]}
    behavior = r.choice(("Removed", "Isolated", "MergedWithPrevious", "MergedWithNext", "Contiguous"))
    return r.choice(
        (
            {"type": "Split", "pattern": _pattern(r), "behavior": behavior, "invert": r.choice((True, False))},
            {"type": "Metaspace", "replacement": r.choice(("▁", "", "ab")), "prepend_scheme": "always", "split": True},
            {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
            {"type": "CharDelimiterSplit", "delimiter": r.choice(("a", "", "ab"))},
            {"type": "FixedLength", "length": r.choice(COUNTS)},
            {"type": "Punctuation", "behavior": behavior},
            {"type": r.choice(("Whitespace", "WhitespaceSplit", "UnicodeScripts", "BertPreTokenizer"))},
            None,
        )
    )


def _post_processor(r: random.Random) -> Any:
    number, token = r.choice(COUNTS), r.choice(("</s>", "x", ""))
    piece = {"SpecialToken": {"id": token, "type_id": r.choice((0, 1, number))}}
    kept = {
        "id": r.choice((token, "y")),
        "ids": [number] * r.choice((0, 1, 1000)),
        "tokens": [token] * r.choice((0, 1)),
    }
    template = {"single": [piece] * r.choice((1, 10_000)), "pair": [piece], "special_tokens": {token: kept}}
    pair = {"sep": [token, number], "cls": [token, 0]}
    return r.choice(
        (
            {"type": "TemplateProcessing"} | template,
            {"type": "BertProcessing"} | pair,
            {"type": "RobertaProcessing", "trim_offsets": True, "add_prefix_space": False} | pair,
            None,
        )
    )


def _padding(r: random.Random) -> Any:
    return {
        "strategy": r.choice(("BatchLongest", {"Fixed": r.choice(COUNTS)})),
        "direction": r.choice(("Left", "Right")),
        "pad_to_multiple_of": r.choice((None, *COUNTS)),
        "pad_id": r.choice(COUNTS),
        "pad_type_id": r.choice((0, 2**31)),
        "pad_token": r.choice(("<pad>", "", "x" * 10**5)),
    }


def _truncation(r: random.Random) -> Any:
    return {
        "direction": r.choice(("Left", "Right")),
        "max_length": r.choice(COUNTS),
        "strategy": r.choice(("LongestFirst", "OnlyFirst", "OnlySecond")),
        "stride": r.choice(COUNTS),
    }


def _added_tokens(r: random.Random) -> Any:
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    contents = [
        r.choice(("", "a", " ", "\u0130", "x" * 5000, "</s>", *TEXTS[:8])) for _ in range(r.choice((1, 3, 300)))
    ]
    return [
        {"id": r.choice((n, r.choice(COUNTS))), "content": c} | {f: r.random() < 0.5 for f in flags}
        for n, c in enumerate(contents)
    ]


def _model(model: dict[str, Any], r: random.Random) -> None:
    """Spoil the model in its place: its words, their scores, the pairs that are merged."""
    model["unk_id"] = r.choice((0, None, *COUNTS)) if r.random() < 0.3 else model.get("unk_id")
    model["byte_fallback"] = r.choice((True, False))
    vocabulary = model.get("vocab")
    if isinstance(vocabulary, list) and vocabulary:
        for _ in range(r.choice((1, 3, 100))):
            score = r.choice((0.0, -1e308, 1e308, 1e-320, -5, 10**300))
            vocabulary[r.randrange(len(vocabulary))] = [r.choice(("", "a", "▁", "\0", "x" * 5000, "<0x0A>")), score]
        if r.random() < 0.1:
            del vocabulary[r.choice((0, 1, 3)) :]
    if isinstance(vocabulary, dict) and vocabulary:
        for _ in range(r.choice((1, 3, 100))):
            word = r.choice(sorted(vocabulary))
            number = vocabulary.pop(word)
            vocabulary[r.choice(("", "a", "</w>", "\0", word + "x", word))] = r.choice((number, 0, r.choice(COUNTS)))
            if not vocabulary:
                break
    if isinstance(model.get("merges"), list):
        words = r.sample(sorted(vocabulary), min(3, len(vocabulary))) if isinstance(vocabulary, dict) else ["a"]
        merge = [r.choice((*words, "", "zz")), r.choice((*words, "", "zz"))]
        model["merges"] += [r.choice((merge, " ".join(merge), ["a"], []))] * r.choice((0, 1, 1000))
    for name, found in {
        "dropout": (None, 0.5, 2.0, -1, float("nan")),
        "continuing_subword_prefix": (None, "", "##", "é", "x" * 1000),
        "end_of_word_suffix": (None, "", "</w>", "é", "x" * 1000),
        "fuse_unk": (True, False),
        "ignore_merges": (True, False),
        "unk_token": (None, "", "zz", "<|endoftext|>"),
        "type": ("BPE", "Unigram", "WordLevel", "WordPiece"),
    }.items():
        if r.random() < 0.08:
            model[name] = r.choice(found)


_PARTS: dict[str, Any] = {
    "model": _model,
    "normalizer": _normalizer,
    "pre_tokenizer": _pre_tokenizer,
    "post_processor": _post_processor,
    "padding": _padding,
    "truncation": _truncation,
    "added_tokens": _added_tokens,
}
