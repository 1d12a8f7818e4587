"""A step engine on a TensorRT or TensorRT-RTX engine file. What no step changes is made by onnxruntime.

Both packages have one API; `Package` is all that differs.
"""

from __future__ import annotations

import importlib
import mmap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mogle_rt.engine_file import EngineHeader, read_engine
from mogle_rt.engines import Conditions
from mogle_rt.errors import CheckpointError, DeviceError, InputError
from mogle_rt.onnx_engine import ExportedGraphs, StepPreparation
from mogle_rt.sampling import Schedule, VelocityLoop


@dataclass(frozen=True)
class Package:
    """A TensorRT: its name for people, its import name, how to get it."""

    name: str
    module: str
    install: str

    def load(self) -> Any:
        """The module.

        Raises:
            DeviceError: it isn't installed, or its libraries can't be loaded.
        """
        try:
            return importlib.import_module(self.module)
        except (ImportError, OSError, RuntimeError) as error:
            raise DeviceError(f"{self.name} is not to be had here ({error}): {self.install}") from None


PACKAGES = {
    "tensorrt": Package(
        "tensorrt",
        "tensorrt",
        "pip install --extra-index-url https://pypi.nvidia.com 'mogle-rt[tensorrt]', or take tensorrt-rtx",
    ),
    "tensorrt-rtx": Package("tensorrt-rtx", "tensorrt_rtx", "pip install 'mogle-rt[tensorrt-rtx]'"),
}


