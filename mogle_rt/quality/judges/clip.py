"""CLIP: embeddings of images and of texts, for CMMD, the text score, and where no other judge is given."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mogle_rt.quality.judges.loading import transformers_model
from mogle_rt.quality.pictures import Picture

DEFAULT = "openai/clip-vit-large-patch14-336"  # CMMD's own
OPTION = "--clip"


class Clip:
    """A CLIP of transformers; see `judges.contract.FeatureJudge`. Its features are embeddings of length 1.

    Args:
        spec: a folder or a hub id. device: to compute on.

    Raises:
        CheckpointError, DownloadError: see `transformers_model`.
    """

    def __init__(self, spec: str, device: torch.device) -> None:
        self._model, self._processor = transformers_model(spec, "CLIPModel", OPTION, kinds=("clip",))
        self._model.to(device)
        self._device = device
        self.name = f"CLIP, {spec}"
        self.most_tokens = int(self._model.config.text_config.max_position_embeddings)

    @torch.no_grad()
    def features(self, pictures: Sequence[Picture]) -> Tensor:
        seen = self._model.vision_model(self._pixels(pictures))
        return F.normalize(self._model.visual_projection(seen.pooler_output), dim=1).cpu()

    @torch.no_grad()
    def maps(self, pictures: Sequence[Picture]) -> list[Tensor]:
        """The patches' states after a third, two thirds and all of the layers: [n, C, patches]."""
        states = self._model.vision_model(self._pixels(pictures), output_hidden_states=True).hidden_states
        last = len(states) - 1
        return [
            states[i][:, 1:].transpose(1, 2).cpu() for i in sorted({max(1, last // 3), max(1, 2 * last // 3), last})
        ]

    @torch.no_grad()
    def texts(self, prompts: Sequence[str]) -> tuple[Tensor, int]:
        """Embeddings of length 1, [n, F]; and how many prompts were cut, because they have too many tokens."""
        tokenizer = self._processor.tokenizer
        cut = sum(len(ids) > self.most_tokens for ids in tokenizer(list(prompts), verbose=False)["input_ids"])
        tokens = tokenizer(
            list(prompts), return_tensors="pt", padding=True, truncation=True, max_length=self.most_tokens
        ).to(self._device)
        seen = self._model.text_model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])
        return F.normalize(self._model.text_projection(seen.pooler_output), dim=1).cpu(), cut

    def _pixels(self, pictures: Sequence[Picture]) -> Tensor:
        prepare = self._processor.image_processor
        return prepare(images=list(pictures), return_tensors="pt")["pixel_values"].to(self._device)
