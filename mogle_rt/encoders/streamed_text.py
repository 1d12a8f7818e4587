"""T5 with weights that are read layer by layer, for every prompt anew.

T5-XXL has 4.8 billion parameters, more than half as many as the steps of FLUX, and is used once for a prompt. Here its
weights are never in memory together: accelerate's hooks ask for those of a layer just before the layer is computed, and
let them go right after. The embeddings are the same to the bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from mogle_rt.bundle.bundle import Bundle
from mogle_rt.bundle.schema import check_names
from mogle_rt.encoders.text_models import empty_t5, text_encoder_shapes

PART = "text_encoder_2"
TIED = ("shared.weight", "encoder.embed_tokens.weight")  # two names of one tensor; a file holds either


class StoredWeights(Mapping[str, Tensor]):
    """T5's tensors on the CPU, each read when it is asked for; the file's pages of the one before are given back.

    Args:
        bundle: where they are.
        dtype: in which they are read.
    """

    def __init__(self, bundle: Bundle, dtype: torch.dtype) -> None:
        self._bundle, self._dtype = bundle, dtype
        self._names = {name: name for name in bundle.names(PART)}
        for name in TIED:
            self._names.setdefault(name, next((other for other in TIED if other in self._names), name))
        self._last: list[str] = []

    def __getitem__(self, name: str) -> Tensor:
        self._bundle.release(self._last)
        self._last = [f"{PART}.{self._names[name]}"]
        return self._bundle.load(self._last, torch.device("cpu"), self._dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def streamed_t5(bundle: Bundle, config: Mapping[str, Any], device: torch.device, dtype: torch.dtype) -> Any:
    """T5's encoder, which holds no weights.

    Args:
        bundle: where the weights are read from.
        config: T5's configuration.
        device, dtype: where and in what to compute.

    Raises:
        CheckpointError: the configuration is not valid, or the tensors don't match it.
    """
    from accelerate import cpu_offload

    stored = {name: bundle.tensors[f"{PART}.{name}"].shape for name in bundle.names(PART)}
    check_names(stored, text_encoder_shapes(PART, config, stored), f"{bundle.path} ({PART})")
    weights = StoredWeights(bundle, dtype)
    return cpu_offload(empty_t5(config, dtype), execution_device=device, state_dict=weights)
