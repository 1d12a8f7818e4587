"""Which engine runs the step: torch, or an export run by onnxruntime or TensorRT."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch

from mogle_rt.bundle import shipped as demo
from mogle_rt.bundle.bundle import Bundle
from mogle_rt.config import ModelConfig
from mogle_rt.engines.contract import Engine
from mogle_rt.engines.exported import ExportedGraphs, manifest_dtype
from mogle_rt.engines.manifest import Manifest
from mogle_rt.engines.onnx_engine import OnnxEngine
from mogle_rt.engines.tensorrt_engine import PACKAGES, TensorRTEngine
from mogle_rt.engines.torch_engine import TorchEngine
from mogle_rt.errors import CheckpointError, ConfigError

EngineName = Literal["torch", "onnxruntime", "tensorrt", "tensorrt-rtx"]
ENGINES = ("torch", "onnxruntime", "tensorrt", "tensorrt-rtx")


def export_folder(path: str | Path | None, checkpoint: str | Path) -> Path:
    """Where the export is; by default beside the bundle, as `python -m mogle_rt.export` leaves it.

    Raises:
        CheckpointError: there is no such bundle.
        ConfigError: none was named for the package's own bundle.
    """
    bundle = demo.bundle_path(checkpoint)
    if not bundle.exists():  # told before the lack of an export of it
        raise CheckpointError(f"{bundle}: no such file")
    if path is not None:
        return Path(path)
    if bundle.resolve() == demo.BUNDLE.resolve():
        raise ConfigError(f"{bundle}: lies in the package; name the folder of its export with engine_path")
    return bundle.absolute().parent  # of the name that was given: a link's target may lie in a hub's cache


def engine_dtype(
    name: str, path: str | Path | None, checkpoint: str | Path, dtype: str | torch.dtype | None
) -> str | torch.dtype | None:
    """The dtype asked for; by default, of an export, the one that it was made in.

    Raises:
        ConfigError: an unknown engine, or a path where none is needed, or none where one is.
        CheckpointError: there is no bundle or no export.
    """
    if name not in ENGINES:
        raise ConfigError(f"engine must be one of {', '.join(ENGINES)}, got {name!r}")
    if name == "torch":
        if path is not None:
            raise ConfigError(f"engine torch takes no engine_path, got {str(path)!r}; name another engine with it")
        return dtype
    return manifest_dtype(Manifest.read(export_folder(path, checkpoint))) if dtype is None else dtype


def make_engine(
    name: str,
    path: str | Path | None,
    bundle: Bundle,
    device: torch.device,
    dtype: torch.dtype,
    model: ModelConfig,
    *,
    kernels: str | None = None,
    cuda_graphs: bool = True,
    mixture: str | None = None,
) -> Engine:
    """The engine, ready to `prepare`.

    Args:
        name, path: see `Pipeline`.
        bundle, device, dtype, model, kernels, cuda_graphs, mixture: see `TorchEngine`.

    Raises:
        CheckpointError, ConfigError, DeviceError: the export doesn't fit the bundle, the options or this machine.
    """
    if name == "torch":
        return TorchEngine(bundle, device, dtype, model, kernels=kernels, cuda_graphs=cuda_graphs, mixture=mixture)
    for option, value in (("kernels", kernels), ("mixture", mixture)):
        if value is not None:
            raise ConfigError(f"engine {name} takes no {option}, got {value!r}; leave it out, or take engine torch")
    exported = ExportedGraphs(export_folder(path, bundle.path), bundle, model, dtype)
    if name == "onnxruntime":
        return OnnxEngine(exported, device)
    return TensorRTEngine(exported, device, PACKAGES[name])
