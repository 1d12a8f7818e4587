"""FLOPs of a call: counted on the call itself, and for a step the closed form that the count must agree with."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.utils.flop_counter import FlopCounterMode

from mogle_rt.config import MLP_RATIO, TransformerConfig

T = TypeVar("T")


def _attention(q: list[int], k: list[int], v: list[int], *_: Any, **__: Any) -> int:
    batch, heads, rows, d = q
    return 2 * batch * heads * rows * k[2] * (d + v[3])


def _addmm(y: list[int], a: list[int], b: list[int], *_: Any, **__: Any) -> int:
    return 2 * a[0] * a[1] * b[1]


def _linear(x: list[int], weight: list[int], *_: Any, **__: Any) -> int:
    return 2 * x[0] * weight[0] * weight[1]


def _fused_kernels() -> dict[Any, Callable[..., int]]:
    """Of the runtime's own operators, what each declares."""
    if importlib.util.find_spec("triton") is None:
        return {}
    from mogle_rt.ops import triton_ops

    def formula(name: str) -> Callable[..., int]:
        def flops(*args: Any, out_val: Any = None) -> int:
            return triton_ops.declared(name, args).flops

        flops._get_raw = True  # type: ignore[attr-defined]  # arguments as they are, not their shapes
        return flops

    return {getattr(torch.ops.mogle_rt, name.split("::")[1]): formula(name) for name in triton_ops.OPERATORS}


def count(call: Callable[[], T]) -> tuple[T, int]:
    """The call's result and its FLOPs in matrix products, convolutions and attention."""
    result, operations = by_operation(call)
    return result, sum(operations.values())


def by_operation(call: Callable[[], T]) -> tuple[T, dict[Any, int]]:
    """The same by operation (an overload packet).

    PyTorch's counter leaves out the CPU's attention kernel, products that add in place or go through an activation,
    and fused kernels; they are added here. A CUDA graph's replay shows none of its operations: count an eager call.
    """
    aten = torch.ops.aten
    missing: dict[Any, Callable[..., int]] = {
        aten._scaled_dot_product_flash_attention_for_cpu: _attention,
        aten.addmm_: _addmm,
        aten._addmm_activation: _addmm,
    }
    if hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        missing[torch.ops.mkldnn._linear_pointwise] = _linear
    missing |= _fused_kernels()
    with FlopCounterMode(display=False, custom_mapping=missing) as counter:
        result = call()
    return result, counter.get_flop_counts().get("Global", {})


def step(config: TransformerConfig, text: int, tokens: int) -> int:
    """FLOPs that one step of one image needs, without its LoRA and experts.

    No modulation (known before the loop), and of the last single block image rows only, but for k and v.

    Args:
        config: the transformer's shape.
        text: text tokens T. tokens: image tokens N; the condition has as many.
    """
    D, M = config.width, MLP_RATIO * config.width
    rows = text + 2 * tokens
    attention = 4 * rows * D  # for each query row
    block = rows * (2 * (4 * D * D + 2 * D * M) + attention)  # q, k, v, out and the MLP: the same in both kinds
    total = (config.num_layers + config.num_single_layers) * block
    if config.num_single_layers:
        total -= (rows - tokens) * (2 * (2 * D * D + 2 * D * M) + attention)
    return total + 2 * config.in_channels * D * (2 * tokens + tokens)
