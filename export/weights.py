"""Places the weights of graphs: graphs point into the bundle or into a copy beside them, or contain the weights.

Loaders accept external data only from a file in the graph's own folder. Which kinds of file they accept there (onnx 1.23,
onnxruntime 1.31, TensorRT-RTX 1.7):

| the file beside the graph is | onnxruntime, TensorRT | onnx.load, onnx.checker |
|---|---|---|
| an ordinary file (the bundle itself, a copy, a clone of a copy-on-write file system) | yes | yes |
| a hard link to the bundle | yes | no, and the bundle itself no longer either |
| a symbolic link | no | no |

So graphs are written beside the bundle unless another folder is asked for. In that case the bundle is cloned into this
folder if the file system can do so, and otherwise it is hard-linked.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import onnx
import torch

from mogle_rt.bundle.bundle import Bundle
from mogle_rt.bundle.container import TensorInfo
from mogle_rt.bundle.source import TensorSource
from mogle_rt.conversion.tensors import StoredTensor
from mogle_rt.conversion.writing.bundle_writer import require_finite
from mogle_rt.conversion.writing.write import write_bundle
from mogle_rt.engines.manifest import header_sha256
from mogle_rt.errors import InputError, OutputError

Mode = Literal["link", "copy", "embed"]
MODES = ("link", "copy", "embed")
EXPORTED_PARTS = ("transformer", "lora", "mogle", "vae")
TEXT_PARTS = ("text_encoder", "text_encoder_2")
COPY_NAME = "weights.safetensors"
EMBED_LIMIT = 2_000_000_000  # bytes; a protobuf message can't be larger than 2 GiB
ALIGNMENT = 4096
CPU = torch.device("cpu")
FICLONE = 0x40049409  # Linux's request number for sharing a file's blocks

ONNX_TYPES = {
    torch.float32: onnx.TensorProto.FLOAT,
    torch.float16: onnx.TensorProto.FLOAT16,
    torch.bfloat16: onnx.TensorProto.BFLOAT16,
}


@dataclass(frozen=True)
class Weights:
    """Where the weights of a graph are.

    Attributes:
        tensors: the dtype, the shape and the place in the file of every weight.
        location: the name of the file beside the graph; None if the weights go into the graph itself.
        bundle: is read if weights are embedded.
        dtype: embedded weights are converted to it.
        sha256: the hash of the file's contents.
    """

    tensors: Mapping[str, TensorInfo]
    location: str | None
    bundle: TensorSource
    dtype: torch.dtype
    sha256: str

    def initializer(self, name: str) -> onnx.TensorProto:
        """The tensor as an ONNX initializer of the same name."""
        info = self.tensors[name]
        tensor = onnx.TensorProto(name=name, dims=info.shape)
        if self.location is None:
            value = self.bundle.load([name], CPU, self.dtype)
            if info.dtype != self.dtype:
                require_finite(name, value, self.bundle.load([name], CPU, info.dtype))
            tensor.data_type = ONNX_TYPES[self.dtype]
            tensor.raw_data = value.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
            return tensor
        tensor.data_type = ONNX_TYPES[info.dtype]
        tensor.data_location = onnx.TensorProto.EXTERNAL
        for key, text in (
            ("location", self.location),
            ("offset", str(info.begin)),
            ("length", str(info.end - info.begin)),
        ):
            tensor.external_data.add(key=key, value=text)
        return tensor


def exported_names(bundle: TensorSource, *, text_encoders: bool) -> list[str]:
    """The names of the bundle's tensors that graphs read, in the order of the file."""
    parts = (*EXPORTED_PARTS, *(TEXT_PARTS if text_encoders else ()))
    return [name for name in bundle.tensors if name.split(".", 1)[0] in parts]


