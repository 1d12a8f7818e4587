"""The judge of the demo's images: a small U-Net that was trained on renders, and labels pictures with the 19 classes.

`examples.demo_checkpoint.train_segmenter` made it from other renders than those that the demo checkpoint was trained on.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from mogle_rt.bundle.shipped import DATA
from mogle_rt.config import NUM_CLASSES
from mogle_rt.masks.classes import Labels
from mogle_rt.masks.labels import resize
from mogle_rt.quality.pictures import Picture, resized, to_tensor

NAME = "demo"
WEIGHTS = DATA / "demo_parser.safetensors"
CHANNELS = (16, 32, 48, 64)
SIDE = 128  # pixels: of the pictures that it was trained on
BATCH = 8  # pictures at once


def _stage(inner: int, outer: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for channels in (inner, outer):
        layers += [nn.Conv2d(channels, outer, 3, padding=1), nn.GroupNorm(4, outer), nn.SiLU()]
    return nn.Sequential(*layers)


class Segmenter(nn.Module):
    """Pictures [B, 3, H, W] in [-1, 1] -> logits [B, 19, H, W]. The coordinates of the pixels are two more channels."""

    def __init__(self) -> None:
        super().__init__()
        c = CHANNELS
        self.stem = nn.Conv2d(5, c[0], 3, padding=1)
        self.down = nn.ModuleList(_stage(c[max(0, i - 1)], c[i]) for i in range(len(c)))
        self.up = nn.ModuleList(_stage(c[i] + c[i + 1], c[i]) for i in range(len(c) - 1))
        self.head = nn.Conv2d(c[0], NUM_CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self._run(x)[0])

    def features(self, x: Tensor) -> Tensor:
        """Means and deviations over the picture of the two deepest maps, [B, 2 * (48 + 64)], for Fréchet distances."""
        return torch.cat([part for m in self.maps(x) for part in (m.mean((2, 3)), m.std((2, 3)))], 1)

    def maps(self, x: Tensor) -> list[Tensor]:
        """The two deepest maps, [B, 48, H / 4, W / 4] and [B, 64, H / 8, W / 8]."""
        return self._run(x)[1]

    def _run(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        B, _, H, W = x.shape
        rows, columns = torch.meshgrid(torch.linspace(-1, 1, H), torch.linspace(-1, 1, W), indexing="ij")
        place = torch.stack([rows, columns]).expand(B, -1, -1, -1)
        x = self.stem(torch.cat([x, place], 1))
        maps = []
        for i, stage in enumerate(self.down):
            x = stage(x if i == 0 else F.max_pool2d(x, 2))
            maps.append(x)
        for i in reversed(range(len(self.up))):
            x = self.up[i](torch.cat([maps[i], F.interpolate(x, scale_factor=2.0)], 1))
        return x, maps[-2:]

    @torch.no_grad()
    def labels(self, x: Tensor) -> Tensor:
        """The most likely class of each pixel, [B, H, W]."""
        return torch.cat([self(part).argmax(1) for part in x.split(BATCH)])


def load_segmenter() -> Segmenter:
    """The trained network, on the CPU."""
    model = Segmenter()
    model.load_state_dict({n: t.float() for n, t in load_file(WEIGHTS).items()})
    return model.eval().requires_grad_(False)


class DemoJudge:
    """The network as a parser, and as one who sees features; see `judges.contract`. It computes on the CPU.

    Pictures of another size than 128 x 128 are resized to it, and what was found in them back.
    """

    def __init__(self) -> None:
        self.name = NAME
        self._network = load_segmenter()

    def labels(self, pictures: Sequence[Picture]) -> list[Labels]:
        found = self._network.labels(self._input(pictures)).byte().numpy()
        return [resize(one, *picture.shape[:2]) for one, picture in zip(found, pictures, strict=True)]

    def features(self, pictures: Sequence[Picture]) -> Tensor:
        return torch.cat([self._network.features(x) for x in self._input(pictures).split(BATCH)])

    def maps(self, pictures: Sequence[Picture]) -> list[Tensor]:
        return self._network.maps(self._input(pictures))

    @staticmethod
    def _input(pictures: Sequence[Picture]) -> Tensor:
        return to_tensor([resized(picture, SIDE, SIDE) for picture in pictures])
