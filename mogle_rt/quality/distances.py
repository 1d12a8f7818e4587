"""How far a set of images is from another: distances between the features that a judge sees in them.

FID (Heusel et al., arXiv 1706.08500) and KID (Bińkowski et al., arXiv 1801.01401) are torchmetrics' own. Their intervals
need hundreds of resamples, for which the same quantities are computed here faster; tests compare the two.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mogle_rt.installed import install_command
from mogle_rt.quality import UnmeasurableError
from mogle_rt.quality.bootstrap import Counts, Figure, figure

SUBSETS, SUBSET_SIZE = 100, 1000  # of KID, as published
CMMD_SIGMA, CMMD_SCALE = 10.0, 1000.0  # as published: arXiv 2401.09603
ROWS = 1024  # of a kernel's matrix that are computed at once
Kernel = Callable[[Tensor, Tensor], Tensor]


class _Features(nn.Module):
    """Stands where torchmetrics expects a network: the features are there already."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.num_features = size

    def forward(self, features: Tensor) -> Tensor:
        return features


def fid(x: Tensor, y: Tensor, counts: tuple[Counts, Counts]) -> Figure:
    """The Fréchet distance of two sets of features, by torchmetrics.

    Args:
        x, y: features [n, F] and [m, F] of the images and of those that they are compared with.
        counts: the resamples of both, see `bootstrap.draws`: [B, n] and [B, m].

    Raises:
        UnmeasurableError: a set has fewer than two images, or torchmetrics isn't installed.
    """
    _check("fid", x, y)
    metric = _torchmetrics("fid")(_Features(x.shape[1])).set_dtype(torch.float64)
    metric.update(y.double(), real=True)
    metric.update(x.double(), real=False)
    return figure(
        float(metric.compute()), np.array([frechet(*_resampled(x, y, a, b)) for a, b in _pairs(counts)]), len(x)
    )


def frechet(x: Tensor, y: Tensor, ridge: float = 0.0) -> float:
    """The Fréchet distance of two sets of features [n, F] and [m, F].

    Args:
        x, y: the features. ridge: what is added to the diagonals of both covariances.

    """
    # With Σ = AᵀA for centred features A, the trace of (Σ₁Σ₂)^½ is the sum of the singular values of A₁A₂ᵀ, whose sides are
    # the numbers of images. Where there are more images than features, a QR decomposition makes A square first.
    centred = []
    for z in (x.double(), y.double()):
        a = (z - z.mean(0)) / (len(z) - 1) ** 0.5
        if ridge:
            a = torch.cat([a, ridge**0.5 * torch.eye(a.shape[1], dtype=a.dtype)])
        centred.append(torch.linalg.qr(a, "r").R if len(a) > a.shape[1] else a)
    a, b = centred
    shared = torch.linalg.svdvals(a @ b.T).sum()
    return float(
        (x.double().mean(0) - y.double().mean(0)).square().sum() + a.square().sum() + b.square().sum() - 2 * shared
    )


