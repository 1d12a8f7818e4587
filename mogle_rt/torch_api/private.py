"""The private functions, operators and classes of PyTorch that this package uses.

Each one that several modules need, or that a public function could replace one day, is called here and nowhere else.
`tests/torch_api/test_private.py` calls every one, and says which modules depend on it when a release changes it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

aten = torch.ops.aten
ADDMM_GELU = aten._addmm_activation  # the operator behind `addmm_gelu`


def has_values(x: Tensor) -> bool:
    """False for meta and fake tensors, which have a shape and nothing else."""
    return not (x.is_meta or isinstance(x, FakeTensor))


def storage_key(x: Tensor) -> int:
    """A number that tensors share if, and only if, they lie in the same storage, as long as it is alive."""
    return int(x.untyped_storage()._cdata)


def addmm_gelu(bias: Tensor, x: Tensor, weight: Tensor, out: Tensor) -> Tensor:
    """GELU (tanh form) of bias + x weight, into ``out``, as one matrix product with a fused epilogue.

    Args:
        bias: [n]. x: [m, k]. weight: [k, n]. out: [m, n], which is returned.
    """
    return torch._addmm_activation(bias, x, weight, use_gelu=True, out=out)


def cpu_attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """PyTorch's attention for CPUs, with the log-sum-exp of its scaled scores.

    Args:
        q: [B, H, Lq, d]. k, v: [B, H, L, d].

    Returns:
        [B, H, Lq, d], and fp32 [B, H, Lq].
    """
    out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
    return out, lse


def flash_attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The flash kernel of GPUs, for 16-bit tensors. Shapes as in `cpu_attention`, but log-sum-exps may be padded."""
    out, lse = aten._scaled_dot_product_flash_attention(q, k, v)[:2]
    return out, lse


def efficient_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The memory-efficient kernel of GPUs, for every dtype. Shapes as of `flash_attention`.

    Args:
        mask: [Lq, L], added to the scaled scores.
    """
    out, lse = aten._scaled_dot_product_efficient_attention(q, k, v, mask, True)[:2]
    return out, lse


def cpu_has_amx() -> bool:
    """Whether this CPU multiplies bfloat16 matrices in hardware (Intel's AMX)."""
    return torch.cpu._is_amx_tile_supported()


def cpu_multiplies_bfloat16() -> bool:
    """Whether this x86 CPU has instructions for bfloat16 products, AMX or AVX512's."""
    return cpu_has_amx() or torch.cpu._is_avx512_bf16_supported()
