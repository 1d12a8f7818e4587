"""Folders in the layout of diffusers and transformers: read their configurations, and find their tensors."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mogle_rt.bundle.container import read_header
from mogle_rt.conversion.hub import FLUX_FOLDERS
from mogle_rt.conversion.tensors import SourceTensor, StoredTensor
from mogle_rt.errors import CheckpointError
from mogle_rt.values import read_json as parse_json

LARGEST_JSON = 64 << 20  # bytes; an index of FLUX.1-dev has 120 kB


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file.

    Raises:
        CheckpointError: the file is missing, can't be read or doesn't hold an object.
    """
    try:
        if path.stat().st_size > LARGEST_JSON:
            raise ValueError(f"it has more than {LARGEST_JSON:,} bytes")
        value = parse_json(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not readable as JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: must hold a JSON object, holds {type(value).__name__}")
    return value


def read_safetensors(path: Path) -> dict[str, SourceTensor]:
    """Find every tensor of a safetensors file, without reading its values."""
    tensors, _ = read_header(path)
    return {name: StoredTensor(path, info) for name, info in tensors.items()}


# diffusion_pytorch_model.safetensors, model.fp16-00001-of-00002.safetensors, model.safetensors.index.fp16.json
_WEIGHTS = re.compile(r"(?P<stem>[^.]+?)(\.(?P<variant>[^.]+?))?(?P<shard>-\d+-of-\d+)?\.safetensors")
_INDEX = re.compile(r"(?P<stem>[^.]+)(\.(?P<before>[^.]+))?\.safetensors\.index(\.(?P<variant>[^.]+))?\.json")


def read_folder(folder: Path) -> dict[str, SourceTensor]:
    """Find the tensors of a diffusers or transformers folder: one safetensors file, or shards with an index.

    A folder may hold the weights several times: without a variant's name, and as variants (``model.fp16.safetensors``).
    The weights without a variant's name are used; if there are none, the only variant is used.

    Raises:
        CheckpointError: there are no weights, or only several variants; or a shard is missing, or the index doesn't
            match the shards.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder; a diffusers FLUX folder has {', '.join(FLUX_FOLDERS)}")
    indexes = {
        (m["variant"] or m["before"] or ""): f for f in sorted(folder.iterdir()) if (m := _INDEX.fullmatch(f.name))
    }
    files: dict[str, list[Path]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        match = _WEIGHTS.fullmatch(file.name)
        if match is None or not match["shard"]:
            files.setdefault((match["variant"] or "") if match else file.stem, []).append(file)
    variants = sorted({*indexes, *files})
    if not variants:
        raise CheckpointError(f"{folder}: no .safetensors files and no index; expected one file or an index")
    if "" not in variants and len(variants) > 1:
        raise CheckpointError(f"{folder}: holds several variants ({', '.join(variants)}); leave one of them there")
    variant = variants[0]  # weights without a variant's name have the empty name, which sorts first
    if variant in indexes:
        return _read_shards(folder, indexes[variant])
    if len(files[variant]) > 1:
        count = len(files[variant])
        raise CheckpointError(f"{folder}: {count} .safetensors files and no index; expected one file or an index")
    return read_safetensors(files[variant][0])


def _read_shards(folder: Path, index: Path) -> dict[str, SourceTensor]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise CheckpointError(f"{index}: has no weight_map from tensors to shards")
    shards = {shard: read_safetensors(folder / Path(shard).name) for shard in sorted(set(weight_map.values()))}
    for name, shard in weight_map.items():
        if name not in shards[shard]:
            raise CheckpointError(f"{folder / shard}: missing tensor {name!r}, which the index says is here")
    return {name: shards[shard][name] for name, shard in weight_map.items()}
