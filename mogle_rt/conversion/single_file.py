"""Read a transformer from one file, as published by FLUX's authors, ComfyUI and others, with diffusers' names."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping
from pathlib import Path

import torch

from mogle_rt.config import FLUX_DEV, TransformerConfig
from mogle_rt.conversion.flux_names import flux_layers, flux_scales
from mogle_rt.conversion.folders import read_folder, read_safetensors
from mogle_rt.conversion.gguf_file import read_gguf
from mogle_rt.conversion.tensors import ScaledTensor, SourceTensor, swapped_halves
from mogle_rt.errors import CheckpointError, ConfigError

logger = logging.getLogger(__name__)

PREFIXES = ("model.diffusion_model.", "diffusion_model.", "transformer.", "")  # the longest that matches is removed
EIGHT_BITS = (torch.float8_e4m3fn, torch.float8_e5m2)
# ComfyUI stores scales beside its 8-bit weights. The scales of weights are used. Those of inputs are for 8-bit
# products, which are not computed here, so they are ignored.
WEIGHT_SCALES = (".scale_weight", ".weight_scale")
IGNORED = (".scale_input", ".input_scale", ".comfy_quant")
OTHER_MODELS = {384: "FLUX.1-Fill", 128: "FLUX.1-Depth or FLUX.1-Canny"}  # by the number of channels of a token
FOUR_BITS = re.compile(r"\.weight\.(absmax|quant_map|quant_state\..+|nested_absmax|nested_quant_map)$")


def read_transformer(path: Path, config: TransformerConfig | None) -> tuple[dict[str, SourceTensor], TransformerConfig]:
    """Find a FLUX transformer's tensors, with diffusers' names, and its configuration.

    Args:
        path: a safetensors or GGUF file with FLUX's own names or diffusers' names, with or without ComfyUI's prefix; or
            a folder in diffusers' layout. Weights of eight bits or fewer are unpacked to bfloat16.
        config: the configuration; None derives it from the tensors' shapes, which needs FLUX's names.

    Raises:
        CheckpointError: the file is not such a file, or belongs to another model than FLUX.1-dev.
    """
    if path.is_dir():
        tensors = read_folder(path)
    else:
        tensors = read_gguf(path) if path.suffix.lower() == ".gguf" else read_safetensors(path)
    tensors = _unscaled(_of_the_transformer(tensors, path), path)
    if any(name.startswith("double_blocks.") for name in tensors):
        config = config or _config_of(tensors, path)
        return _renamed(tensors, config, path), config
    if not any(name.startswith("transformer_blocks.") for name in tensors):
        raise CheckpointError(
            f"{path}: holds no FLUX transformer: neither double_blocks.0… (FLUX's names) nor transformer_blocks.0… "
            "(diffusers')"
        )
    if config is None:
        raise CheckpointError(
            f"{path}: has diffusers' names but no configuration; give --flux a folder with transformer/config.json"
        )
    return tensors, config


def refuse_other_models(in_channels: int, where: object) -> None:
    """Refuse FLUX models with wider tokens, because they were trained with inputs that Face-MoGLE doesn't provide.

    Raises:
        CheckpointError: the number of channels belongs to such a model, which the message names.
    """
    if in_channels in OTHER_MODELS:
        raise CheckpointError(
            f"{where}: this is {OTHER_MODELS[in_channels]} (its tokens have {in_channels} channels); Face-MoGLE was "
            "trained on FLUX.1-dev, whose tokens have 64: take black-forest-labs/FLUX.1-dev"
        )


def _of_the_transformer(tensors: Mapping[str, SourceTensor], path: Path) -> dict[str, SourceTensor]:
    """The transformer's tensors, without their prefix. Other parts that the file may hold are left out."""
    if any(FOUR_BITS.search(name) for name in tensors):
        raise CheckpointError(
            f"{path}: holds weights in bitsandbytes' 4-bit formats (nf4 or fp4), which are not supported; use a "
            "16-bit, fp8 or GGUF file of the same model"
        )
    marks = ("double_blocks.0.", "transformer_blocks.0.")
    prefix = next((p for p in PREFIXES if any(name.startswith(f"{p}{m}") for name in tensors for m in marks)), "")
    own = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
    left_out = len(tensors) - len(own)
    if left_out:
        logger.info("%s: %d tensors outside of the transformer are left out", path, left_out)
    return own


