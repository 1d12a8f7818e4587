"""Checks the exported text encoders against those of the transformers library, which computes in float32."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mogle_rt.bundle.source import TensorSource
from mogle_rt.encoders.text_models import load_text_encoder
from mogle_rt.engines.manifest import Manifest
from mogle_rt.export.comparisons import Comparison, compare
from mogle_rt.export.run_graphs import CPU, run_built, run_exported
from mogle_rt.export.text import CLIP, T5, TEXT_GRAPHS

LARGEST_WHOLE = 500_000_000  # the most parameters of a T5 for which all of its layers are run; FLUX's has 4.8 billion
T5_LENGTHS = (9, 150)  # tokens; the second is more than the distance beyond which T5 tells no two distances apart


class FirstLayer(TensorSource):
    """A source whose T5 has its first layer only, which alone holds a table of distances."""

    def __init__(self, source: TensorSource) -> None:
        first, layers = f"{T5}.encoder.block.0.", f"{T5}.encoder.block."
        config = replace(
            source.config,
            text_encoder_2={**(source.config.text_encoder_2 or {}), "num_layers": 1, "num_decoder_layers": 1},
        )
        tensors = {n: t for n, t in source.tensors.items() if not n.startswith(layers) or n.startswith(first)}
        super().__init__(config, tensors, source.storages)
        self._source = source

    def load(self, names: Sequence[str], device: torch.device, dtype: torch.dtype | None) -> Tensor:
        """See `TensorSource.load`."""
        return self._source.load(names, device, dtype)

    def release(self, names: Sequence[str]) -> None:
        """See `TensorSource.release`."""
        self._source.release(names)


def compare_text(
    bundle: TensorSource,
    placed: TensorSource,
    folder: Path,
    manifest: Manifest,
    tolerance: Callable[[torch.dtype], float],
    progress: Callable[[str], None] | None = None,
) -> list[Comparison]:
    """Run random tokens through both text encoders and their graphs.

    Args:
        bundle, placed: the bundle, and the weights that were exported from it.
        folder, manifest: the export, which holds text encoders.
        tolerance: the largest error that is allowed where graphs compute in a dtype.
        progress: is called with the name of each comparison before it is made.
    """
    results = []
    for part in TEXT_GRAPHS:
        run, by, computed = run_exported(placed, folder, manifest)
        title, original = part, bundle
        parameters = sum(bundle.tensors[f"{part}.{name}"].numel for name in bundle.names(part))
        if part == T5 and parameters > LARGEST_WHOLE:
            title, original = f"{part} (layer 0 alone)", FirstLayer(bundle)
            run, by, computed = run_built(FirstLayer(placed), folder, manifest), "onnxruntime in float32", torch.float32
        config = getattr(original.config, part)
        encoder = load_text_encoder(part, config, original.part(part, CPU, torch.float32))
        for ids in _clip_ids(encoder.config) if part == CLIP else _t5_ids(encoder.config):
            what = f"{title}, batch {len(ids)}, {ids.shape[1]} tokens"
            if progress:
                progress(what)
            with torch.no_grad():
                result = encoder(ids)
            expected = {"pooled_prompt_embeds": result.pooler_output} if part == CLIP else {"prompt_embeds": result[0]}
            got = run(part, {"clip_ids" if part == CLIP else "t5_ids": ids})
            results.append(compare(what, by, got, expected, tolerance(computed)))
    return results


def _clip_ids(config: Any) -> list[Tensor]:
    """Two texts as long as CLIP takes them, which end in different places, with noise behind their ends."""
    words, length, end = config.vocab_size, config.max_position_embeddings, config.eos_token_id
    ids = torch.randint(0, words, (2, length), generator=torch.Generator().manual_seed(10))
    ids[ids == end] = (end + 1) % words
    ids[0, length // 3] = ids[1, length // 2] = ids[1, length - 1] = end
    return [ids]


def _t5_ids(config: Any) -> list[Tensor]:
    """Texts of two lengths."""
    g = torch.Generator().manual_seed(11)
    return [
        torch.randint(0, config.vocab_size, (3 - n, length), generator=g)
        for n, length in enumerate(T5_LENGTHS, start=1)
    ]
