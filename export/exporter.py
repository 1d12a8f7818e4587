"""`export` writes the graphs of a bundle and the manifest. By default the graphs point to the bundle's own weights."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
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
    NAME,
    BundleSpec,
    EngineSpec,
    GraphSpec,
    Manifest,
    TensorSpec,
    WeightsSpec,
    header_sha256,
)
from mogle_rt.errors import CheckpointError, InputError, OutputError
from mogle_rt.export.graph import BFLOAT16_OPSET, DEFAULT_OPSET, NEWEST_OPSET, OLDEST_OPSET, GraphBuilder
from mogle_rt.export.prepare import PrepareGraph, build_experts, condition_row_names, modulation_row_names
from mogle_rt.export.step import StepGraph
from mogle_rt.export.vae import VaeGraph
from mogle_rt.export.weights import COPY_NAME, MODES, Mode, Weights, place_weights
from mogle_rt.masks import CLASS_NAMES, PALETTE

GRAPHS = ("vae_encoder", "experts", "prepare", "step", "step_scaled", "vae_decoder")
SHORT_NAMES = {getattr(torch, long): short for short, long in DTYPE_NAMES.items()}

DRIVE = (
    "pictures: of each mask 20; picture 0 is the mask in the classes' colors, picture 1 + i is class i (255 where it is, "
    "else 0, in all three channels); uint8 [P, H, W, 3], H and W multiples of 16; equal pictures need be encoded once",
    "vae_encoder(pictures) -> latents [P, N, 64], N = H / 16 * W / 16; gather them to mask_latents [B, 20, N, 64]",
    "experts(mask_latents) -> bank, gate_input",
    "text encoders are not exported: prompt_embeds [B, T, J] (T5) and pooled_prompt_embeds [B, P] (CLIP) come from "
    "elsewhere, with the masks' batch B",
    "prepare(prompt_embeds, pooled_prompt_embeds, model_timesteps, timesteps, guidance = 1000 * "
    "guidance_scale, grid = (H / 16, W / 16), position_delta = (0, 0), position_scale = 1) -> text, time_table, "
    "modulation, condition_modulation, rope_cos, rope_sin; sequence = T + 2 N",
    "latents = standard normal noise [B, N, 64]",
    "for k in 0 ... S - 1: step(latents, step = k, all of the above) -> velocity; latents += (sigma[k + 1] - sigma[k]) * "
    "velocity, in float32, then rounded to the graphs' dtype; condition is the step's mixture, not needed by the loop",
    "where condition_scale is not 1, step_scaled in step's place, with log_condition_scale = log(condition_scale), "
    "-10000 for 0",
    "vae_decoder(latents, grid) -> images [B, 3, H, W] in [0, 1]",
    "an engine's file: 8 bytes MOGLETRT, the header's length n as a little-endian uint64, n bytes of header (JSON, UTF-8), "
    "plan_bytes bytes of TensorRT's plan; its inputs and outputs are its graph's",
)
CLASSES = tuple(
    {"index": i, "name": name, "color": color}
    for i, (name, color) in enumerate(zip(CLASS_NAMES, PALETTE.tolist(), strict=True))
)


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """What to export.

    Attributes:
        dtype: of the inputs, the outputs and the arithmetic of the graphs.
        opset: of the graphs, from `OLDEST_OPSET` to `NEWEST_OPSET`; bfloat16 needs at least `BFLOAT16_OPSET`. From 23 on
            the graphs use the fused operators.
        weights: see `mogle_rt.export.weights.place_weights`.
        model: the reference's switches, built into the graphs.

    Raises:
        InputError: the opset or the mode of weights is unknown, or the opset is too old for the dtype.
    """

    dtype: torch.dtype
    opset: int = DEFAULT_OPSET
    weights: Mode = "link"
    model: ModelConfig = field(default_factory=ModelConfig)

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
    """Build one of `GRAPHS` in memory.

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
    check_replaced(folder, options.weights, previous)
    graphs: dict[str, GraphSpec] = {}
    if progress:
        progress("weights")
    with replace_together(folder, last=NAME) as new:
        weights = place_weights(bundle, folder, new, options.weights, options.dtype)
        for name in GRAPHS:
            if progress:
                progress(f"{name}.onnx")
            graphs[name] = write_graph(build_graph(name, bundle.config, weights, options), new / f"{name}.onnx")
        manifest = Manifest(
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
            schedule=_schedule(bundle.config),
            drive=DRIVE,
            modulation_rows=tuple(modulation_row_names(bundle.config.transformer)),
            condition_modulation_rows=tuple(condition_row_names(bundle.config.transformer)),
        )
        manifest.write(new)
        if previous is not None and previous.weights.mode == "copy" and manifest.weights.file != COPY_NAME:
            (new / GONE).mkdir()  # no graph points into the copy any more
            (new / GONE / COPY_NAME).touch()
    return manifest


def check_replaced(folder: Path, weights: Mode, previous: Manifest | None) -> None:
    """Check that an export replaces no files but those of an earlier export.

    Raises:
        OutputError: it would replace another file, which the message names.
    """
    own: set[str] = set()
    if previous is not None:
        own = {graph.file for graph in previous.graphs.values()}
        if previous.weights.mode == "copy":
            own.add(str(previous.weights.file))
    for name in (*(f"{graph}.onnx" for graph in GRAPHS), *([COPY_NAME] if weights == "copy" else [])):
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


def _schedule(config: BundleConfig) -> Mapping[str, Any]:
    return {
        "scheduler": config.scheduler.to_dict(),
        "formulas": [
            "in float64: s = linspace(1, 1 / S, S), S steps",
            "use_dynamic_shifting: mu = base_shift + (max_shift - base_shift) / (max_image_seq_len - "
            "base_image_seq_len) * (N - base_image_seq_len), N image tokens; exponential: s = exp(mu) / (exp(mu) + "
            "(1 / s - 1)), linear: s = mu / (mu + (1 / s - 1)); otherwise s = shift * s / (1 + (shift - 1) * s)",
            "sigma = s rounded to float32, then 0; timesteps = sigma * num_train_timesteps in float32; model_timesteps = "
            "timesteps / 1000 * 1000 in float32",
        ],
    }


def export(
    checkpoint: str | Path,
    output: str | Path | None = None,
    *,
    dtype: str | torch.dtype | None = None,
    opset: int = DEFAULT_OPSET,
    weights: Mode = "link",
    model_config: ModelConfig | Mapping[str, Any] | None = None,
    progress: Callable[[str], None] | None = None,
) -> Path:
    """Export a bundle to ONNX; `mogle_rt.export.verify.verify` compares the result with the torch engine.

    Args:
        checkpoint: a bundle.
        output: the folder to write to; by default the bundle's own.
        dtype: bf16, fp16 or fp32; by default the one that the bundle is stored in.
        opset, weights, model_config: see `ExportOptions`.
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
    )
    folder = export_folder(bundle, output)
    export_onnx(bundle, folder, options, progress)
    return folder
