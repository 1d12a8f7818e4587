"""The step's operations in PyTorch, which write to given buffers. `mogle_rt.ops.choice` decides when they are used.

Activations are sequence-major, [L, B, D]: first positions [text, image, condition], then images of the batch. So each
stream is one block of rows, whatever the batch size. ``bounds`` are the ascending end positions of row groups that
share a modulation (or a norm's weight); the last is L. Modulations are [G, B, D], one row per group and image.

Operations that a step repeats on the same tensors return a `Prepared`, so that the views are made only once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from mogle_rt.ops import attention

if TYPE_CHECKING:
    from mogle_rt.config import MogleConfig, TransformerConfig
    from mogle_rt.kernels.inputs import Experts, Gate
    from mogle_rt.ops.attention import AttentionPlan
    from mogle_rt.ops.contract import Prepared

RIDING = False  # see `mogle_rt.linear.layer`
LAYER_NORM_EPS = 1e-6
QK_NORM_EPS = 1e-6
FP16_MAX = 65504


def check_model(transformer: TransformerConfig, mogle: MogleConfig) -> None:
    """Do nothing, since PyTorch's operations accept a model of any shape."""


@functools.lru_cache(maxsize=64)
def _sizes(bounds: tuple[int, ...]) -> list[int]:
    """The number of rows in each group."""
    return [end - start for start, end in zip((0, *bounds), bounds, strict=False)]


