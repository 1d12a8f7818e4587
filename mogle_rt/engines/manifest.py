"""The file manifest.json beside exported graphs. It says what the graphs are and how to run them from any language.

A run calls ``vae_encoder`` on the distinct pictures of the masks, ``experts`` on the latents of each mask's 20
pictures, ``text_encoder`` and ``text_encoder_2`` on the prompt's tokens if they were exported, ``prepare`` on the prompt's
embeddings and the schedule, ``step`` once for each step, and ``vae_decoder`` on the result.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

from mogle_rt.bundle.bundle import BundleConfig
from mogle_rt.bundle.container import MAX_HEADER
from mogle_rt.bundle.files import atomic_write
from mogle_rt.bundle.leftovers import sweep
from mogle_rt.config import DTYPE_NAMES, NUM_EXPERTS, ModelConfig
from mogle_rt.engines.engine_file import EngineHeader
from mogle_rt.errors import CheckpointError, ConfigError
from mogle_rt.values import Count, FileName, OneOf, Range, Sha256, parsed, quoted, read_json

NAME = "manifest.json"
LARGEST = 16 << 20  # bytes of a manifest; FLUX.1-dev's has about 30 kB
FORMAT = "mogle_rt export"
FORMAT_VERSION = 2
PLAIN_VERSION = 1  # of an export without text encoders, which earlier versions of this program read too
AXES = ("batch", "tokens", "text_tokens", "steps", "sequence", "pictures", "height", "width")
Size = Annotated[int, Range(1, 2**31)] | Annotated[str, OneOf(*AXES)]  # a fixed size, or the name of a dynamic axis
TENSOR_TYPES = ("FLOAT", "FLOAT16", "BFLOAT16", "INT64", "UINT8")
DTYPE_TYPES = {"fp32": "FLOAT", "fp16": "FLOAT16", "bf16": "BFLOAT16"}
ROPE = ("rope_cos", "rope_sin")
STEP_INPUTS = (
    "latents",
    "step",
    "bank",
    "gate_input",
    "time_table",
    "text",
    "modulation",
    "condition_modulation",
    *ROPE,
)
PROMPT = ("prompt_embeds", "pooled_prompt_embeds")
TIMES = ("model_timesteps", "timesteps", "guidance")
PLACES = ("grid", "position_delta", "position_scale")
# What each graph can be given, and what it can give, in the way of data. An ablation's graphs have fewer.
TENSORS: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "text_encoder": (("clip_ids",), ("pooled_prompt_embeds",)),
    "text_encoder_2": (("t5_ids",), ("prompt_embeds",)),
    "vae_encoder": (("pictures",), ("latents",)),
    "experts": (("mask_latents",), ("bank", "gate_input")),
    "prepare": (
        (*PROMPT, *TIMES, *PLACES),
        ("text", "time_table", "modulation", "condition_modulation", *ROPE),
    ),
    "step": (STEP_INPUTS, ("velocity", "condition")),
    "step_scaled": ((*STEP_INPUTS, "log_condition_scale"), ("velocity", "condition")),
    "vae_decoder": (("latents", "grid"), ("images",)),
}
NEEDED = {"experts": (), "prepare": ("text",), "step": ("velocity", "condition")}  # graphs, and outputs of theirs


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """An input or output of a graph. ``dtype`` is ONNX's name, e.g. FLOAT16."""

    name: str
    dtype: Annotated[str, OneOf(*TENSOR_TYPES)]
    shape: tuple[Size, ...]

    def sizes(self, **axes: int) -> tuple[int, ...]:
        """The shape, with the sizes of dynamic axes filled in."""
        return tuple(axes[size] if isinstance(size, str) else size for size in self.shape)


@dataclass(frozen=True, kw_only=True)
class FileSpec:
    """A file in the manifest's folder, and its SHA-256."""

    file: FileName
    sha256: Sha256


@dataclass(frozen=True, kw_only=True)
class GraphSpec(FileSpec):
    """A graph: its file, and its inputs and outputs."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


@dataclass(frozen=True, kw_only=True)
class WeightsSpec:
    """Where the weights of the graphs are stored.

    Attributes:
        mode: link, copy or embed. file: a file in the graphs' folder; None if the graphs contain the weights.
        bytes: the size of the file. header_sha256: the SHA-256 of its first bytes (the length field and the header).
        sha256: the hash of the contents, taken from the file's own header.
    """

    mode: Annotated[str, OneOf("link", "copy", "embed")]
    file: FileName | None = None
    bytes: Count = 0
    header_sha256: Sha256 = ""
    sha256: Sha256 = ""


@dataclass(frozen=True, kw_only=True)
class TokenizerSpec(FileSpec):
    """The tokenizer of a text encoder: its file, and the graph that takes its tokens."""

    graph: Annotated[str, OneOf("text_encoder", "text_encoder_2")]


@dataclass(frozen=True, kw_only=True)
class EngineSpec:
    """A TensorRT engine: its file, the graph that it was built from, and a copy of the file's header."""

    file: FileName
    graph: str
    header: EngineHeader


