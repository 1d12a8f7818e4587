"""Distances between sets of features are those of torchmetrics and of the papers, and their intervals are honest."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from mogle_rt.errors import InputError
from mogle_rt.quality.bootstrap import draws, figure, of_mean
from mogle_rt.quality.distances import (
    cmmd,
    fid,
    frechet,
    gaussian,
    kernel_distance,
    kid,
    polynomial,
)


class Identity(nn.Module):
    """Takes features for images. Written anew here, so that the package's own is not the judge of itself."""

    num_features = 12

    def forward(self, features: Tensor) -> Tensor:
        return features


def features(n: int, m: int, F: int = 12) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(n + m)
    mix = torch.randn(F, F, generator=g, dtype=torch.float64)
    return (
        torch.randn(n, F, generator=g, dtype=torch.float64) @ mix,
        torch.randn(m, F, generator=g, dtype=torch.float64) @ mix * 1.2 + 0.3,
    )


pytestmark = pytest.mark.filterwarnings("ignore:Metric `Kernel Inception Distance`")


def once(*sizes: int) -> tuple[np.ndarray, np.ndarray]:
    n, m = sizes
    return np.ones((1, n), np.int64), np.ones((1, m), np.int64)


def torchmetrics_fid(x: Tensor, y: Tensor) -> float:
    metric = FrechetInceptionDistance(Identity()).set_dtype(torch.float64)
    metric.update(y, real=True)
    metric.update(x, real=False)
    return float(metric.compute())


@pytest.mark.quick
@pytest.mark.parametrize(("n", "m"), [(40, 40), (60, 25), (20, 90)])
def test_fid_is_torchmetrics(n: int, m: int) -> None:
    x, y = features(n, m)
    want = torchmetrics_fid(x, y)
    assert want > 1
    assert fid(x, y, once(n, m)).value == pytest.approx(want, rel=1e-6)
    assert frechet(x, y) == pytest.approx(want, rel=1e-6)  # that of the intervals


def test_fid_of_fewer_images_than_features() -> None:
    """Both covariances are then singular. In numbers of 64 bits the root of a zero is some 1e-8 of the largest one."""
    x, y = features(8, 7)
    assert frechet(x, y) == pytest.approx(torchmetrics_fid(x, y), rel=1e-6)
    assert frechet(x, x) == pytest.approx(0, abs=1e-9)


def test_a_ridge_is_added_to_both_covariances() -> None:
    x, y = features(30, 30)
    a, b = (torch.cov(z.T) + 0.5 * torch.eye(12, dtype=torch.float64) for z in (x, y))
    shared = torch.linalg.eigvals(a @ b).sqrt().real.sum()
    want = (x.mean(0) - y.mean(0)).square().sum() + a.trace() + b.trace() - 2 * shared
    assert frechet(x, y, 0.5) == pytest.approx(float(want), rel=1e-9)


@pytest.mark.parametrize(("n", "m"), [(30, 30), (30, 45)])
def test_kid_is_torchmetrics(n: int, m: int) -> None:
    x, y = features(n, m)
    metric = KernelInceptionDistance(Identity(), subsets=1 if n == m else 100, subset_size=30)
    metric.update(y, real=True)
    metric.update(x, real=False)
    torch.manual_seed(3)
    want = float(metric.compute()[0])
    state = torch.get_rng_state()
    assert kid(x, y, once(n, m), seed=3).value == pytest.approx(want, rel=1e-6)
    assert torch.equal(torch.get_rng_state(), state)  # a program's random numbers are not touched
    if n == m:  # that of the intervals is of all images
        assert kernel_distance(x, y, polynomial, once(n, m), unbiased=True)[0] == pytest.approx(want, rel=1e-6)


def test_kid_without_bias_is_nothing_between_halves_of_one_set() -> None:
    """A resample in which an image stands twice must not count how alike the image is to itself."""
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 150, 4, generator=g, dtype=torch.float64)
    counts = draws(np.arange(150), 200, 1), draws(np.arange(150), 200, 2)
    values = kernel_distance(x, y, polynomial, counts, unbiased=True)
    point = kernel_distance(x, y, polynomial, once(150, 150), unbiased=True)[0]
    assert abs(values.mean() - point) < 3 * values.std() / 200**0.5


def test_cmmd_is_the_published_formula() -> None:
    x, y = (nn.functional.normalize(z.float(), dim=1) for z in features(20, 33))
    gamma = 1 / (2 * 10**2)

    def mean(a: Tensor, b: Tensor) -> Tensor:
        return torch.exp(-gamma * torch.cdist(a.double(), b.double()) ** 2).mean()

    want = 1000 * (mean(x, x) + mean(y, y) - 2 * mean(x, y))
    assert cmmd(x, y, once(20, 33)).value == pytest.approx(float(want), rel=1e-9)


def test_kernels_are_summed_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = features(30, 20)
    counts = draws(np.arange(30), 5, 0), draws(np.arange(20), 5, 1)
    whole = kernel_distance(x, y, gaussian, counts, unbiased=True)
    monkeypatch.setattr("mogle_rt.quality.distances.ROWS", 7)
    np.testing.assert_allclose(kernel_distance(x, y, gaussian, counts, unbiased=True), whole, rtol=1e-12)


def test_a_resample_is_the_set_that_it_draws() -> None:
    x, y = features(9, 8)
    counts = draws(np.arange(9), 3, 0), draws(np.arange(8), 3, 1)
    values = kernel_distance(x, y, gaussian, counts, unbiased=False)
    for a, b, value in zip(*counts, values, strict=True):
        drawn = x[np.repeat(np.arange(9), a)], y[np.repeat(np.arange(8), b)]
        assert kernel_distance(*drawn, gaussian, once(9, 8), unbiased=False)[0] == pytest.approx(value, rel=1e-9)


def test_a_distance_needs_two_images() -> None:
    x, y = features(5, 1)
    for measure in (fid, kid, cmmd):
        with pytest.raises(InputError, match="needs at least two images to compare with, got 1"):
            measure(x, y, once(5, 1))


def test_the_interval_of_a_mean_covers_it_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for i in range(200):
        found = of_mean(rng.normal(size=60), np.arange(60), 200, i)
        assert found.low is not None
        assert found.high is not None
        hits += found.low < 0 < found.high
    assert 0.88 < hits / 200 < 0.99  # 95 %, less what 60 values and 200 resamples miss it by


def test_the_interval_of_a_distance_holds_its_value() -> None:
    """Every resample's distance is larger than the value; the interval lies about the value nevertheless."""
    x, y = features(30, 30)
    counts = draws(np.arange(30), 100, 0), draws(np.arange(30), 100, 1)
    found = fid(x, y, counts)
    assert found.low is not None
    assert found.high is not None
    assert found.low < found.value < found.high


def test_images_of_one_mask_are_drawn_together() -> None:
    counts = draws(np.array(["a", "b", "a", "c"]), 50, 0)
    assert (counts[:, 0] == counts[:, 2]).all()
    assert (counts[:, [0, 1, 3]].sum(1) == 3).all()
    assert len(np.unique(counts, axis=0)) > 5


def test_values_that_are_missing_do_not_count() -> None:
    found = of_mean(np.array([1.0, np.nan, 3.0]), np.arange(3), 50, 0)
    assert (found.value, found.count) == (2.0, 2)
    assert figure(2.0, np.array([]), 2).to_dict() == {"value": 2.0, "low": None, "high": None, "images": 2}
