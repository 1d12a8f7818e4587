"""Which way of computing less is taken: the fastest whose images stay within the drift that was asked for."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mogle_rt.config import Options
from mogle_rt.errors import ConfigError
from mogle_rt.fast.settings import FastConfig
from mogle_rt.values import Range, quoted, real

ALIKE = 1.05  # times of which the longer is at most this many times the shorter count as equal: they are measured
DECIBELS, SHARES = Range(0, 120), Range(0, 1)


@dataclass(frozen=True, kw_only=True)
class Bounds(Options):
    """How far images may be from exact ones. None sets no bound.

    Attributes:
        psnr: the least peak signal-to-noise ratio, on average over the cases, in dB.
        worst: the least that any single case may have, in dB.
        ssim: the least structural similarity, on average.
        latents: the largest distance of the latents from exact ones, relative to their length, on average.
        mask: by how much the mask consistency may be lower than that of the exact images, see `Figures`.

    Raises:
        ConfigError: a value is out of range.
    """

    psnr: float | None = None
    worst: float | None = None
    ssim: float | None = None
    latents: float | None = None
    mask: float | None = None

    def __post_init__(self) -> None:
        for name, value in self.to_dict().items():
            if value is not None:
                real(value, f"max_drift: {name}", DECIBELS if name in ("psnr", "worst") else SHARES)

    def __str__(self) -> str:
        """The bounds that are set, as `parse_bounds` reads them."""
        return ",".join(f"{name}={value:g}" for name, value in self.to_dict().items() if value is not None)


# What the names of fast modes promise where nothing else is asked for.
DEFAULT_BOUNDS = {
    "balanced": Bounds(psnr=32, worst=27, mask=0.01),
    "fast": Bounds(psnr=27, worst=22, mask=0.02),
}


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What was measured of one way, over all cases.

    Attributes:
        way: what is left out; nothing of the exact images.
        computed: steps in which the model was computed, on average. price: what they cost, in whole steps.
        seconds: of an image: preparing, steps and decoding. Encoding masks and prompts is the same in every way, and not
            in it. It is the median of the exact images' times, times the median of the ratios to those that were drawn at
            about the same time, which a machine's busy times change least.
        psnr, worst: peak signal-to-noise ratio to the exact images, the mean and the least, in dB; 120 where they are equal.
        ssim: structural similarity, the mean; None where it wasn't measured.
        latents: distance of the latents from the exact ones, relative to their length, the mean.
        mask: mask consistency: the mean intersection over union of a mask's classes with those that a judge finds in its
            image; None where there is no judge.
        mask_loss: by how much it is lower than that of the exact images of the same cases.
    """

    way: FastConfig
    computed: float
    price: float
    seconds: float
    psnr: float
    worst: float
    ssim: float | None
    latents: float
    mask: float | None
    mask_loss: float | None

    @property
    def fewer_steps(self) -> bool:
        """Whether it is an exact run of a shorter schedule."""
        return self.way.most_steps is not None and self.way == FastConfig(most_steps=self.way.most_steps)

    def to_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "way": self.way.to_dict()}


def within(figures: Figures, bounds: Bounds) -> bool:
    """Whether images of a way are as near to exact ones as is asked for. A bound on what was not measured doesn't count."""
    for bound, measured, sign in (
        (bounds.psnr, figures.psnr, 1),
        (bounds.worst, figures.worst, 1),
        (bounds.ssim, figures.ssim, 1),
        (bounds.latents, figures.latents, -1),
        (bounds.mask, figures.mask_loss, -1),
    ):
        if bound is not None and measured is not None and sign * measured < sign * bound:
            return False
    return True


def choose(measured: Sequence[Figures], bounds: Bounds) -> Figures | None:
    """The fastest way within the bounds. Of those that are about equally fast, it is the one nearest to the exact images.

    So fewer steps are chosen wherever they are better at an equal time.

    Args:
        measured: of every way; that of the exact images may be among them.

    Returns:
        None if none is within the bounds.
    """
    allowed = [figures for figures in measured if within(figures, bounds)]
    if not allowed:
        return None
    fastest = min(figures.seconds for figures in allowed)
    alike = [figures for figures in allowed if figures.seconds <= ALIKE * fastest]
    return max(alike, key=lambda figures: (figures.psnr, -figures.seconds))


def parse_bounds(texts: Sequence[str]) -> dict[str, Bounds]:
    """The bounds of each named mode: the defaults, changed by texts such as "balanced:psnr=35,worst=30".

    "none" in place of a number takes a bound away.

    Raises:
        ConfigError: a text has another form, an unknown name, or a value that is out of range.
    """
    result = dict(DEFAULT_BOUNDS)
    for text in texts:
        mode, colon, rest = text.partition(":")
        parts = [tuple(piece.strip() for piece in part.partition("=")) for part in rest.split(",")]
        if mode not in result or not colon or not all(name and value for name, _, value in parts):
            raise ConfigError(
                f"--max-drift must be {' or '.join(result)} with bounds, such as 'balanced:psnr=35,worst=30', "
                f"got {quoted(text)}"
            )
        given = {name: _number(value, text) for name, _, value in parts}
        result[mode] = Bounds.from_mapping(result[mode].to_dict() | given, what="--max-drift")
    return result


def _number(value: str, text: str) -> float | None:
    if value == "none":
        return None
    try:
        return float(value)
    except ValueError:
        raise ConfigError(f"--max-drift: a bound must be a number or none, got {quoted(text)}") from None
