"""The objects that kernels take: the gate, the region experts, and what follows a product; and the rule for ranks.

This module does not import Triton, because PyTorch's own operations take the same objects on machines without it.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

# The columns of a low-rank branch that ride behind a row's own are filled up with zeros to a multiple of this. Triton
# loads 16 bytes at once only where it knows that a row's stride is a multiple of 16 elements; with a stride of 3080, a
# multiple of 8, the same kernel loads two bytes at a time.
RANK_STEP = 16


def padded_rank(rank: int) -> int:
    """``rank`` filled up to a multiple of `RANK_STEP`."""
    return -(-rank // RANK_STEP) * RANK_STEP


@dataclass(frozen=True)
class Gate:
    """The gate over the experts: Linear(relu(Linear(latents @ noise_weight^T + gate_input + time))), then softmax.

    All tensors have the same dtype and lie on the same device. Weights of linear layers are [out, in].
    """

    latents: Tensor  # [N, B, C], packed noisy latents
    gate_input: Tensor  # [N, B, C], the part of the sum that no step changes
    time: Tensor  # [C], the step's embedding
    noise_weight: Tensor  # [C, C]
    in_weight: Tensor  # [G, C]
    in_bias: Tensor  # [G]
    out_weight: Tensor  # [E, G]
    out_bias: Tensor  # [E]

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        """N, B, C, G, E."""
        N, B, C = self.latents.shape
        return N, B, C, self.in_weight.shape[0], self.out_weight.shape[0]


@dataclass(frozen=True)
class Experts:
    """The region experts, each Linear(relu(Linear(x))) of the picture that it sees.

    Only the distinct pictures are held: ``planes[P]``, and ``index[B, E]`` says which of them expert e sees in image b.
    Experts whose region is absent have the index -1. They all see the same black picture, so their outputs depend on
    the size of the image alone, and all images share them: ``absent[N, E, C]``.

    All tensors but the index have the same dtype, and all lie on the same device. Weights of linear layers are [out, in].
    """

    planes: Tensor  # [P, N, C], packed latents of pictures
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


@dataclass(frozen=True)
class Epilogue:
    """What a linear layer's kernel does with its product y: out = y + low up^T + bias, through GELU if asked for.

    All tensors have the same dtype, fp32, fp16 or bf16, and lie on the same device.
    """

    bias: Tensor  # [columns]
    low: Tensor | None  # [rows, R], the low-rank columns of the rows, or None for R = 0
    up: Tensor | None  # [columns, R], or None
    out: Tensor  # [rows, columns], written
    gelu: bool  # in its tanh form

    @property
    def rank(self) -> int:
        """R."""
        return 0 if self.low is None else self.low.shape[-1]
