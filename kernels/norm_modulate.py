"""LayerNorm, the modulation of each group of rows, and the low-rank down-projection of the last rows in extra columns."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mogle_rt.kernels import stream_rows
from mogle_rt.kernels.common import KernelCost
from mogle_rt.kernels.stream_rows import Norm


def norm_modulate(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    bounds: Sequence[int],
    out: Tensor,
    lora_down: Tensor | None,
    lora_from: int,
) -> None:
    """out = [LayerNorm(x) * scale + shift, low], eps 1e-6 (AdaLN, arXiv 2212.09748, section 3.2).

    ``low`` is the product of the first D columns, as stored, with ``lora_down`` for positions ``lora_from`` to the
    end and 0 for the others, so that a weight [W | B] does a linear layer and its LoRA in one product.

    Args:
        x: [L, B, D], fp32, fp16 or bf16; rows have one common stride, channels have stride 1.
        scale: [G, B, D], with the 1 already added; shift: [G, B, D]; both of x's dtype.
        bounds: the ends of the G = 1 … 3 groups of positions, in ascending order; the last is L.
        out: [L, B, D + R], written.
        lora_down: [D, R], or None (R = 0).
        lora_from: first position with a branch, 0 … L.

    Raises:
        ValueError: a shape, dtype, stride or device doesn't fit.
    """
    stream_rows.stream(x, bounds, None, Norm(scale, shift, out, lora_down, lora_from))


def norm_modulate_ref(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    bounds: Sequence[int],
    out: Tensor,
    lora_down: Tensor | None,
    lora_from: int,
) -> None:
    """`norm_modulate` by PyTorch."""
    stream_rows.reference(x, bounds, None, Norm(scale, shift, out, lora_down, lora_from))


def norm_modulate_cost(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    bounds: Sequence[int],
    out: Tensor,
    lora_down: Tensor | None,
    lora_from: int,
) -> KernelCost:
    """The least that `norm_modulate` takes."""
    return stream_rows.cost(x, bounds, None, Norm(scale, shift, out, lora_down, lora_from))
