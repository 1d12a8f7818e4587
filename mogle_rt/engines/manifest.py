"""The file manifest.json beside exported graphs. It says what the graphs are and how to run them from any language.

A run calls ``vae_encoder`` on the distinct pictures of the masks, ``experts`` on the latents of each mask's 20
pictures, ``prepare`` on the prompt's embeddings and the schedule, ``step`` once for each step, and ``vae_decoder`` on
the result.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mogle_rt.bundle.files import atomic_write
from mogle_rt.errors import CheckpointError

NAME = "manifest.json"
FORMAT = "mogle_rt export"
FORMAT_VERSION = 1
Size = int | str  # a fixed size, or the name of a dynamic axis


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """An input or output of a graph. ``dtype`` is ONNX's name, e.g. FLOAT16."""

    name: str
    dtype: str
    shape: tuple[Size, ...]

    def sizes(self, **axes: int) -> tuple[int, ...]:
        """The shape, with the sizes of dynamic axes filled in."""
        return tuple(axes[size] if isinstance(size, str) else size for size in self.shape)


@dataclass(frozen=True, kw_only=True)
class GraphSpec:
    """A graph: its file in the manifest's folder, the SHA-256 of that file, and its inputs and outputs."""

    file: str
    sha256: str
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

    mode: str
    file: str | None = None
    bytes: int = 0
    header_sha256: str = ""
    sha256: str = ""


@dataclass(frozen=True, kw_only=True)
class EngineSpec:
    """A TensorRT engine: its file, the graph that it was built from, and a copy of the file's header."""

    file: str
    graph: str
    header: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The whole manifest.

    Attributes:
        dtype: fp32, fp16 or bf16. bundle: name and content hash of the exported bundle.
        config: the bundle's configurations. model_config: the reference's switches, which are built into the graphs.
        classes: the classes of the masks, each with index, name and color (RGB).
        graphs: the graphs by name, see the module. schedule, drive: instructions in words and formulas.
        modulation_rows, condition_modulation_rows: the meanings of the rows of the modulation tables.
        verified: the comparisons that were made, with their errors (null for one that is not finite); may be empty.
    """

    format: str = FORMAT
    format_version: int = FORMAT_VERSION
    software: Mapping[str, str]
    dtype: str
    opset: int
    bundle: Mapping[str, str]
    weights: WeightsSpec
    model_config: Mapping[str, bool]
    config: Mapping[str, Any]
    classes: tuple[Mapping[str, Any], ...]
    graphs: Mapping[str, GraphSpec]
    engines: tuple[EngineSpec, ...] = ()
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
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise CheckpointError(
                f"{path}: no such file; export first: python -m mogle_rt.export CKPT -o {path.parent}"
            ) from None
        except (OSError, ValueError, RecursionError) as error:
            raise CheckpointError(f"{path}: can't be read as a manifest: {error}") from None
        if not isinstance(raw, dict) or raw.get("format") != FORMAT:
            raise CheckpointError(f"{path}: not the manifest of a mogle_rt export")
        if raw.get("format_version") != FORMAT_VERSION:
            raise CheckpointError(
                f"{path}: manifest version {raw.get('format_version')!r}; this version reads {FORMAT_VERSION}: export again"
            )
        try:
            return cls(
                **raw
                | {
                    "weights": WeightsSpec(**raw["weights"]),
                    "graphs": {name: _graph(value) for name, value in raw["graphs"].items()},
                    "engines": tuple(EngineSpec(**value) for value in raw["engines"]),
                    **{
                        n: tuple(raw[n])
                        for n in ("classes", "drive", "modulation_rows", "condition_modulation_rows", "verified")
                    },
                }
            )
        except (TypeError, KeyError, AttributeError) as error:
            raise CheckpointError(f"{path}: damaged manifest: {type(error).__name__}: {error}") from None

    def check_files(self, folder: Path) -> None:
        """Check that the graphs are unchanged and that the file of the weights is the one that they refer to.

        This reads only the graphs and the header of the weights, so it is fast at any size. To check the weights too,
        use `python -m mogle_rt.export --check`.

        Raises:
            CheckpointError: a file is missing, moved or changed.
        """
        for graph in self.graphs.values():
            path = folder / graph.file
            if not path.is_file():
                raise CheckpointError(f"{path}: the manifest names this graph, but it is gone; export again")
            if file_sha256(path) != graph.sha256:
                raise CheckpointError(f"{path}: was changed after the export: its hash is not the manifest's")
        if self.weights.file is None:
            return
        path = folder / self.weights.file
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


def _graph(raw: Mapping[str, Any]) -> GraphSpec:
    def tensors(values: list[Mapping[str, Any]]) -> tuple[TensorSpec, ...]:
        return tuple(TensorSpec(**{**v, "shape": tuple(v["shape"])}) for v in values)

    return GraphSpec(**{**raw, "inputs": tensors(raw["inputs"]), "outputs": tensors(raw["outputs"])})


def file_sha256(path: Path) -> str:
    """The SHA-256 of a whole file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def header_sha256(path: Path) -> str:
    """The SHA-256 of a safetensors file's length field and header."""
    with path.open("rb") as file:
        start = file.read(8)
        return hashlib.sha256(start + file.read(int.from_bytes(start, "little"))).hexdigest()
