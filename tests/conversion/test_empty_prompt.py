"""Bundles without text encoders hold the empty prompt's embeddings, so they too can draw from a mask alone."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from mogle_rt import CheckpointError, Pipeline
from mogle_rt.bundle.bundle import Bundle
from mogle_rt.conversion.tensors import HeldTensor
from mogle_rt.conversion.writing.empty_prompt import _read_when_used
from tests.apps.test_cli import QUICK, draw_mask, one_thread, pixels, run
from tests.checkpoints import Files


def test_images_from_masks_alone_are_the_same(tiny_files: Files, tiny_bundle: Path, tmp_path: Path) -> None:
    alone = tiny_files.convert(tmp_path / "alone.safetensors", text_encoders=False)
    whole, bundle = Bundle(tiny_bundle), Bundle(alone)
    assert bundle.default_text_tokens == whole.default_text_tokens
    for mine, theirs in zip(
        Pipeline(alone, device="cpu", dtype="fp32").prompt_encoder([""], whole.default_text_tokens),
        Pipeline(tiny_bundle, device="cpu", dtype="fp32").prompt_encoder([""], whole.default_text_tokens),
        strict=True,
    ):
        assert torch.equal(mine, theirs)
    assert bundle.empty_prompt(bundle.default_text_tokens - 1) is None
    mask = draw_mask(tmp_path / "mask.png")
    with one_thread():
        for checkpoint, name in ((tiny_bundle, "a"), (alone, "b")):
            result = run("generate", checkpoint, "-m", mask, "-o", tmp_path / f"{name}.png", "--seed", 1, *QUICK)
            assert result.code == 0, result.err
    assert pixels(tmp_path / "a.png") == pixels(tmp_path / "b.png")


def test_other_lengths_and_prompts_need_the_encoders(tiny_files: Files, tmp_path: Path) -> None:
    pipe = Pipeline(tiny_files.convert(tmp_path / "alone.safetensors", text_encoders=False), device="cpu")
    for options in ({"max_sequence_length": 3}, {"prompt": "a face"}, {"prompt": ["", "a face"]}):
        with pytest.raises(CheckpointError, match="or no prompt, to draw from the mask alone"):
            pipe(None, num_inference_steps=1, **options)


def test_embeddings_of_another_shape_are_refused(tiny_files: Files, tmp_path: Path) -> None:
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    path = tiny_files.convert(tmp_path / "alone.safetensors", text_encoders=False)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    for change in (
        {"prompt_embeds": torch.zeros(4, 7)},
        {"pooled_prompt_embeds": torch.zeros(1)},
        {"more": torch.ones(1)},
    ):
        tensors = load_file(path) | {f"empty_prompt.{name}": value for name, value in change.items()}
        save_file(tensors, tmp_path / "other.safetensors", metadata)
        with pytest.raises(CheckpointError, match=next(iter(change))):
            Bundle(tmp_path / "other.safetensors")


def test_without_tokenizers_there_is_no_empty_prompt(tiny_files: Files, tmp_path: Path) -> None:
    flux = tmp_path / "flux"
    shutil.copytree(tiny_files.flux, flux)
    shutil.rmtree(flux / "tokenizer_2")
    files = Files(tmp_path)
    shutil.copy(tiny_files.lora, files.lora)
    shutil.copy(tiny_files.mogle, files.mogle)
    assert not Bundle(files.convert(tmp_path / "b.safetensors", text_encoders=False)).names("empty_prompt")


def test_weights_are_held_only_while_they_are_used() -> None:
    module = nn.Linear(3, 2, bias=False, device="meta")
    weight = torch.randn(2, 3)
    _read_when_used(module, "a", {"a.weight": HeldTensor(weight.half())})
    x = torch.randn(4, 3)
    with torch.no_grad():
        assert torch.equal(module(x), x @ weight.half().float().T)
    assert module.weight.is_meta
