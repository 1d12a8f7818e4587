"""FLOPs of a call, counted while it runs; and for a step also by a formula, which the count must agree with."""

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
    """For each of the runtime's own operators, a function that returns the FLOPs which its kernel declares."""
    if importlib.util.find_spec("triton") is None:
        return {}
    from mogle_rt.ops import triton_ops

    def formula(name: str) -> Callable[..., int]:
        def flops(*args: Any, out_val: Any = None) -> int:
            return triton_ops.declared(name, args).flops

        flops._get_raw = True  # type: ignore[attr-defined]  # it gets the arguments, not their shapes
        return flops

    return {getattr(torch.ops.mogle_rt, name.split("::")[1]): formula(name) for name in triton_ops.OPERATORS}


def count(call: Callable[[], T]) -> tuple[T, int]:
    """Returns the call's result, and its FLOPs in matrix products, convolutions and attention."""
    result, operations = by_operation(call)
    return result, sum(operations.values())


def by_operation(call: Callable[[], T]) -> tuple[T, dict[Any, int]]:
    """The same as `count`, with the FLOPs of each operation (an overload packet of PyTorch).

    PyTorch's counter leaves out the CPU's attention kernel, products that add in place or apply an activation, and
    fused kernels; they are added here. The replay of a CUDA graph shows none of its operations, so count a call that
    runs them one by one.
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

    Modulations don't count, because they are known before the loop. Of the last single block only the image rows count,
    except for k and v, which all rows need.

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
