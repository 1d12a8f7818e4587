"""The one place that chooses between PyTorch's operations and the fused kernels. No silent fallback."""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Callable, Sequence
from typing import Protocol, cast

import torch
from torch import Tensor

from mogle_rt.attention import AttentionPlan
from mogle_rt.config import MogleConfig, TransformerConfig
from mogle_rt.errors import ConfigError

VARIABLE = "MOGLE_RT_KERNELS"
CHOICES = ("triton", "torch")

Prepared = Callable[[], None]  # an operation on the tensors that it was given, as often as it's called

logger = logging.getLogger(__name__)


class Ops(Protocol):
    """The operations of a step; `mogle_rt.torch_ops` says what each does. Activations are sequence-major.

    ``RIDING``: the blocks' LoRA rides along in further columns, see `mogle_rt.lora`.
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

    def experts(
        self,
        planes: Tensor,
        index: Tensor,
        absent: Tensor,
        weight_in: Tensor,
        bias_in: Tensor,
        weight_out: Tensor,
        bias_out: Tensor,
    ) -> Tensor: ...

    def expert_mix(
        self,
        latents: Tensor,
        gate_input: Tensor,
        time: Tensor,
        *layers: Tensor,
        planes: Tensor,
        index: Tensor,
        absent: Tensor,
        out: Tensor,
    ) -> None: ...

    def cheaper_mixture(
        self,
        planes: Tensor,
        index: Tensor,
        absent: Tensor,
        *,
        gate: Sequence[Tensor],
        experts: Sequence[Tensor],
        steps: int,
    ) -> str: ...

    def gate_mix(
        self, latents: Tensor, gate_input: Tensor, time: Tensor, *gate: Tensor, bank: Tensor, out: Tensor
    ) -> None: ...

    def gate_mix_mean(
        self, latents: Tensor, gate_input: Tensor, time: Tensor, *gate: Tensor, bank: Tensor, out: Tensor
    ) -> None: ...


def choice(kernels: str | None, device: torch.device) -> str:
    """Which of `CHOICES` is meant.

    Args:
        kernels: one of them; None takes what the environment variable MOGLE_RT_KERNELS says, and without it Triton on
            GPUs (and on the meta device, which stands for one), PyTorch elsewhere.

    Raises:
        ConfigError: the choice is unknown, or Triton is not installed.
    """
    name = kernels or os.environ.get(VARIABLE) or None
    source = "kernels" if kernels else VARIABLE
    installed = importlib.util.find_spec("triton") is not None
    if name is None:
        if device.type in ("cuda", "meta") and not installed:
            logger.warning("triton is not installed: a step takes PyTorch's own, slower operations")
        return "triton" if device.type in ("cuda", "meta") and installed else "torch"
    if name not in CHOICES:
        raise ConfigError(f"{source} must be one of {', '.join(map(repr, CHOICES))}, got {name!r}")
    if name == "triton" and not installed:
        raise ConfigError(f"{source}='triton', but triton is not installed; use 'torch'")
    return name


def choose(kernels: str | None, device: torch.device) -> Ops:
    """Operations for a device. kernels: see `choice`.

    Raises:
        ConfigError: the choice is unknown, or Triton can't be had here.
    """
    if choice(kernels, device) == "torch":
        from mogle_rt import torch_ops

        return cast(Ops, torch_ops)
    from mogle_rt import triton_ops

    if device.type not in ("cuda", "meta") and not (device.type == "cpu" and triton_ops.interpreted()):
        raise ConfigError(
            f"{'kernels' if kernels else VARIABLE}='triton' can't run on {device}: Triton's kernels need a GPU (or, for "
            "tests, TRITON_INTERPRET=1); use 'torch'"
        )
    return cast(Ops, triton_ops)