def _unscaled(tensors: Mapping[str, SourceTensor], path: Path) -> dict[str, SourceTensor]:
    """Convert 8-bit weights to bfloat16, multiplied by the scales that are stored beside them."""
    result, scales = {}, {}
    for name, tensor in tensors.items():
        if name == "scaled_fp8" or name.endswith(IGNORED):
            continue
        ending = next((e for e in WEIGHT_SCALES if name.endswith(e)), None)
        if ending is None:
            result[name] = tensor
        elif tensor.shape in ((), (1,)):
            scale = float(tensor.load().item())
            if not 0 < scale < math.inf:
                raise CheckpointError(f"{path}: {name!r} is {scale:g}; a weight's scale must be positive and finite")
            scales[f"{name.removesuffix(ending)}.weight"] = scale
        else:
            raise CheckpointError(
                f"{path}: {name!r} has shape {list(tensor.shape)}; only one scale for a whole weight is supported"
            )
    for name in scales:
        if name not in result:
            raise CheckpointError(f"{path}: has a scale of {name!r}, but no such weight")
        if result[name].dtype not in EIGHT_BITS:
            raise CheckpointError(f"{path}: {name!r} has a scale but is {result[name].dtype}, not in eight bits")
    for name, tensor in result.items():
        if tensor.dtype in EIGHT_BITS:
            result[name] = ScaledTensor(tensor, scales.get(name, 1.0))
    return result


def _config_of(tensors: Mapping[str, SourceTensor], path: Path) -> TransformerConfig:
    """Derive the configuration from the shapes of the tensors in a file with FLUX's names."""

    def size(name: str, axis: int) -> int:
        if name not in tensors or len(tensors[name].shape) <= axis:
            raise CheckpointError(f"{path}: missing tensor {name!r}")
        return tensors[name].shape[axis]

    def count(prefix: str) -> int:
        return len({name.split(".")[1] for name in tensors if name.startswith(f"{prefix}.")})

    width, channels = size("img_in.weight", 0), size("img_in.weight", 1)
    refuse_other_models(channels, path)
    head = size("double_blocks.0.img_attn.norm.query_norm.scale", 0)
    if head != FLUX_DEV.attention_head_dim:
        raise CheckpointError(
            f"{path}: its heads have {head} channels, FLUX.1-dev's {FLUX_DEV.attention_head_dim}; the file doesn't say "
            "how their rotary embedding is divided: give --flux a folder with transformer/config.json"
        )
    try:
        return TransformerConfig(
            num_layers=count("double_blocks"),
            num_single_layers=count("single_blocks"),
            attention_head_dim=head,
            num_attention_heads=width // head,
            joint_attention_dim=size("txt_in.weight", 1),
            pooled_projection_dim=size("vector_in.in_layer.weight", 1),
            guidance_embeds="guidance_in.in_layer.weight" in tensors,
            axes_dims_rope=FLUX_DEV.axes_dims_rope,
            in_channels=channels,
        )
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from None


def _renamed(tensors: Mapping[str, SourceTensor], config: TransformerConfig, path: Path) -> dict[str, SourceTensor]:
    """Change FLUX's names to diffusers'. Split stacked rows, and swap the halves of the last norm's modulation."""
    left, result = dict(tensors), {}
    for name, stored in flux_scales(config):
        if (scale := left.pop(f"{name}.scale", None)) is not None:
            result[f"{stored}.weight"] = scale
    for name, rows in flux_layers(config):
        for kind in ("weight", "bias"):
            tensor = left.pop(f"{name}.{kind}", None)
            if tensor is None:
                continue
            if not tensor.shape:
                raise CheckpointError(f"{path}: tensor '{name}.{kind}' is a single number, expected one for each row")
            if rows.swapped:
                tensor = swapped_halves(tensor)
            sizes = [size * config.width for size in rows.sizes] if len(rows.layers) > 1 else [tensor.shape[0]]
            if sum(sizes) != tensor.shape[0]:
                raise CheckpointError(
                    f"{path}: tensor '{name}.{kind}' has {tensor.shape[0]} rows, expected {sum(sizes)}"
                )
            start = 0
            for layer, size in zip(rows.layers, sizes, strict=True):
                result[f"{layer}.{kind}"] = tensor.rows(start, start + size) if len(sizes) > 1 else tensor
                start += size
    if left:
        raise CheckpointError(f"{path}: unexpected tensor {next(iter(left))!r}")
    return result
