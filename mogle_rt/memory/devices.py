"""Which device and dtype to compute on."""

from __future__ import annotations

import logging
import platform
from functools import cache

import torch

from mogle_rt.config import parse_dtype
from mogle_rt.errors import DeviceError
from mogle_rt.torch_api.private import cpu_has_amx, cpu_multiplies_bfloat16

logger = logging.getLogger(__name__)


def choose_device(device: str | int | torch.device | None) -> torch.device:
    """The requested device (a number N means cuda:N). The default is a CUDA GPU, else Apple's GPU, else the CPU.

    Raises:
        DeviceError: the device is unknown, or this machine doesn't have it.
    """
    if device is None:
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    asked = f"cuda:{device}" if type(device) is int else device  # not every build of PyTorch accepts a number
    try:
        chosen = torch.device(asked)
    except (RuntimeError, TypeError):
        raise DeviceError(f"device must be cpu, cuda, cuda:N or mps, got {device!r}") from None
    # PyTorch keeps only eight bits of the number, so cuda:256 would become cuda:0.
    if chosen.type not in ("cpu", "cuda", "mps") or str(chosen) != str(asked):
        raise DeviceError(f"device must be cpu, cuda, cuda:N or mps, got {device!r}")
    if chosen.type == "mps" and not torch.backends.mps.is_available():
        raise DeviceError("device mps was asked for, but this machine has none; use cpu")
    if chosen.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if not 0 <= (chosen.index or 0) < count:
            raise DeviceError(f"device {chosen} was asked for, but PyTorch sees {count} CUDA GPUs; use cpu")
    return chosen


def choose_dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    """The requested dtype. The default is one in which the device multiplies fast.

    On CPUs that is float32, unless they have AMX. Other CPUs multiply bfloat16 at the speed of float32 at best, and
    hundreds of times slower if they don't support it at all.
    """
    if dtype is not None:
        chosen = parse_dtype(dtype)
        if chosen == torch.bfloat16 and device.type == "cpu" and not _multiplies_bfloat16():
            _warn_of_slow_bfloat16()
        return chosen
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if device.type == "mps":
        return torch.float16
    return torch.bfloat16 if cpu_has_amx() else torch.float32


def device_name(device: torch.device) -> str:
    """What a device is called: a GPU by its model, any other by its kind."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _multiplies_bfloat16() -> bool:
    """Whether this CPU has instructions for bfloat16 products. Only x86 processors tell; others are assumed to."""
    return platform.machine().lower() not in ("x86_64", "amd64") or cpu_multiplies_bfloat16()


@cache
def _warn_of_slow_bfloat16() -> None:
    """Log the warning once per process."""
    logger.warning("this CPU has no instructions for bf16, so its products may take 100 times as long; use dtype fp32")
