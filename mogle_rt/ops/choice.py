"""The one place that chooses between PyTorch's operations and the fused kernels. No silent fallback."""

from __future__ import annotations

import importlib.util
import logging
import os
from typing import cast

import torch

from mogle_rt.errors import ConfigError
from mogle_rt.ops.contract import Ops

VARIABLE = "MOGLE_RT_KERNELS"
CHOICES = ("triton", "torch")


logger = logging.getLogger(__name__)


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
        from mogle_rt.ops import torch_ops

        return cast(Ops, torch_ops)
    from mogle_rt.ops import triton_ops

    if device.type not in ("cuda", "meta") and not (device.type == "cpu" and triton_ops.interpreted()):
        raise ConfigError(
            f"{'kernels' if kernels else VARIABLE}='triton' can't run on {device}: Triton's kernels need a GPU (or, for "
            "tests, TRITON_INTERPRET=1); use 'torch'"
        )
    return cast(Ops, triton_ops)
