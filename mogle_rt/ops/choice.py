"""The one place that chooses between PyTorch's operations and the fused kernels. It never falls back silently."""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
from typing import cast

import torch

from mogle_rt.config import KERNELS
from mogle_rt.errors import ConfigError
from mogle_rt.kernels.chips import TARGETS, compiled_for
from mogle_rt.ops.contract import Ops

KERNELS_VARIABLE = "MOGLE_RT_KERNELS"

logger = logging.getLogger(__name__)


def choice(kernels: str | None, device: torch.device) -> str:
    """Which of `KERNELS` is meant.

    Args:
        kernels: one of `KERNELS`. None means the value of the environment variable MOGLE_RT_KERNELS. Without that, it
            means Triton on GPUs that its kernels were compiled for (and on the meta device, which stands for such a
            GPU), and PyTorch elsewhere.

    Raises:
        ConfigError: the choice is unknown, or Triton's kernels can't be used on this device.
    """
    name = kernels or os.environ.get(KERNELS_VARIABLE) or None
    source = "kernels" if kernels else KERNELS_VARIABLE
    if name is not None and name not in KERNELS:
        raise ConfigError(f"{source} must be one of {', '.join(map(repr, KERNELS))}, got {name!r}")
    if name == "torch" or (name is None and device.type not in ("cuda", "meta")):
        return "torch"
    reason = _why_not_triton(device)
    if reason is None:
        return "triton"
    if name == "triton":
        raise ConfigError(f"{source}='triton', but {reason}; use 'torch'")
    _warn_once(reason)
    return "torch"


def _why_not_triton(device: torch.device) -> str | None:
    """The reason why Triton's kernels can't run on a GPU, or None where they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    # AMD's GPUs have no such capability numbers. Without a GPU, CUDA tensors are fake and stand for those of any GPU.
    if device.type != "cuda" or torch.version.hip or not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability(device)
    if compiled_for((major, minor)):
        return None
    known = ", ".join(target.removeprefix("sm_") for target in TARGETS if target.startswith("sm_"))
    return (
        f"its kernels were never compiled for this GPU, {torch.cuda.get_device_name(device)} of compute capability "
        f"{major}.{minor} (they were for sm_{known})"
    )


@functools.cache
def _warn_once(reason: str) -> None:
    logger.warning("a step takes PyTorch's own, slower operations: %s", reason)


def choose(kernels: str | None, device: torch.device) -> Ops:
    """The operations to use on a device. For ``kernels``, see `choice`.

    Raises:
        ConfigError: the choice is unknown, or Triton can't be used here.
    """
    if choice(kernels, device) == "torch":
        from mogle_rt.ops import torch_ops

        return cast(Ops, torch_ops)
    from mogle_rt.ops import triton_ops

    if device.type not in ("cuda", "meta") and not (device.type == "cpu" and triton_ops.interpreted()):
        source = "kernels" if kernels else KERNELS_VARIABLE
        raise ConfigError(
            f"{source}='triton' can't run on {device}: Triton's kernels need a GPU (or, for tests, TRITON_INTERPRET=1); "
            "use 'torch'"
        )
    return cast(Ops, triton_ops)