def kid(x: Tensor, y: Tensor, counts: tuple[Counts, Counts], seed: int = 0) -> Figure:
    """The kernel distance of two sets of features, by torchmetrics: the mean over 100 random subsets of 1000 images.

    Where a set has at most 1000 images, a subset is all of them, or as many as the smaller set has.

    Args:
        x, y, counts: see `fid`. seed: of the subsets.

    Raises:
        UnmeasurableError: a set has fewer than two images, or torchmetrics isn't installed.
    """
    _check("kid", x, y)
    size = min(len(x), len(y), SUBSET_SIZE)
    subsets = 1 if size == len(x) == len(y) else SUBSETS
    with warnings.catch_warnings(action="ignore"):  # that it keeps features, which are here already
        metric = _torchmetrics("kid")(_Features(x.shape[1]), subsets=subsets, subset_size=size)
    metric.update(y.double(), real=True)
    metric.update(x.double(), real=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        value = float(metric.compute()[0])
    return figure(value, kernel_distance(x, y, polynomial, counts, unbiased=True), len(x))


def cmmd(x: Tensor, y: Tensor, counts: tuple[Counts, Counts]) -> Figure:
    """The CLIP distance of two sets of embeddings of length 1 (Jayasumana et al., arXiv 2401.09603), with their kernel.

    Args:
        x, y, counts: see `fid`.

    Raises:
        UnmeasurableError: a set has fewer than two images.
    """
    _check("cmmd", x, y)
    once = (np.ones((1, len(x)), np.int64), np.ones((1, len(y)), np.int64))
    value, replicates = (CMMD_SCALE * kernel_distance(x, y, gaussian, c, unbiased=False) for c in (once, counts))
    return figure(float(value[0]), replicates, len(x))


def polynomial(x: Tensor, y: Tensor) -> Tensor:
    """KID's kernel, (x·y / F + 1)³: [n, F] and [m, F] -> [n, m]."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def gaussian(x: Tensor, y: Tensor) -> Tensor:
    """CMMD's kernel, exp(-|x - y|² / 2σ²): [n, F] and [m, F] -> [n, m]."""
    away = x.square().sum(1)[:, None] + y.square().sum(1)[None] - 2 * x @ y.T
    return torch.exp(-away / (2 * CMMD_SIGMA**2))


def kernel_distance(
    x: Tensor, y: Tensor, kernel: Kernel, counts: tuple[Counts, Counts], *, unbiased: bool
) -> NDArray[np.float64]:
    """The squared maximum mean discrepancy, of B resamples at once: [B].

    Args:
        x, y, counts: see `fid`.
        unbiased: leave out what a kernel makes of an image and itself, also where a resample has an image twice.
    """
    x, y = x.double(), y.double()
    u, v = (torch.from_numpy(c.T.copy()).double() for c in counts)  # [n, B], [m, B]
    result = -2 * _sum(x, y, u, v, kernel) / (u.sum(0) * v.sum(0))
    for z, w in ((x, u), (y, v)):
        total, pairs = _sum(z, z, w, w, kernel), w.sum(0) ** 2
        if unbiased:
            itself = torch.stack([kernel(one[None], one[None])[0, 0] for one in z])
            total, pairs = total - itself @ w.square(), pairs - w.square().sum(0)
        result = result + total / pairs
    return result.numpy()


def _sum(x: Tensor, y: Tensor, u: Tensor, v: Tensor, kernel: Kernel) -> Tensor:
    """uᵀ k(x, y) v for each resample, [B], without the whole matrix of the kernel."""
    parts = [(w * (kernel(rows, y) @ v)).sum(0) for rows, w in zip(x.split(ROWS), u.split(ROWS), strict=True)]
    return torch.stack(parts).sum(0)


def _pairs(counts: tuple[Counts, Counts]) -> zip[tuple[Counts, Counts]]:
    return zip(*counts, strict=True)


def _resampled(x: Tensor, y: Tensor, a: Counts, b: Counts) -> tuple[Tensor, Tensor]:
    return (x[np.repeat(np.arange(len(x)), a)], y[np.repeat(np.arange(len(y)), b)])


def _check(name: str, x: Tensor, y: Tensor) -> None:
    for what, z in (("images", x), ("images to compare with", y)):
        if len(z) < 2:
            raise UnmeasurableError(f"{name} needs at least two {what}, got {len(z)}; a useful figure takes thousands")


def _torchmetrics(name: str) -> Any:
    """Its metric of this name. Its package for images offers it only where torch-fidelity's network is installed, too."""
    try:
        from torchmetrics.image.fid import FrechetInceptionDistance
        from torchmetrics.image.kid import KernelInceptionDistance
    except ImportError:
        raise UnmeasurableError(
            f"{name} needs the package torchmetrics; install it with {install_command('evaluate')}"
        ) from None
    return {"fid": FrechetInceptionDistance, "kid": KernelInceptionDistance}[name]
