"""The step's operations as fused kernels: custom operators that torch.export, torch.compile and fake tensors support.

On a GPU (and in Triton's interpreter) an operator launches its kernel; on other devices it runs the kernel's twin
in PyTorch. Each kernel declares the bytes and FLOPs that it needs at least; `declared` returns them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from functools import partial
from itertools import islice
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
from mogle_rt.kernels.common import LARGEST_ROW, KernelCost
from mogle_rt.kernels.common import interpreted as interpreted
from mogle_rt.kernels.gate import LARGEST_WIDTH
from mogle_rt.kernels.inputs import Epilogue, Experts, Gate
from mogle_rt.ops import attention
from mogle_rt.ops.attention import AttentionPlan, Visibility

if TYPE_CHECKING:
    from mogle_rt.ops.contract import Prepared

RIDING = True
_COSTS: dict[str, Callable[..., KernelCost]] = {}
_INPUTS = (Gate, Experts, Epilogue)  # passed to operators field by field, since a schema can't hold such classes


def flat(args: Iterable[Any]) -> list[Any]:
    """Turn a kernel's arguments into its operator's: a `Gate`, `Experts` or `Epilogue` is replaced by its fields."""
    return [value for arg in args for value in (vars(arg).values() if isinstance(arg, _INPUTS) else (arg,))]


def _joined(kinds: Sequence[Any], args: Iterable[Any]) -> list[Any]:
    """The inverse of `flat`, given the types of the kernel's arguments."""
    rest = iter(args)
    return [kind(*islice(rest, len(fields(kind)))) if kind in _INPUTS else next(rest) for kind in kinds]


def _schema(of: Any, name: str) -> str:
    """The part of a schema that lists the tensors of a `Gate` or of `Experts`."""
    return ", ".join(f"Tensor {name}_{field.name}" for field in fields(of))


def define(module: Any, name: str, schema: str) -> Callable[..., None]:
    """Define operator mogle_rt::``name`` from a module's ``name``, ``name``_ref and ``name``_cost, all called alike."""
    kernel, twin, cost = (getattr(module, f"{name}{suffix}") for suffix in ("", "_ref", "_cost"))
    kinds = [parameter.annotation for parameter in inspect.signature(kernel, eval_str=True).parameters.values()]

    def run(*args: Any) -> None:
        first: Tensor = args[0]
        (kernel if first.is_cuda or interpreted() else twin)(*_joined(kinds, args))

    full = f"mogle_rt::{name}"
    torch.library.define(full, f"({schema}) -> ()")
    torch.library.impl(full, ("cpu", "cuda"), run)
    torch.library.register_fake(full, lambda *args: None)
    _COSTS[full] = lambda *args: cost(*_joined(kinds, args))
    packet: Any = getattr(torch.ops.mogle_rt, name)
    operator: Callable[..., None] = packet.default
    return operator


