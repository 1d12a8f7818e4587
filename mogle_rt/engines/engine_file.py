"""The file of a TensorRT engine: a header that says what the engine fits, followed by the plan.

Layout: 8 magic bytes, a little-endian uint64 with the header's length, the header (JSON, UTF-8), the plan.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from mogle_rt.bundle.files import atomic_write
from mogle_rt.config import DTYPE_NAMES
from mogle_rt.errors import CheckpointError, ConfigError
from mogle_rt.values import Count, OneOf, Range, Sha256, parsed, read_json

MAGIC = b"MOGLETRT"
FORMAT_VERSION = 1
MAX_HEADER = 1 << 20
Shape = tuple[Annotated[int, Range(1, 2**31)], ...]


@dataclass(frozen=True, kw_only=True)
class EngineHeader:
    """The header of an engine file: what the engine was built from and where it can run.

    Attributes:
        runtime, runtime_version: "tensorrt" or "tensorrt-rtx", and the version that built the engine.
        target: the compute capability of the GPU, e.g. "8.9".
        graph, dtype: the graph of the step ("step" or "step_scaled") and the dtype of its computation.
        bundle_sha256, graph_sha256: hashes of the bundle and of the graph that the engine was built from.
        profile: for each input, its smallest, usual and largest shape.
        plan_bytes: the size of the plan, which follows the header.
        weight_streaming, refittable: the options that the engine was built with.
    """

    format_version: Count = FORMAT_VERSION
    runtime: str
    runtime_version: str
    target: str
    graph: str
    dtype: Annotated[str, OneOf(*DTYPE_NAMES)]
    bundle_sha256: Sha256
    graph_sha256: Sha256
    profile: Mapping[str, tuple[Shape, Shape, Shape]]
    plan_bytes: Count
    weight_streaming: bool = False
    refittable: bool = False

    def fits(self, bundle_sha256: str, graph_sha256: str) -> bool:
        """Whether the engine was built from this bundle's weights and this graph."""
        return (self.bundle_sha256, self.graph_sha256) == (bundle_sha256, graph_sha256)

    def to_dict(self) -> dict[str, Any]:
        """The header as a dict, with the types that reading its JSON gives."""
        values: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return values


def write_engine(path: Path, header: EngineHeader, plan: memoryview) -> None:
    """Write an engine file. If writing fails, no partial file remains."""
    raw = json.dumps(header.to_dict()).encode()
    with atomic_write(path) as file:
        file.write(MAGIC + struct.pack("<Q", len(raw)) + raw)
        file.write(plan)


def read_engine(path: Path) -> tuple[EngineHeader, int]:
    """Read the header of an engine file. Returns the header and the offset of the plan in bytes.

    Raises:
        CheckpointError: the file is missing, unreadable, not an engine file, damaged, cut short, or of another version.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(len(MAGIC) + 8)
            length = int.from_bytes(start[len(MAGIC) :], "little")
            text = file.read(min(length, MAX_HEADER))
    except FileNotFoundError:
        raise CheckpointError(
            f"{path}: no such engine; build one: python -m mogle_rt.export BUNDLE --format tensorrt-rtx"
        ) from None
    except OSError as error:
        raise CheckpointError(f"{path}: can't be read: {error.strerror or error}") from None
    if not start.startswith(MAGIC) or length > MAX_HEADER:
        raise CheckpointError(f"{path}: not an engine file of mogle_rt")
    try:
        raw = read_json(text)
    except ValueError:
        raise CheckpointError(f"{path}: damaged engine file: its header is not JSON") from None
    if not isinstance(raw, dict) or raw.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(f"{path}: engine file of another version; build it again")
    try:
        header = parsed(EngineHeader, raw, "header")
    except ConfigError as error:
        raise CheckpointError(f"{path}: damaged engine file: {error}") from None
    assert isinstance(header, EngineHeader)
    begin = len(MAGIC) + 8 + length
    if size != begin + header.plan_bytes:
        raise CheckpointError(f"{path}: cut short: {size} bytes where {begin + header.plan_bytes} are needed")
    return header, begin
