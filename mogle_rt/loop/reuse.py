"""What steps keep for later steps of the same run, which then compute less (see `mogle_rt.fast`)."""

from __future__ import annotations

import torch
from torch import Tensor


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
