"""Embed prompts as diffusers' FluxPipeline does: CLIP gives a pooled vector, T5 gives a sequence."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from mogle_rt.bundle.bundle import Bundle
from mogle_rt.encoders.streamed_text import streamed_t5
from mogle_rt.encoders.text_models import load_text_encoder
from mogle_rt.encoders.tokenizers import load_tokenizer, without_panic
from mogle_rt.encoders.words import known_words
from mogle_rt.errors import CheckpointError
from mogle_rt.torch_api.settings import settled

logger = logging.getLogger(__name__)


class TextEncoders:
    """CLIP and T5 with their tokenizers.

    Args:
        bundle: a bundle that holds text encoders.
        device, dtype: the device and the data type of the computation.
        streamed: read T5's weights layer by layer for each prompt, instead of holding them in memory.

    Attributes:
        known_words: the words that the encoders were trained with, or None if the tokenizer doesn't tell.

    Raises:
        CheckpointError: the bundle was made without text encoders, or they don't match their configuration.
    """

    @settled()
    def __init__(self, bundle: Bundle, device: torch.device, dtype: torch.dtype, *, streamed: bool = False) -> None:
        if not bundle.has_text_encoders:
            raise CheckpointError(
                f"{bundle.path}: holds no text encoders; pass prompt_embeds and pooled_prompt_embeds instead of a prompt"
                + (", or no prompt, to draw from the mask alone" if bundle.names("empty_prompt") else "")
            )
        config = bundle.config
        assert config.text_encoder is not None
        assert config.text_encoder_2 is not None
        self.device = device
        self.tokenizer = load_tokenizer("tokenizer", bundle.files("tokenizer"))
        self.tokenizer_2 = load_tokenizer("tokenizer_2", bundle.files("tokenizer_2"))
        self.known_words = known_words(self.tokenizer_2)
        self.clip = load_text_encoder("text_encoder", config.text_encoder, bundle.part("text_encoder", device, dtype))
        self.t5 = (
            streamed_t5(bundle, config.text_encoder_2, device, dtype)
            if streamed
            else load_text_encoder(
                "text_encoder_2", config.text_encoder_2, bundle.part("text_encoder_2", device, dtype)
            )
        )

    @settled()
    def encode(self, prompts: list[str], max_sequence_length: int) -> tuple[Tensor, Tensor]:
        """Embed prompts.

        Args:
            prompts: B texts. Text beyond CLIP's 77 tokens, or beyond ``max_sequence_length`` T5 tokens, is cut off with
                a warning.
            max_sequence_length: the number of T5 tokens, T, to which every prompt is padded.

        Returns:
            prompt_embeds [B, T, J] and pooled_prompt_embeds [B, P].
        """
        clip_length = self.clip.config.max_position_embeddings
        pooled = self.clip(self._tokens(self.tokenizer, "CLIP", prompts, clip_length, self.clip)).pooler_output
        sequence = self.t5(self._tokens(self.tokenizer_2, "T5", prompts, max_sequence_length, self.t5))[0]
        return sequence, pooled

    def _tokens(self, tokenizer: Any, name: str, prompts: list[str], length: int, model: Any) -> Tensor:
        def tokenize(**options: Any) -> Any:
            what = f"{name}'s tokenizer can't read this prompt"
            return without_panic(lambda: tokenizer(prompts, **options).input_ids, what)

        ids = tokenize(return_tensors="pt", max_length=length, padding="max_length", truncation=True)
        words = model.config.vocab_size
        if ids.shape != (len(prompts), length) or ids.min() < 0 or ids.max() >= words:
            raise CheckpointError(
                f"{name}'s tokenizer gives {list(ids.shape)} numbers up to {int(ids.max())}, its encoder takes "
                f"{[len(prompts), length]} up to {words - 1}: the bundle's parts don't fit each other"
            )
        for prompt, full in zip(prompts, tokenize(verbose=False), strict=True):
            if len(full) > length:
                logger.warning(
                    "%s reads %d tokens; the prompt %r has %d and is cut", name, length, prompt[:60], len(full)
                )
        return ids.to(self.device)
