"""The layout of a run's rows: which are text, image and condition, and what follows from the switches."""

from __future__ import annotations

from dataclasses import dataclass

from mogle_rt.ops.attention import Visibility


@dataclass(frozen=True)
class Layout:
    """Row counts of a run and what follows from the switches.

    Attributes:
        text, image, condition: rows T, N and N (or 0 without a condition).
        visibility: who attends to whom.
        latent_lora: the LoRA acts on image rows too, and on text rows where they are one sequence.
        add_cond_attn: the condition's gated attention output is added to the image rows.
    """

    text: int
    image: int
    condition: int
    visibility: Visibility = Visibility.JOINT
    latent_lora: bool = False
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
    def double_lora_from(self) -> int:
        """First row with LoRA in double blocks."""
        return self.text if self.latent_lora else self.condition_from

    @property
    def single_lora_from(self) -> int:
        """First row with LoRA in single blocks."""
        return 0 if self.latent_lora else self.condition_from
