"""Make a bundle from the reference's files, tensor by tensor, so that even a large model needs little memory."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from mogle_rt.bundle import schema
from mogle_rt.bundle.bundle import TEXT_PARTS, BundleConfig
from mogle_rt.bundle.schema import check_names
from mogle_rt.bundle.storage import storage_named
from mogle_rt.config import SchedulerConfig, TransformerConfig, parse_dtype
from mogle_rt.conversion.folders import read_folder, read_json
from mogle_rt.conversion.hub import check_flux_folder, find
from mogle_rt.conversion.lora import read_lora
from mogle_rt.conversion.mogle_file import read_mogle
from mogle_rt.conversion.single_file import read_transformer, refuse_other_models
from mogle_rt.conversion.tensors import HeldTensor, SourceTensor
from mogle_rt.conversion.writing.empty_prompt import empty_prompt
from mogle_rt.conversion.writing.write import WrittenWeights, write_bundle
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
    transformer: str | Path | None = None,
    dtype: str | torch.dtype | None = None,
    text_encoders: bool = True,
    weights: str | None = None,
    on_weights: Callable[[WrittenWeights], None] | None = None,
    progress: bool | None = None,
) -> Path:
    """Write the single-file bundle that `Pipeline` and the exporter read.

    Args:
        flux: a FLUX folder in diffusers' layout, or a hub id. Its text encoders are optional.
        lora: the condition branch's LoRA: a safetensors file, or a folder written by peft; a path or a hub id.
        mogle: experts and gate: the released ``.pt`` file, or safetensors; a path or a hub id.
        output: the bundle to write; it appears complete or not at all.
        transformer: a single file with the transformer, to use instead of the one in ``flux``: safetensors with FLUX's
            own names or diffusers' names (also with ComfyUI's prefix, and in scaled fp8), or GGUF. A path or a hub id.
        dtype: "bf16", "fp16" or "fp32" (or a torch dtype) for all weights. None keeps each weight's stored dtype, but
            converts what is stored in eight bits or fewer to bfloat16.
        text_encoders: False leaves CLIP and T5 out. The bundle then holds the embeddings of the empty prompt, if the
            encoders are in ``flux``; other prompts must be given as embeddings.
        weights: "int8", "fp8" or "int4" stores the blocks' weights in fewer bits, see docs/precision.md. None stores them
            like all others.
        on_weights: is called with a report of how well each layer is kept in that format.
        progress: whether to show a progress bar; None shows it only on a terminal.

    Returns:
        The path of the bundle.

    Raises:
        CheckpointError: a file is missing, damaged, or doesn't match the configuration, or a weight is not finite.
        DownloadError: a hub id can't be downloaded.
        OutputError: ``output`` can't be written, or is one of the files to read.
        ConfigError: the dtype or the weight format is unknown.
    """
    if weights is not None:
        storage_named(weights)
    target = parse_dtype(dtype) if dtype is not None else None
    output = Path(output)
    flux_dir = find(flux)
    check_flux_folder(flux_dir)
    transformer_file = None if transformer is None else find(transformer, default_file="flux1-dev.safetensors")
    lora_file = find(lora, default_file="pytorch_lora_weights.safetensors")
    mogle_file = find(mogle, default_file="global_local_mask_moe.pt")
    tensors, config = gather(flux_dir, lora_file, mogle_file, transformer=transformer_file, text_encoders=text_encoders)
    if text_encoders and config.text_encoder is None:
        logger.warning("%s holds no text encoders: prompts for this bundle must come as embeddings", flux_dir)
    try:
        existing = output.exists()
    except OSError:  # the name is too long; the error comes when the file is written
        existing = False
    if existing:
        own = {lora_file, mogle_file, *(p for t in tensors.values() for p in t.paths), *flux_dir.glob("*/*")}
        if any(source.exists() and output.samefile(source) for source in own):
            raise OutputError(f"{output}: is one of the files to convert; choose another name for the bundle")
    report = write_bundle(output, tensors, config, dtype=target, weights=weights, progress=progress)
    if on_weights is not None:
        on_weights(report)
    return output


def gather(
    flux: Path, lora: Path, mogle: Path, *, transformer: Path | None = None, text_encoders: bool = True
) -> tuple[dict[str, SourceTensor], BundleConfig]:
    """Collect the tensors of a bundle in their order, without reading them, and check names and shapes.

    Raises:
        CheckpointError: a file is missing or damaged, or a tensor is missing, unexpected or of another shape.
    """
    transformer_tensors, config = _transformer(flux, transformer)
    try:
        scheduler = SchedulerConfig.from_mapping(read_json(flux / "scheduler" / "scheduler_config.json"))
    except ConfigError as error:
        raise CheckpointError(f"{flux}: {error}") from None
    vae = read_json(flux / "vae" / "config.json")
    mogle_tensors, mogle_config = read_mogle(mogle)
    if mogle_config.latent_dim != config.in_channels:
        raise CheckpointError(
            f"{mogle}: its experts take {mogle_config.latent_dim} channels, the transformer's tokens have "
            f"{config.in_channels}"
        )
    lora_tensors = read_lora(lora, config)
    ranks = {n.removesuffix(".lora_A.weight"): t.shape[0] for n, t in lora_tensors.items() if ".lora_A." in n}

    tensors: dict[str, SourceTensor] = {}
    for part, found, expected, where in (
        ("transformer", transformer_tensors, schema.transformer_tensors(config), transformer or flux),
        ("lora", lora_tensors, schema.lora_tensors(config, ranks), lora),
        ("mogle", mogle_tensors, schema.mogle_tensors(mogle_config), mogle),
        ("vae", read_folder(flux / "vae"), tensor_shapes(autoencoder(vae)), flux / "vae"),
    ):
        check_names({n: t.shape for n, t in found.items()}, expected, where)
        tensors |= {f"{part}.{name}": found[name] for name in expected}
    configs: dict[str, dict[str, Any] | None] = {"text_encoder": None, "text_encoder_2": None}
    if text_encoders and (flux / "text_encoder").is_dir():
        for part in configs:
            configs[part] = encoder = read_json(flux / part / "config.json")
            found = _without_extras(read_folder(flux / part), part, flux / part)
            expected = text_encoder_shapes(part, encoder, found)
            check_names({n: t.shape for n, t in found.items()}, expected, flux / part)
            tensors |= {f"{part}.{name}": found[name] for name in expected}
        for part in ("tokenizer", "tokenizer_2"):
            tensors |= {f"{part}.{name}": tensor for name, tensor in _files(flux / part).items()}
    elif all((flux / part).is_dir() for part in TEXT_PARTS):
        clip, t5 = (_without_extras(read_folder(flux / part), part, flux / part) for part in TEXT_PARTS[:2])
        files = {
            part: {n: t.load().numpy().tobytes() for n, t in _files(flux / part).items()} for part in TEXT_PARTS[2:]
        }
        tensors |= {f"empty_prompt.{name}": tensor for name, tensor in empty_prompt(flux, clip, t5, files).items()}
    try:
        bundle = BundleConfig(transformer=config, mogle=mogle_config, scheduler=scheduler, vae=vae, **configs)
    except ConfigError as error:
        raise CheckpointError(f"{flux}: {error}") from None
    return tensors, bundle


def _transformer(flux: Path, file: Path | None) -> tuple[dict[str, SourceTensor], TransformerConfig]:
    """The transformer's tensors and configuration, from its folder or from one file."""
    pipeline = flux / "model_index.json"
    if file is None and pipeline.is_file():
        name = read_json(pipeline).get("_class_name")
        if isinstance(name, str) and name.startswith("Flux") and name not in ("FluxPipeline", "FluxImg2ImgPipeline"):
            raise CheckpointError(
                f"{flux}: this is a {name}; Face-MoGLE was trained on FLUX.1-dev: take black-forest-labs/FLUX.1-dev"
            )
    path = flux / "transformer" / "config.json"
    config = None
    if file is None or path.is_file():
        raw = read_json(path)
        if "quantization_config" in raw and file is None:
            method = (
                raw["quantization_config"].get("quant_method") if isinstance(raw["quantization_config"], dict) else ""
            )
            raise CheckpointError(
                f"{path.parent}: its weights are quantised ({method or 'quantization_config'}); take the original ones, "
                "or pass an fp8 or GGUF file as --transformer"
            )
        channels = raw.get("in_channels")
        if isinstance(channels, int):
            refuse_other_models(channels, flux)
        try:
            config = TransformerConfig.from_mapping(raw)
        except ConfigError as error:
            raise CheckpointError(f"{flux}: {error}") from None
    if file is None:
        assert config is not None
        return read_folder(flux / "transformer"), config
    return read_transformer(file, config)


