"""The interface of what provides a model's tensors: a bundle, a bundle without weights, or some blocks of a bundle."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from mogle_rt.bundle.container import TensorInfo
from mogle_rt.bundle.storage import WeightStorage

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from mogle_rt.bundle.bundle import BundleConfig

LORA_DOWN = ".lora_A.weight"


class TensorSource(ABC):
    """A model's configurations and its tensors, which are read when they are requested.

    Args:
        config: all configurations.
        tensors: the available tensors, by full name, such as "transformer.proj_out.weight".
        storages: how the transformer's layers are stored that are not stored plainly, by their names in the transformer.

    Attributes:
        config, tensors, storages: as given.
    """

    def __init__(
        self,
        config: BundleConfig,
        tensors: Mapping[str, TensorInfo],
        storages: Mapping[str, WeightStorage] | None = None,
    ) -> None:
        self.config, self.tensors, self.storages = config, tensors, dict(storages or {})
        self._names: dict[str, list[str]] = {}
        for full in tensors:
            part, _, name = full.partition(".")
            self._names.setdefault(part, []).append(name)

    def names(self, part: str) -> list[str]:
        """The names of a part's tensors, without the part's prefix."""
        return self._names.get(part, [])

    def lora_ranks(self) -> dict[str, int]:
        """The rank of the LoRA on each layer that has one. The layers' names have no prefix."""
        ranks = {}
        for name in self.names("lora"):
            if name.endswith(LORA_DOWN):
                shape = self.tensors[f"lora.{name}"].shape
                ranks[name.removesuffix(LORA_DOWN)] = shape[0] if shape else 0
        return ranks

    @abstractmethod
    def load(self, names: Sequence[str], device: torch.device, dtype: torch.dtype | None) -> Tensor:
        """Return tensors stacked along their first dimension, on ``device`` and in ``dtype`` (None: as they are stored).

        The result may be a view of a file and must not be written to.
        """

    def expect(self, names: Sequence[str]) -> None:  # noqa: B027 - most sources have nothing to do
        """Hear that these tensors are read next. A source may use the time until then, and need not."""

    @abstractmethod
    def release(self, names: Sequence[str]) -> None:
        """Let the source drop these tensors from memory. If they are used again, they are read again."""

    def part(self, part: str, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """All tensors of a part, by their names without the part's prefix."""
        return {name: self.load([f"{part}.{name}"], device, dtype) for name in self.names(part)}
