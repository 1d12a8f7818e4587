"""What the measures ask of a judge, whatever network it has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from mogle_rt.masks.classes import Labels
from mogle_rt.quality.pictures import Picture


class FeatureJudge(Protocol):
    """Sees features in images.

    Attributes:
        name: of the network and its weights, for the report.
    """

    name: str

    def features(self, pictures: Sequence[Picture]) -> Tensor:
        """One vector for each picture: float32 [n, F], on the CPU."""

    def maps(self, pictures: Sequence[Picture]) -> list[Tensor]:
        """Features with their places, of one or more depths: each float32 [n, C, ...], on the CPU."""


class Parser(Protocol):
    """Finds the 19 classes in images.

    Attributes:
        name: of the network and its weights, for the report.
    """

    name: str

    def labels(self, pictures: Sequence[Picture]) -> list[Labels]:
        """The class of each pixel, uint8 [H, W] as large as the picture."""
