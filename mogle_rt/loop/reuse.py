"""What steps keep for later steps of the same run, which then compute less (see `mogle_rt.fast`)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mogle_rt.loop.buffers import Buffers
from mogle_rt.model.layout import Layout
from mogle_rt.model.modulation import StepModulation
from mogle_rt.model.transformer import Transformer


class Difference:
    """Continues the last two velocities in a straight line. All that it reads and writes has a fixed address.

    Args:
        velocity: the buffer that each computed step writes its velocity to.

    Attributes:
        weight: float32 [1], how far the line is continued, see `mogle_rt.fast.course.Way`; the host sets it.
        buffers: what it writes to. They are float32, so that nothing is rounded before the latents are.
    """

    def __init__(self, velocity: Tensor) -> None:
        self._velocity = velocity
        self._difference = torch.zeros_like(velocity, dtype=torch.float32)
        self._continued = torch.empty_like(self._difference)
        self.weight = torch.zeros(1, dtype=torch.float32, device=velocity.device)
        self.buffers = [self._difference, self._continued, self.weight]

    def before(self) -> None:
        """Keep the last velocity, before a step computes another."""
        self._difference.copy_(self._velocity)

    def after(self) -> None:
        """Note what the step has changed of it."""
        torch.sub(self._velocity, self._difference, out=self._difference)

    def continued(self) -> Tensor:
        """The velocity that is expected, float32."""
        return torch.addcmul(self._velocity, self._difference, self.weight, out=self._continued)


def difference_shapes(layout: Layout, batch: int, channels: int) -> list[tuple[int, ...]]:
    """The shapes of the buffers of `Difference`, which are float32."""
    return [(layout.image, batch, channels)] * 2 + [(1,)]


@dataclass(frozen=True)
class KeptRows:
    """What a block keeps of the condition's rows.

    Attributes:
        keys_values: [C, B, 2 D], as attention reads them, after norm and rotation.
        shared: [C, B, D], what the switch add_cond_attn adds to the image's rows, before its gate; None without it.
        gate: [B, D], this gate, which no step changes.
    """

    keys_values: Tensor
    shared: Tensor | None = None
    gate: Tensor | None = None


class KeptCondition:
    """What all blocks keep of the condition's rows, from the last step that computed them.

    These rows depend on the step in two ways: the gate of the mixture reads the latents and the time, and in attention
    they see text and image. Their modulation is constant. So what is kept is an approximation in later steps.

    Attributes:
        rows: for each block, in order.
        buffers: the tensors that hold them.
    """

    def __init__(self, transformer: Transformer, b: Buffers, layout: Layout, modulation: StepModulation) -> None:
        blocks, singles, batch, width = len(transformer.blocks), len(transformer.single_blocks), *b.x.shape[1:]
        self.buffers = [b.x.new_zeros(shape) for shape in kept_shapes(blocks, singles, layout, batch, width)]
        keys_values, *shared = self.buffers
        self.rows = [KeptRows(of_block) for of_block in keys_values]
        if shared:
            self.rows[:blocks] = map(KeptRows, keys_values[:blocks], shared[0], modulation.double[:, 2, 2])


def kept_shapes(blocks: int, singles: int, layout: Layout, batch: int, width: int) -> list[tuple[int, ...]]:
    """The shapes of the buffers of `KeptCondition`."""
    rows = (layout.condition, batch)
    shared = [(blocks, *rows, width)] if layout.add_cond_attn and blocks else []
    return [(blocks + singles, *rows, 2 * width), *shared]
