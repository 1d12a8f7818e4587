"""What each step of a run does in a fast mode. The host decides it from the settings and the noise levels alone.

So nothing has to be read from the device, and the same run always takes the same course.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from mogle_rt.fast.settings import FastConfig


class Kind(enum.Enum):
    """What a step computes."""

    WHOLE = "whole"  # everything
    KEPT = "kept"  # text and image; the condition's keys and values are those of an earlier step
    REUSED = "reused"  # nothing: the velocity follows from earlier steps


@dataclass(frozen=True)
class Way:
    """How a step is done.

    Attributes:
        kind: what it computes.
        weight: of a reused step: the velocity is v + weight · (v - u), with v the last one that was computed, and u the
            one before.
        fresh: in an adaptive course, for each image whether it takes the velocity that is computed; otherwise empty.
        weights: likewise, its weight.
    """

    kind: Kind
    weight: float = 0.0
    fresh: tuple[bool, ...] = ()
    weights: tuple[float, ...] = ()


WHOLE, KEPT = Way(Kind.WHOLE), Way(Kind.KEPT)


def computed_steps(mask: Sequence[bool] | None, steps: int, first: int = 0) -> list[bool]:
    """Whether each step of a run is computed.

    A mask of another length is stretched: the same share of steps is computed, and they lie where the mask has them.
    The first and the last step that are run are computed whatever the mask says.

    Args:
        mask: of any length; None computes every step.
        steps: of the schedule. first: the step that is run first; those before it count as not computed.
    """
    if mask is None:
        return [k >= first for k in range(steps)]
    ones, length = sum(mask), len(mask)
    wanted = max(1, ones * steps // length)  # rounded down: otherwise some steps would be counted twice
    done = [0]  # the mask's computed steps before each of its places
    for computed in mask:
        done.append(done[-1] + computed)

    def count(k: int) -> int:
        """How many of the run's first k steps are computed: ⌈wanted · (share of the mask's ones until k / steps)⌉."""
        place, rest = divmod(k * length, steps)  # in places of the mask, rest / steps is a part of one
        until = done[place] * steps + (rest * mask[place] if rest else 0)
        return -(-wanted * until // (max(ones, 1) * steps))

    counts = [count(k) for k in range(steps + 1)]
    chosen = [after > before for before, after in pairwise(counts)]
    return [k >= first and (chosen[k] or k in (first, steps - 1)) for k in range(steps)]


def ways_of(config: FastConfig | None, sigmas: Sequence[float], first: int = 0) -> list[Way]:
    """How each step of a run is done that begins at step ``first`` and knows nothing of earlier steps.

    Args:
        config: None computes everything.
        sigmas: the noise level of each step, strictly falling.

    Returns:
        One for each of the ``sigmas``; those before ``first`` are never asked for.
    """
    if config is None:
        return [WHOLE] * len(sigmas)
    ways: list[Way] = []
    last: list[int] = []  # the computed steps so far
    for k, computed in enumerate(computed_steps(config.mask, len(sigmas), first)):
        if computed or k < first:
            ways.append(KEPT if len(last) % config.refresh_every else WHOLE)
            last += [k] if computed else []
        elif config.order == 0 or len(last) < 2:
            ways.append(Way(Kind.REUSED))
        else:
            before, latest = sigmas[last[-2]], sigmas[last[-1]]
            ways.append(Way(Kind.REUSED, (sigmas[k] - latest) / (latest - before)))
    return ways


class Course:
    """The course of a run, which begins anew wherever its latents are changed: what was kept then belongs to others.

    Args:
        config: None computes everything.
        sigmas: the noise level of each step.

    Attributes:
        computed: how many steps were computed. with_condition: how many of them computed the condition too.
    """

    def __init__(self, config: FastConfig | None, sigmas: Sequence[float]) -> None:
        self.config, self.computed, self.with_condition = config, 0, 0
        self._sigmas = list(sigmas)
        self.begin(0)

    def begin(self, k: int) -> None:
        """Begin at step k, without anything from earlier steps."""
        self._ways, self._next = ways_of(self.config, self._sigmas, k), k
        self._fresh = True

    def may_go_on(self, k: int) -> bool:
        """Whether step k comes next and something of earlier steps could be used in it, if the latents are the same."""
        return self.config is not None and not self._fresh and k == self._next

    def way(self, k: int) -> Way:
        """How step k is done. A step out of turn begins the course anew."""
        if k != self._next:
            self.begin(k)
        return self._ways[k]

    def done(self, k: int, changes: Sequence[float] = ()) -> None:
        """Note that step k was done in its way. changes: only for adaptive courses."""
        self._count(k, self._ways[k].kind)

    def _count(self, k: int, kind: Kind) -> None:
        self.computed += kind is not Kind.REUSED
        self.with_condition += kind is Kind.WHOLE
        self._next, self._fresh = k + 1, False