def check_model(transformer: TransformerConfig, mogle: MogleConfig) -> None:
    """Check that the kernels accept the model's sizes: a program holds whole rows, heads and layers of the gate.

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


def declared(operator: str, args: Sequence[Any]) -> KernelCost:
    """The least bytes and FLOPs that the operator "mogle_rt::…" needs for these arguments, given as in its schema."""
    return _COSTS[operator](*args)


_norm_modulate = define(
    norm_kernels,
    "norm_modulate",
    "Tensor x, Tensor scale, Tensor shift, SymInt[] bounds, Tensor(a!) out, Tensor? lora_down, SymInt lora_from",
)
_residual = define(
    residual_kernels,
    "residual",
    "Tensor(a!) x, Tensor y, Tensor gate, SymInt[] bounds, Tensor? lora_up, SymInt lora_up_from, bool clip",
)
_residual_norm_modulate = define(
    residual_kernels,
    "residual_norm_modulate",
    "Tensor(a!) x, Tensor y, Tensor gate, Tensor scale, Tensor shift, SymInt[] bounds, Tensor(b!) out, "
    "Tensor? lora_down, SymInt lora_from, Tensor? lora_up, SymInt lora_up_from, bool clip",
)
_qk_norm_rope = define(rope_kernels, "qk_norm_rope", "Tensor(a!) x, Tensor norm_weight, SymInt[] bounds, Tensor rope")
_GATE, _EXPERTS = _schema(Gate, "gate"), _schema(Experts, "experts")
_gate_mix = define(gate_kernels, "gate_mix", f"{_GATE}, Tensor bank, Tensor(a!) out")
_gate_mix_mean = define(gate_kernels, "gate_mix_mean", f"{_GATE}, Tensor bank, Tensor(a!) sums, Tensor(b!) out")
_region_experts = define(expert_kernels, "region_experts", f"{_EXPERTS}, Tensor(a!) bank")
_region_expert_mix = define(fused_kernels, "region_expert_mix", f"{_GATE}, {_EXPERTS}, Tensor(a!) out")
_joint_attention = define(
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


def gate_mix(gate: Gate, bank: Tensor, out: Tensor) -> None:
    """See `mogle_rt.ops.torch_ops.gate_mix`."""
    _gate_mix(*flat((gate, bank, out)))


def gate_mix_mean(gate: Gate, bank: Tensor, out: Tensor) -> None:
    """See `mogle_rt.ops.torch_ops.gate_mix_mean`."""
    _, B, E, _ = bank.shape
    sums = torch.empty(gate_kernels.partial_sums(bank), B, E, device=bank.device, dtype=torch.float32)
    _gate_mix_mean(*flat((gate, bank, sums, out)))


def joint_attention(
    q: Tensor, k: Tensor, v: Tensor, condition_from: int, plan: AttentionPlan, scores: Tensor | None, out: Tensor
) -> Callable[[], Tensor]:
    """See `mogle_rt.ops.torch_ops.joint_attention`.

    Where everything sees everything, PyTorch's fused attention is used (flash or cuDNN's, as PyTorch chooses).
    Otherwise one launch of our kernel replaces up to four launches and a merge.
    """
    if plan.visibility is Visibility.JOINT or condition_from >= k.shape[0]:
        return partial(attention.joint_attention, q, k, v, condition_from, plan)

    def run() -> Tensor:
        _joint_attention(q, k, v, out, condition_from, plan.visibility.value, plan.log_scale)
        return out

    return run


def region_experts(experts: Experts) -> Tensor:
    """See `mogle_rt.ops.torch_ops.region_experts`."""
    N, B, C, _, E = experts.sizes
    bank = experts.planes.new_empty(N, B, E, C)
    _region_experts(*flat((experts, bank)))
    return bank


def region_expert_mix(gate: Gate, experts: Experts, out: Tensor) -> None:
    """See `mogle_rt.ops.torch_ops.region_expert_mix`."""
    _region_expert_mix(*flat((gate, experts, out)))


# FLOPs that a GPU computes in the time of moving one byte. In 16 bits: half of what the datasheets of A100 and H100 say
# (200 and 295), since tiles of 16 rows don't fill tensor cores. In fp32: a sixth of that, since each product takes
# three TF32 products. These numbers were not measured.
FLOPS_A_BYTE = {torch.float32: 20, torch.float16: 128, torch.bfloat16: 128}


def cheaper_mixture(gate: Gate, experts: Experts, steps: int) -> str:
    """Which way of mixing is cheaper by the kernels' declared costs: a "bank", or everything "fused" in each step.

    Each way's cost is its bytes in the whole run, plus its FLOPs as the bytes that could be moved in the same time.
    They are added because an expert's products wait for its loads. For a single image, the distinct pictures and shared
    rows are as many bytes as the bank, so the bank is cheaper: it saves the FLOPs. If images share rows or pictures,
    the fused way moves fewer bytes.

    Args:
        gate: only shapes and dtypes are looked at.
        experts: likewise, except that the values of the index are read, so the index has to be on the CPU.
        steps: the number of steps in the run.
    """
    out = gate.latents
    N, B, C = out.shape
    bank = out.new_empty(()).expand(N, B, experts.index.shape[1], C)  # the costs only use its size

    def taken(cost: KernelCost) -> float:
        return cost.moved + cost.flops / FLOPS_A_BYTE[out.dtype]

    once = taken(expert_kernels.region_experts_cost(experts, bank))
    banked = once + steps * taken(gate_kernels.gate_mix_cost(gate, bank, out))
    fused = steps * taken(fused_kernels.region_expert_mix_cost(gate, experts, out))
    return "fused" if fused < banked else "bank"
