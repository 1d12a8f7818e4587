"""Comparisons of two results that should differ by rounding only, and what becomes of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from mogle_rt.errors import NumericalError

# The largest relative RMS error that is allowed. A single error, relative to the largest value, may be LARGEST times that.
TOLERANCES = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}
VAE_TOLERANCES = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 8e-2}  # its norms amplify errors
LARGEST = 20


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One comparison, and whether rounding in the dtype explains its error.

    Attributes:
        what: the graph and its sizes.
        by: what ran the graph.
        rms, largest: relative errors.
        tolerance: the largest RMS error that is allowed.
    """

    what: str
    by: str
    rms: float
    largest: float
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether both errors are small enough. With NaN a comparison fails."""
        return self.rms <= self.tolerance and self.largest <= LARGEST * self.tolerance


def compare(
    what: str, by: str, got: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float
) -> Comparison:
    """Compare several tensors; the result has the worst errors."""
    errors = [errors_between(got[name].double(), value.double()) for name, value in expected.items()]
    rms, largest = (max(e, key=lambda v: math.inf if math.isnan(v) else v) for e in zip(*errors, strict=True))
    return Comparison(what=what, by=by, rms=rms, largest=largest, tolerance=tolerance)


def errors_between(a: Tensor, b: Tensor) -> tuple[float, float]:
    """The relative RMS error, and the largest error relative to the largest value. If both are all zeros, it is 0."""
    if a.shape != b.shape:
        return math.inf, math.inf
    tiny = torch.finfo(torch.float32).tiny
    rms = (a - b).norm() / b.norm().clamp_min(tiny)
    return float(rms), float((a - b).abs().max() / b.abs().max().clamp_min(tiny))


def summary(results: list[Comparison]) -> tuple[Mapping[str, Any], ...]:
    """The results as the manifest holds them. JSON has no NaN or infinity, so such errors become null."""

    def known(value: object) -> object:
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return tuple({k: known(v) for k, v in asdict(r).items()} | {"passed": r.passed} for r in results)


def require(results: list[Comparison]) -> None:
    """Check that all comparisons passed.

    Raises:
        NumericalError: some failed; the message names the worst.
    """
    failed = [r for r in results if not r.passed]
    if failed:
        worst = max(failed, key=lambda r: math.inf if math.isnan(r.rms) else r.rms / r.tolerance)
        raise NumericalError(
            f"{len(failed)} of {len(results)} comparisons failed; {worst.what}: relative RMS error {worst.rms:.2g} "
            f"(at most {worst.tolerance:g}), largest {worst.largest:.2g}"
        )
