"""The interface of a step's operations, which the rest of the package uses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from mogle_rt.config import MogleConfig, TransformerConfig
from mogle_rt.kernels.inputs import Experts, Gate
from mogle_rt.ops.attention import AttentionPlan

Prepared = Callable[[], None]  # an operation bound to its tensors; it can be called again and again


class Ops(Protocol):
    """The operations of a step; `mogle_rt.ops.torch_ops` says what each does. Activations are sequence-major.

    ``RIDING``: whether the blocks' LoRA is computed in extra columns of the same products, see `mogle_rt.linear.layer`.
    """

    RIDING: bool

    def check_model(self, transformer: TransformerConfig, mogle: MogleConfig) -> None: ...

    def rope_buffer(self, table: Tensor) -> Tensor: ...

    def norm_modulate(
        self,
        x: Tensor,
        scale: Tensor,
        shift: Tensor,
        bounds: tuple[int, ...],
        out: Tensor,
        lora_down: Tensor | None,
        lora_from: int,
    ) -> Prepared: ...

    def residual(
        self,
        x: Tensor,
        y: Tensor,
        gate: Tensor,
        bounds: tuple[int, ...],
        lora_up: Tensor | None,
        lora_from: int,
        clip: bool,
    ) -> Prepared: ...

    def residual_norm_modulate(
        self,
        x: Tensor,
        y: Tensor,
        gate: Tensor,
        scale: Tensor,
        shift: Tensor,
        bounds: tuple[int, ...],
        out: Tensor,
        lora_down: Tensor | None,
        lora_from: int,
        lora_up: Tensor | None,
        lora_up_from: int,
        clip: bool,
    ) -> Prepared: ...

    def qk_norm_rope(self, x: Tensor, norm_weight: Tensor, bounds: tuple[int, ...], rope: Tensor) -> Prepared: ...

    def joint_attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        condition_from: int,
        plan: AttentionPlan,
        scores: Tensor | None,
        out: Tensor,
    ) -> Callable[[], Tensor]: ...

    def region_experts(self, experts: Experts) -> Tensor: ...

    def region_expert_mix(self, gate: Gate, experts: Experts, out: Tensor) -> None: ...

    def cheaper_mixture(self, gate: Gate, experts: Experts, steps: int) -> str: ...

    def gate_mix(self, gate: Gate, bank: Tensor, out: Tensor) -> None: ...

    def gate_mix_mean(self, gate: Gate, bank: Tensor, out: Tensor) -> None: ...
