"""The ways of computing less that are tried, and fewer steps, which each of them has to beat."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from mogle_rt.fast.course import Kind, Way, ways_of
from mogle_rt.fast.settings import POLICIES, FastConfig

EXACT = FastConfig()
REFRESH = (2, 4)  # of the condition
WITH_REFRESH = ("medium", "fast")  # masks that are tried together with the rarer refresh
CHANGES = (0.05, 0.1, 0.2)  # of the velocity, up to which steps are left out
KEPT_COST = 0.6  # of a step without the condition, in whole steps: about what it is at FLUX's size
LONGEST_NAME = 60  # characters of a way's name in a file's name


def course_of(config: FastConfig, steps: int) -> tuple[Way, ...]:
    """What each step of a run does that is asked for with ``steps`` steps."""
    count = config.steps_of(steps)
    return tuple(ways_of(config, [1 - k / count for k in range(count)]))


def computed(config: FastConfig, steps: int) -> int:
    """In how many steps the model is computed; where the velocities decide, a guess: half of them."""
    course = course_of(config, steps)
    return -(-len(course) // 2) if config.adapts else sum(way.kind is not Kind.REUSED for way in course)


def price(computed: float, with_condition: float) -> float:
    """What the computed steps cost, in whole steps; ``with_condition`` of them computed the condition too."""
    return with_condition + KEPT_COST * (computed - with_condition)


def candidates(steps: int) -> list[FastConfig]:
    """The ways that are tried with this number of steps, from little to much that is left out.

    Settings that do the same with so few steps are tried once.
    """
    tried: dict[tuple[Way, ...], FastConfig] = {course_of(EXACT, steps): EXACT}
    for name in POLICIES:
        for order in (1, 0):
            config = FastConfig(steps_mask=name, order=order)
            tried.setdefault(course_of(config, steps), config)
    refreshed = [FastConfig(refresh_every=every) for every in REFRESH]
    refreshed += [FastConfig(steps_mask=name, refresh_every=max(REFRESH)) for name in WITH_REFRESH]
    for config in refreshed:
        tried.setdefault(course_of(config, steps), config)
    adaptive = [FastConfig(max_change=change) for change in CHANGES] if steps > 3 else []  # it computes three at least
    return [config for config in tried.values() if config != EXACT] + adaptive


def competitor(config: FastConfig, steps: int) -> FastConfig | None:
    """Fewer steps at the price of a way, as far as it is known beforehand: the velocities don't decide."""
    if config.adapts:
        return None
    kinds = [way.kind for way in course_of(config, steps)]
    whole = kinds.count(Kind.WHOLE)
    return fewer_steps(config, price(whole + kinds.count(Kind.KEPT), whole), steps)


def fewer_steps(config: FastConfig, price: float, steps: int) -> FastConfig | None:
    """The shorter schedule that costs what a way costs. None where that is not shorter, or it is the way itself."""
    count = max(1, round(price))
    fewer = FastConfig(most_steps=count) if count < steps else None
    return None if fewer == config else fewer


def with_competitors(ways: Sequence[FastConfig], steps: int) -> list[FastConfig]:
    """The ways, each behind its competitor; each once, and without those that leave nothing out."""
    every: dict[FastConfig, None] = {}
    for config in ways:
        for one in (competitor(config, steps), config):
            if one is not None and not one.exact:
                every[one] = None
    return list(every)


def label(config: FastConfig) -> str:
    """A way's name for people, such as "15 steps" or "steps_mask=medium,order=0"."""
    if config.exact:
        return "exact"
    if config == FastConfig(most_steps=config.most_steps):
        return "1 step" if config.most_steps == 1 else f"{config.most_steps} steps"
    return str(config)


def file_stem(config: FastConfig) -> str:
    """A way's name in the name of a file."""
    name = label(config).replace(" ", "-")
    return name if len(name) <= LONGEST_NAME else hashlib.sha256(name.encode()).hexdigest()[:16]
