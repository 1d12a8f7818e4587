"""Prompt embeddings are equal to those of diffusers' FluxPipeline.encode_prompt."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5Tokenizer

from mogle_rt.bundle.bundle import Bundle
from mogle_rt.encoders.text import TextEncoders
from mogle_rt.encoders.text_models import load_text_encoder
from tests.checkpoints import Files
from tests.conftest import assert_close, relative_rms

PROMPTS = ["a young woman with long blond hair", "", "he has a grey beard, glasses and a green hat " * 12]


@pytest.fixture(scope="module")
def encoders(tiny_bundle: Path) -> TextEncoders:
    return TextEncoders(Bundle(tiny_bundle), torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("length", [512, 77, 9])
def test_equals_diffusers(encoders: TextEncoders, tiny_files: Files, length: int) -> None:
    theirs = FluxPipeline(
        scheduler=None,
        vae=None,
        text_encoder=CLIPTextModel.from_pretrained(tiny_files.flux / "text_encoder"),
        tokenizer=CLIPTokenizer.from_pretrained(tiny_files.flux / "tokenizer"),
        text_encoder_2=T5EncoderModel.from_pretrained(tiny_files.flux / "text_encoder_2"),
        tokenizer_2=T5Tokenizer.from_pretrained(tiny_files.flux / "tokenizer_2"),
        transformer=None,
    )
    embeds, pooled, _ = theirs.encode_prompt(PROMPTS, max_sequence_length=length, device=torch.device("cpu"))
    ours, our_pooled = encoders.encode(PROMPTS, length)
    assert ours.shape == (3, length, 24)
    assert_close(ours, embeds, rms=1e-6)
    assert_close(our_pooled, pooled, rms=1e-6)


def test_a_configuration_names_no_code(tiny_bundle: Path) -> None:
    """A configuration may name kernels, which transformers would fetch from the hub and import."""
    bundle = Bundle(tiny_bundle)
    for part, config in (
        ("text_encoder", bundle.config.text_encoder),
        ("text_encoder_2", bundle.config.text_encoder_2),
    ):
        assert config is not None
        evil = {"attn_implementation": "evil/kernel", "_attn_implementation": "evil/kernel"}
        evil |= {"experts_implementation": "evil/kernel", "_experts_implementation_internal": "evil/kernel"}
        spoilt = {
            **config,
            **evil,
            "quantization_config": {"quant_method": "fp8"},
            "auto_map": {"AutoModel": "evil--x.Y"},
        }
        model = load_text_encoder(part, spoilt, bundle.part(part, torch.device("cpu"), torch.float32))
        assert model.config._attn_implementation in ("sdpa", "eager")
        assert "evil" not in repr(model.config)
        assert not hasattr(model, "hf_quantizer")


@pytest.mark.quick
def test_words_matter(encoders: TextEncoders) -> None:
    (a, b), (pooled_a, pooled_b) = encoders.encode(["a green hat", "a green beard"], 32)
    assert relative_rms(a, b) > 0.01
    assert relative_rms(pooled_a, pooled_b) > 0.01


@pytest.mark.quick
def test_cutting_gives_a_warning(encoders: TextEncoders, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        encoders.encode(["a hat"], 64)
        assert not caplog.records
        encoders.encode(PROMPTS[2:], 16)
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) == 2
    for warning, (begin, tokenizer) in zip(
        warnings, {"CLIP reads 77": encoders.tokenizer, "T5 reads 16": encoders.tokenizer_2}.items(), strict=True
    ):
        assert warning.startswith(f"{begin} tokens; the prompt 'he has a grey beard, ")
        assert warning.endswith(f" has {len(tokenizer(PROMPTS[2], verbose=False).input_ids)} and is cut")
