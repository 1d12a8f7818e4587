"""Prompts as embeddings: ``embed`` writes them, and ``generate --embeds`` draws from them as from the prompts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mogle_rt import InputError, Pipeline
from mogle_rt.bundle.bundle import Bundle
from mogle_rt.jobs.embeddings import EmbeddedPrompts, write_embeddings
from tests.apps.test_cli import QUICK, draw_mask, images_in, one_thread, pixels, prompts_of, run
from tests.checkpoints import Files


def test_embedded_prompts_draw_the_same_images(tiny_bundle: Path, tiny_files: Files, tmp_path: Path) -> None:
    """A bundle without text encoders can draw from them as well."""
    masks = [draw_mask(tmp_path / "masks" / f"{name}.png", seed=i) for i, name in enumerate("ab")]
    masks[0].with_suffix(".txt").write_text("a man")
    masks[1].with_suffix(".txt").write_text("a woman")
    file, alone = tmp_path / "p.safetensors", tiny_files.convert(tmp_path / "alone.safetensors", text_encoders=False)
    with one_thread():
        assert (
            run(
                "embed",
                tiny_bundle,
                "a hat",
                "-m",
                tmp_path / "masks",
                "-o",
                file,
                "--device",
                "cpu",
                "--dtype",
                "fp32",
            ).code
            == 0
        )
        assert EmbeddedPrompts.read(file).prompts == ("a hat", "a man", "a woman")
        arguments = ("-m", tmp_path / "masks", "--seed", 1, *QUICK)
        for name, options in (("texts", ()), ("hat", ("-p", "a hat"))):
            expected, found = tmp_path / f"{name}_expected", tmp_path / f"{name}_found"
            assert run("generate", tiny_bundle, *arguments, *options, "-o", expected).code == 0
            result = run("generate", alone, *arguments, *options, "-o", found, "--embeds", file, "--batch-size", 2)
            assert result.code == 0, result.err
            assert prompts_of(found) == prompts_of(expected)
            for a, b in zip(images_in(expected), images_in(found), strict=True):
                difference = torch.frombuffer(bytearray(pixels(a)), dtype=torch.uint8).int()
                difference -= torch.frombuffer(bytearray(pixels(b)), dtype=torch.uint8).int()
                assert difference.abs().max() <= 1  # the batch adds in another order
    embeddings = load_file(file)  # its tensors are arguments of a call in Python
    pipe = Pipeline(alone, device="cpu", dtype="fp32")
    out = pipe([masks[0]] * 3, num_inference_steps=1, height=32, width=48, **embeddings)
    assert len(out.images) == 3


def embedded(path: Path, *prompts: str) -> EmbeddedPrompts:
    write_embeddings(path, prompts, torch.zeros(len(prompts), 3, 4), torch.zeros(len(prompts), 5), "hash")
    return EmbeddedPrompts.read(path)


def test_which_prompt_is_a_mask_s(tmp_path: Path) -> None:
    one, two = embedded(tmp_path / "1", "x"), embedded(tmp_path / "2", "x", "y")
    assert one.prompts_of_masks(None, ["", "", ""]) == ["x"] * 3
    assert two.prompts_of_masks(None, ["", ""]) == ["x", "y"]
    assert two.prompts_of_masks(None, ["y", "x"]) == ["y", "x"]  # the masks' own texts
    assert two.prompts_of_masks(["y", "y", "x"], ["y", "y", "x"]) == ["y", "y", "x"]
    with pytest.raises(InputError, match="holds 2 prompts for 3 masks"):
        two.prompts_of_masks(None, ["", "", ""])
    with pytest.raises(InputError, match="holds no embedding of 'z'"):
        two.prompts_of_masks(["z"], ["z"])


def test_other_files_are_refused(tiny_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no embeddings")
    save_file({"prompt_embeds": torch.zeros(1, 2, 3), "pooled_prompt_embeds": torch.zeros(1, 3)}, tmp_path / "bare")
    for name, message in (("absent", "no such file"), ("text", "holds no embeddings"), ("bare", "holds no embeddings")):
        with pytest.raises(InputError, match=message):
            EmbeddedPrompts.read(tmp_path / name)
        result = run("generate", tiny_bundle, "--embeds", tmp_path / name, "-o", tmp_path / "x.png")
        assert (result.code, result.err.count("\n")) == (1, 1)
    with pytest.raises(InputError, match="holds no embeddings"):
        EmbeddedPrompts.read(tiny_bundle)


def test_embed_refuses(tiny_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "there").write_text("")
    for arguments, message in (
        (("-o", tmp_path / "new"), "give a prompt at least"),
        (("a", "-o", tmp_path / "there"), "exists already"),
        (("a", "-o", tmp_path / "there" / "new"), "is a file, not a folder"),
        (("a", "-o", tmp_path / "new", "--device", "gpu"), "device must be cpu"),
    ):
        result = run("embed", tiny_bundle, *arguments)
        assert result.code == 1
        assert message in result.err
    assert not (tmp_path / "new").exists()
    assert Bundle(tiny_bundle).empty_prompt(512) is None
