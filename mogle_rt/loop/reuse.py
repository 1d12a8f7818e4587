"""What steps keep for later steps of the same run, which then compute less (see `mogle_rt.fast`)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mogle_rt.fast.course import Way
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


class Followed:
    """For each image the velocity that it took last, and what that has changed; all float32, at fixed addresses.

    Args:
        like: a velocity. batch_dim: its dimension of images.

    Attributes:
        buffers: what it writes to.
    """

    def __init__(self, like: Tensor, batch_dim: int) -> None:
        shape = [size if dim == batch_dim else 1 for dim, size in enumerate(like.shape)]
        self._others = [dim for dim in range(like.dim()) if dim != batch_dim]
        self._last, self._difference, self._velocity = (torch.zeros_like(like, dtype=torch.float32) for _ in range(3))
        self._weight = self._last.new_zeros(shape)
        self._fresh = torch.zeros(shape, dtype=torch.bool, device=like.device)
        self._change = self._last.new_zeros(shape)
        self.buffers = [self._last, self._difference, self._velocity, self._weight, self._fresh, self._change]

    def choose(self, way: Way) -> None:
        """Set what each image does in the next step."""
        self._fresh.view(-1).copy_(torch.tensor(way.fresh))
        self._weight.view(-1).copy_(torch.tensor(way.weights))

    def take(self, velocity: Tensor) -> None:
        """Let the images that want a computed velocity take theirs."""
        change = torch.sub(velocity, self._last, out=self._velocity)
        size = torch.linalg.vector_norm(velocity, dim=self._others, keepdim=True, dtype=torch.float32)
        torch.div(torch.linalg.vector_norm(change, dim=self._others, keepdim=True), size, out=self._change)
        self._difference.copy_(torch.where(self._fresh, change, self._difference))
        self._last.copy_(torch.where(self._fresh, velocity.float(), self._last))

    def velocity(self) -> Tensor:
        """Of each image the computed velocity, or the expected one."""
        return torch.addcmul(self._last, self._difference, self._weight, out=self._velocity)

    def changes(self) -> list[float]:
        """How much the last computed velocity of each image differs from the one before, relatively. The host waits."""
        return self._change.view(-1).tolist()

    def forget(self) -> None:
        """Forget earlier velocities, which were of other latents."""
        self._last.zero_()
        self._difference.zero_()


def followed_shapes(layout: Layout, batch: int, channels: int) -> list[tuple[int, ...]]:
    """The shapes of the large buffers of `Followed`, which are float32."""
    return [(layout.image, batch, channels)] * 3


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
