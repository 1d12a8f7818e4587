"""The only place where onnxruntime is imported. Its telemetry is switched off, and it is asked what it can run here."""

from __future__ import annotations

import os
from functools import cache
from typing import Any

import torch

from mogle_rt.errors import DeviceError, printable
from mogle_rt.installed import install_command

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
# A model with a single Identity node. It shows whether a provider works before gigabytes are read for it.
PROBE = (
    b'\x08\x08:7\n\x10\n\x01x\x12\x01y"\x08Identity\x12\x01gZ\x0f\n\x01x\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01'
    b"b\x0f\n\x01y\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01B\x04\n\x00\x10\x12"
)
SILENT, WARNINGS = 4, 2  # log severities of onnxruntime; the second is its default
SWITCH = "ORT_DISABLE_TELEMETRY"


def import_onnxruntime() -> Any:
    """Import onnxruntime without telemetry, and return the module.

    When it is imported, onnxruntime 1.31 writes a device id and a database of events into the user's cache folder, and
    later looks up its vendor's host. Only the environment variable `SWITCH` prevents this, and only if it is set before
    the import. The library's own function `disable_telemetry_events` comes too late. A value that the user set is kept.

    Raises:
        ImportError: the package is not installed.
    """
    os.environ.setdefault(SWITCH, "1")
    import onnxruntime

    return onnxruntime


def load_onnxruntime(device: torch.device, dtype: torch.dtype) -> Any:
    """The module onnxruntime, after checking that it can run graphs of this dtype on this device.

    Raises:
        DeviceError: onnxruntime is not installed, or can't run such graphs there.
    """
    try:
        onnxruntime = import_onnxruntime()
    except ImportError as error:
        raise DeviceError(
            f"engine onnxruntime needs the package onnxruntime ({error}): {install_command('export')}"
        ) from None
    provider = PROVIDERS.get(device.type)
    if provider is None:
        raise DeviceError(f"engine onnxruntime runs on cpu or cuda, not on {device.type}")
    available = onnxruntime.get_available_providers()
    if provider not in available:
        raise DeviceError(
            f"this onnxruntime has no {provider} (it has {', '.join(available)}); "
            f"install onnxruntime-gpu, or use device cpu"
        )
    if device.type == "cpu" and dtype == torch.bfloat16:
        raise DeviceError("onnxruntime's CPU kernels don't support bf16; export with --dtype fp32, or use cuda")
    if device.type == "cuda":
        _probe(onnxruntime, device)
    return onnxruntime


def provider(device: torch.device) -> Any:
    """The provider for a device, with its options. TF32 is off, so that float32 means float32."""
    name = PROVIDERS[device.type]
    return (name, {"device_id": str(device.index or 0), "use_tf32": "0"}) if device.type == "cuda" else name


@cache
def _probe(ort: Any, device: torch.device) -> None:
    """Check that onnxruntime really uses the provider that was asked for.

    Where the provider's libraries or driver are missing, onnxruntime falls back to the CPU and only logs the reason.

    Raises:
        DeviceError: onnxruntime falls back to another provider on this machine.
    """
    # The error below already says what is wrong, so onnxruntime should not log it as well. Missing libraries are logged
    # by the logger of the whole process, so for a moment the sessions of other threads log nothing either.
    ort.set_default_logger_severity(SILENT)
    try:
        session = ort.InferenceSession(PROBE, providers=[provider(device)], enable_fallback=0)
        got, reason = session.get_providers()[0], "its libraries or driver are missing"
    except Exception as error:  # onnxruntime has its own classes for each kind
        got, reason = "nothing", first_line(error)
    finally:
        ort.set_default_logger_severity(WARNINGS)
    if got != PROVIDERS[device.type]:
        raise DeviceError(
            f"onnxruntime fell back from {PROVIDERS[device.type]} to {got} on {device}: {reason}; "
            f"fix that, or use device cpu"
        )


def first_line(error: Exception) -> str:
    """What onnxruntime says, on one line."""
    return printable(str(error)[:600])[:300]
