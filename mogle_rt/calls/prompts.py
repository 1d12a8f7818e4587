"""Embed prompts, and cache the embeddings."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from mogle_rt.bundle.bundle import Bundle
from mogle_rt.encoders.cache import TensorCache
from mogle_rt.encoders.text import TextEncoders

MOST_TOLD = 1000  # words that are remembered as told; a server may meet any number

logger = logging.getLogger(__name__)


class PromptEncoder:
    """A bundle's CLIP and T5. They are loaded when a prompt is not in the cache.

    Args:
        bundle: the bundle that holds the text encoders.
        device, dtype: the device and the data type of the computation.
        cache: the embeddings of prompts, by prompt and number of T5 tokens.

    Attributes:
        streamed: whether T5's weights are read layer by layer for each new prompt, instead of being held in memory.
        offload: whether to free the text encoders after each new prompt, so that their memory is free while the
            pipeline draws.
    """

    def __init__(self, bundle: Bundle, device: torch.device, dtype: torch.dtype, cache: TensorCache) -> None:
        self.bundle, self.device, self.dtype, self.cache = bundle, device, dtype, cache
        self.encoders: TextEncoders | None = None
        self.offload = self.streamed = False
        self._told: set[str] = set()

    def stream(self, streamed: bool) -> None:
        """Choose how T5's weights are read; what is held otherwise is freed."""
        if streamed != self.streamed:
            self.streamed, self.encoders = streamed, None

    def __call__(self, prompts: list[str], tokens: int) -> tuple[Tensor, Tensor]:
        """Embed B prompts: return T5's embeddings [B, tokens, J] and CLIP's [B, P].

        Words that the encoders were not trained with are warned of, where the bundle's tokenizer tells; each word once.

        Raises:
            CheckpointError: the bundle holds no text encoders, and not the embeddings of these prompts either.
        """
        known = {p: found for p in prompts if (found := self.cache.get((p, tokens))) is not None}
        new = [p for p in dict.fromkeys(prompts) if p not in known]
        kept = self.bundle.empty_prompt(tokens) if new == [""] else None
        if kept is not None:
            known[""] = tuple(t.to(self.device, self.dtype) for t in kept)
        elif new:
            if self.encoders is None:
                self.encoders = TextEncoders(self.bundle, self.device, self.dtype, streamed=self.streamed)
            for prompt, *made in zip(new, *self.encoders.encode(new, tokens), strict=True):
                known[prompt] = tuple(t.clone() for t in made)
                self.cache.put((prompt, tokens), known[prompt])
            self._warn_of_unseen(self.encoders, new)
            if self.offload or self.streamed:
                self.encoders = None
        sequences, vectors = zip(*(known[p] for p in prompts), strict=True)
        return torch.stack(sequences), torch.stack(vectors)

    def _warn_of_unseen(self, encoders: TextEncoders, prompts: list[str]) -> None:
        """One warning for the words of new prompts that the encoders were not trained with; each word is told of once."""
        if (known := encoders.known_words) is None:
            return
        words = [word for word in known.unseen(" ".join(prompts)) if word not in self._told]
        if words:
            logger.warning("%s", known.warning(words))
            self._told = (self._told if len(self._told) < MOST_TOLD else set()) | set(words)


def repeated(x: Tensor, batch: int) -> Tensor:
    """Repeat each of the n rows batch / n times, so that images of one prompt come one after the other."""
    return x if x.shape[0] == batch else x.repeat_interleave(batch // x.shape[0], dim=0)
