"""`export` writes the graphs of a bundle and the manifest. By default the graphs point to the bundle's own weights."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import onnx
import torch

from mogle_rt import __version__
from mogle_rt.bundle import shipped as demo
from mogle_rt.bundle.bundle import Bundle, BundleConfig
from mogle_rt.bundle.files import atomic_write, replace_together
from mogle_rt.bundle.leftovers import GONE, sweep
from mogle_rt.config import DTYPE_NAMES, ModelConfig, parse_dtype
from mogle_rt.engines.engine_file import read_engine
from mogle_rt.engines.manifest import (
    FORMAT_VERSION,
    NAME,
    PLAIN_VERSION,
    BundleSpec,
    EngineSpec,
    FileSpec,
    GraphSpec,
    Manifest,
    TensorSpec,
    TokenizerSpec,
    WeightsSpec,
    header_sha256,
)
from mogle_rt.errors import CheckpointError, InputError, OutputError
from mogle_rt.export.graph import BFLOAT16_OPSET, DEFAULT_OPSET, NEWEST_OPSET, OLDEST_OPSET, GraphBuilder
from mogle_rt.export.instructions import CLASSES, drive, schedule
from mogle_rt.export.prepare import PrepareGraph, build_experts, condition_row_names, modulation_row_names
from mogle_rt.export.step import StepGraph
from mogle_rt.export.text import TEXT_GRAPHS, TextGraph, require_text_encoders
from mogle_rt.export.tokenizers import tokenizer_files
from mogle_rt.export.vae import VaeGraph
from mogle_rt.export.weights import COPY_NAME, MODES, Mode, Weights, place_weights

GRAPHS = ("vae_encoder", "experts", "prepare", "step", "step_scaled", "vae_decoder")
SHORT_NAMES = {getattr(torch, long): short for short, long in DTYPE_NAMES.items()}


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """What to export.

    Attributes:
        dtype: of the inputs, the outputs and the arithmetic of the graphs.
        opset: of the graphs, from `OLDEST_OPSET` to `NEWEST_OPSET`; bfloat16 needs at least `BFLOAT16_OPSET`. From 23 on
            the graphs use the fused operators.
        weights: see `mogle_rt.export.weights.place_weights`.
        model: the reference's switches, built into the graphs.
        text_encoders: also export CLIP and T5, and their tokenizers.

    Raises:
        InputError: the opset or the mode of weights is unknown, or the opset is too old for the dtype.
    """

    dtype: torch.dtype
    opset: int = DEFAULT_OPSET
    weights: Mode = "link"
    model: ModelConfig = field(default_factory=ModelConfig)
    text_encoders: bool = False

    @property
    def graphs(self) -> tuple[str, ...]:
        """The names of the graphs that are made."""
        return (*TEXT_GRAPHS, *GRAPHS) if self.text_encoders else GRAPHS

    def __post_init__(self) -> None:
        if not OLDEST_OPSET <= self.opset <= NEWEST_OPSET:
            raise InputError(f"opset must be from {OLDEST_OPSET} to {NEWEST_OPSET}, got {self.opset}")
        if self.dtype == torch.bfloat16 and self.opset < BFLOAT16_OPSET:
            raise InputError(f"bf16 needs opset {BFLOAT16_OPSET} or newer, got {self.opset}; or take fp16 or fp32")
        if self.weights not in MODES:
            raise InputError(f"weights must be link, copy or embed, got {self.weights!r}")


def build_graph(
    name: str, config: BundleConfig, weights: Weights, options: ExportOptions, *, fused_attention: bool = True
) -> onnx.ModelProto:
    """Build one of the options' graphs in memory.

    Args:
        fused_attention: see `GraphBuilder`.
    """
    g = GraphBuilder(name, dtype=options.dtype, opset=options.opset, weights=weights, fused_attention=fused_attention)
    if name == "experts":
        return build_experts(g, config)
    if name == "prepare":
        return PrepareGraph(g, config, options.model).build()
    if name in ("step", "step_scaled"):
        return StepGraph(g, config, options.model, scaled=name == "step_scaled").build()
    if name in TEXT_GRAPHS:
        return TextGraph(g, config, name).build()
    vae = VaeGraph(g, config)
    return vae.build_encoder() if name == "vae_encoder" else vae.build_decoder()


def bundle_dtype(bundle: Bundle) -> torch.dtype:
    """The dtype in which the transformer is stored."""
    return bundle.tensors["transformer.x_embedder.weight"].dtype


def export_folder(bundle: Bundle, output: str | Path | None) -> Path:
    """The folder that was asked for; by default the bundle's own, where every loader can read the weights.

    Raises:
        OutputError: it is a file, it holds the export of another bundle, or no folder was named for the demo bundle.
    """
    if output is None and bundle.path.resolve() == demo.BUNDLE.resolve():
        raise OutputError(f"{bundle.path}: lies in the package; name a folder with -o")
    # A bundle may be given as a symbolic link, for example into a hub's cache. We write beside the link, never there.
    folder = bundle.path.absolute().parent if output is None else Path(output)
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder}: is a file, not a folder")
    previous = previous_export(folder)
    if previous is not None and previous.bundle.name != bundle.path.name:
        raise OutputError(f"{folder}: holds the export of {previous.bundle.name}; choose another folder with -o")
    return folder


def previous_export(folder: Path) -> Manifest | None:
    """The manifest of the export that a folder holds, or None.

    Raises:
        OutputError: its manifest can't be read.
    """
    sweep(folder)
    try:
        return Manifest.read(folder) if (folder / NAME).exists() else None
    except CheckpointError as error:
        raise OutputError(f"{folder}: choose another folder: {error}") from None


def export_onnx(
    bundle: Bundle, folder: Path, options: ExportOptions, progress: Callable[[str], None] | None = None
) -> Manifest:
    """Write the graphs and the manifest.

    Unless weights are copied, only headers are read, so it takes seconds and little memory for any model. Engines of an
    earlier export stay in the manifest if their graph is the same as before.

    Args:
        folder: is made if it doesn't exist. Files of an earlier export are replaced, others never.
        progress: called with each file's name before it is made.

    Raises:
        OutputError: the folder can't be written to, the bundle can't be linked into it, or it holds a file of a graph's
            name that no export has made.
        InputError: the weights are too large to embed, or stored in eight or four bits.
        CheckpointError: text encoders are asked for, but the bundle holds none, or its tokenizers can't be read.
    """
    if bundle.storages:
        held = ", ".join(sorted({storage.name for storage in bundle.storages.values()}))
        raise InputError(
            f"{bundle.path}: weights in {held} can't be exported; export the bundle that they were made from"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder}: can't be made: {error.strerror or error}") from None
    previous = previous_export(folder)
    tokenizers: dict[str, bytes] = {}
    if options.text_encoders:
        require_text_encoders(bundle)
        tokenizers = tokenizer_files(bundle)
    made = {*(f"{graph}.onnx" for graph in options.graphs), *tokenizers}
    check_replaced(folder, {*made, *([COPY_NAME] if options.weights == "copy" else [])}, previous)
    graphs: dict[str, GraphSpec] = {}
    if progress:
        progress("weights")
    with replace_together(folder, last=NAME) as new:
        weights = place_weights(
            bundle, folder, new, options.weights, options.dtype, text_encoders=options.text_encoders
        )
        for name in options.graphs:
            if progress:
                progress(f"{name}.onnx")
            graphs[name] = write_graph(build_graph(name, bundle.config, weights, options), new / f"{name}.onnx")
        for name, content in tokenizers.items():
            (new / name).write_bytes(content)
        manifest = Manifest(
            format_version=FORMAT_VERSION if options.text_encoders else PLAIN_VERSION,
            software={"mogle_rt": __version__, "onnx": onnx.__version__, "torch": torch.__version__},
            dtype=SHORT_NAMES[options.dtype],
            opset=options.opset,
            bundle=BundleSpec(name=bundle.path.name, sha256=bundle.content_hash),
            weights=describe_weights((new, folder), weights, options.weights),
            model_config=options.model,
            config=_json_config(bundle.config),
            classes=CLASSES,
            graphs=graphs,
            engines=kept_engines(folder, previous, graphs, bundle.content_hash),
            tokenizers=tuple(
                TokenizerSpec(graph=graph, file=name, sha256=hashlib.sha256(content).hexdigest())
                for graph, (name, content) in zip(TEXT_GRAPHS, tokenizers.items(), strict=False)
            ),
            schedule=schedule(bundle.config.scheduler),
            drive=drive(text_encoders=options.text_encoders),
            modulation_rows=tuple(modulation_row_names(bundle.config.transformer)),
            condition_modulation_rows=tuple(condition_row_names(bundle.config.transformer)),
        )
        manifest.write(new)
        for name in files_of(previous) - made - {manifest.weights.file}:  # nothing points to them any more
            (new / GONE).mkdir(exist_ok=True)
            (new / GONE / name).touch()
    return manifest


def files_of(export: Manifest | None) -> set[str]:
    """The names of the files that an export has written, without those of engines."""
    if export is None:
        return set()
    copied = {export.weights.file} if export.weights.mode == "copy" else set()
    files: tuple[FileSpec, ...] = (*export.graphs.values(), *export.tokenizers)
    return {file.file for file in files} | {name for name in copied if name is not None}


def check_replaced(folder: Path, names: Iterable[str], previous: Manifest | None) -> None:
    """Check that an export replaces no files but those of an earlier export.

    Args:
        names: the files that it writes.

    Raises:
        OutputError: it would replace another file, which the message names.
    """
    own = files_of(previous)
    for name in names:
        if name not in own and (folder / name).exists():
            raise OutputError(f"{folder / name}: exists already, but not from an export; choose another folder with -o")


def kept_engines(
    folder: Path, previous: Manifest | None, graphs: Mapping[str, GraphSpec], bundle_sha256: str
) -> tuple[EngineSpec, ...]:
    """Engines of an earlier export that still exist and were built from exactly these graphs and weights."""
    kept = []
    for engine in () if previous is None else previous.engines:
        try:
            header, _ = read_engine(folder / engine.file)
        except CheckpointError:
            continue
        if header.graph in graphs and header.fits(bundle_sha256, graphs[header.graph].sha256):
            kept.append(engine)
    return tuple(kept)


def write_graph(model: onnx.ModelProto, path: Path) -> GraphSpec:
    """Write a graph to a file, and return its description for the manifest."""
    data = model.SerializeToString()
    with atomic_write(path) as file:
        file.write(data)
    return GraphSpec(
        file=path.name,
        sha256=hashlib.sha256(data).hexdigest(),
        inputs=tuple(tensor_spec(v) for v in model.graph.input),
        outputs=tuple(tensor_spec(v) for v in model.graph.output),
    )


def tensor_spec(value: onnx.ValueInfoProto) -> TensorSpec:
    """An input or output as the manifest describes it."""
    kind = value.type.tensor_type
    return TensorSpec(
        name=value.name,
        dtype=onnx.TensorProto.DataType.Name(kind.elem_type),
        shape=tuple(d.dim_param or d.dim_value for d in kind.shape.dim),
    )


def describe_weights(folders: Sequence[Path], weights: Weights, mode: str) -> WeightsSpec:
    """Describe the file of weights for the manifest. It is looked for in the folders in their order."""
    if weights.location is None:
        return WeightsSpec(mode=mode)
    path = next(folder / weights.location for folder in folders if (folder / weights.location).exists())
    return WeightsSpec(
        mode=mode,
        file=weights.location,
        bytes=path.stat().st_size,
        header_sha256=header_sha256(path),
        sha256=weights.sha256,
    )


def _json_config(config: BundleConfig) -> dict[str, Any]:
    """The configurations of transformer, mixture, scheduler and VAE."""
    raw = replace(config, text_encoder=None, text_encoder_2=None).to_dict()
    return {name: value for name, value in raw.items() if value is not None}


def export(
    checkpoint: str | Path,
    output: str | Path | None = None,
    *,
    dtype: str | torch.dtype | None = None,
    opset: int = DEFAULT_OPSET,
    weights: Mode = "link",
    model_config: ModelConfig | Mapping[str, Any] | None = None,
    text_encoders: bool = False,
    progress: Callable[[str], None] | None = None,
) -> Path:
    """Export a bundle to ONNX; `mogle_rt.export.verify.verify` compares the result with the torch engine.

    Args:
        checkpoint: a bundle.
        output: the folder to write to; by default the bundle's own.
        dtype: bf16, fp16 or fp32; by default the one that the bundle is stored in.
        opset, weights, model_config, text_encoders: see `ExportOptions`.
        progress: see `export_onnx`.

    Returns:
        The folder with the export.

    Raises:
        MogleError: see `ExportOptions`, `export_folder`, `export_onnx` and `Bundle`.
    """
    bundle = Bundle(checkpoint)
    options = ExportOptions(
        dtype=bundle_dtype(bundle) if dtype is None else parse_dtype(dtype),
        opset=opset,
        weights=weights,
        model=ModelConfig.of(model_config),
        text_encoders=text_encoders,
    )
    folder = export_folder(bundle, output)
    export_onnx(bundle, folder, options, progress)
    return folder
