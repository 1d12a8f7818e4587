"""An exact group norm for the VAE on a CPU, where its activations are in the channels-last layout.

oneDNN's convolutions work in this layout. If they get PyTorch's default layout, they convert their inputs and outputs,
which takes up to a tenth of the VAE's time from 256 x 256 pixels on. But PyTorch's group norm sums channels-last
activations one pixel after the other. Where most pixels are equal, as within a region, this can lose all of float32's
digits. `GroupNorm` keeps nearly all of them: its error is about twice that of PyTorch's norm in the default layout.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Channels last is used for pictures of at least this many pixels. Smaller ones would take up to a fifth longer with it
# (measured on an AMD EPYC, Zen 4).
LEAST_PIXELS = 256 * 256
MOST_SUMMED = 64  # the most pixels that are summed one after the other


def arranged(x: Tensor, pixels: int) -> Tensor:
    """Return the VAE's input [B, C, h, w] in the fastest memory layout for a picture of this many pixels."""
    last = x.device.type == "cpu" and x.dtype == torch.float32 and pixels >= LEAST_PIXELS
    return x.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def exact_norms(vae: nn.Module) -> None:
    """Replace every group norm of PyTorch in ``vae`` by `GroupNorm`, in place, with the same weights."""
    for module in list(vae.modules()):
        for name, norm in module.named_children():
            if type(norm) is nn.GroupNorm:
                setattr(module, name, GroupNorm(norm))


class GroupNorm(nn.GroupNorm):
    """A group norm that is also exact in the channels-last layout.

    Args:
        norm: the group norm whose weights and settings it takes over.
    """

    def __init__(self, norm: nn.GroupNorm) -> None:
        super().__init__(norm.num_groups, norm.num_channels, norm.eps, affine=False)
        self.affine, self.weight, self.bias = norm.affine, norm.weight, norm.bias

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x: [B, C, h, w], or any other shape that PyTorch's group norm accepts."""
        ours = x.dim() == 4 and x.device.type == "cpu" and x.dtype == torch.float32
        differentiated = torch.is_grad_enabled() and x.requires_grad
        last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
        if not (ours and last) or differentiated:
            return super().forward(x)
        if len(x) == 1:
            return self._one(x)
        out = torch.empty_like(x)
        for image, into in zip(x.split(1), out.split(1), strict=True):
            into.copy_(self._one(image))
        return out

    def _one(self, x: Tensor) -> Tensor:
        """Normalise one image: sum a few pixels at a time, combine the sums per group, and apply them in one pass."""
        _, C, h, w = x.shape
        summed = math.gcd(h * w, MOST_SUMMED)
        parts = x.permute(0, 2, 3, 1).reshape(1, summed, 1, -1).permute(0, 3, 1, 2)
        means, variances = torch.ops.aten.batch_norm_update_stats(parts, None, None, 0.0)
        means, variances = (s.view(h * w // summed, self.num_groups, -1) for s in (means, variances))
        mean = _average(means)
        variance = _average(variances + (means - mean).square())
        mean, variance = (s.expand(1, -1, means.shape[2]).reshape(C) for s in (mean, variance))
        return F.batch_norm(x, mean, variance, self.weight, self.bias, eps=self.eps)


def _average(x: Tensor) -> Tensor:
    """[n, G, c] -> [1, G, 1], one dimension at a time, because PyTorch is less exact when it sums both at once."""
    return x.mean(0, keepdim=True).mean(2, keepdim=True)
