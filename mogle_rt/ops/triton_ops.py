"""The step's operations as fused kernels, each one custom operator that torch.export, torch.compile and fake tensors know.

On a GPU (and in Triton's interpreter) an operator launches its kernel; on other devices it is the kernel's twin.
What an operator takes at least in bytes and FLOPs, its kernel declares: `declared`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mogle_rt.config import MogleConfig, TransformerConfig
from mogle_rt.errors import ConfigError
from mogle_rt.kernels import gate_mix as gate_kernels
from mogle_rt.kernels import joint_attention as attention_kernels
from mogle_rt.kernels import norm_modulate as norm_kernels
from mogle_rt.kernels import qk_norm_rope as rope_kernels
from mogle_rt.kernels import region_expert_mix as fused_kernels
from mogle_rt.kernels import region_experts as expert_kernels
from mogle_rt.kernels import residual_norm_modulate as residual_kernels
from mogle_rt.kernels.common import LARGEST_ROW, Cost
from mogle_rt.kernels.common import interpreted as interpreted
from mogle_rt.kernels.gate import LARGEST_WIDTH
from mogle_rt.ops import attention
from mogle_rt.ops.attention import AttentionPlan, Visibility

if TYPE_CHECKING:
    from mogle_rt.ops.contract import Prepared

RIDING = True
_COSTS: dict[str, Callable[..., Cost]] = {}


def _define(module: Any, name: str, schema: str) -> Callable[..., None]:
    """The operator mogle_rt::``name`` of a module with ``name``, ``name``_ref and ``name``_cost."""
    kernel, twin = getattr(module, name), getattr(module, f"{name}_ref")

    def run(*args: Any) -> None:
        first: Tensor = args[0]
        (kernel if first.is_cuda or interpreted() else twin)(*args)

    full = f"mogle_rt::{name}"
    torch.library.define(full, f"({schema}) -> ()")
    torch.library.impl(full, ("cpu", "cuda"), run)
    torch.library.register_fake(full, lambda *args: None)
    _COSTS[full] = getattr(module, f"{name}_cost")
    packet: Any = getattr(torch.ops.mogle_rt, name)
    operator: Callable[..., None] = packet.default
    return operator


def check_model(transformer: TransformerConfig, mogle: MogleConfig) -> None:
    """Whether the kernels take a model of this shape: a program holds rows, heads and the gate's layers whole.

    Raises:
        ConfigError: something is too wide.
    """
    head = min(attention_kernels.LARGEST_HEAD, rope_kernels.LARGEST_HEAD)
    for name, size, largest in (
        ("width", transformer.width, LARGEST_ROW),
        ("attention_head_dim", transformer.attention_head_dim, head),
        ("latent_dim", mogle.latent_dim, LARGEST_WIDTH),
        ("expert_dim", mogle.expert_dim if mogle.has_expert else 0, LARGEST_WIDTH),
        ("gate_dim", mogle.gate_dim if mogle.has_gating else 0, LARGEST_WIDTH),
    ):
        if size > largest:
            raise ConfigError(
                f"Triton's kernels take {name} up to {largest}, this model has {size}; use kernels='torch'"
            )


def declared(operator: str, args: Sequence[Any]) -> Cost:
    """What the operator "mogle_rt::…" takes at least with these arguments."""
    return _COSTS[operator](*args)


_norm_modulate = _define(
    norm_kernels,
    "norm_modulate",
    "Tensor x, Tensor scale, Tensor shift, SymInt[] bounds, Tensor(a!) out, Tensor? lora_down, SymInt lora_from",
)
_residual = _define(
    residual_kernels,
    "residual",
    "Tensor(a!) x, Tensor y, Tensor gate, SymInt[] bounds, Tensor? lora_up, SymInt lora_up_from, bool clip",
)
_residual_norm_modulate = _define(
    residual_kernels,
    "residual_norm_modulate",
    "Tensor(a!) x, Tensor y, Tensor gate, Tensor scale, Tensor shift, SymInt[] bounds, Tensor(b!) out, "
    "Tensor? lora_down, SymInt lora_from, Tensor? lora_up, SymInt lora_up_from, bool clip",
)
_qk_norm_rope = _define(rope_kernels, "qk_norm_rope", "Tensor(a!) x, Tensor norm_weight, SymInt[] bounds, Tensor rope")
_GATE = (
    "Tensor latents, Tensor gate_input, Tensor time, Tensor noise_weight, Tensor gate_in_weight, "
    "Tensor gate_in_bias, Tensor gate_out_weight, Tensor gate_out_bias"
)
_gate_mix = _define(gate_kernels, "gate_mix", f"{_GATE}, Tensor bank, Tensor(a!) out")
_gate_mix_mean = _define(gate_kernels, "gate_mix_mean", f"{_GATE}, Tensor bank, Tensor(a!) sums, Tensor(b!) out")
_EXPERTS = (
    "Tensor planes, Tensor index, Tensor absent, Tensor expert_in_weight, Tensor expert_in_bias, "
    "Tensor expert_out_weight, Tensor expert_out_bias"
)
_region_experts = _define(expert_kernels, "region_experts", f"{_EXPERTS}, Tensor(a!) bank")
_region_expert_mix = _define(fused_kernels, "region_expert_mix", f"{_GATE}, {_EXPERTS}, Tensor(a!) out")
_joint_attention = _define(
    attention_kernels,
    "joint_attention",
    "Tensor q, Tensor k, Tensor v, Tensor(a!) out, SymInt condition_from, str visibility, Tensor log_scale",
)


OPERATORS = tuple(_COSTS)  # names, "mogle_rt::…"


def norm_modulate(*args: Any) -> Prepared:
    """See `mogle_rt.ops.torch_ops.norm_modulate`."""
    return partial(_norm_modulate, *args)


def residual(*args: Any) -> Prepared:
    """See `mogle_rt.ops.torch_ops.residual`."""
    return partial(_residual, *args)


def residual_norm_modulate(*args: Any) -> Prepared:
    """See `mogle_rt.ops.torch_ops.residual_norm_modulate`."""
    return partial(_residual_norm_modulate, *args)


def qk_norm_rope(*args: Any) -> Prepared:
    """See `mogle_rt.ops.torch_ops.qk_norm_rope`."""
    return partial(_qk_norm_rope, *args)


def rope_buffer(table: Tensor) -> Tensor:
    """A rotary table, complex64 [L, d / 2], as `qk_norm_rope` takes it: fp32 [L, d], cosines, then sines."""
    return torch.cat([table.real, table.imag], dim=1)


def gate_mix(latents: Tensor, gate_input: Tensor, time: Tensor, *gate: Tensor, bank: Tensor, out: Tensor) -> None:
    """See `mogle_rt.ops.torch_ops.gate_mix`."""
    _gate_mix(latents, gate_input, time, *gate, bank, out)


def gate_mix_mean(latents: Tensor, gate_input: Tensor, time: Tensor, *gate: Tensor, bank: Tensor, out: Tensor) -> None:
    """See `mogle_rt.ops.torch_ops.gate_mix_mean`."""
    _, B, E, _ = bank.shape
    sums = torch.empty(gate_kernels.partial_sums(bank), B, E, device=bank.device, dtype=torch.float32)
    _gate_mix_mean(latents, gate_input, time, *gate, bank, sums, out)


def joint_attention(
    q: Tensor, k: Tensor, v: Tensor, condition_from: int, plan: AttentionPlan, scores: Tensor | None, out: Tensor
) -> Callable[[], Tensor]:
    """See `mogle_rt.ops.torch_ops.joint_attention`.

    The library's fused attention (flash or cuDNN's, as PyTorch chooses) where everything sees everything; else one
    launch in place of up to four and a merge.
    """
    if plan.visibility is Visibility.JOINT or condition_from >= k.shape[0]:
        return partial(attention.joint_attention, q, k, v, condition_from, plan)

    def run() -> Tensor:
        _joint_attention(q, k, v, out, condition_from, plan.visibility.value, plan.log_scale)
        return out

    return run


def experts(planes: Tensor, index: Tensor, absent: Tensor, *layers: Tensor) -> Tensor:
    """See `mogle_rt.ops.torch_ops.experts`."""
    bank = planes.new_empty(planes.shape[1], *index.shape, planes.shape[2])
    _region_experts(planes, index, absent, *layers, bank)
    return bank


def expert_mix(
    latents: Tensor,
    gate_input: Tensor,
    time: Tensor,
    *layers: Tensor,
    planes: Tensor,
    index: Tensor,
    absent: Tensor,
    out: Tensor,
) -> None:
    """See `mogle_rt.ops.torch_ops.expert_mix`."""
    gate, expert = layers[:5], layers[5:]
    _region_expert_mix(latents, gate_input, time, *gate, planes, index, absent, *expert, out)


# FLOPs that a GPU does while it moves a byte: half of what A100's and H100's datasheets say (200 and 295 in 16 bits),
# as tiles of 16 rows don't fill tensor cores; a sixth of that in fp32, by three TF32 products. Not measured.
FLOPS_A_BYTE = {torch.float32: 20, torch.float16: 128, torch.bfloat16: 128}


def cheaper_mixture(
    planes: Tensor, index: Tensor, absent: Tensor, *, gate: Sequence[Tensor], experts: Sequence[Tensor], steps: int
) -> str:
    """Which way of mixing takes less by what the kernels declare: the "bank", or all "fused" in every step.

    The run's bytes, and its FLOPs as the bytes that could be moved meanwhile: an expert's products wait for its loads.
    One image's distinct pictures and shared rows are as many bytes as its bank, so the bank serves, without its FLOPs;
    images that share rows or pictures are fewer bytes fused.

    Args:
        planes, index, absent: see `mogle_rt.ops.torch_ops.experts`; the index on the CPU.
        gate, experts: weights. steps: of the run.
    """
    (B, E), (N, C) = index.shape, planes.shape[1:]
    some = planes.new_empty(())  # the costs ask for sizes alone
    tokens, time, bank = some.expand(N, B, C), some.expand(C), some.expand(N, B, E, C)
    gated, seen = [tokens, tokens, time, *gate], [planes, index, absent, *experts]

    def taken(operator: str, *arguments: Tensor) -> float:
        cost = declared(f"mogle_rt::{operator}", arguments)
        return cost.moved + cost.flops / FLOPS_A_BYTE[planes.dtype]

    banked = taken("region_experts", *seen, bank) + steps * taken("gate_mix", *gated, bank, tokens)
    fused = steps * taken("region_expert_mix", *gated, *seen, tokens)
    return "fused" if fused < banked else "bank"
