"""Gated residual with its low-rank up-projection, then the next norm, in one pass over the stream."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mogle_rt.kernels import stream_rows
from mogle_rt.kernels.common import KernelCost
from mogle_rt.kernels.stream_rows import Norm, Residual


def residual_norm_modulate(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    scale: Tensor,
    shift: Tensor,
    bounds: Sequence[int],
    out: Tensor,
    lora_down: Tensor | None,
    lora_from: int,
    lora_up: Tensor | None,
    lora_up_from: int,
    clip: bool,
) -> None:
    """x += gate * (y + low @ lora_up) in place, then `norm_modulate` of the new x.

    A linear layer whose weight has Q more output rows (its A) gives [y, low]; its LoRA is finished here, for positions
    ``lora_up_from`` to the end. x is rounded to its dtype before the norm, so that the result is the unfused one's.

    Args:
        x: [L, B, D], fp32, fp16 or bf16; rows at one stride, channels at stride 1.
        y: [L, B, D + Q].
        gate: [G, B, D]; scale: [G, B, D], its 1 added; shift: [G, B, D]; all of x's dtype.
        bounds: ends of the G = 1 … 3 groups of positions, ascending to L.
        out: [L, B, D + R], written.
        lora_down: [D, R], or None (R = 0); lora_from: first position with it, 0 … L.
        lora_up: [Q, D], or None (Q = 0); lora_up_from: first position with it, 0 … L.
        clip: clamp the new x to ±65504 (fp16).

    Raises:
        ValueError: a shape, dtype, stride or device doesn't fit.
    """
    update = Residual(y, gate, lora_up, lora_up_from, clip)
    stream_rows.stream(x, bounds, update, Norm(scale, shift, out, lora_down, lora_from))


def residual_norm_modulate_ref(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    scale: Tensor,
    shift: Tensor,
    bounds: Sequence[int],
    out: Tensor,
    lora_down: Tensor | None,
    lora_from: int,
    lora_up: Tensor | None,
    lora_up_from: int,
    clip: bool,
) -> None:
    """`residual_norm_modulate` in PyTorch."""
    update = Residual(y, gate, lora_up, lora_up_from, clip)
    stream_rows.reference(x, bounds, update, Norm(scale, shift, out, lora_down, lora_from))


def residual_norm_modulate_cost(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    scale: Tensor,
    shift: Tensor,
    bounds: Sequence[int],
    out: Tensor,
    lora_down: Tensor | None,
    lora_from: int,
    lora_up: Tensor | None,
    lora_up_from: int,
    clip: bool,
) -> KernelCost:
    """What `residual_norm_modulate` takes at least."""
    update = Residual(y, gate, lora_up, lora_up_from, clip)
    return stream_rows.cost(x, bounds, update, Norm(scale, shift, out, lora_down, lora_from))


def residual(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    bounds: Sequence[int],
    lora_up: Tensor | None,
    lora_up_from: int,
    clip: bool,
) -> None:
    """The first half of `residual_norm_modulate`: x += gate * (y + low @ lora_up) in place.

    Raises:
        ValueError: a shape, dtype, stride or device doesn't fit.
    """
    stream_rows.stream(x, bounds, Residual(y, gate, lora_up, lora_up_from, clip), None)


def residual_ref(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    bounds: Sequence[int],
    lora_up: Tensor | None,
    lora_up_from: int,
    clip: bool,
) -> None:
    """`residual` in PyTorch."""
    stream_rows.reference(x, bounds, Residual(y, gate, lora_up, lora_up_from, clip), None)


def residual_cost(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    bounds: Sequence[int],
    lora_up: Tensor | None,
    lora_up_from: int,
    clip: bool,
) -> KernelCost:
    """What `residual` takes at least."""
    return stream_rows.cost(x, bounds, Residual(y, gate, lora_up, lora_up_from, clip), None)