class TensorRTEngine(VelocityLoop):
    """Face-MoGLE's step by TensorRT, from an export. Inputs and results stay on the GPU.

    Args:
        exported: an export that holds an engine of this package.
        device: a CUDA GPU of the compute capability that the engine was built for.
        package: TensorRT or TensorRT-RTX.

    Raises:
        CheckpointError: the export holds no such engine, or it doesn't fit the export.
        DeviceError: not a GPU, not the right one, or the package is missing or of another version.
    """

    def __init__(self, exported: ExportedGraphs, device: torch.device, package: Package) -> None:
        self.exported, self.device, self.package = exported, device, package
        self._engines: dict[str, Any] = {}
        self._headers: dict[str, EngineHeader] = {}
        self._context: Any = None
        self._inputs: dict[str, Tensor] = {}
        self._outputs: dict[str, Tensor] = {}
        found = [e for e in exported.manifest.engines if e.header.get("runtime") == package.name]
        if not found:
            raise CheckpointError(
                f"{exported.folder}: holds no {package.name} engine; build one: "
                f"python -m mogle_rt.export {exported.manifest.bundle['name']} --format {package.name}"
            )
        self._files = self._fitting({exported.folder / e.file: read_engine(exported.folder / e.file)[0] for e in found})

    def _fitting(self, found: dict[Path, EngineHeader]) -> dict[str, Path]:
        """Engines that fit this GPU, package and export, by their graph."""
        targets = " or ".join(sorted({header.target for header in found.values()}))
        first = next(iter(found))
        if self.device.type != "cuda":
            raise DeviceError(
                f"{first}: a {self.package.name} engine runs on a CUDA GPU of compute capability {targets}, "
                f"not on {self.device.type}; use engine torch or onnxruntime here"
            )
        have = ".".join(map(str, torch.cuda.get_device_capability(self.device)))
        fitting = {path: header for path, header in found.items() if header.target == have}
        if not fitting:
            raise DeviceError(
                f"{first}: was built for compute capability {targets}, {torch.cuda.get_device_name(self.device)} has "
                f"{have}; build one with --target {have.replace('.', '')}"
            )
        version = self.package.load().__version__
        for path, header in fitting.items():
            if header.graph_sha256 != self.exported.graph(header.graph).sha256:
                raise CheckpointError(f"{path}: was built from another export of the graph; build it again")
            if header.runtime_version != version:
                raise DeviceError(
                    f"{path}: was built by {header.runtime} {header.runtime_version}, installed is {version}; "
                    f"build it again"
                )
            self._headers[header.graph] = header
        return {header.graph: path for path, header in fitting.items()}

    def _engine(self, graph: str) -> Any:
        """The deserialised engine; one at a time is held."""
        if graph not in self._files:
            raise CheckpointError(
                f"{self.exported.folder}: holds no {self.package.name} engine of graph {graph!r}, which condition_scale "
                f"other than 1 needs; build it with --condition-scale"
            )
        if graph not in self._engines:
            self._engines.clear()
            trt = self.package.load()
            path = self._files[graph]
            _, begin = read_engine(path)
            with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
                runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
                with memoryview(mapped) as whole, whole[begin:] as plan:
                    engine = runtime.deserialize_cuda_engine(plan)
            if engine is None:
                raise DeviceError(f"{path}: {self.package.name} refuses the engine on this GPU; build it again here")
            if self._headers[graph].weight_streaming:
                engine.weight_streaming_budget_v2 = engine.get_weight_streaming_automatic_budget()
            self._engines[graph] = (runtime, engine)
        return self._engines[graph][1]

    def prepare(self, conditions: Conditions, schedule: Schedule) -> None:
        """Compute the step's constant inputs, and bind them.

        Raises:
            InputError: a size is outside the engine's profile.
        """
        self.follow(schedule, self.device)
        graph = "step" if conditions.condition_scale == 1 else "step_scaled"
        batch, _, tokens, channels = conditions.mask_latents.shape
        engine = self._engine(graph)
        inputs = StepPreparation(self.exported, self.device)(conditions, schedule)
        spec = self.exported.graph(graph)
        dtype = inputs["text"].dtype
        inputs["latents"] = torch.empty(batch, tokens, channels, dtype=dtype, device=self.device)
        inputs["step"] = torch.zeros(1, dtype=torch.int64, device=self.device)
        check_profile(self._headers[graph], {t.name: tuple(inputs[t.name].shape) for t in spec.inputs})
        self._context = engine.create_execution_context()
        self._inputs = {t.name: inputs[t.name].contiguous() for t in spec.inputs}
        self._outputs = {
            t.name: torch.empty(t.sizes(batch=batch, tokens=tokens), dtype=dtype, device=self.device)
            for t in spec.outputs
        }
        for name, value in self._inputs.items():
            if engine.get_tensor_mode(name) is not None:
                self._context.set_input_shape(name, tuple(value.shape))
        for name, value in (self._inputs | self._outputs).items():
            self._context.set_tensor_address(name, value.data_ptr())

    @property
    def execution(self) -> str:
        """How steps are run."""
        return self.package.name

    @torch.inference_mode()
    def step(self, latents: Tensor, k: int) -> Tensor:
        """Velocity at step k of the prepared run: [B, N, 64] -> [B, N, 64]."""
        if self._context is None:
            raise RuntimeError("prepare() must be called before step()")
        self._inputs["latents"].copy_(latents)
        self._inputs["step"].fill_(k)
        stream = torch.cuda.current_stream(self.device)
        if not self._context.execute_async_v3(stream.cuda_stream):
            raise DeviceError(f"{self.package.name} failed to run the step; its log says why")
        return self._outputs["velocity"].clone()


def check_profile(header: EngineHeader, shapes: dict[str, tuple[int, ...]]) -> None:
    """Shapes lie in an engine's profile.

    Raises:
        InputError: names the first that does not, with its bounds.
    """
    for name, shape in shapes.items():
        if name not in header.profile:
            continue
        low, _, high = header.profile[name]
        if any(not a <= size <= b for a, size, b in zip(low, shape, high, strict=True)):
            raise InputError(
                f"{name} of shape {list(shape)} is outside the engine's profile, {list(low)} to {list(high)}; "
                f"build one with wider --min and --max"
            )
