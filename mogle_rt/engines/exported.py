"""The parts that all engines for exports share: the export itself, onnxruntime's sessions, and what no step changes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mogle_rt.bundle.bundle import Bundle
from mogle_rt.config import DTYPE_NAMES, ModelConfig
from mogle_rt.engines.contract import Conditions
from mogle_rt.engines.manifest import GraphSpec, Manifest, manifest_path
from mogle_rt.engines.onnxruntime_import import import_onnxruntime
from mogle_rt.errors import CheckpointError, ConfigError, DeviceError
from mogle_rt.loop.schedule import Schedule

TYPES = {
    "FLOAT": torch.float32,
    "FLOAT16": torch.float16,
    "BFLOAT16": torch.bfloat16,
    "INT64": torch.int64,
    "UINT8": torch.uint8,
}
ONNX_NUMBERS = {torch.float32: 1, torch.uint8: 2, torch.int64: 7, torch.float16: 10, torch.bfloat16: 16}
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
PREPACK_BYTES = 1 << 30  # weights up to this size are rearranged for speed; larger ones stay mapped from their file
KEPT = "experts"  # this graph has only a few megabytes, so its session is kept on a GPU too
# The classes of onnxruntime's errors that concern the graph and not the machine.
REFUSALS = ("InvalidArgument", "InvalidGraph", "InvalidProtobuf", "NoSuchFile", "NotImplemented")
# On a GPU these operators must not run on the CPU. onnxruntime silently moves operators there that its provider lacks.
HEAVY = frozenset(
    (
        "Attention",
        "Conv",
        "Gelu",
        "Gemm",
        "LayerNormalization",
        "MatMul",
        "RMSNormalization",
        "RotaryEmbedding",
        "Softmax",
    )
)
# A model with a single Identity node. It shows whether a provider works before gigabytes are read for it.
PROBE = (
    b'\x08\x08:7\n\x10\n\x01x\x12\x01y"\x08Identity\x12\x01gZ\x0f\n\x01x\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01'
    b"b\x0f\n\x01y\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01B\x04\n\x00\x10\x12"
)
SILENT, WARNINGS = 4, 2  # log severities of onnxruntime; the second is its default
NO_ATTENTION = -1e4  # log(condition_scale) for 0: its exponential is 0 in every dtype


class ExportedGraphs:
    """An export, checked against a bundle, the model's switches and a dtype.

    Args:
        path: the folder of the export, or its manifest.
        bundle: the bundle that was exported.
        model, dtype: the switches and the dtype of the export.

    Raises:
        CheckpointError: files are missing or changed, or another bundle was exported.
        ConfigError: the switches or the dtype differ from those of the export.
    """

    def __init__(self, path: str | Path, bundle: Bundle, model: ModelConfig, dtype: torch.dtype) -> None:
        self.manifest = Manifest.read(path)
        self.folder = manifest_path(path).parent
        self.manifest.check_files(self.folder)
        if bundle.content_hash not in (self.manifest.bundle["sha256"], self.manifest.weights.sha256):
            raise CheckpointError(
                f"{self.folder}: was exported from another bundle ({self.manifest.bundle['name']}) than {bundle.path}"
            )
        if dict(self.manifest.model_config) != model.to_dict():
            other = [n for n, value in model.to_dict().items() if self.manifest.model_config.get(n) != value]
            raise ConfigError(
                f"{self.folder}: was exported with {other[0]} = {self.manifest.model_config.get(other[0])}, but "
                f"{getattr(model, other[0])} is asked for; export with --model-config, or pass the same model_config"
            )
        if manifest_dtype(self.manifest) != dtype:
            raise ConfigError(
                f"{self.folder}: was exported in {self.manifest.dtype}, but {str(dtype).removeprefix('torch.')} is "
                f"asked for; export with that --dtype"
            )

    def graph(self, name: str) -> GraphSpec:
        """The graph of this name in the manifest.

        Raises:
            CheckpointError: the export has no graph of this name.
        """
        if name not in self.manifest.graphs:
            raise CheckpointError(f"{self.folder}: the export holds no graph {name!r}; export again")
        return self.manifest.graphs[name]


def manifest_dtype(manifest: Manifest) -> torch.dtype:
    """The dtype in which the graphs compute.

    Raises:
        CheckpointError: the manifest names an unknown dtype.
    """
    name = DTYPE_NAMES.get(manifest.dtype)
    if name is None:
        raise CheckpointError(f"damaged manifest: dtype {manifest.dtype!r}")
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def load_onnxruntime(device: torch.device, dtype: torch.dtype) -> Any:
    """The module onnxruntime, after checking that it can run graphs of this dtype on this device.

    Raises:
        DeviceError: onnxruntime is not installed, or can't run such graphs there.
    """
    try:
        onnxruntime = import_onnxruntime()
    except ImportError as error:
        raise DeviceError(
            f"engine onnxruntime needs the package onnxruntime ({error}): pip install 'mogle-rt[export]'"
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


def _provider(device: torch.device) -> Any:
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
        session = ort.InferenceSession(PROBE, providers=[_provider(device)], enable_fallback=0)
        got, reason = session.get_providers()[0], "its libraries or driver are missing"
    except Exception as error:  # onnxruntime has its own classes for each kind
        got, reason = "nothing", _first_line(error)
    finally:
        ort.set_default_logger_severity(WARNINGS)
    if got != PROVIDERS[device.type]:
        raise DeviceError(
            f"onnxruntime fell back from {PROVIDERS[device.type]} to {got} on {device}: {reason}; "
            f"fix that, or use device cpu"
        )


class Session:
    """A graph in onnxruntime on one device. It never moves to another device silently.

    Args:
        folder: the folder that holds the graph's file and its weights. graph: its entry in the manifest.
        weight_bytes: the size of the weights, see `PREPACK_BYTES`.

    Raises:
        DeviceError: onnxruntime is missing, can't run the graph on the device, or would run heavy nodes elsewhere.
        CheckpointError: onnxruntime does not accept the graph.
    """

    def __init__(self, folder: Path, graph: GraphSpec, device: torch.device, weight_bytes: int) -> None:
        ort = load_onnxruntime(device, TYPES[graph.outputs[0].dtype])
        self.device = device
        self.graph = graph
        options = ort.SessionOptions()
        options.log_severity_level = SILENT
        options.intra_op_num_threads = torch.get_num_threads()
        # Without this, its threads keep spinning after a run and take processor time from PyTorch, which runs next.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        if device.type == "cuda":
            options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        if weight_bytes > PREPACK_BYTES:
            options.add_session_config_entry("session.disable_prepacking", "1")
        path = folder / graph.file
        try:
            self.session = ort.InferenceSession(str(path), options, providers=[_provider(device)], enable_fallback=0)
        except Exception as error:  # onnxruntime has its own classes for each kind
            reason = _first_line(error)
            if type(error).__name__ in REFUSALS or "Load model from" in reason:
                raise CheckpointError(f"{path}: onnxruntime refuses it: {reason}") from None
            raise DeviceError(f"{path}: onnxruntime can't load it on {device}: {reason}") from None
        if device.type == "cuda":
            self._check_assignment(path)

    def _check_assignment(self, path: Path) -> None:
        """Check that no heavy node was assigned to the CPU."""
        if not hasattr(self.session, "get_provider_graph_assignment_info"):  # an older version of onnxruntime
            return
        left = [
            f"{node.name} ({node.op_type})"
            for part in self.session.get_provider_graph_assignment_info()
            if part.ep_name == PROVIDERS["cpu"]
            for node in part.get_nodes()
            if node.op_type in HEAVY
        ]
        if left:
            more = f" and {len(left) - 3} more" if len(left) > 3 else ""
            raise DeviceError(
                f"{path}: onnxruntime's CUDA provider lacks {', '.join(left[:3])}{more}, which would run on the CPU; "
                f"export with another --dtype or --opset, or use engine torch"
            )

    def outputs(self, **axes: int) -> dict[str, Tensor]:
        """Uninitialised tensors for the results. axes: the sizes of the graph's dynamic axes in this run."""
        return {t.name: self._empty(t.sizes(**axes), t.dtype) for t in self.graph.outputs}

    def _empty(self, shape: tuple[int, ...], dtype: str) -> Tensor:
        return torch.empty(shape, dtype=TYPES[dtype], device=self.device)

    def binding(self, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> Any:
        """Bind the graph's inputs and outputs to the tensors' memory without copies. Other entries of ``inputs`` are
        ignored. Every input must be contiguous and have the dtype that the graph declares."""
        binding = self.session.io_binding()
        place = (self.device.type, self.device.index or 0)
        for spec in self.graph.inputs:
            value = inputs[spec.name]
            assert value.is_contiguous(), spec.name
            assert value.dtype == TYPES[spec.dtype], spec.name
            binding.bind_input(spec.name, *place, ONNX_NUMBERS[value.dtype], tuple(value.shape), value.data_ptr())
        for name, value in outputs.items():
            binding.bind_output(name, *place, ONNX_NUMBERS[value.dtype], tuple(value.shape), value.data_ptr())
        return binding

    def run(self, binding: Any) -> None:
        """Run the graph on bound tensors.

        Raises:
            DeviceError: onnxruntime failed.
        """
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()  # onnxruntime uses its own stream
        try:
            self.session.run_with_iobinding(binding)
            binding.synchronize_outputs()
        except Exception as error:  # onnxruntime has its own classes for each kind
            raise DeviceError(f"{self.graph.file}: onnxruntime failed: {_first_line(error)}") from None

    def __call__(self, inputs: Mapping[str, Tensor], **axes: int) -> dict[str, Tensor]:
        """Run the graph once. Inputs may be on any device; the results are new tensors on the session's device."""
        placed = {t.name: inputs[t.name].to(self.device, TYPES[t.dtype]).contiguous() for t in self.graph.inputs}
        results = self.outputs(**axes)
        self.run(self.binding(placed, results))
        return results


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


class StepPreparation:
    """Computes everything that no step changes, with the graphs ``experts`` and ``prepare``.

    On a GPU the weights of ``prepare``, a quarter of the model's, are released after use. Its last results are kept, so
    that another run with the same prompt, schedule and size does not load the weights again.
    """

    def __init__(self, exported: ExportedGraphs, device: torch.device) -> None:
        self.exported, self.device = exported, device
        self._sessions: dict[str, Session] = {}
        self._made_from: dict[str, Tensor] = {}
        self._made: dict[str, Tensor] = {}

    def session(self, name: str) -> Session:
        """The session of a graph. On a CPU, where the weights are pages of their file, every session is kept."""
        if name in self._sessions:
            return self._sessions[name]
        session = Session(
            self.exported.folder, self.exported.graph(name), self.device, self.exported.manifest.weights.bytes
        )
        if self.device.type == "cpu" or name == KEPT:
            self._sessions[name] = session
        return session

    def __call__(self, conditions: Conditions, schedule: Schedule) -> dict[str, Tensor]:
        """Compute all inputs of the step except the latents and the step's number. The results are on the device."""
        c = conditions
        axes = run_axes(c, schedule)
        bank = self.session(KEPT)({"mask_latents": c.masks.stacked()}, **axes)  # the graph takes every picture
        scale = c.condition_scale
        log_scale = max(NO_ATTENTION, math.log(scale)) if scale > 0 else NO_ATTENTION
        return (
            bank
            | self._prepared(c, schedule, axes)
            | {"log_condition_scale": torch.tensor([log_scale], device=self.device)}
        )

    def _prepared(self, c: Conditions, schedule: Schedule, axes: Mapping[str, int]) -> dict[str, Tensor]:
        """The results of ``prepare``: those of the last run if its inputs were the same."""
        batch = axes["batch"]
        values = {
            "prompt_embeds": c.prompt_embeds.expand(batch, -1, -1),
            "pooled_prompt_embeds": c.pooled_prompt_embeds.expand(batch, -1),
            "model_timesteps": schedule.model_timesteps,
            "timesteps": schedule.timesteps,
            "guidance": torch.tensor([c.guidance_scale * 1000.0], dtype=torch.float32),
            "grid": torch.tensor(c.grid),
            "position_delta": torch.tensor(c.position_delta, dtype=torch.float32),
            "position_scale": torch.tensor([c.position_scale], dtype=torch.float32),
        }
        inputs = {
            t.name: values[t.name].to(self.device, TYPES[t.dtype], copy=True)  # the caller may change its tensors
            for t in self.exported.graph("prepare").inputs
        }
        if not self._made or not all(torch.equal(value, self._made_from[name]) for name, value in inputs.items()):
            self._made = {}  # freed before the new results are made
            self._made = self.session("prepare")(inputs, **axes)
            self._made_from = inputs
        return self._made


def run_axes(conditions: Conditions, schedule: Schedule) -> dict[str, int]:
    """The sizes of a run, by the names of the graphs' dynamic axes."""
    tokens, text_tokens = conditions.masks.tokens, conditions.prompt_embeds.shape[1]
    return {
        "batch": conditions.masks.batch,
        "tokens": tokens,
        "text_tokens": text_tokens,
        "steps": len(schedule),
        "sequence": text_tokens + 2 * tokens,
    }
