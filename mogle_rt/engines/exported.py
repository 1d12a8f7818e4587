"""The parts that all engines for exports share: the export itself, onnxruntime's sessions, and what no step changes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mogle_rt.bundle.bundle import Bundle
from mogle_rt.config import DTYPE_NAMES, ModelConfig
from mogle_rt.engines.contract import Conditions
from mogle_rt.engines.manifest import GraphSpec, Manifest, manifest_path
from mogle_rt.engines.onnxruntime_import import PROVIDERS, SILENT, first_line, load_onnxruntime, provider
from mogle_rt.errors import CheckpointError, ConfigError, DeviceError
from mogle_rt.loop.schedule import Schedule

TYPES = {
    "FLOAT": torch.float32,
    "FLOAT16": torch.float16,
    "BFLOAT16": torch.bfloat16,
    "INT64": torch.int64,
    "UINT8": torch.uint8,
}
ORT_TYPES = {
    "FLOAT": "tensor(float)",
    "FLOAT16": "tensor(float16)",
    "BFLOAT16": "tensor(bfloat16)",
    "INT64": "tensor(int64)",
    "UINT8": "tensor(uint8)",
}
ONNX_NUMBERS = {torch.float32: 1, torch.uint8: 2, torch.int64: 7, torch.float16: 10, torch.bfloat16: 16}
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
        self.manifest.check_graphs(bundle.config, self.folder)
        of = self.manifest.bundle
        if not bundle.content_hash or bundle.content_hash not in (of.sha256, self.manifest.weights.sha256):
            raise CheckpointError(f"{self.folder}: was exported from another bundle ({of.name}) than {bundle.path}")
        exported = self.manifest.model_config
        if exported != model:
            other = next(n for n, value in model.to_dict().items() if getattr(exported, n) != value)
            raise ConfigError(
                f"{self.folder}: was exported with {other} = {getattr(exported, other)}, but "
                f"{getattr(model, other)} is asked for; export with --model-config, or pass the same model_config"
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
    """The dtype in which the graphs compute."""
    dtype = getattr(torch, DTYPE_NAMES[manifest.dtype])
    assert isinstance(dtype, torch.dtype)
    return dtype


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
            self.session = ort.InferenceSession(str(path), options, providers=[provider(device)], enable_fallback=0)
        except Exception as error:  # onnxruntime has its own classes for each kind
            reason = first_line(error)
            if type(error).__name__ in REFUSALS or "Load model from" in reason:
                raise CheckpointError(f"{path}: onnxruntime refuses it: {reason}") from None
            raise DeviceError(f"{path}: onnxruntime can't load it on {device}: {reason}") from None
        self._check_tensors(path)
        if device.type == "cuda":
            self._check_assignment(path)

    def _check_tensors(self, path: Path) -> None:
        """The graph has the inputs and outputs that the manifest says.

        Raises:
            CheckpointError: names the first that differs.
        """
        for said, got in (
            (self.graph.inputs, self.session.get_inputs()),
            (self.graph.outputs, self.session.get_outputs()),
        ):
            expected = [(t.name, ORT_TYPES[t.dtype], list(t.shape)) for t in said]
            has = [(v.name, v.type, list(v.shape)) for v in got]
            if has != expected:
                differs = next((a for a, b in zip(has, expected, strict=False) if a != b), (has or expected)[-1])
                raise CheckpointError(
                    f"{path}: is not the graph that the manifest describes: {differs[0]!r} of {differs[1]} and shape "
                    f"{differs[2]}; export again"
                )

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
            raise DeviceError(f"{self.graph.file}: onnxruntime failed: {first_line(error)}") from None

    def __call__(self, inputs: Mapping[str, Tensor], **axes: int) -> dict[str, Tensor]:
        """Run the graph once. Inputs may be on any device; the results are new tensors on the session's device."""
        placed = {t.name: inputs[t.name].to(self.device, TYPES[t.dtype]).contiguous() for t in self.graph.inputs}
        results = self.outputs(**axes)
        self.run(self.binding(placed, results))
        return results


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
