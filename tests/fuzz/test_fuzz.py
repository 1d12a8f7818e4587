"""A few attempts to break each reader; `make fuzz` makes more, with new seeds. ``python -m tests.fuzz`` makes thousands."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest

if sys.platform != "linux":
    pytest.skip("attempts are made in forks with limits, as Linux has them", allow_module_level=True)

import torch

from mogle_rt import CheckpointError
from tests.checkpoints import Files
from tests.conftest import FUZZ_SEED, MORE_EXAMPLES
from tests.fuzz.attempts import MEMORY, REFUSED, WORKS, attempt_many
from tests.fuzz.readers import Attempt, readers

SLOW = ("bundle, run", "graph", "table of rows", "evaluated folder")
ATTEMPTS = 20
NAMES = (
    *("bundle", "quantised bundle", "bundle, run", "embeddings", "tokenizer", "LoRA", "MoGLE", "FLUX folder"),
    *("transformer in one file", "GGUF", "mask", "prompts", "job record", "manifest", "graph", "engine"),
    *("manifest with text encoders", "table of rows", "settings in an image", "evaluated folder", "fast settings"),
    *("calibration", "request", "parts of a tokenizer"),
)


@pytest.fixture(scope="module")
def every_reader(tiny_files: Files, tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Attempt]:
    torch.set_num_threads(1)  # PyTorch's other threads would not exist in the forks
    return readers(tiny_files, tiny_bundle, tmp_path_factory.mktemp("spoiled"))


@pytest.mark.parametrize("name", NAMES)
def test_a_spoiled_file_works_or_is_refused_in_one_line(name: str, every_reader: dict[str, Attempt]) -> None:
    assert set(every_reader) == set(NAMES)
    count = (ATTEMPTS // 4 if name in SLOW else ATTEMPTS) * (1 if FUZZ_SEED is None else MORE_EXAMPLES)
    report = attempt_many(name, every_reader[name], int(FUZZ_SEED or 1), range(count))
    assert not report.defects
    assert sum(report.outcomes.values()) == count


@pytest.mark.quick
def test_what_counts_as_a_defect() -> None:
    """Another kind of error, a message of two lines, a signal, and memory beyond the limit are counted as defects."""

    def attempt(r: random.Random) -> None:
        number = numbers.pop(0)
        if number == 1:
            raise CheckpointError("refused")
        if number == 2:
            raise KeyError("x")
        if number == 3:
            error = CheckpointError("a")
            error.args = ("a\nb",)
            raise error
        if number == 4:
            numbers[:] = []
            import os

            os.abort()
        if number == 5:
            bytearray(2 * MEMORY)

    numbers = [0, 1, 2, 3, 4]
    report = attempt_many("x", attempt, 1, range(5))
    assert report.outcomes == {WORKS: 1, REFUSED: 1, "KeyError": 1, "not one line": 1, "signal 6": 1}
    assert [number for number, _ in report.defects] == [2, 3, 4]
    numbers = [5]
    assert attempt_many("x", attempt, 1, range(1)).outcomes == {"MemoryError": 1}


@pytest.mark.quick
def test_an_attempt_can_be_repeated() -> None:
    """An attempt depends on its seed and its number alone, not on the attempts before it."""
    drawn: dict[int, str] = {}

    def attempt(r: random.Random) -> None:
        raise KeyError(r.random())

    for first in (0, 3):
        for number, what in attempt_many("x", attempt, 7, range(first, 5)).defects:
            assert drawn.setdefault(number, what) == what
    assert len(set(drawn.values())) == 5
