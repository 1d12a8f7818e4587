"""A few blocks of a model can be used as a smaller model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mogle_rt.bundle.bundle import Bundle
from mogle_rt.bundle.schema import lora_tensors, transformer_tensors
from mogle_rt.export.blocks import SelectedBlocks

CPU = torch.device("cpu")


@pytest.mark.parametrize(("double", "single"), [([1], []), ([], [1]), ([1, 0], [0])])
def test_blocks_are_numbered_anew(double: list[int], single: list[int], tiny_bundle: Path) -> None:
    """The result is a complete model of fewer blocks, with the tensors of the chosen blocks."""
    bundle = Bundle(tiny_bundle)
    part = SelectedBlocks(bundle, double=double, single=single)
    config = part.config.transformer
    assert (config.num_layers, config.num_single_layers) == (len(double), len(single))
    assert set(part.names("transformer")) == set(transformer_tensors(config))
    assert set(part.names("lora")) == set(lora_tensors(config, part.lora_ranks()))
    assert part.names("mogle") == bundle.names("mogle")
    for stack, chosen in (("transformer_blocks", double), ("single_transformer_blocks", single)):
        for new, old in enumerate(chosen):
            for name in (f"transformer.{stack}.{{}}.attn.to_q.weight", f"lora.{stack}.{{}}.attn.to_q.lora_B.weight"):
                mine = part.load([name.format(new)], CPU, torch.float32)
                assert torch.equal(mine, bundle.load([name.format(old)], CPU, torch.float32))
                assert part.tensors[name.format(new)] == bundle.tensors[name.format(old)]


def test_release_reaches_the_source(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle, released = Bundle(tiny_bundle), list[str]()
    monkeypatch.setattr(bundle, "release", released.extend)
    part = SelectedBlocks(bundle, double=[1], single=[])
    part.release(["transformer.transformer_blocks.0.attn.to_q.weight"])
    assert released == ["transformer.transformer_blocks.1.attn.to_q.weight"]
    assert bundle.config.transformer.num_layers == 2, "the source stays as it was"
