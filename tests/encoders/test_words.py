"""Words that a text encoder never saw: found where the tokenizer tells the known ones, and warned of once."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from mogle_rt.bundle.bundle import Bundle
from mogle_rt.bundle.shipped import examples
from mogle_rt.calls.prompts import PromptEncoder
from mogle_rt.encoders.cache import TensorCache
from mogle_rt.encoders.words import KnownWords, words_of

UNSEEN = [
    ("a young woman with long blond hair, wearing a red hat.", []),
    ("", []),
    ("  a   man ,\n", []),
    ("a turquoise hat, a turquoise, wide hat", ["turquoise", "wide"]),
    ("Purple hair and a purple hat", ["Purple"]),
    ("red-haired", ["red-haired"]),
    ("a hat,glasses and (earrings)", ["hat,glasses", "(earrings)"]),
    ("a man & a beard!", []),
    ("a x 7 王 hat", ["x", "7", "王"]),
]


@pytest.fixture(scope="module")
def known() -> KnownWords:
    found = words_of(Bundle("demo"))
    assert found is not None
    return found


@pytest.mark.parametrize(("prompt", "unseen"), UNSEEN)
def test_words_that_are_spelled_are_found(known: KnownWords, prompt: str, unseen: list[str]) -> None:
    assert known.unseen(prompt) == unseen


def test_known_words_have_one_token_each(known: KnownWords) -> None:
    assert {"man", "beard", "An"} <= known.words
    assert not {"", "Man", "x", ".", "</s>"} & known.words
    assert known.unseen(" ".join(sorted(known.words))) == []


def test_tokenizers_that_take_words_apart_tell_nothing(tiny_bundle: Path) -> None:
    assert words_of(Bundle(tiny_bundle)) is None


def test_the_warning_names_words_that_are_nearly_the_same(known: KnownWords) -> None:
    message = known.warning(["bearded", "tall", "y" * 1000])
    assert "'bearded' (it knows 'beard'), 'tall', 'yyy" in message
    assert len(message) < 300
    assert "'12'" not in known.warning([str(i) for i in range(20)])
    assert "and 12 more" in known.warning([str(i) for i in range(20)])


@pytest.mark.parametrize("offload", [False, True])
def test_each_word_is_warned_of_once(caplog: pytest.LogCaptureFixture, offload: bool) -> None:
    encoder = PromptEncoder(Bundle("demo"), torch.device("cpu"), torch.float32, TensorCache(0))
    encoder.offload = offload
    with torch.no_grad(), caplog.at_level(logging.WARNING):
        encoder([example.prompt for example in examples()], 48)
        assert not caplog.records
        encoder(["a turquoise hat", "a wide turquoise hat"], 48)
        encoder(["a turquoise shirt"], 48)
        encoder(["a turquoise and beige hat"], 48)
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) == 2
    assert "'turquoise', 'wide' in" in warnings[0]
    assert "'beige' in" in warnings[1]
