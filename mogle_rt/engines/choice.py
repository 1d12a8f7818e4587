"""Chooses the engine that runs the step: torch, or onnxruntime or TensorRT with an export."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch

from mogle_rt.bundle import shipped as demo
from mogle_rt.bundle.bundle import Bundle
from mogle_rt.config import ENGINES, ModelConfig
from mogle_rt.engines.contract import Engine
from mogle_rt.engines.exported import ExportedGraphs, manifest_dtype
from mogle_rt.engines.manifest import Manifest
from mogle_rt.engines.onnx_engine import OnnxEngine
from mogle_rt.engines.tensorrt_engine import PACKAGES, TensorRTEngine
from mogle_rt.engines.torch_engine import TorchEngine
from mogle_rt.errors import CheckpointError, ConfigError

EngineName = Literal["torch", "onnxruntime", "tensorrt", "tensorrt-rtx"]


def export_folder(path: str | Path | None, checkpoint: str | Path) -> Path:
    """The folder of the export: ``path``, by default the bundle's folder, where `python -m mogle_rt.export` writes it.

    Raises:
        CheckpointError: there is no such bundle.
        ConfigError: no folder was given for the bundle that is part of the package.
    """
    bundle = demo.bundle_path(checkpoint)
    if not bundle.exists():  # a missing bundle is reported before a missing export
        raise CheckpointError(f"{bundle}: no such file")
    if path is not None:
        return Path(path)
    if bundle.resolve() == demo.BUNDLE.resolve():
        raise ConfigError(f"{bundle}: lies in the package; name the folder of its export with engine_path")
    return bundle.absolute().parent  # links are not resolved, because their target may be in a hub's cache


def engine_dtype(
    name: str, path: str | Path | None, checkpoint: str | Path, dtype: str | torch.dtype | None
) -> str | torch.dtype | None:
    """The dtype that was asked for. If none was and the engine runs an export, the dtype of the export.

    Raises:
        ConfigError: the engine is unknown, a path was given for torch, or none for the export of the package's bundle.
        CheckpointError: there is no bundle or no export.
    """
    if name not in ENGINES:
        raise ConfigError(f"engine must be one of {', '.join(ENGINES)}, got {name!r}")
    if name == "torch":
        if path is not None:
            raise ConfigError(f"engine torch takes no engine_path, got {str(path)!r}; give another engine with it")
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
    streamed: Sequence[int] = (),
) -> Engine:
    """Make the engine; call its `prepare` next.

    Args:
        name, path: see `Pipeline`.
        bundle, device, dtype, model, kernels, cuda_graphs, mixture: see `TorchEngine`.

    Raises:
        CheckpointError, ConfigError, DeviceError: the export does not fit the bundle, the options or this machine.
    """
    if name == "torch":
        options = {"kernels": kernels, "cuda_graphs": cuda_graphs, "mixture": mixture, "streamed": streamed}
        return TorchEngine(bundle, device, dtype, model, **options)  # type: ignore[arg-type]
    for option, value in (("kernels", kernels), ("mixture", mixture)):
        if value is not None:
            raise ConfigError(f"engine {name} takes no {option}, got {value!r}; leave it out, or use engine torch")
    exported = ExportedGraphs(export_folder(path, bundle.path), bundle, model, dtype)
    if name == "onnxruntime":
        return OnnxEngine(exported, device)
    return TensorRTEngine(exported, device, PACKAGES[name])
