"""The region experts, as a part of the kernels that run them: their parameters and device code.

Only the distinct pictures of the regions that a mask has are held: ``planes[P]``, and ``index[B, E]`` says which is
expert e's in image b. Experts whose region is absent (index -1) all see the same black picture, so their outputs
depend on the size of the image alone: ``absent[N, E, C]``, shared by all images.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from mogle_rt.kernels.common import check, check_device, nbytes, power_of_two, precision, require
from mogle_rt.kernels.gate import LARGEST_WIDTH, load_transposed


@dataclass(frozen=True)
class Experts:
    """Inputs and parameters. Linear layers as [out, in]."""

    planes: Tensor  # [P, N, C]
    index: Tensor  # [B, E] int32, -1 … P - 1
    absent: Tensor  # [N, E, C]
    in_weight: Tensor  # [E, H, C]
    in_bias: Tensor  # [E, H]
    out_weight: Tensor  # [E, C, H]
    out_bias: Tensor  # [E, C]

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        """N, B, C, H, E."""
        _, N, C = self.planes.shape
        B, E = self.index.shape
        return N, B, C, self.in_weight.shape[1], E

    def check(self) -> None:
        """Raises ValueError where a shape, dtype, stride or device doesn't fit. Indices stay unread: they are the GPU's."""
        x = self.planes
        check_device(x)
        require(
            x.dim() == 3 and self.index.dim() == 2 and self.in_weight.dim() == 3,
            f"planes must be [P, N, C], index [B, E], got {list(x.shape)}, {list(self.index.shape)}",
        )
        N, B, C, H, E = self.sizes
        require(0 < max(C, H, E) <= LARGEST_WIDTH, f"C, H and E must be 1 to {LARGEST_WIDTH}, got {C}, {H}, {E}")
        check("planes", x, x.shape, x)
        check("index", self.index, (B, E), x, torch.int32)
        check("absent", self.absent, (N, E, C), x)
        check("expert_in_weight", self.in_weight, (E, H, C), x)
        check("expert_in_bias", self.in_bias, (E, H), x)
        check("expert_out_weight", self.out_weight, (E, C, H), x)
        check("expert_out_bias", self.out_bias, (E, C), x)

    def arguments(self) -> tuple[Any, ...]:
        """Of `expert_outputs`, as far as they are tensors and strides."""
        return (
            self.planes,
            self.index,
            self.absent,
            self.in_weight,
            self.in_bias,
            self.out_weight,
            self.out_bias,
            *self.planes.stride()[:2],
            self.index.stride(0),
            *self.absent.stride()[:2],
            *self.in_weight.stride()[:2],
            self.in_bias.stride(0),
            *self.out_weight.stride()[:2],
            self.out_bias.stride(0),
        )

    def constants(self) -> dict[str, Any]:
        """Of both kernels with experts."""
        _, _, C, H, E = self.sizes
        return {
            "C": C,
            "H": H,
            "E": E,
            "C_BLOCK": power_of_two(C, 16),
            "H_BLOCK": power_of_two(H, 16),
            "PRECISION": precision(self.planes.dtype),
        }

    def outputs(self) -> Tensor:
        """The bank in PyTorch, fp32 (fp64 for fp64): [N, B, E, C]. Layers round to the dtype, as they do apart."""
        dtype = self.planes.dtype
        exact = torch.promote_types(dtype, torch.float32)
        present = (self.index >= 0)[..., None, None]
        x = self.planes[self.index.clamp(min=0).long()].to(exact)  # [B, E, N, C]
        hidden = (x @ self.in_weight.to(exact).mT + self.in_bias[:, None]).relu()
        y = hidden.to(dtype).to(exact) @ self.out_weight.to(exact).mT + self.out_bias[:, None]
        return torch.where(present, y, self.absent.to(exact).transpose(0, 1)).permute(2, 0, 1, 3)

    def _present(self) -> tuple[int, int, int, int]:
        """Distinct pictures in use, experts with one, experts without one in some image, pairs of image and expert.

        From the index; where it has no values (fake and meta tensors), as if each picture were one expert's in
        every image, so that a count needs no data.
        """
        B, E = self.index.shape
        if self.index.is_meta or isinstance(self.index, FakeTensor):
            present = min(self.planes.shape[0], E)
            return self.planes.shape[0], present, E - present, B * present
        there = self.index >= 0
        distinct = len(self.index[there].unique())
        return distinct, int(there.any(0).sum()), int((~there).any(0).sum()), int(there.sum())

    def read(self) -> int:
        """Bytes: pictures, parameters and absent rows that are used, each once, and the index."""
        N, _, C, H, _ = self.sizes
        distinct, present, absent, _ = self._present()
        values = (distinct + absent) * N * C + present * (2 * H * C + H + C)
        return values * self.planes.element_size() + nbytes(self.index)

    def flops(self) -> int:
        """Of both layers of what is present."""
        N, _, C, H, _ = self.sizes
        return 4 * self._present()[3] * N * C * H


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
    """One expert's outputs for some tokens, fp32 [ROWS, C_BLOCK]."""
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
