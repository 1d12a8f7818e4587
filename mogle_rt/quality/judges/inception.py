"""InceptionV3 as FID and KID have it: the network of 2015 with TensorFlow's weights, in pytorch-fid's names.

It differs from torchvision's in its poolings: averages do not count the border, and the last block takes a maximum.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from mogle_rt.errors import CheckpointError
from mogle_rt.quality.judges.loading import weights_in
from mogle_rt.quality.pictures import Picture, resized

SIDE = 299  # pixels
FILE = "pt_inception-2015-12-05-6726825d.pth"
ADDRESS = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{FILE}"
OPTION = "--features"
MAPS = ("Mixed_5d", "Mixed_6e", "Mixed_7c")  # after these blocks, pictures are compared by place


def cached_weights() -> Path | None:
    """Where pytorch-fid and torch-fidelity keep the weights that they fetch, if one of them did."""
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    names = (FILE, "weights-inception-2015-12-05-6726825d.pth")
    return next((folder / name for name in names if (folder / name).is_file()), None)


class Inception:
    """The network; see `judges.contract.FeatureJudge`. Features are the 2048 means of its last maps.

    Args:
        path: the weights, a .pth of pytorch-fid or torch-fidelity, or a .safetensors with the same names.
        device: to compute on.

    Raises:
        CheckpointError: there is no such file, or it holds other weights.
    """

    def __init__(self, path: Path, device: torch.device) -> None:
        self.name = f"InceptionV3, {path.name}"
        self._device = device
        self._weights = {name: value.float().to(device) for name, value in weights_in(path, OPTION).items()}
        try:
            with torch.no_grad():
                self._run(torch.zeros(1, 3, SIDE, SIDE, device=device))
        except (KeyError, RuntimeError) as error:
            what = f"has no {error}" if isinstance(error, KeyError) else str(error)
            raise CheckpointError(
                f"{OPTION} {path}: is no InceptionV3 as FID has it: {what}; fetch {ADDRESS}"
            ) from None

    def features(self, pictures: Sequence[Picture]) -> Tensor:
        return self._run(self._input(pictures))[-1].mean((2, 3)).cpu()

    def maps(self, pictures: Sequence[Picture]) -> list[Tensor]:
        return [m.cpu() for m in self._run(self._input(pictures))]

    def _input(self, pictures: Sequence[Picture]) -> Tensor:
        """Pictures as clean-fid gives them: 299 x 299, from -1 to almost 1."""
        x = torch.stack([torch.from_numpy(resized(picture, SIDE, SIDE)) for picture in pictures])
        return (x.permute(0, 3, 1, 2).to(self._device) - 128) / 128

    @torch.no_grad()
    def _run(self, x: Tensor) -> list[Tensor]:
        """[n, 3, 299, 299] -> the maps after the blocks in `MAPS`."""
        x = self._layer(x, "Conv2d_1a_3x3", stride=2, pad=False)
        x = self._layer(x, "Conv2d_2a_3x3", pad=False)
        x = F.max_pool2d(self._layer(x, "Conv2d_2b_3x3"), 3, 2)
        x = self._layer(self._layer(x, "Conv2d_3b_1x1"), "Conv2d_4a_3x3", pad=False)
        x = F.max_pool2d(x, 3, 2)
        maps = []
        for block in ("5b", "5c", "5d", "6a", "6b", "6c", "6d", "6e", "7a", "7b", "7c"):
            name = f"Mixed_{block}"
            x = torch.cat(self._block(x, name), 1)
            if name in MAPS:
                maps.append(x)
        return maps

    def _block(self, x: Tensor, name: str) -> list[Tensor]:
        """One block's branches."""
        if name in ("Mixed_6a", "Mixed_7a"):  # halves the sides
            pooled = F.max_pool2d(x, 3, 2)
            if name == "Mixed_6a":
                deep = self._line(x, name, "branch3x3dbl_1", "branch3x3dbl_2")
                ends = [self._end(x, f"{name}.branch3x3"), self._end(deep, f"{name}.branch3x3dbl_3")]
            else:
                deep = self._line(x, name, "branch7x7x3_1", "branch7x7x3_2", "branch7x7x3_3")
                first = self._end(self._line(x, name, "branch3x3_1"), f"{name}.branch3x3_2")
                ends = [first, self._end(deep, f"{name}.branch7x7x3_4")]
            return [*ends, pooled]
        pooled = F.max_pool2d(x, 3, 1, 1) if name == "Mixed_7c" else F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
        last = self._line(pooled, name, "branch_pool")
        first = self._line(x, name, "branch1x1")
        if name.startswith("Mixed_5"):
            middle = self._line(x, name, "branch5x5_1", "branch5x5_2")
            return [first, middle, self._line(x, name, *(f"branch3x3dbl_{i}" for i in (1, 2, 3))), last]
        if name.startswith("Mixed_6"):
            middle = self._line(x, name, *(f"branch7x7_{i}" for i in (1, 2, 3)))
            return [first, middle, self._line(x, name, *(f"branch7x7dbl_{i}" for i in (1, 2, 3, 4, 5))), last]
        ends = []
        for branch, stem in (("branch3x3", ("1",)), ("branch3x3dbl", ("1", "2"))):
            y = self._line(x, name, *(f"{branch}_{i}" for i in stem))
            ends += [self._line(y, name, f"{branch}_{int(stem[-1]) + 1}{half}") for half in "ab"]
        return [first, *ends, last]

    def _line(self, x: Tensor, block: str, *names: str) -> Tensor:
        """Layers one after another that keep the sides."""
        for name in names:
            x = self._layer(x, f"{block}.{name}")
        return x

    def _end(self, x: Tensor, name: str) -> Tensor:
        return self._layer(x, name, stride=2, pad=False)

    def _layer(self, x: Tensor, name: str, *, stride: int = 1, pad: bool = True) -> Tensor:
        """A convolution, its normalisation with the statistics of training, and a ReLU."""
        w = self._weights
        kernel = w[f"{name}.conv.weight"]
        padding = (kernel.shape[2] // 2, kernel.shape[3] // 2) if pad else (0, 0)
        x = F.conv2d(x, kernel, None, stride, padding)
        mean, variance, weight, bias = (w[f"{name}.bn.{n}"] for n in ("running_mean", "running_var", "weight", "bias"))
        return F.relu(F.batch_norm(x, mean, variance, weight, bias, eps=1e-3))
