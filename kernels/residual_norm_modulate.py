"""The gated residual with its low-rank up-projection and then the next norm, in one pass over the residual stream."""

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

    A linear layer whose weight has Q more output rows (the LoRA's A) gives [y, low]. This kernel completes the LoRA for
    positions ``lora_up_from`` to the end. x is rounded to its dtype before the norm, so that the result equals that of
    separate operations.

    Args:
        x: [L, B, D], fp32, fp16 or bf16; rows have one common stride, channels have stride 1.
        y: [L, B, D + Q].
        gate: [G, B, D]; scale: [G, B, D], with the 1 already added; shift: [G, B, D]; all of x's dtype.
        bounds: the ends of the G = 1 … 3 groups of positions, in ascending order; the last is L.
        out: [L, B, D + R], written.
        lora_down: [D, R], or None (R = 0); lora_from: the first position that it acts on, 0 … L.
        lora_up: [Q, D], or None (Q = 0); lora_up_from: the first position that it acts on, 0 … L.
        clip: whether to clamp the new x to ±65504, the largest values of fp16.

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
    """`residual_norm_modulate` by PyTorch."""
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
    """The least that `residual_norm_modulate` takes."""
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
    """`residual` by PyTorch."""
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
    """The least that `residual` takes."""
    return stream_rows.cost(x, bounds, Residual(y, gate, lora_up, lora_up_from, clip), None)
