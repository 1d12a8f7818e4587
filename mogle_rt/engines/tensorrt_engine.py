"""The engine that runs a TensorRT or TensorRT-RTX engine file. onnxruntime computes what no step changes.

Both packages have the same API. `Package` holds everything in which they differ.
"""

from __future__ import annotations

import importlib
import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mogle_rt.engines.contract import Conditions
from mogle_rt.engines.engine_file import EngineHeader, read_engine
from mogle_rt.engines.exported import ExportedGraphs, StepPreparation, manifest_dtype, run_axes
from mogle_rt.engines.manifest import GraphSpec
from mogle_rt.engines.onnxruntime_import import load_onnxruntime
from mogle_rt.engines.velocity import VelocityLoop
from mogle_rt.errors import CheckpointError, DeviceError, InputError, MogleError
from mogle_rt.installed import install_command
from mogle_rt.loop.schedule import Schedule


@dataclass(frozen=True)
class Package:
    """TensorRT or TensorRT-RTX: its name in messages, its import name, and how to install it."""

    name: str
    module: str
    install: str

    def load(self) -> Any:
        """Import the module and return it.

        Raises:
            DeviceError: it is not installed, or its libraries can't be loaded.
        """
        try:
            return importlib.import_module(self.module)
        except (ImportError, OSError, RuntimeError) as error:
            raise DeviceError(f"{self.name} can't be loaded here ({error}): {self.install}") from None


PACKAGES = {
    "tensorrt": Package(
        "tensorrt",
        "tensorrt",
        f"{install_command('tensorrt')} --extra-index-url https://pypi.nvidia.com, or use tensorrt-rtx",
    ),
    "tensorrt-rtx": Package("tensorrt-rtx", "tensorrt_rtx", install_command("tensorrt-rtx")),
}