def place_weights(
    bundle: Bundle, folder: Path, new: Path, mode: Mode, dtype: torch.dtype, *, text_encoders: bool
) -> Weights:
    """Put weights where graphs in ``folder`` find them.

    Args:
        new: the folder of files that are moved into ``folder`` later, see `mogle_rt.bundle.files.replace_together`.
        mode: "link" points into the bundle (weights stay in the stored dtype, and graphs cast them if they compute in
            another), "copy" writes `COPY_NAME` in ``dtype``, "embed" writes them into the graphs in ``dtype``.
        text_encoders: whether they are among the graphs.

    Raises:
        CheckpointError: ``dtype`` can't hold some values.
        InputError: the weights are too large to embed.
        OutputError: the folder can't be written to, or, with "link", it is on another file system than the bundle.
    """
    if mode == "link":
        name = _linked_name(bundle, folder)
        _link(bundle.path.resolve(), folder, new, name)
        return Weights(bundle.tensors, name, bundle, dtype, bundle.content_hash)
    if mode == "copy":
        target = folder / COPY_NAME
        if target.exists() and target.samefile(bundle.path):
            raise OutputError(f"{target}: is the bundle itself; choose another folder")
        tensors, content_hash = _copy(bundle, new / COPY_NAME, dtype, text_encoders=text_encoders)
        return Weights(tensors, COPY_NAME, bundle, dtype, content_hash)
    size = sum(bundle.tensors[n].numel for n in exported_names(bundle, text_encoders=text_encoders)) * dtype.itemsize
    if size > EMBED_LIMIT:
        raise InputError(
            f"weights of {size / 1e9:.1f} GB can't be embedded, because an ONNX file can't be larger than 2 GB; "
            "link or copy them"
        )
    return Weights(bundle.tensors, None, bundle, dtype, "")


def _linked_name(bundle: Bundle, folder: Path) -> str:
    """The bundle's file name, or another one if that is a symbolic link in this folder, which no loader follows."""
    given = folder / bundle.path.name
    return COPY_NAME if given.is_symlink() and given.exists() and given.samefile(bundle.path) else bundle.path.name


def _link(path: Path, folder: Path, new: Path, name: str) -> None:
    """Put the bundle's file beside the graphs under this name, as a clone or a hard link."""
    target = folder / name
    if target.is_symlink():
        raise OutputError(
            f"{target}: is a symbolic link, which no loader follows; export to {path.parent}, or with weights copy"
        )
    if target.exists():
        if not target.samefile(path) and not _same(path, target):
            raise OutputError(f"{target}: is another file with the bundle's name; choose another folder")
        return
    if _clone(path, new / name):
        return
    try:
        os.link(path, new / name)
    except OSError as error:
        raise OutputError(
            f"{folder}: the bundle can't be linked into it ({error.strerror}); choose a folder on its file system, "
            f"export beside the bundle by giving none, or take weights copy"
        ) from None


def _same(path: Path, target: Path) -> bool:
    """Whether the target is a clone or a copy of the bundle, judged by size and header."""
    return path.stat().st_size == target.stat().st_size and header_sha256(path) == header_sha256(target)


def _clone(path: Path, target: Path) -> bool:
    """Clone the file if the file system can: the clone shares its blocks, so it costs nothing. Whether this was done."""
    try:
        import fcntl
    except ImportError:  # Windows has no such module
        return False
    try:
        with path.open("rb") as source, target.open("xb") as copy:
            fcntl.ioctl(copy.fileno(), FICLONE, source.fileno())
        return True
    except OSError:
        target.unlink(missing_ok=True)
        return False


def _copy(
    bundle: Bundle, target: Path, dtype: torch.dtype, *, text_encoders: bool
) -> tuple[Mapping[str, TensorInfo], str]:
    """Write the weights that graphs read, in ``dtype``, as a bundle, which has text encoders only if they are exported.

    Returns:
        The tensors of the copy, and the hash of its contents.
    """
    names = exported_names(bundle, text_encoders=text_encoders)
    if text_encoders:
        names += [name for name in bundle.tensors if name.startswith(("tokenizer.", "tokenizer_2."))]
    sources = {n: StoredTensor(bundle.path, bundle.tensors[n]) for n in names}
    config = bundle.config if text_encoders else replace(bundle.config, text_encoder=None, text_encoder_2=None)
    write_bundle(target, sources, config, dtype=dtype, progress=False)
    copied = Bundle(target)
    return copied.tensors, copied.content_hash
