"""The region experts, a part of several kernels: checks of arguments, device code, and the same in PyTorch."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from mogle_rt.kernels.common import check, check_device, nbytes, power_of_two, precision, require
from mogle_rt.kernels.gate import LARGEST_WIDTH, load_transposed
from mogle_rt.kernels.inputs import Experts


def check_experts(experts: Experts) -> None:
    """Raise ValueError if a shape, dtype, stride or device doesn't fit.

    The values of the index are not checked, because reading them would mean waiting for the GPU.
    """
    x = experts.planes
    check_device(x)
    require(
        x.dim() == 3 and experts.index.dim() == 2 and experts.in_weight.dim() == 3,
        f"planes must be [P, N, C], index [B, E], got {list(x.shape)}, {list(experts.index.shape)}",
    )
    N, B, C, H, E = experts.sizes
    require(0 < max(C, H, E) <= LARGEST_WIDTH, f"C, H and E must be 1 to {LARGEST_WIDTH}, got {C}, {H}, {E}")
    check("planes", x, x.shape, x)
    check("index", experts.index, (B, E), x, torch.int32)
    check("absent", experts.absent, (N, E, C), x)
    check("the experts' in_weight", experts.in_weight, (E, H, C), x)
    check("the experts' in_bias", experts.in_bias, (E, H), x)
    check("the experts' out_weight", experts.out_weight, (E, C, H), x)
    check("the experts' out_bias", experts.out_bias, (E, C), x)


def expert_arguments(experts: Experts) -> tuple[Any, ...]:
    """The tensors and strides that both kernels with experts take, in the order of their parameters."""
    return (
        experts.planes,
        experts.index,
        experts.absent,
        experts.in_weight,
        experts.in_bias,
        experts.out_weight,
        experts.out_bias,
        *experts.planes.stride()[:2],
        experts.index.stride(0),
        *experts.absent.stride()[:2],
        *experts.in_weight.stride()[:2],
        experts.in_bias.stride(0),
        *experts.out_weight.stride()[:2],
        experts.out_bias.stride(0),
    )


def expert_constants(experts: Experts) -> dict[str, Any]:
    """The constants that both kernels with experts are compiled for."""
    _, _, C, H, E = experts.sizes
    return {
        "C": C,
        "H": H,
        "E": E,
        "C_BLOCK": power_of_two(C, 16),
        "H_BLOCK": power_of_two(H, 16),
        "PRECISION": precision(experts.planes.dtype),
    }


def expert_outputs_ref(experts: Experts) -> Tensor:
    """The bank [N, B, E, C], computed by PyTorch in fp32, or in fp64 if the inputs are fp64.

    The hidden layer is rounded to the inputs' dtype, as in the kernel.
    """
    dtype = experts.planes.dtype
    exact = torch.promote_types(dtype, torch.float32)
    present = (experts.index >= 0)[..., None, None]
    x = experts.planes[experts.index.clamp(min=0).long()].to(exact)  # [B, E, N, C]
    hidden = (x @ experts.in_weight.to(exact).mT + experts.in_bias[:, None]).relu()
    y = hidden.to(dtype).to(exact) @ experts.out_weight.to(exact).mT + experts.out_bias[:, None]
    return torch.where(present, y, experts.absent.to(exact).transpose(0, 1)).permute(2, 0, 1, 3)


def _present(experts: Experts) -> tuple[int, int, int, int]:
    """Counts that the index gives, for declared costs.

    Fake and meta tensors have no values. For them each picture is taken to belong to one expert in every image, so that
    a cost can be counted without data.

    Returns:
        The number of distinct pictures that are used, of experts that see a picture in some image, of experts that see
        none in some image, and of pairs of an image and an expert that sees a picture in it.
    """
    B, E = experts.index.shape
    if experts.index.is_meta or isinstance(experts.index, FakeTensor):
        present = min(experts.planes.shape[0], E)
        return experts.planes.shape[0], present, E - present, B * present
    there = experts.index >= 0
    distinct = len(experts.index[there].unique())
    return distinct, int(there.any(0).sum()), int((~there).any(0).sum()), int(there.sum())


def expert_read(experts: Experts) -> int:
    """Bytes of the index and of all pictures, weights and absent rows that are used, each read once."""
    N, _, C, H, _ = experts.sizes
    distinct, present, absent, _ = _present(experts)
    values = (distinct + absent) * N * C + present * (2 * H * C + H + C)
    return values * experts.planes.element_size() + nbytes(experts.index)


def expert_flops(experts: Experts) -> int:
    """Floating point operations of both layers, for experts that see a picture."""
    N, _, C, H, _ = experts.sizes
    return 4 * _present(experts)[3] * N * C * H


@triton.jit
def expert_outputs(
    planes_ptr,
    absent_ptr,
    in_ptr,
    in_bias_ptr,
    out_ptr,
    out_bias_ptr,
    planes_p,
    planes_n,
    absent_n,
    absent_e,
    in_e,
    in_stride,
    in_bias_e,
    out_e,
    out_stride,
    out_bias_e,
    plane,  # number of the expert's picture, or -1
    expert,
    n,  # tokens
    live,
    C: tl.constexpr,
    H: tl.constexpr,
    C_BLOCK: tl.constexpr,
    H_BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One expert's outputs for the tokens of a program, fp32 [ROWS, C_BLOCK]."""
    c, h = tl.arange(0, C_BLOCK), tl.arange(0, H_BLOCK)
    mask = live[:, None] & (c < C)[None, :]
    if plane >= 0:
        at = plane.to(tl.int64) * planes_p + (n * planes_n)[:, None] + c[None, :]
        x = tl.load(planes_ptr + at, mask=mask, other=0.0)
        into = load_transposed(in_ptr + expert * in_e, in_stride, c, h, C, H)
        hidden = tl.dot(x, into, input_precision=PRECISION)
        hidden += tl.load(in_bias_ptr + expert * in_bias_e + h, mask=h < H, other=0.0).to(tl.float32)[None, :]
        hidden = tl.maximum(hidden, 0.0, propagate_nan=tl.PropagateNan.ALL).to(planes_ptr.dtype.element_ty)
        out = load_transposed(out_ptr + expert * out_e, out_stride, h, c, H, C)
        y = tl.dot(hidden, out, input_precision=PRECISION)
        y += tl.load(out_bias_ptr + expert * out_bias_e + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    else:
        at = (n * absent_n)[:, None] + expert * absent_e + c[None, :]
        y = tl.load(absent_ptr + at, mask=mask, other=0.0).to(tl.float32)
    return y
