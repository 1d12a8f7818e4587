"""Memory that the products of a model use one after the other, so that it is there once and not once for each layer."""

from __future__ import annotations

import math

import torch
from torch import Tensor


class Scratch:
    """Rooms by what they are used for. A room never moves: whoever has taken it holds it, even when a larger one follows.

    Rooms come as large as the largest that was announced, so that one serves all layers.
    """

    def __init__(self) -> None:
        self._announced: dict[str, int] = {}
        self._rooms: dict[tuple[str, torch.device, torch.dtype], Tensor] = {}

    def announce(self, use: str, numel: int) -> None:
        """A room of so many elements is going to be taken."""
        self._announced[use] = max(numel, self._announced.get(use, 0))

    def take(self, use: str, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
        """Uninitialised memory of this shape, which other takers of the same use share."""
        numel, key = math.prod(shape), (use, device, dtype)
        room = self._rooms.get(key)
        if room is None or room.numel() < numel:
            room = torch.empty(max(numel, self._announced.get(use, 0)), device=device, dtype=dtype)
            self._rooms[key] = room
        return room[:numel].view(shape)
