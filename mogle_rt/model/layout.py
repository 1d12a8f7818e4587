"""The layout of a run's rows: which are text, image and condition, and what follows from the switches."""

from __future__ import annotations

from dataclasses import dataclass

from mogle_rt.linear.branches import Streams
from mogle_rt.ops.attention import Visibility


@dataclass(frozen=True)
class Layout:
    """Row counts of a run and what follows from the switches.

    Attributes:
        text, image, condition: rows T, N and N (or 0 without a condition).
        visibility: who attends to whom.
        add_cond_attn: the condition's gated attention output is added to the image rows.
    """

    text: int
    image: int
    condition: int
    visibility: Visibility = Visibility.JOINT
    add_cond_attn: bool = False

    @property
    def condition_from(self) -> int:
        """First condition row of the joint sequence."""
        return self.text + self.image

    @property
    def total(self) -> int:
        """Rows of the joint sequence."""
        return self.text + self.image + self.condition

    @property
    def image_rows(self) -> slice:
        """Image rows of the joint sequence."""
        return slice(self.text, self.condition_from)

    @property
    def double_bounds(self) -> tuple[int, ...]:
        """Ends of the row groups that share a modulation in double blocks: text, image, condition."""
        return (self.text, self.condition_from) + ((self.total,) if self.condition else ())

    @property
    def single_bounds(self) -> tuple[int, ...]:
        """The same in single blocks: text and image, condition."""
        return (self.condition_from,) + ((self.total,) if self.condition else ())

    @property
    def streams(self) -> Streams:
        """All rows of the joint sequence, by their names."""
        return self.text_stream + self.streams_after_text

    @property
    def text_stream(self) -> Streams:
        """The text's rows alone."""
        return (("text", self.text),)

    @property
    def image_stream(self) -> Streams:
        """The image's rows alone."""
        return (("image", self.image),)

    @property
    def streams_after_text(self) -> Streams:
        """The rows that share their weights in double blocks."""
        return (*self.image_stream, ("condition", self.condition))
