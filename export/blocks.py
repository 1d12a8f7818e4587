"""Some blocks of a model as a model of their own, for the verification of models that are too large for memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from mogle_rt.bundle.source import TensorSource


class SelectedBlocks(TensorSource):
    """The tensors of a source with only some of its blocks, which get new numbers.

    Args:
        source: all blocks.
        double, single: the numbers of the blocks that are kept, in their new order.
    """

    def __init__(self, source: TensorSource, *, double: Sequence[int], single: Sequence[int]) -> None:
        transformer = replace(source.config.transformer, num_layers=len(double), num_single_layers=len(single))
        chosen = {"transformer_blocks": double, "single_transformer_blocks": single}
        self._source = source
        self._stored: dict[str, str] = {}  # names here -> names in the source
        for stored in source.tensors:
            owner, _, rest = stored.partition(".")
            stack, _, inside = rest.partition(".")
            if owner not in ("transformer", "lora") or stack not in chosen:
                self._stored[stored] = stored
                continue
            number, _, leaf = inside.partition(".")
            if int(number) in chosen[stack]:
                self._stored[f"{owner}.{stack}.{chosen[stack].index(int(number))}.{leaf}"] = stored
        tensors = {name: source.tensors[stored] for name, stored in self._stored.items()}
        layers = {name.rpartition(".")[0]: stored.rpartition(".")[0] for name, stored in self._stored.items()}
        storages = {
            name.removeprefix("transformer."): source.storages[stored.removeprefix("transformer.")]
            for name, stored in layers.items()
            if stored.removeprefix("transformer.") in source.storages
        }
        super().__init__(replace(source.config, transformer=transformer), tensors, storages)

    def load(self, names: Sequence[str], device: torch.device, dtype: torch.dtype | None) -> Tensor:
        """See `TensorSource.load`."""
        return self._source.load([self._stored[name] for name in names], device, dtype)

    def release(self, names: Sequence[str]) -> None:
        """See `TensorSource.release`."""
        self._source.release([self._stored[name] for name in names])