@dataclass(frozen=True, kw_only=True)
class BundleSpec:
    """The bundle that was exported: its file's name, and the hash of its contents."""

    name: FileName
    sha256: Sha256


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The whole manifest.

    Attributes:
        dtype: fp32, fp16 or bf16. bundle: name and content hash of the exported bundle.
        config: the bundle's configurations. model_config: the reference's switches, which are built into the graphs.
        classes: the classes of the masks, each with index, name and color (RGB).
        graphs: the graphs by name, see the module. tokenizers: of the text encoders, if those were exported.
        schedule, drive: instructions in words and formulas.
        modulation_rows, condition_modulation_rows: the meanings of the rows of the modulation tables.
        verified: the comparisons that were made, with their errors (null for one that is not finite); may be empty.
    """

    format: str = FORMAT
    format_version: int = FORMAT_VERSION
    software: Mapping[str, str]
    dtype: Annotated[str, OneOf(*DTYPE_NAMES)]
    opset: Annotated[int, Range(1, 100)]
    bundle: BundleSpec
    weights: WeightsSpec
    model_config: ModelConfig
    config: Mapping[str, Any]
    classes: tuple[Mapping[str, Any], ...]
    graphs: Mapping[str, GraphSpec]
    engines: tuple[EngineSpec, ...] = ()
    tokenizers: tuple[TokenizerSpec, ...] = ()
    schedule: Mapping[str, Any] = field(default_factory=dict)
    drive: tuple[str, ...] = ()
    modulation_rows: tuple[str, ...] = ()
    condition_modulation_rows: tuple[str, ...] = ()
    verified: tuple[Mapping[str, Any], ...] = ()

    def write(self, folder: Path) -> Path:
        """Write the manifest into a folder and return its path. If writing fails, no partial file remains."""
        path = folder / NAME
        with atomic_write(path) as file:
            file.write(json.dumps(asdict(self), indent=1, allow_nan=False).encode() + b"\n")
        return path

    @classmethod
    def read(cls, path: str | Path) -> Manifest:
        """Read the manifest. path: its folder, or the file itself.

        Raises:
            CheckpointError: there is no manifest, or it is damaged or of another version.
        """
        path = manifest_path(path)
        sweep(path.parent)  # an export that was killed while its files took their places is finished
        try:
            if path.stat().st_size > LARGEST:
                raise CheckpointError(f"{path}: can't be read as a manifest: has more than {LARGEST:,} bytes")
            raw = read_json(path.read_bytes())
        except FileNotFoundError:
            raise CheckpointError(
                f"{path}: no such file; export first: python -m mogle_rt.export CKPT -o {path.parent}"
            ) from None
        except (OSError, ValueError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"{path}: can't be read as a manifest: {error}") from None
        if not isinstance(raw, dict) or raw.get("format") != FORMAT:
            raise CheckpointError(f"{path}: not the manifest of a mogle_rt export")
        if raw.get("format_version") not in (PLAIN_VERSION, FORMAT_VERSION):
            version = quoted(raw.get("format_version"))
            raise CheckpointError(
                f"{path}: manifest version {version}; this version reads {PLAIN_VERSION} to {FORMAT_VERSION}: export again"
            )
        try:
            manifest = parsed(cls, raw, "manifest")
        except ConfigError as error:
            raise CheckpointError(f"{path}: damaged manifest: {error}") from None
        assert isinstance(manifest, cls)
        return manifest

    def check_graphs(self, config: BundleConfig, where: Path) -> None:
        """Every graph is described with the inputs and outputs that graphs of this model have, and with their shapes.

        So nothing is allocated by what a manifest says, but by what the model is.

        Raises:
            CheckpointError: names the first that differs.
        """
        allowed = self._tensors(config)
        for name in (*NEEDED, *self.graphs):
            if name not in TENSORS or name not in self.graphs:
                has = "holds the unknown" if name in self.graphs else "holds no"
                raise CheckpointError(f"{where}: the export {has} graph {quoted(name)}; export again")
        made = {t.name for name in ("experts", "prepare") for t in self.graphs[name].outputs}
        for name, graph in self.graphs.items():
            inputs, outputs = TENSORS[name]
            if name.startswith("step"):
                inputs = tuple(n for n in inputs if n in made or n in ("latents", "step", "log_condition_scale"))
            for kind, tensors, known in (("input", graph.inputs, inputs), ("output", graph.outputs, outputs)):
                names = [t.name for t in tensors]
                wrong = [t for t in tensors if t.name not in known or names.count(t.name) > 1]
                wrong += [t for t in tensors if t.name in known and (t.dtype, t.shape) not in allowed[t.name]]
                if wrong:
                    t = wrong[0]
                    raise CheckpointError(
                        f"{where}: damaged manifest: a graph {name!r} of this model has no {kind} {quoted(t.name)} "
                        f"of {t.dtype} and shape {list(t.shape)}; export again"
                    )
                lacking = [n for n in NEEDED.get(name, ()) if kind == "output" and n not in names]
                if lacking or not names:
                    raise CheckpointError(
                        f"{where}: damaged manifest: graph {name!r} lacks the {kind} {quoted((lacking or known)[0])}; "
                        "export again"
                    )

    def _tensors(self, config: BundleConfig) -> dict[str, list[tuple[str, tuple[Size, ...]]]]:
        """Of each input and output of a graph, the types and shapes that it can have in this model."""
        t, m, own = config.transformer, config.mogle, DTYPE_TYPES[self.dtype]
        channels, width, rows = t.in_channels, t.width, len(self.modulation_rows)
        shapes: dict[str, tuple[Size, ...]] = {
            "mask_latents": ("batch", NUM_EXPERTS, "tokens", channels),
            "bank": ("batch", "tokens", NUM_EXPERTS if m.has_gating else 1, channels),
            "gate_input": ("batch", "tokens", m.latent_dim),
            "prompt_embeds": ("batch", "text_tokens", t.joint_attention_dim),
            "pooled_prompt_embeds": ("batch", t.pooled_projection_dim),
            "text": ("batch", "text_tokens", width),
            "time_table": ("steps", m.latent_dim),
            "modulation": ("steps", "batch", rows, width),
            "condition_modulation": ("batch", len(self.condition_modulation_rows), width),
            "velocity": ("batch", "tokens", channels),
            "condition": ("batch", "tokens", channels),
            "images": ("batch", 3, "height", "width"),
        }
        allowed: dict[str, list[tuple[str, tuple[Size, ...]]]] = {name: [(own, s)] for name, s in shapes.items()}
        return allowed | {
            "latents": [(own, ("batch", "tokens", channels)), (own, ("pictures", "tokens", channels))],
            **{name: [("INT64", ("batch", "text_tokens"))] for name in ("clip_ids", "t5_ids")},
            "pictures": [("UINT8", ("pictures", "height", "width", 3))],
            "grid": [("INT64", (2,))],
            "step": [("INT64", (1,))],
            **{name: [("FLOAT", ("sequence", t.attention_head_dim // 2))] for name in ROPE},
            **{name: [("FLOAT", ("steps",))] for name in ("model_timesteps", "timesteps")},
            "position_delta": [("FLOAT", (2,))],
            **{name: [("FLOAT", (1,))] for name in ("guidance", "position_scale", "log_condition_scale")},
        }

    def check_files(self, folder: Path) -> None:
        """Check that graphs and tokenizers are unchanged and that the file of the weights is the one that they refer to.

        This reads only the graphs and the header of the weights, so it is fast at any size. To check the weights too,
        use `python -m mogle_rt.export --check`.

        Raises:
            CheckpointError: a file is missing, moved or changed.
        """
        files: tuple[FileSpec, ...] = (*self.graphs.values(), *self.tokenizers)
        for file in files:
            path = inside(folder, file.file)
            if not path.is_file():
                raise CheckpointError(f"{path}: the manifest names this file, but it is gone; export again")
            if file_sha256(path) != file.sha256:
                raise CheckpointError(f"{path}: was changed after the export: its hash is not the manifest's")
        if self.weights.file is None:
            return
        path = inside(folder, self.weights.file)
        if not path.is_file():
            raise CheckpointError(
                f"{path}: the graphs' weights are gone; put {self.weights.file} beside the graphs again, or export again"
            )
        if path.stat().st_size != self.weights.bytes or header_sha256(path) != self.weights.header_sha256:
            raise CheckpointError(f"{path}: is not the file that the graphs point into, or was changed; export again")


def manifest_path(path: str | Path) -> Path:
    """The path of the manifest. path: its folder, or the file itself."""
    path = Path(path)
    return path / NAME if path.is_dir() or path.suffix != ".json" else path


def inside(folder: Path, name: str) -> Path:
    """A file that a manifest names, which must lie in the manifest's own folder.

    Raises:
        CheckpointError: it is a link to another folder.
    """
    path = folder / name
    if path.is_symlink() and path.resolve().parent != folder.resolve():
        raise CheckpointError(
            f"{path}: is a link to another folder, which no loader follows; put the file itself there"
        )
    return path


def file_sha256(path: Path) -> str:
    """The SHA-256 of a whole file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def header_sha256(path: Path) -> str:
    """The SHA-256 of a safetensors file's length field and header."""
    with path.open("rb") as file:
        start = file.read(8)
        return hashlib.sha256(start + file.read(min(int.from_bytes(start, "little"), MAX_HEADER))).hexdigest()
