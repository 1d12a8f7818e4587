"""The weights that make modulations are read one after the other, and the next is on its way while one is computed."""

from __future__ import annotations

import itertools
import mmap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mogle_rt.bundle.bundle import Bundle
from mogle_rt.bundle.container import READ_AHEAD
from mogle_rt.config import TransformerConfig
from mogle_rt.model.loading import LazyWeights
from mogle_rt.model.modulation import modulation_tables
from tests.checkpoints import write_checkpoint
from tests.conftest import make_once

CPU = torch.device("cpu")
DOUBLE = "transformer.transformer_blocks.{}.norm1{}.linear.weight"


@pytest.fixture(scope="module")
def bundle(shared_folder: Path) -> Bundle:
    def make(path: Path) -> None:
        write_checkpoint(path.with_suffix("")).convert(path)

    return Bundle(make_once(shared_folder / "modulated.safetensors", make))


def read(bundle: Bundle, weights: LazyWeights, dtype: torch.dtype) -> TransformerConfig:
    """Make the tables of two steps."""
    config = bundle.config.transformer
    temb = torch.randn(2, 1, config.width).to(dtype)
    modulation_tables(config, temb, temb[0], weights)
    return config


@pytest.mark.skipif(not hasattr(mmap, "MADV_WILLNEED"), reason="the system takes no advice on mapped files")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])  # views of the file, and copies
def test_the_next_weight_is_asked_for_before_one_is_used(
    dtype: torch.dtype, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    happened: list[tuple[str, str]] = []
    load, weights = bundle.load, LazyWeights(bundle, CPU, dtype)
    names = {info.begin // mmap.PAGESIZE * mmap.PAGESIZE: name for name, info in bundle.tensors.items()}

    class Map:
        """The map of the file, which notes the advice that it is given."""

        def madvise(self, advice: int, begin: int, length: int) -> None:
            if advice == mmap.MADV_WILLNEED and begin in names:
                happened.append(("expect", names[begin]))

    def noted(names: Sequence[str], device: torch.device, dtype: torch.dtype | None) -> Tensor:
        happened.extend(("load", name) for name in names if "linear.weight" in name)
        return load(names, device, dtype)

    assert len(bundle._file._bytes) > 0  # the tensors are views of the real map
    monkeypatch.setattr(bundle._file, "_map", Map())
    monkeypatch.setattr(bundle, "load", noted)
    config = read(bundle, weights, dtype)
    order = [DOUBLE.format(i, part) for i in range(config.num_layers) for part in ("", "_context")]
    order += [f"transformer.single_transformer_blocks.{i}.norm.linear.weight" for i in range(config.num_single_layers)]
    order.append("transformer.norm_out.linear.weight")
    expected: list[tuple[str, str]] = []
    for name, following in zip(order, [*order[1:], None], strict=True):
        expected += [("expect", following)] if following else []
        expected.append(("load", name))
    assert happened == expected

    happened.clear()
    weights.keep(kept=True)
    read(bundle, weights, dtype)
    happened.clear()
    read(bundle, weights, dtype)
    assert not happened, "what is kept in memory is not read again"


def test_advice_covers_the_tensor_in_small_parts(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Linux reads only a disk's read-ahead for each request, so one request for a large weight would do little."""
    given: list[tuple[int, int]] = []

    class Map:
        def madvise(self, advice: int, begin: int, length: int) -> None:
            given.append((begin, begin + length))

    monkeypatch.setattr(bundle._file, "_map", Map())
    monkeypatch.setattr("mogle_rt.bundle.container.READ_AHEAD", 2 * mmap.PAGESIZE)
    infos: dict[str, Any] = dict(bundle.tensors)
    largest = max(infos.values(), key=lambda info: info.end - info.begin)
    bundle._file.expect(largest)
    assert given[0][0] == largest.begin // mmap.PAGESIZE * mmap.PAGESIZE
    assert given[-1][1] == largest.end
    assert all(before[1] == after[0] for before, after in itertools.pairwise(given))
    assert all(end - begin <= 2 * mmap.PAGESIZE for begin, end in given)
    assert len(given) > 2
    assert READ_AHEAD % mmap.PAGESIZE == 0