@dataclass(eq=False)
class Loaded:
    """An engine on the GPU with its execution context. ``runtime`` must live as long as the engine."""

    graph: str
    path: Path
    modes: Any
    runtime: Any
    engine: Any
    context: Any

    @classmethod
    def read(cls, graph: str, path: Path, header: EngineHeader, package: Package) -> Loaded:
        """Read an engine from its file onto the current GPU.

        Raises:
            DeviceError: TensorRT does not accept the engine, or there is too little memory.
        """
        trt = package.load()
        _, begin = read_engine(path)
        runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
        with (
            path.open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
            memoryview(mapped) as whole,
            whole[begin:] as plan,
        ):
            engine = runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise DeviceError(f"{path}: {package.name} refuses the engine on this GPU; build it again here")
        if header.weight_streaming:
            engine.weight_streaming_budget_v2 = engine.get_weight_streaming_automatic_budget()
        context = engine.create_execution_context()
        if context is None:
            raise DeviceError(f"{path}: {package.name} can't run the engine: too little memory on this GPU")
        return cls(graph, path, trt.TensorIOMode, runtime, engine, context)

    def bind(self, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> None:
        """Tell TensorRT the addresses of inputs and results.

        Raises:
            DeviceError: TensorRT does not accept the shape or the address of a tensor.
        """
        for name, value in inputs.items():
            if self.engine.get_tensor_mode(name) != self.modes.INPUT:
                continue  # TensorRT has removed this input, because nothing needs it
            if not self.context.set_input_shape(name, tuple(value.shape)):
                raise DeviceError(f"{self.path}: TensorRT refuses {name} of shape {list(value.shape)}")
            self._bind(name, value)
        for name, value in outputs.items():
            self._bind(name, value)

    def _bind(self, name: str, value: Tensor) -> None:
        if not self.context.set_tensor_address(name, value.data_ptr()):
            raise DeviceError(f"{self.path}: TensorRT refuses the memory of {name}")

    def run(self, stream: int) -> None:
        """Launch a step on a CUDA stream, given by its handle.

        Raises:
            DeviceError: TensorRT failed.
        """
        if not self.context.execute_async_v3(stream):
            raise DeviceError(f"{self.path}: TensorRT failed to run the step; its log says why")


class TensorRTEngine(VelocityLoop):
    """Runs Face-MoGLE's step from an export with TensorRT. Inputs and results stay on the GPU.

    Args:
        exported: an export that holds an engine of this package.
        device: a CUDA GPU of the compute capability that the engine was built for.
        package: TensorRT or TensorRT-RTX.

    Raises:
        CheckpointError: the export has no such engine, or the engine does not fit the export.
        DeviceError: the device is not a GPU or not the right one, or the package is missing or of another version.
    """

    def __init__(self, exported: ExportedGraphs, device: torch.device, package: Package) -> None:
        self.exported, self.device, self.package = exported, device, package
        self._fitting: dict[str, tuple[Path, EngineHeader]] = {}
        self._unfit: dict[str, MogleError] = {}
        self._find()
        load_onnxruntime(device, manifest_dtype(exported.manifest))  # reports problems now and not at the first call
        self._prepare_step = StepPreparation(exported, device)
        self._loaded: Loaded | None = None
        self._inputs: dict[str, Tensor] = {}
        self._outputs: dict[str, Tensor] = {}

    def _find(self) -> None:
        """Find, for each graph, the first engine that fits this GPU, package and export, or the error of the first one.

        Raises:
            CheckpointError, DeviceError: no engine fits.
        """
        found = [e for e in self.exported.manifest.engines if e.header.runtime == self.package.name]
        if not found:
            raise CheckpointError(
                f"{self.exported.folder}: holds no {self.package.name} engine; build one: "
                f"python -m mogle_rt.export {self.exported.manifest.bundle.name} --format {self.package.name}"
            )
        targets = " or ".join(sorted({e.header.target for e in found}))
        first = self.exported.folder / found[0].file
        if self.device.type != "cuda":
            raise DeviceError(
                f"{first}: a {self.package.name} engine runs on a CUDA GPU of compute capability {targets}, "
                f"not on {self.device.type}; use engine torch or onnxruntime here"
            )
        have = ".".join(map(str, torch.cuda.get_device_capability(self.device)))
        found = [e for e in found if e.header.target == have]
        if not found:
            raise DeviceError(
                f"{first}: was built for compute capability {targets}, but {torch.cuda.get_device_name(self.device)} "
                f"has {have}; build one with --target {have.replace('.', '')}"
            )
        version = self.package.load().__version__
        for engine in found:
            path = self.exported.folder / engine.file
            try:
                header = self._check(path, version)
            except (CheckpointError, DeviceError) as error:
                self._unfit.setdefault(engine.graph, error)
            else:
                self._fitting.setdefault(header.graph, (path, header))
        if not self._fitting:
            raise next(iter(self._unfit.values()))

    def _check(self, path: Path, version: str) -> EngineHeader:
        """Read the header of an engine, and check that the engine fits the export and the package."""
        header, _ = read_engine(path)
        if not header.fits(self.exported.manifest.bundle.sha256, self.exported.graph(header.graph).sha256):
            raise CheckpointError(f"{path}: was built from another export of the graph; build it again")
        if header.runtime_version != version:
            raise DeviceError(
                f"{path}: was built by {header.runtime} {header.runtime_version}, but {version} is installed; "
                f"build it again"
            )
        return header

    def header(self, graph: str) -> EngineHeader:
        """The header of the engine that runs a graph.

        Raises:
            CheckpointError, DeviceError: there is no such engine, or it does not fit.
        """
        if graph in self._fitting:
            return self._fitting[graph][1]
        if graph in self._unfit:
            raise self._unfit[graph]
        scaled = graph == "step_scaled"
        raise CheckpointError(
            f"{self.exported.folder}: holds no {self.package.name} engine of graph {graph!r}, which condition_scale "
            f"{'other than 1 needs; build it with --condition-scale' if scaled else '1 needs; build it'}"
        )

    def _load(self, graph: str) -> Loaded:
        """The deserialised engine of a graph, with its context. Only one is held at a time."""
        if self._loaded is None or self._loaded.graph != graph:
            self._loaded = None  # freed before the next one is loaded
            self._loaded = Loaded.read(graph, *self._fitting[graph], self.package)
        return self._loaded

    def prepare(self, conditions: Conditions, schedule: Schedule) -> None:
        """Compute the inputs that no step changes, and bind them to the engine.

        Raises:
            InputError: a size is outside the engine's profile.
            CheckpointError, DeviceError: there is no engine for these conditions, or TensorRT fails.
        """
        self.follow(schedule, self.device, conditions)
        graph = "step" if conditions.condition_scale == 1 else "step_scaled"
        spec, axes = self.exported.graph(graph), run_axes(conditions, schedule)
        check_profile(self.header(graph), spec, axes)
        self._inputs = {}  # while this is empty, `step` refuses to run
        with torch.cuda.device(self.device):
            loaded = self._load(graph)
            inputs = self._prepare_step(conditions, schedule)
            dtype = inputs["text"].dtype
            shapes = {t.name: t.sizes(**axes) for t in (*spec.inputs, *spec.outputs)}
            inputs["latents"] = torch.empty(shapes["latents"], dtype=dtype, device=self.device)
            inputs["step"] = torch.zeros(1, dtype=torch.int64, device=self.device)
            outputs = {t.name: torch.empty(shapes[t.name], dtype=dtype, device=self.device) for t in spec.outputs}
            inputs = {t.name: inputs[t.name].contiguous() for t in spec.inputs}
            loaded.bind(inputs, outputs)
        self._inputs, self._outputs = inputs, outputs

    @property
    def execution(self) -> str:
        """How steps are run."""
        return self.package.name

    @torch.inference_mode()
    def step(self, latents: Tensor, k: int) -> Tensor:
        """The velocity at step k of the prepared run: [B, N, 64] -> [B, N, 64]."""
        if self._loaded is None or not self._inputs:
            raise RuntimeError("prepare() must be called before step()")
        with torch.cuda.device(self.device):
            self._inputs["latents"].copy_(latents)
            self._inputs["step"].fill_(k)
            self._loaded.run(torch.cuda.current_stream(self.device).cuda_stream)
            return self._outputs["velocity"].clone()


def check_profile(header: EngineHeader, graph: GraphSpec, axes: Mapping[str, int]) -> None:
    """Check that the sizes of a run are within the profile of an engine.

    Args:
        axes: see `run_axes`.

    Raises:
        InputError: a size is outside. The message names the first such size and its bounds.
    """
    for tensor in graph.inputs:
        if tensor.name not in header.profile:
            continue
        low, _, high = header.profile[tensor.name]
        shape = tensor.sizes(**axes)
        for axis, size, least, most in zip(tensor.shape, shape, low, high, strict=True):
            if least <= size <= most:
                continue
            if axis in ("steps", "text_tokens"):  # --min and --max don't set these
                what = str(axis).replace("_", " ")
                raise InputError(f"{size} {what}, but the engine takes at most {most} {what}")
            raise InputError(
                f"{tensor.name} of shape {list(shape)} is outside the engine's profile, {list(low)} to {list(high)}; "
                f"build one with wider --min and --max"
            )
