"""Ways to run exported graphs for verification.

onnxruntime runs the files, or graphs that are built again; ONNX's reference evaluator runs what is small enough.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnx
import torch
from torch import Tensor

from mogle_rt.bundle.source import TensorSource
from mogle_rt.engines.exported import Session, manifest_dtype
from mogle_rt.engines.manifest import Manifest
from mogle_rt.engines.onnxruntime_import import import_onnxruntime
from mogle_rt.export.exporter import ExportOptions, build_graph
from mogle_rt.export.weights import Weights

CPU = torch.device("cpu")

Run: TypeAlias = Callable[[str, Mapping[str, Tensor]], dict[str, Tensor]]  # graph, inputs -> outputs


def run_files(folder: Path, manifest: Manifest) -> Run:
    """Run the exported files themselves."""
    sessions: dict[str, Session] = {}

    def run(graph: str, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if graph not in sessions:
            sessions[graph] = Session(folder, manifest.graphs[graph], CPU, manifest.weights.bytes)
        return _run_session(sessions[graph].session, inputs)

    return run


def run_built(source: TensorSource, folder: Path, manifest: Manifest) -> Run:
    """Run the same graphs in float32, built again in memory for all or some blocks, with the weights in the folder."""
    onnxruntime = import_onnxruntime()
    options = options_of(manifest, torch.float32)
    weights = Weights(source.tensors, manifest.weights.file, source, torch.float32, "")
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 4
    settings.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    settings.add_session_config_entry("session.disable_prepacking", "1")

    def run(graph: str, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        model = build_graph(graph, source.config, weights, options)
        session = onnxruntime.InferenceSession(model.SerializeToString(), settings, providers=["CPUExecutionProvider"])
        return _run_session(session, inputs)

    return run


def evaluate(source: TensorSource, manifest: Manifest, dtype: torch.dtype) -> Run:
    """Run the same graphs in ONNX's reference evaluator, with the exported weights embedded in them."""
    from onnx.reference import ReferenceEvaluator

    options = options_of(manifest, dtype)
    evaluators: dict[str, tuple[onnx.ModelProto, ReferenceEvaluator]] = {}

    def run(graph: str, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if graph not in evaluators:
            model = build_graph(graph, source.config, Weights(source.tensors, None, source, dtype, ""), options)
            evaluators[graph] = model, ReferenceEvaluator(model)
        model, evaluator = evaluators[graph]
        feeds = {}
        for value in model.graph.input:
            kind = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
            feeds[value.name] = _numpy(inputs[value.name]).astype(kind)
        results: Any = evaluator.run(None, feeds)
        names = [o.name for o in model.graph.output]
        return {n: torch.from_numpy(np.asarray(r).astype(np.float32)) for n, r in zip(names, results, strict=True)}

    return run


def run_exported(source: TensorSource, folder: Path, manifest: Manifest) -> tuple[Run, str, torch.dtype]:
    """What runs the graphs of the VAE or of text encoders, its name, and the dtype in which it computes.

    It is onnxruntime with the files. Its CPU kernels don't take bfloat16, so such graphs are built again in float32.
    """
    dtype = manifest_dtype(manifest)
    if dtype != torch.bfloat16:
        return run_files(folder, manifest), "onnxruntime", dtype
    return run_built(source, folder, manifest), "onnxruntime in float32", torch.float32


def options_of(manifest: Manifest, dtype: torch.dtype) -> ExportOptions:
    """The options of the export, but with this dtype."""
    return ExportOptions(dtype=dtype, opset=manifest.opset, model=manifest.model_config)


def _run_session(session: Any, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    kinds = {
        "tensor(float)": np.float32,
        "tensor(float16)": np.float16,
        "tensor(int64)": np.int64,
        "tensor(uint8)": np.uint8,
    }
    feeds = {i.name: _numpy(inputs[i.name]).astype(kinds[i.type]) for i in session.get_inputs()}
    results = session.run(None, feeds)
    return {o.name: torch.from_numpy(r).float() for o, r in zip(session.get_outputs(), results, strict=True)}


def _numpy(value: Tensor) -> Any:
    return (value.float() if value.is_floating_point() else value).numpy()
