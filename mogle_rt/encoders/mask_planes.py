"""The encoded pictures of a batch of masks: each distinct picture is kept once, with an index of who sees which."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


@dataclass(frozen=True)
class MaskPlanes:
    """The encoded pictures of B masks without repetitions.

    Each mask has 20 pictures, one for each expert: the whole mask in the palette's colours, then a black and white
    picture of each of the 19 classes. All classes that a mask lacks have the same black picture, and masks of one batch
    often have more pictures in common.

    Attributes:
        planes: [P, N, 64], packed VAE latents of the distinct pictures, 1 <= P <= 20 B.
        index: integers [B, 20] from 0 to P - 1: the plane that each expert of each image sees. It is a NumPy array, so
            reading it never waits for a GPU.

    Raises:
        ValueError: a shape is wrong, or the index names a plane that doesn't exist.
    """

    planes: Tensor
    index: NDArray[np.int32]

    def __post_init__(self) -> None:
        if self.planes.dim() != 3:
            raise ValueError(f"planes must be [P, N, 64], got {list(self.planes.shape)}")
        if self.index.ndim != 2 or self.index.dtype.kind != "i":
            raise ValueError(f"index must be integers [B, 20], got {self.index.dtype} {list(self.index.shape)}")
        if self.index.size and not 0 <= self.index.min() <= self.index.max() < len(self.planes):
            raise ValueError(
                f"index must name planes 0 to {len(self.planes) - 1}, got {self.index.min()} to {self.index.max()}"
            )

    @classmethod
    def from_stacked(cls, mask_latents: Tensor) -> MaskPlanes:
        """Find the pictures that are equal bit by bit. This copies all of them to the CPU, and waits for a GPU.

        Args:
            mask_latents: [B, 20, N, 64], every expert's picture. Meta and fake tensors have no contents, so all of
                their pictures count as distinct.
        """
        every, first = mask_latents.flatten(0, 1), dict[Hashable, int]()
        numbers = [first.setdefault(content, len(first)) for content in _contents(every)]
        kept = [numbers.index(number) for number in range(len(first))]
        planes = every if len(kept) == len(every) else torch.stack([every[number] for number in kept])
        return cls(planes, np.array(numbers, dtype=np.int32).reshape(mask_latents.shape[:2]))

    @property
    def batch(self) -> int:
        """The number of images, B."""
        return len(self.index)

    @property
    def tokens(self) -> int:
        """The number of tokens in a picture, N."""
        return self.planes.shape[1]

    def to(self, device: torch.device, dtype: torch.dtype) -> MaskPlanes:
        """The same pictures on another device or in another dtype."""
        return replace(self, planes=self.planes.to(device, dtype))

    def repeated(self, batch: int) -> MaskPlanes:
        """Repeat each of the B masks for batch / B consecutive images, without copying a picture."""
        return replace(self, index=self.index.repeat(batch // self.batch, axis=0))

    def seen_by(self, expert: int) -> Tensor:
        """The pictures that one expert sees: [B, N, 64], a copy."""
        return torch.stack([self.planes[number] for number in self.index[:, expert].tolist()])

    def stacked(self) -> Tensor:
        """Every expert's picture: [B, 20, N, 64], a copy."""
        index = torch.tensor(self.index.reshape(-1).tolist(), device=self.planes.device)
        return self.planes.index_select(0, index).unflatten(0, self.index.shape)


def _contents(pictures: Tensor) -> list[Hashable]:
    """A key for each of the pictures [P, …]. Keys are equal where pictures are equal bit by bit."""
    if pictures.is_meta or isinstance(pictures, FakeTensor):
        return list(range(len(pictures)))
    return [picture.tobytes() for picture in pictures.contiguous().view(torch.uint8).cpu().numpy()]