def _without_extras(tensors: Mapping[str, SourceTensor], part: str, where: Path) -> dict[str, SourceTensor]:
    """Drop the tensors that an encoder computes itself or doesn't use, and keep the tied embedding once.

    T5's token embedding has two names, and files hold it under either or both. CLIP's projection is for image search;
    FLUX uses the pooled state before it.

    Raises:
        CheckpointError: the file holds the embedding under both names, and the two differ.
    """
    result = {name: tensor for name, tensor in tensors.items() if not name.endswith(".position_ids")}
    if part == "text_encoder":
        result.pop("text_projection.weight", None)
    other = result.pop("encoder.embed_tokens.weight", None)
    if other is None:
        return result
    shared = result.setdefault("shared.weight", other)
    if shared is not other:
        same = shared.shape == other.shape and shared.dtype == other.dtype
        if not same or not all(map(torch.equal, shared.chunks(), other.chunks())):
            raise CheckpointError(
                f"{where}: shared.weight and encoder.embed_tokens.weight are one embedding under two names, but differ; "
                "remove the wrong one"
            )
    return result


def _files(folder: Path) -> dict[str, SourceTensor]:
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder; the text encoders need their tokenizers beside them")
    files: dict[str, SourceTensor] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix not in TOKENIZER_SUFFIXES or not path.is_file():
            continue
        if path.stat().st_size > TOKENIZER_FILE_LIMIT:  # before it is read; no tokenizer needs it
            continue
        data = path.read_bytes()
        if data:
            files[path.name] = HeldTensor(torch.frombuffer(bytearray(data), dtype=torch.uint8))
    if not files:
        raise CheckpointError(f"{folder}: holds no tokenizer files (*.json, *.txt, *.model)")
    return files
