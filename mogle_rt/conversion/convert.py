"""Make a bundle from the reference's files, tensor by tensor: memory stays small however large the model."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from tqdm import tqdm

from mogle_rt.bundle import schema
from mogle_rt.bundle.bundle import FLOATS, FORMAT, FORMAT_VERSION, BundleConfig, describe
from mogle_rt.bundle.container import TensorInfo, header_room, write_header
from mogle_rt.bundle.files import atomic_write
from mogle_rt.bundle.schema import check_names
from mogle_rt.config import SchedulerConfig, TransformerConfig, parse_dtype
from mogle_rt.conversion import sources
from mogle_rt.conversion.sources import SourceTensor
from mogle_rt.encoders.text_models import text_encoder_shapes
from mogle_rt.encoders.vae import autoencoder, tensor_shapes
from mogle_rt.errors import CheckpointError, ConfigError, OutputError

logger = logging.getLogger(__name__)

TOKENIZER_SUFFIXES = (".json", ".txt", ".model")
TOKENIZER_FILE_LIMIT = 64 << 20


def convert(
    flux: str | Path,
    lora: str | Path,
    mogle: str | Path,
    output: str | Path,
    *,
    dtype: str | torch.dtype | None = None,
    text_encoders: bool = True,
    progress: bool | None = None,
) -> Path:
    """Write the single-file bundle that `Pipeline` and the exporter take.

    Args:
        flux: a FLUX folder in diffusers' layout, or a hub id. Text encoders in it are optional.
        lora: the branch LoRA (safetensors), a path or a hub id.
        mogle: experts and gate, the released ``.pt`` or safetensors, a path or a hub id.
        output: the bundle to write; it appears whole or not at all.
        dtype: "bf16", "fp16" or "fp32" (or a torch dtype) for all weights; None keeps each as stored.
        text_encoders: False leaves CLIP and T5 out; prompts must then come as embeddings.
        progress: True or False; None shows a bar on a terminal.

    Returns:
        The path of the bundle.

    Raises:
        CheckpointError: a file is missing, damaged, or doesn't fit the configuration; weights that are not finite.
        DownloadError: a hub id that can't be fetched.
        OutputError: ``output`` can't be written, or is one of the files to read.
        ConfigError: an unknown dtype.
    """
    target = parse_dtype(dtype) if dtype is not None else None
    output = Path(output)
    flux_dir = sources.find(flux)
    lora_file = sources.find(lora, default_file="pytorch_lora_weights.safetensors")
    mogle_file = sources.find(mogle, default_file="global_local_mask_moe.pt")
    tensors, config = gather(flux_dir, lora_file, mogle_file, text_encoders=text_encoders)
    if text_encoders and config.text_encoder is None:
        logger.warning("%s holds no text encoders: prompts for this bundle must come as embeddings", flux_dir)
    try:
        existing = output.exists()
    except OSError:  # a name too long: told when it is written to
        existing = False
    if existing:
        own = {lora_file, mogle_file, *(t.path for t in tensors.values() if t.path), *flux_dir.glob("*/*")}
        if any(output.samefile(source) for source in own):
            raise OutputError(f"{output}: is one of the files to convert; choose another name for the bundle")
    write_bundle(output, tensors, config, dtype=target, progress=progress)
    return output


def gather(
    flux: Path, lora: Path, mogle: Path, *, text_encoders: bool = True
) -> tuple[dict[str, SourceTensor], BundleConfig]:
    """Everything that goes into a bundle, unread, in the order it is written, checked against the configurations.

    Raises:
        CheckpointError: a file is missing or damaged, or a tensor is missing, unexpected or of another shape.
    """
    try:
        transformer = TransformerConfig.from_mapping(sources.read_json(flux / "transformer" / "config.json"))
        scheduler = SchedulerConfig.from_mapping(sources.read_json(flux / "scheduler" / "scheduler_config.json"))
    except ConfigError as error:
        raise CheckpointError(f"{flux}: {error}") from None
    vae = sources.read_json(flux / "vae" / "config.json")
    mogle_tensors, mogle_config = sources.read_mogle(mogle)
    if mogle_config.latent_dim != transformer.in_channels:
        raise CheckpointError(
            f"{mogle}: its experts take {mogle_config.latent_dim} channels, the transformer's tokens have "
            f"{transformer.in_channels}"
        )
    lora_tensors = sources.read_lora(lora, transformer)
    ranks = {n.removesuffix(".lora_A.weight"): t.shape[0] for n, t in lora_tensors.items() if ".lora_A." in n}

    tensors: dict[str, SourceTensor] = {}
    for part, found, expected, where in (
        ("transformer", sources.read_folder(flux / "transformer"), schema.transformer_tensors(transformer), flux),
        ("lora", lora_tensors, schema.lora_tensors(transformer, ranks), lora),
        ("mogle", mogle_tensors, schema.mogle_tensors(mogle_config), mogle),
        ("vae", sources.read_folder(flux / "vae"), tensor_shapes(autoencoder(vae)), flux / "vae"),
    ):
        check_names({n: t.shape for n, t in found.items()}, expected, where)
        tensors |= {f"{part}.{name}": found[name] for name in expected}
    configs: dict[str, dict[str, Any] | None] = {"text_encoder": None, "text_encoder_2": None}
    if text_encoders and (flux / "text_encoder").is_dir():
        for part in configs:
            configs[part] = config = sources.read_json(flux / part / "config.json")
            found = _without_tied(sources.read_folder(flux / part))
            expected = text_encoder_shapes(part, config, found)
            check_names({n: t.shape for n, t in found.items()}, expected, flux / part)
            tensors |= {f"{part}.{name}": found[name] for name in expected}
        for part in ("tokenizer", "tokenizer_2"):
            tensors |= {f"{part}.{name}": tensor for name, tensor in _files(flux / part).items()}
    try:
        bundle = BundleConfig(transformer=transformer, mogle=mogle_config, scheduler=scheduler, vae=vae, **configs)
    except ConfigError as error:
        raise CheckpointError(f"{flux}: {error}") from None
    return tensors, bundle


def _without_tied(tensors: Mapping[str, SourceTensor]) -> dict[str, SourceTensor]:
    """T5 stores its token embedding under two names; buffers that the code computes itself are dropped too."""
    result = {n: t for n, t in tensors.items() if not n.endswith(".position_ids")}
    if "shared.weight" in result:
        result.pop("encoder.embed_tokens.weight", None)
    return result


def _files(folder: Path) -> dict[str, SourceTensor]:
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder; the text encoders need their tokenizers beside them")
    files: dict[str, SourceTensor] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix not in TOKENIZER_SUFFIXES:
            continue
        data = path.read_bytes()
        if data and len(data) <= TOKENIZER_FILE_LIMIT:
            files[path.name] = SourceTensor.of(torch.frombuffer(bytearray(data), dtype=torch.uint8))
    if not files:
        raise CheckpointError(f"{folder}: holds no tokenizer files (*.json, *.txt, *.model)")
    return files


def write_bundle(
    output: Path,
    tensors: Mapping[str, SourceTensor],
    config: BundleConfig,
    *,
    dtype: torch.dtype | None = None,
    progress: bool | None = None,
) -> None:
    """Stream ``tensors`` into a bundle, in their order. Files (uint8) keep their type and go last.

    Raises:
        CheckpointError: a weight is NaN or infinite, before or after the change of dtype.
        OutputError: the file can't be written.
    """
    ordered = sorted(tensors.items(), key=lambda item: item[1].dtype == torch.uint8)
    dtypes = {name: _stored_dtype(name, t.dtype, dtype) for name, t in ordered}
    config_text = json.dumps(config.to_dict(), sort_keys=True)
    metadata = {
        "format": FORMAT,
        "format_version": str(FORMAT_VERSION),
        "config": config_text,
        "sha256": "0" * 64,
    }
    start = position = header_room(list(tensors), metadata)
    layout: dict[str, TensorInfo] = {}
    for name, tensor in ordered:
        size = dtypes[name].itemsize
        for d in tensor.shape:
            size *= d
        layout[name] = TensorInfo(dtypes[name], tensor.shape, position, position + size)
        position += size
    digest = hashlib.sha256(config_text.encode())
    bar = tqdm(
        total=position - start,
        unit="B",
        unit_scale=True,
        desc="convert",
        disable=None if progress is None else not progress,
    )
    with atomic_write(output) as f, bar:
        for name, tensor in ordered:
            digest.update(describe(name, layout[name]))
            f.seek(layout[name].begin)
            for chunk in tensor.chunks():
                _write_chunk(f, chunk, dtypes[name], name, digest, bar)
        f.truncate(position)
        write_header(f, layout, metadata | {"sha256": digest.hexdigest()}, start)


def _stored_dtype(name: str, source: torch.dtype, wanted: torch.dtype | None) -> torch.dtype:
    if name.startswith("tokenizer"):
        return source
    if source not in (*FLOATS, torch.float64):
        raise CheckpointError(f"tensor {name!r} is {source}; weights must be float32, float16, bfloat16 or float64")
    return wanted or (torch.float32 if source == torch.float64 else source)


def _write_chunk(file: BinaryIO, chunk: torch.Tensor, dtype: torch.dtype, name: str, digest: Any, bar: Any) -> None:
    converted = chunk.to(dtype)
    raw = converted.view(torch.uint8).numpy()
    if _all_zero(raw):
        file.seek(raw.nbytes, 1)  # a hole stays a hole: nothing to write
    else:
        if dtype.is_floating_point:
            require_finite(name, converted, chunk)
        file.write(raw.data)
    digest.update(raw.data)
    bar.update(raw.nbytes)


def require_finite(name: str, converted: torch.Tensor, source: torch.Tensor) -> None:
    """Values of a tensor that were converted from ``source``.

    Raises:
        CheckpointError: NaN or infinite values, there already or by the conversion.
    """
    if not _finite(converted):
        after = f" once in {converted.dtype}" if _finite(source) else ""
        raise CheckpointError(f"tensor {name!r} holds NaN or infinite values{after}")


def _finite(values: torch.Tensor) -> bool:
    return all(
        math.isfinite(bound.item()) for bound in values.aminmax()
    )  # NaN passes through: 20x faster than isfinite


def _all_zero(raw: np.ndarray[Any, np.dtype[np.uint8]]) -> bool:
    words = raw.nbytes // 8 * 8
    return not (np.bitwise_or.reduce(raw[:words].view(np.uint64)) if words else 0) and not raw[words:].any()
