"""The settings of fast modes. All of them change the result, so all are off unless they are asked for."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from mogle_rt.config import Options
from mogle_rt.errors import ConfigError
from mogle_rt.values import Range, quoted, read_json, real, whole

MOST_STEPS_IN_MASK = 10_000
ORDERS, INTERVALS, CHANGES = Range(0, 1), Range(1, MOST_STEPS_IN_MASK), Range(0, 100)


def _mask(computed: Sequence[int], reused: Sequence[int]) -> str:
    """Runs of computed and of reused steps in turn, as a text of 1 and 0."""
    runs = [("1", n) for n in computed], [("0", n) for n in reused]
    turns = chain.from_iterable(zip(*runs, strict=False))
    return "".join(digit * n for digit, n in (*turns, *runs[0][len(reused) :]))


# The masks for 28 steps that cache-dit publishes under these names, from 18 computed steps down to 8.
POLICIES = {
    "slow": _mask((8, 3, 3, 2, 1, 1), (1, 2, 2, 2, 3)),
    "medium": _mask((6, 2, 2, 2, 2, 1), (1, 3, 3, 3, 3)),
    "fast": _mask((6, 1, 1, 1, 1, 1), (1, 3, 4, 5, 4)),
    "ultra": _mask((4, 1, 1, 1, 1), (2, 5, 6, 7)),
}


@dataclass(frozen=True, kw_only=True)
class FastConfig(Options):
    """What a run leaves out. The defaults leave nothing out.

    Attributes:
        steps_mask: which steps are computed; in the others, the velocity follows from earlier steps. A text of 1
            (computed) and 0 (not computed), such as "1110101", or a sequence of such numbers, of any length: it is
            stretched over a run's steps. Or one of cache-dit's masks: "slow", "medium", "fast", "ultra". The
            first and the last step of a run are computed in any case. None: all steps are computed.
        order: how the velocity follows from earlier steps. 0: it is the last one that was computed. 1: the last two are
            continued in a straight line over the noise level.
        refresh_every: k: of the computed steps, the first and every k-th after it compute the condition's rows too. The
            others compute text and image alone, and attend to the keys and values that the condition had last. 1: all
            compute everything. More than 1 needs engine torch.
        max_change: instead of a mask: a step is left out while the velocity of an image is expected to differ from the
            last computed one by at most this much, relatively, see `mogle_rt.fast.adaptive`. None: it is not looked at.
        max_skips: with max_change, the most steps that are left out in a row.
        most_steps: a run that is asked for with more steps has this many: an exact run of a shorter schedule, as far as
            nothing else is left out. None: a run has the steps that it is asked for with.

    Raises:
        ConfigError: a value is not allowed.
    """

    steps_mask: str | None = None
    order: int = 1
    refresh_every: int = 1
    max_change: float | None = None
    max_skips: int = 4
    most_steps: int | None = None

    def __post_init__(self) -> None:
        if self.steps_mask is not None:
            object.__setattr__(self, "steps_mask", _checked_mask(self.steps_mask))
        whole(self.order, "FastConfig: order", ORDERS)
        whole(self.refresh_every, "FastConfig: refresh_every", INTERVALS)
        whole(self.max_skips, "FastConfig: max_skips", INTERVALS)
        if self.max_change is not None:
            object.__setattr__(self, "max_change", real(self.max_change, "FastConfig: max_change", CHANGES))
            if self.steps_mask is not None or self.refresh_every > 1:
                other = "steps_mask" if self.steps_mask is not None else "refresh_every"
                raise ConfigError(f"FastConfig: max_change and {other} exclude each other; leave one of them out")
        if self.most_steps is not None:
            whole(self.most_steps, "FastConfig: most_steps", INTERVALS)

    @property
    def mask(self) -> tuple[bool, ...] | None:
        """Whether each step is computed, as the mask says before it is stretched; None if it leaves none out."""
        digits = POLICIES.get(str(self.steps_mask), self.steps_mask)
        return None if digits is None or "0" not in digits else tuple(digit == "1" for digit in digits)

    @property
    def extrapolates(self) -> bool:
        """Whether steps need the difference of the last two velocities."""
        return self.mask is not None and self.order == 1

    def steps_of(self, asked: int) -> int:
        """How many steps a run has that is asked for with ``asked``."""
        return asked if self.most_steps is None else min(asked, self.most_steps)

    @property
    def adapts(self) -> bool:
        """Whether the velocities decide which steps are computed."""
        return self.max_change is not None

    @property
    def keeps_condition(self) -> bool:
        """Whether some steps leave out the condition's rows."""
        return self.refresh_every > 1

    @property
    def exact(self) -> bool:
        """Whether nothing is left out."""
        nothing = self.mask is None and not self.keeps_condition and not self.adapts
        return nothing and self.most_steps is None

    def check_exported(self) -> None:
        """Check that an exported engine, which computes whole steps alone, can run it.

        Raises:
            ConfigError: it can't.
        """
        if self.keeps_condition:
            raise ConfigError(
                f"refresh_every={self.refresh_every} needs engine torch: exported engines compute whole steps; leave it out"
            )

    @classmethod
    def parse(cls, text: str) -> FastConfig:
        """The settings that a text says, such as "steps_mask=fast,order=0", or as JSON.

        Raises:
            ConfigError: it says something else.
        """
        if text.lstrip().startswith("{"):
            try:
                said = read_json(text)
            except ValueError as error:
                raise ConfigError(f"fast is not JSON: {error}") from None
            return cls.from_mapping(said, what="fast")
        given: dict[str, Any] = {}
        for part in text.split(","):
            name, equals, value = (piece.strip() for piece in part.partition("="))
            if not equals or not value:
                raise ConfigError(f"fast must be settings such as 'steps_mask=fast,order=1', got {quoted(text)}")
            given[name] = _number(value) if name != "steps_mask" else value
        return cls.from_mapping(given, what="fast")

    def __str__(self) -> str:
        """The settings that aren't the defaults, as `parse` reads them."""
        fields = dataclasses.fields(self)
        return ",".join(f"{f.name}={v}" for f in fields if (v := getattr(self, f.name)) not in (f.default, None))


def _number(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def _checked_mask(given: object) -> str:
    """A mask as a policy's name or a text of digits."""
    if isinstance(given, str) and given in POLICIES:
        return given
    if isinstance(given, Sequence) and 1 <= len(given) <= MOST_STEPS_IN_MASK:
        digits = (
            given if isinstance(given, str) else [str(int(v)) if isinstance(v, (int, bool)) else "?" for v in given]
        )
        if set(digits) <= {"0", "1"}:
            return "".join(digits)
    raise ConfigError(
        f"FastConfig: steps_mask must be {', '.join(map(repr, POLICIES))}, or a 1 for each step that is computed and a 0 "
        f"for each that is not, at most {MOST_STEPS_IN_MASK} of them, got {quoted(given)}"
    )
