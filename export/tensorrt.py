"""Builds TensorRT and TensorRT-RTX engines of the step.

Networks are strongly typed, so every layer has the precision that it has in the graph. Both packages have the same API, see
`mogle_rt.engines.tensorrt_engine.Package`. Only TensorRT-RTX can build for GPUs that are not in the machine.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx
import torch

from mogle_rt.bundle.bundle import Bundle
from mogle_rt.bundle.files import atomic_write
from mogle_rt.bundle.source import TensorSource
from mogle_rt.config import PATCH
from mogle_rt.engines.engine_file import EngineHeader, write_engine
from mogle_rt.engines.exported import manifest_dtype
from mogle_rt.engines.manifest import EngineSpec, Manifest
from mogle_rt.engines.tensorrt_engine import Package
from mogle_rt.errors import ConfigError, DeviceError, InputError
from mogle_rt.export.exporter import ExportOptions, build_graph
from mogle_rt.export.weights import Weights

SIZE = re.compile(r"(\d+)x(\d+)(?:x(\d+))?")


class RefusedNodesError(ConfigError):
    """TensorRT can't take nodes of the graph.

    Attributes:
        nodes: of each refused node the name, the operator and the reason.
    """

    def __init__(self, package: str, nodes: Sequence[tuple[str, str, str]]) -> None:
        self.nodes = list(nodes)
        listed = "; ".join(f"{name} ({op}): {reason}" for name, op, reason in self.nodes[:5])
        more = f"; and {len(self.nodes) - 5} more" if len(self.nodes) > 5 else ""
        super().__init__(f"{package} refuses {len(self.nodes)} nodes: {listed}{more}")


@dataclass(frozen=True)
class Size:
    """An image size in pixels, and a batch size."""

    width: int
    height: int
    batch: int = 1

    @classmethod
    def parse(cls, text: str) -> Size:
        """Read WIDTHxHEIGHT or WIDTHxHEIGHTxBATCH.

        Raises:
            InputError: the text has another form, or width or height is no multiple of 16.
        """
        match = SIZE.fullmatch(text.strip())
        if match is None:
            raise InputError(f"a size must look like 512x512 or 512x512x4 (width x height x batch), got {text!r}")
        size = cls(int(match[1]), int(match[2]), int(match[3] or 1))
        if min(size.width, size.height, size.batch) < 1 or size.width % PATCH or size.height % PATCH:
            raise InputError(f"width and height must be multiples of {PATCH}, the batch 1 or more, got {text!r}")
        return size

    @property
    def tokens(self) -> int:
        """The number of image tokens N."""
        return self.width // PATCH * (self.height // PATCH)


@dataclass(frozen=True, kw_only=True)
class Profile:
    """The sizes that an engine takes: the smallest, the usual (for which it is made fastest) and the largest.

    Attributes:
        text_tokens, steps: smallest, usual and largest number of the prompt's tokens and of steps.

    Raises:
        InputError: sizes are not in ascending order.
    """

    smallest: Size = Size(256, 256)
    usual: Size = Size(512, 512)
    largest: Size = Size(1024, 1024, 4)
    text_tokens: tuple[int, int, int] = (1, 512, 512)
    steps: tuple[int, int, int] = (1, 28, 100)

    def __post_init__(self) -> None:
        for what in ("tokens", "batch"):
            low, usual, high = (getattr(s, what) for s in (self.smallest, self.usual, self.largest))
            if not low <= usual <= high:
                raise InputError(f"--min, --opt and --max must ascend, their {what} are {low}, {usual} and {high}")
        for name in ("text_tokens", "steps"):
            low, usual, high = getattr(self, name)
            if not 1 <= low <= usual <= high:
                raise InputError(f"{name} must be three ascending positive numbers, got {getattr(self, name)}")

    def axes(self, which: int) -> dict[str, int]:
        """The sizes of the dynamic axes in the smallest (0), usual (1) or largest (2) run."""
        size, text = (self.smallest, self.usual, self.largest)[which], self.text_tokens[which]
        return {
            "batch": size.batch,
            "tokens": size.tokens,
            "text_tokens": text,
            "steps": self.steps[which],
            "sequence": text + 2 * size.tokens,
        }


def parse_targets(text: str | None, package: Package) -> list[str]:
    """Read compute capabilities such as "89", "8.9" or "sm_89", several with commas, as TensorRT's names ("SM89").

    Raises:
        InputError: the package doesn't build for such a compute capability.
        DeviceError: none was named, and there is no GPU here.
    """
    trt = package.load()
    local = None
    if torch.cuda.is_available():
        local = "SM{}{}".format(*torch.cuda.get_device_capability())
    if package.name == "tensorrt":
        if local is None:
            raise DeviceError("tensorrt builds on a CUDA GPU only, and PyTorch sees none; tensorrt-rtx builds without")
        if text is not None and _target(text) != local:
            raise InputError(f"tensorrt builds for this machine's GPU ({local}) only, got target {text!r}")
        return [local]
    known = sorted((n for n in dir(trt.ComputeCapability) if n.startswith("SM")), key=lambda n: int(n[2:]))
    choice = ", ".join(n[2:] for n in known)
    if text is None:
        if local is None:
            raise DeviceError(f"there is no GPU here to build for; name one with --target: {choice}")
        text = local
    targets = [_target(part) for part in text.split(",")]
    for target in targets:
        if target not in known:
            raise InputError(f"target must be one of {choice} for {package.name}, got {target.removeprefix('SM')!r}")
    return targets


def _target(text: str) -> str:
    return "SM" + text.strip().lower().removeprefix("sm").lstrip("_").replace(".", "").upper()


def build_engine(
    bundle: Bundle,
    folder: Path,
    manifest: Manifest,
    package: Package,
    *,
    graph: str = "step",
    profile: Profile,
    target: str,
    weight_streaming: bool = False,
    refit: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
) -> Manifest:
    """Build an engine of an exported step, and add it to the manifest.

    Args:
        bundle: see `step_model`.
        folder, manifest: the export.
        graph: "step", or "step_scaled" for runs with a condition_scale.
        profile: the sizes that the engine takes.
        target: one of `parse_targets`.
        weight_streaming: allow weights to stay in the host's memory if the GPU's memory is too small.
        refit: allow weights to be exchanged later. Building such an engine needs a GPU.
        progress: is called with a phase of the build, the number of its finished steps, and that of all its steps.

    Returns:
        The new manifest, which is also written to the folder.

    Raises:
        RefusedNodesError: TensorRT refuses nodes of the graph; the error names all of them.
        ConfigError: TensorRT can't build the engine.
        DeviceError: the package is missing, or ``refit`` without a GPU.
    """
    model = step_model(bundle, manifest, graph)
    spec = manifest.graphs[graph]
    shapes = {
        t.name: tuple(t.sizes(**profile.axes(which)) for which in range(3))
        for t in spec.inputs
        if any(isinstance(size, str) for size in t.shape)
    }
    plan = build_plan(
        model,
        folder,
        package,
        shapes,
        target=target,
        weight_streaming=weight_streaming,
        refit=refit,
        progress=progress,
    )
    header = EngineHeader(
        runtime=package.name,
        runtime_version=package.load().__version__,
        target=f"{target[2:-1]}.{target[-1]}",
        graph=graph,
        dtype=manifest.dtype,
        bundle_sha256=manifest.bundle.sha256,
        graph_sha256=spec.sha256,
        profile={name: (low, usual, high) for name, (low, usual, high) in shapes.items()},
        plan_bytes=plan.nbytes,
        weight_streaming=weight_streaming,
        refittable=refit,
    )
    file = f"{graph}.{target.lower()}.{package.name}.engine"
    write_engine(folder / file, header, memoryview(plan))
    entry = EngineSpec(file=file, graph=graph, header=header)
    manifest = replace(manifest, engines=(*(e for e in manifest.engines if e.file != file), entry))
    manifest.write(folder)
    return manifest


def step_model(bundle: TensorSource, manifest: Manifest, graph: str) -> onnx.ModelProto:
    """The step in a form that TensorRT accepts: in float32 it refuses Attention, but accepts the operators it consists of.

    Args:
        bundle: the file with the export's weights; if they were copied, the copy.
    """
    dtype = manifest_dtype(manifest)
    options = ExportOptions(dtype=dtype, opset=manifest.opset, model=manifest.model_config)
    weights = Weights(bundle.tensors, manifest.weights.file, bundle, dtype, "")
    return build_graph(graph, bundle.config, weights, options, fused_attention=dtype != torch.float32)


def build_plan(
    model: onnx.ModelProto,
    folder: Path,
    package: Package,
    shapes: Mapping[str, Sequence[Sequence[int]]],
    *,
    target: str,
    weight_streaming: bool = False,
    refit: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
) -> Any:
    """Build the plan of any graph in memory.

    Args:
        folder: the folder with the graph's weights.
        shapes: the smallest, usual and largest shape of each input.
        target: one of `parse_targets`.

    Raises:
        RefusedNodesError, ConfigError: see `build_engine`.
    """
    trt = package.load()
    if refit and not torch.cuda.is_available():
        raise DeviceError(f"{package.name} builds refittable engines on a machine with a GPU only; leave out --refit")
    logger = _logger(trt)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    raw, path = model.SerializeToString(), str(folder / "graph.onnx")
    if not parser.parse(raw, path):
        raise RefusedNodesError(package.name, _refused(trt, parser, logger, model, raw, path))
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)  # float32 means float32
    if weight_streaming:
        config.set_flag(trt.BuilderFlag.WEIGHT_STREAMING)
    if refit:
        config.set_flag(trt.BuilderFlag.REFIT)
    if package.name == "tensorrt-rtx":
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, target), 0)
    if progress:
        config.progress_monitor = _monitor(trt, progress)
    profile = builder.create_optimization_profile()
    for name, (low, usual, high) in shapes.items():
        profile.set_shape(name, tuple(low), tuple(usual), tuple(high))
    config.add_optimization_profile(profile)
    # The timing cache is deprecated in TensorRT-RTX.
    timings = folder / f"timing.{package.name}.cache" if package.name == "tensorrt" else None
    if timings is not None:
        cache = config.create_timing_cache(timings.read_bytes() if timings.exists() else b"")
        config.set_timing_cache(cache, ignore_mismatch=True)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        reason = logger.errors[-1] if logger.errors else "it gave no reason"
        raise ConfigError(f"{package.name} can't build the engine: {reason}")
    if timings is not None:
        with atomic_write(timings) as file:
            file.write(memoryview(config.get_timing_cache().serialize()))
    return plan


def _refused(
    trt: Any, parser: Any, logger: Any, model: onnx.ModelProto, raw: bytes, path: str
) -> list[tuple[str, str, str]]:
    """Name, operator and reason of every refused node. The parser stops at the first, so it is asked about the rest."""
    refused: dict[str, tuple[str, str, str]] = {}
    for i in range(parser.num_errors):
        error = parser.get_error(i)
        name = error.node_name() or (model.graph.node[error.node()].name if error.node() >= 0 else "the graph")
        reason = " ".join(error.desc().split())
        refused.setdefault(name, (name, error.node_operator() or "?", reason[:300]))
    operators = {node.op_type for node in model.graph.node}
    unknown = {op for op in operators if not parser.supports_operator(op)}
    for node in model.graph.node:
        if node.op_type in unknown:
            refused.setdefault(node.name, (node.name, node.op_type, "unknown operator"))
    if not refused:
        reason = logger.errors[-1] if logger.errors else "no reason given"
        refused["the graph"] = ("the graph", "?", reason)
    return list(refused.values())


def _logger(trt: Any) -> Any:
    """A logger that keeps the errors and prints nothing."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.errors.append(" ".join(message.split())[:300])

    return Logger()


def _monitor(trt: Any, progress: Callable[[str, int, int], None]) -> Any:
    """A monitor that passes the phases of a build on to ``progress``."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.steps: dict[str, int] = {}

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            self.steps[phase] = steps
            progress(phase, 0, steps)

        def step_complete(self, phase: str, step: int) -> bool:
            progress(phase, step + 1, self.steps.get(phase, 0))
            return True

        def phase_finish(self, phase: str) -> None:
            steps = self.steps.pop(phase, 0)
            progress(phase, steps, steps)

    return Monitor()
