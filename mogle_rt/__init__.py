"""mogle_rt: an optimised inference runtime for Face-MoGLE (arXiv 2509.00428): faces from a semantic mask and a prompt."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mogle_rt import errors
from mogle_rt.errors import (
    CheckpointError,
    ClusterError,
    ConfigError,
    DeviceError,
    DownloadError,
    InputError,
    MaskError,
    MogleError,
    NumericalError,
    OutputError,
)

__version__ = "0.1.0"

# A wheel holds kernels/ and export/ inside this package; a checkout has them beside it.
if not Path(__file__).with_name("kernels").is_dir():
    __path__.append(str(Path(__file__).parents[1]))

if TYPE_CHECKING:
    from mogle_rt import batch, masks
    from mogle_rt.config import ModelConfig
    from mogle_rt.conversion.convert import convert
    from mogle_rt.fast.settings import FastConfig
    from mogle_rt.pipeline import Pipeline

# Loaded when first used: `import mogle_rt` and `mogle-rt --help` needn't wait for torch and diffusers.
_LAZY = {
    "FastConfig": "mogle_rt.fast.settings",
    "ModelConfig": "mogle_rt.config",
    "Pipeline": "mogle_rt.pipeline",
    "convert": "mogle_rt.conversion.convert",
}

__all__ = [
    "CheckpointError",
    "ClusterError",
    "ConfigError",
    "DeviceError",
    "DownloadError",
    "FastConfig",
    "InputError",
    "MaskError",
    "ModelConfig",
    "MogleError",
    "NumericalError",
    "OutputError",
    "Pipeline",
    "__version__",
    "batch",
    "convert",
    "errors",
    "masks",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    if name in ("batch", "masks"):
        return importlib.import_module(f"mogle_rt.{name}")
    raise AttributeError(f"module 'mogle_rt' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