@functools.lru_cache(maxsize=8)
def _identity(width: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    """LayerNorm's weight and bias. On the CPU, PyTorch's kernel takes half the time if it is given them."""
    if device.type != "cpu":
        return None, None
    with torch.inference_mode():
        return torch.ones(width, device=device, dtype=dtype), torch.zeros(width, device=device, dtype=dtype)


def norm_modulate(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    bounds: tuple[int, ...],
    out: Tensor,
    lora_down: Tensor | None = None,
    lora_from: int = 0,
) -> Prepared:
    """AdaLN: out = LayerNorm(x) * scale + shift, with the LoRA's down-projection of it in the columns after.

    Args:
        x: [L, B, D]. scale (with the 1 already added), shift: [G, B, D].
        out: [L, B, D + R].
        lora_down: [D, R], for positions ``lora_from`` to the end; the others' columns become 0. None if R is 0.
    """
    width, sizes = x.shape[-1], _sizes(bounds)
    identity = _identity(width, x.device, x.dtype)
    modulated = out[..., :width]
    groups = list(zip(shift.unbind(), scale.unbind(), modulated.split(sizes), strict=True))
    if lora_down is not None:
        rows = (x.shape[0] - lora_from) * x.shape[1]
        branch, low = (part[lora_from:].view(rows, part.shape[-1]) for part in (modulated, out[..., width:]))
        without = out[:lora_from, :, width:]

    def run() -> None:
        normed = F.layer_norm(x, (width,), *identity, eps=LAYER_NORM_EPS)
        for rows, (shifted, scaled, into) in zip(normed.split(sizes), groups, strict=True):
            torch.addcmul(shifted, rows, scaled, out=into)
        if lora_down is not None:
            without.zero_()
            torch.mm(branch, lora_down, out=low)

    return run


def residual(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    bounds: tuple[int, ...],
    lora_up: Tensor | None = None,
    lora_from: int = 0,
    clip: bool = False,
) -> Prepared:
    """x += gate * y in place, after the LoRA's up-projection of y's last Q columns was added to y.

    Args:
        x: [L, B, D]. y: [L, B, D + Q]. gate: [G, B, D].
        lora_up: [Q, D], for positions ``lora_from`` to the end. None if Q is 0.
        clip: keep values within fp16's range, as the reference does at the end of a block in fp16.
    """
    width, sizes, tail = x.shape[-1], _sizes(bounds), y[lora_from:]
    added = y if lora_up is None else y[..., :width]
    groups = list(zip(x.split(sizes), gate.unbind(), added.split(sizes), strict=True))

    def run() -> None:
        if lora_up is not None:
            tail[..., :width] += tail[..., width:] @ lora_up
        for rows, gated, more in groups:
            rows.addcmul_(gated, more)
        if clip:
            x.clamp_(-FP16_MAX, FP16_MAX)

    return run


def residual_norm_modulate(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    scale: Tensor,
    shift: Tensor,
    bounds: tuple[int, ...],
    out: Tensor,
    lora_down: Tensor | None = None,
    lora_from: int = 0,
    lora_up: Tensor | None = None,
    lora_up_from: int = 0,
    clip: bool = False,
) -> Prepared:
    """`residual`, then `norm_modulate` of the new x, over the same groups."""
    add = residual(x, y, gate, bounds, lora_up, lora_up_from, clip)
    norm = norm_modulate(x, scale, shift, bounds, out, lora_down, lora_from)

    def run() -> None:
        add()
        norm()

    return run


def rope_buffer(table: Tensor) -> Tensor:
    """A rotary table, complex64 [L, d / 2], as `qk_norm_rope` takes it: complex [L, 1, 1, 1, d / 2]."""
    return table[:, None, None, None]


def qk_norm_rope(x: Tensor, norm_weight: Tensor, bounds: tuple[int, ...], rope: Tensor) -> Prepared:
    """RMSNorm over each head of q and k, then rotation of neighbouring channel pairs; in place.

    Args:
        x: [L, B, P, H, d]. norm_weight: [G, W, d], for the first W of the P parts; the others (v) stay as they are.
        rope: complex [L, 1, 1, 1, d / 2].
    """
    qk, size = x[:, :, : norm_weight.shape[1]], x.shape[-1]
    # The weights are repeated for every head, because a product over longer contiguous rows is vectorised better.
    weights = norm_weight.unsqueeze(2).expand(-1, -1, x.shape[3], -1).contiguous()
    groups = list(zip(qk.split(_sizes(bounds)), weights.unbind(), strict=True))
    pairs = qk.unflatten(-1, (-1, 2))
    rotated = torch.view_as_complex(pairs) if qk.dtype == torch.float32 else None
    eps = torch.tensor(QK_NORM_EPS, dtype=torch.float32, device=x.device)

    def run() -> None:
        norm = torch.linalg.vector_norm(qk, dim=-1, keepdim=True, dtype=torch.float32)
        qk.mul_(torch.addcmul(eps, norm, norm, value=1 / size).rsqrt_())
        for rows, weight in groups:
            rows.mul_(weight)
        if rotated is None:
            pairs.copy_(torch.view_as_real(torch.view_as_complex(pairs.float()) * rope))
        else:
            rotated.mul_(rope)

    return run


def joint_attention(
    q: Tensor, k: Tensor, v: Tensor, condition_from: int, plan: AttentionPlan, scores: Tensor | None, out: Tensor
) -> Callable[[], Tensor]:
    """See `mogle_rt.ops.attention.joint_attention`.

    Args:
        scores: scratch memory if all scores are to be kept at once, see `mogle_rt.ops.attention.scores_room`.
        out: [Lq, B, H * d], where the result may be written. The result is this tensor or one from a library.
    """
    if scores is not None:
        return attention.attention_by_products(q, k, v, condition_from, plan, scores, out)
    return functools.partial(attention.joint_attention, q, k, v, condition_from, plan)


def region_experts(experts: Experts) -> Tensor:
    """The *bank*: Linear(relu(Linear(x))) of every expert, with x the picture that the expert sees.

    Returns:
        [N, B, E, C]: a token's experts side by side, so that a step's weighted sum is one small product per token.
    """
    N, B, C, _, E = experts.sizes
    index = experts.index
    rows = experts.planes.index_select(0, index.t().flatten().clamp(min=0)).view(E, B * N, C)
    hidden = torch.baddbmm(experts.in_bias[:, None], rows, experts.in_weight.transpose(1, 2)).relu_()
    y = torch.baddbmm(experts.out_bias[:, None], hidden, experts.out_weight.transpose(1, 2))
    bank = y.view(E, B, N, C).permute(2, 1, 0, 3)
    return torch.where((index < 0)[..., None], experts.absent[:, None], bank).contiguous()


def region_expert_mix(gate: Gate, experts: Experts, out: Tensor) -> None:
    """`region_experts` and `gate_mix` together, without keeping a bank. out: [N, B, C]."""
    gate_mix(gate, region_experts(experts), out)


def cheaper_mixture(gate: Gate, experts: Experts, steps: int) -> str:
    """Always "bank", the experts once per image: a fused mixture would repeat the experts' operations in each step."""
    return "bank"


def gate_weights(gate: Gate) -> Tensor:
    """softmax(Linear(relu(Linear(latents @ noise_weightᵀ + gate_input + time)))): [N, B, E]."""
    N, B, C = gate.latents.shape
    h = (gate.gate_input + gate.time).view(N * B, C).addmm_(gate.latents.view(N * B, C), gate.noise_weight.t())
    h = torch.addmm(gate.in_bias, h, gate.in_weight.t()).relu_()
    return torch.addmm(gate.out_bias, h, gate.out_weight.t()).softmax(-1).view(N, B, -1)


def gate_mix(gate: Gate, bank: Tensor, out: Tensor) -> None:
    """The bank's experts, weighted by the gate. bank: [N, B, E, C]. out: [N, B, C]."""
    _mix(gate_weights(gate), bank, out)


def gate_mix_mean(gate: Gate, bank: Tensor, out: Tensor) -> None:
    """`gate_mix` with the weights averaged over the tokens of each image."""
    weights = gate_weights(gate)
    _mix(weights.mean(0, keepdim=True).expand_as(weights), bank, out)


def _mix(weights: Tensor, bank: Tensor, out: Tensor) -> None:
    N, B, E, C = bank.shape
    torch.bmm(weights.reshape(N * B, 1, E), bank.view(N * B, E, C), out=out.view(N * B, 1, C))
