"""A course that decides as it goes: a step is left out while the velocity changes little.

The last two velocities that were computed for an image say how fast it changes with the noise level: relatively, by the
norm over the whole image. If it goes on like that, the change since the last computed one is known for each later step
before anything is computed. Every image of a batch is decided by itself, as it would be alone. A step is computed where
one of them needs it, and the others don't look at what is computed for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from mogle_rt.fast.course import Course, Kind, Way
from mogle_rt.fast.settings import FastConfig

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class Image:
    """What is known of an image.

    Attributes:
        computed: the steps whose velocities it took, ascending.
        rate: the relative change of its velocity for each unit of the noise level.
    """

    computed: list[int] = field(default_factory=list)
    rate: float = 0.0


def needs(image: Image, k: int, config: FastConfig, sigmas: Sequence[float], first: int) -> bool:
    """Whether step k has to be computed for an image, in a run that began at step ``first``."""
    if k in (first, len(sigmas) - 1) or len(image.computed) < 2 or config.max_change is None:
        return True
    latest = image.computed[-1]
    foretold = image.rate * (sigmas[latest] - sigmas[k])
    return k - latest > config.max_skips or not foretold <= config.max_change


class AdaptiveCourse(Course):
    """The course of a run in which the velocities decide.

    Args:
        config, sigmas: see `Course`.
        batch: the number of images.
    """

    def __init__(self, config: FastConfig, sigmas: Sequence[float], batch: int) -> None:
        self._adaptive, self._batch = config, batch
        super().__init__(config, sigmas)

    def begin(self, k: int) -> None:
        """See `Course.begin`."""
        self._images = [Image() for _ in range(self._batch)]
        self._first, self._now = k, Way(Kind.WHOLE)
        super().begin(k)

    def way(self, k: int) -> Way:
        """See `Course.way`."""
        if k != self._next:
            self.begin(k)
        config, sigmas = self._adaptive, self._sigmas
        fresh = tuple(needs(image, k, config, sigmas, self._first) for image in self._images)
        weights = [0.0] * self._batch
        if config.order:
            for i, image in enumerate(self._images):
                if not fresh[i]:
                    before, latest = (sigmas[step] for step in image.computed[-2:])
                    weights[i] = (sigmas[k] - latest) / (latest - before)
        self._now = Way(Kind.WHOLE if any(fresh) else Kind.REUSED, fresh=fresh, weights=tuple(weights))
        return self._now

    def done(self, k: int, changes: Sequence[float] = ()) -> None:
        """See `Course.done`. changes: of each image, |v - u| / |v|, with u the last velocity that it took."""
        for i, image in enumerate(self._images):
            if self._now.fresh[i]:
                if image.computed:
                    image.rate = changes[i] / (self._sigmas[image.computed[-1]] - self._sigmas[k])
                image.computed.append(k)
        self._count(k, self._now.kind)


class Levels(Protocol):
    """A run's noise levels, see `mogle_rt.loop.schedule.Schedule`. One more follows the last step."""

    @property
    def sigmas(self) -> Tensor: ...

    def __len__(self) -> int: ...


def course_of(config: FastConfig | None, schedule: Levels, batch: int) -> Course:
    """The course of a run of ``batch`` images with this schedule, whose values are read only where they matter."""
    if config is None or not (config.extrapolates or config.adapts):
        return Course(config, [0.0] * len(schedule))
    sigmas = schedule.sigmas[:-1].tolist()
    return AdaptiveCourse(config, sigmas, batch) if config.adapts else Course(config, sigmas)
