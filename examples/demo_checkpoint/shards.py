"""Reads the files of `latents` for training: batches of one size, which are drawn from all files of this size."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from examples.demo_checkpoint.attributes import Attributes
from examples.demo_checkpoint.latents import BLACK, WHITE
from mogle_rt.config import NUM_CLASSES, VAE_SCALE

Size = tuple[int, int]
FEWEST_CELLS = 3  # that a region must have for its average to count


def no_mask() -> Tensor:
    """The rows [20] of condition pictures of a mask that is all background."""
    rows = torch.full((1 + NUM_CLASSES,), BLACK)
    rows[1] = WHITE
    return rows


@dataclass
class Batch:
    """Pictures of one size.

    Attributes:
        faces: [B, N, 64]. masks: [B, 20, N, 64]. people: B, what each shows. grid: rows and columns of tokens.
        regions: [B, 19, 4 N], weights that average over each region's latent cells; 0 for regions of too few cells.
        nothing: [20, N, 64], the mask of a picture that is all background, which stands for no mask.
    """

    faces: Tensor
    masks: Tensor
    regions: Tensor
    people: list[Attributes]
    grid: tuple[int, int]
    nothing: Tensor


def region_averages(cells: Tensor) -> Tensor:
    """The class of each cell [B, C] (255: none) -> [B, 19, C], see `Batch`."""
    inside = (cells[:, None] == torch.arange(NUM_CLASSES)[:, None]).float()
    count = inside.sum(-1, keepdim=True)
    return torch.where(count >= FEWEST_CELLS, inside / count.clamp(min=1), 0)


class Shards:
    """The files of a folder, which are mapped into memory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[Path, dict[str, Any]] = {}
        self.refresh()
        if not self._files:
            raise SystemExit(f"{folder}: has no latents; make them with examples.demo_checkpoint.latents")

    def refresh(self) -> None:
        """See the files that were added meanwhile."""
        for path in sorted(self.folder.glob("*.pt")):
            if path not in self._files:
                stored = torch.load(path, weights_only=True, mmap=True)
                stored["people"] = [Attributes(**a) for a in json.loads(stored["people"])]
                stored["size"] = tuple(int(side) for side in path.name.split("-")[0].split("x"))
                self._files[path] = stored

    def __len__(self) -> int:
        return sum(len(f["faces"]) for f in self._files.values())

    def sizes(self) -> list[Size]:
        """The sizes that are there, height and width."""
        return sorted({f["size"] for f in self._files.values()})

    def draw(
        self,
        size: Size,
        count: int,
        rough: float,
        drop: Callable[[Tensor, torch.Generator], Tensor],
        generator: torch.Generator,
    ) -> Batch:
        """A random batch. rough: the share of masks that are rough. drop: changes the rows of condition pictures."""

        def below(limit: int) -> int:
            return int(torch.randint(limit, (1,), generator=generator))

        files = [f for f in self._files.values() if f["size"] == size]
        chosen = [(f, below(len(f["faces"]))) for f in (files[below(len(files))] for _ in range(count))]
        is_rough = torch.rand(count, generator=generator) < rough
        kinds = ["rough" if r else "index" for r in is_rough]
        index = drop(torch.stack([f[kind][i] for (f, i), kind in zip(chosen, kinds, strict=True)]), generator)
        return self._batch(chosen, index)

    def all(self, size: Size, count: int) -> Iterator[Batch]:
        """Every picture of a size with its exact mask, ``count`` at a time."""
        chosen = [(f, i) for f in self._files.values() if f["size"] == size for i in range(len(f["faces"]))]
        for start in range(0, len(chosen), count):
            some = chosen[start : start + count]
            yield self._batch(some, torch.stack([f["index"][i] for f, i in some]))

    def _batch(self, chosen: list[tuple[dict[str, Any], int]], index: Tensor) -> Batch:
        height, width = chosen[0][0]["size"]
        return Batch(
            faces=torch.stack([f["faces"][i] for f, i in chosen]).float(),
            masks=torch.stack([f["rows"][rows] for (f, _), rows in zip(chosen, index, strict=True)]).float(),
            regions=region_averages(torch.stack([f["cells"][i] for f, i in chosen])),
            people=[f["people"][i] for f, i in chosen],
            grid=(height // (2 * VAE_SCALE), width // (2 * VAE_SCALE)),
            nothing=chosen[0][0]["rows"][no_mask()].float(),
        )
