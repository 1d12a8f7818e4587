"""The layout of a run's rows: which of them are text, image and condition, and how the switches group them."""

from __future__ import annotations

from dataclasses import dataclass, replace

from mogle_rt.linear.branches import Streams
from mogle_rt.ops.attention import Visibility


@dataclass(frozen=True)
class Layout:
    """The row counts and switches of a run.

    Attributes:
        text, image, condition: the numbers of rows, T, N and N (or 0 without a condition).
        visibility: which tokens attend to which.
        add_cond_attn: whether the condition's gated attention output is added to the image rows.
    """

    text: int
    image: int
    condition: int
    visibility: Visibility = Visibility.JOINT
    add_cond_attn: bool = False

    @property
    def without_condition(self) -> Layout:
        """The same without the condition's rows; ``condition_from`` stays."""
        return replace(self, condition=0)

    @property
    def condition_from(self) -> int:
        """The first condition row of the joint sequence."""
        return self.text + self.image

    @property
    def total(self) -> int:
        """The number of rows of the joint sequence."""
        return self.text + self.image + self.condition

    @property
    def image_rows(self) -> slice:
        """The image rows of the joint sequence."""
        return slice(self.text, self.condition_from)

    @property
    def double_bounds(self) -> tuple[int, ...]:
        """The ends of the row groups that share a modulation in double blocks: text, image, condition."""
        return (self.text, self.condition_from) + ((self.total,) if self.condition else ())

    @property
    def single_bounds(self) -> tuple[int, ...]:
        """The ends of these row groups in single blocks: text with image, condition."""
        return (self.condition_from,) + ((self.total,) if self.condition else ())

    @property
    def streams(self) -> Streams:
        """All streams of the joint sequence, each with its number of rows."""
        return self.text_stream + self.streams_after_text

    @property
    def text_stream(self) -> Streams:
        """The text stream alone."""
        return (("text", self.text),)

    @property
    def image_stream(self) -> Streams:
        """The image stream alone; where the condition's rows are left out, the condition is named without rows."""
        return (("image", self.image),) if self.condition else self.streams_after_text

    @property
    def streams_after_text(self) -> Streams:
        """The streams that share weights in double blocks: image and condition."""
        return (("image", self.image), ("condition", self.condition))
