"""Read LoRA files in all common naming schemes as low-rank branches of the bundle's own layers.

A layer that is stacked in FLUX's own code (q, k and v; a single block's first layer) has one LoRA for all its rows. The
stored layers that correspond to it then share A, and each gets its own rows of B.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mogle_rt.bundle import schema
from mogle_rt.bundle.container import read_header
from mogle_rt.config import TransformerConfig
from mogle_rt.conversion.adapter_settings import RANKS, AdapterSettings, adapter_file, adapter_settings
from mogle_rt.conversion.flux_names import Rows, flux_layers
from mogle_rt.conversion.tensors import HeldTensor, SourceTensor, StoredTensor
from mogle_rt.errors import CheckpointError

PREFIXES = ("base_model.model.", "model.diffusion_model.", "diffusion_model.", "transformer.")
_KINDS = {"lora_A": "A", "lora_down": "A", "lora.down": "A", "lora_B": "B", "lora_up": "B", "lora.up": "B"}
# X.lora_A.weight; X.lora_A.NAME.weight (peft, with the adapter's name); X.lora_down.weight (kohya); X.lora.down.weight
# (old diffusers).
_KEY = re.compile(r"(?P<name>.+)\.(?P<kind>lora_A|lora_B|lora_down|lora_up|lora\.down|lora\.up)(\.[^.]+)?\.weight")
_XLABS = re.compile(
    r"(?P<block>(double|single)_blocks\.\d+)\.processor\.(?P<part>\w+?)_lora(?P<of>[12]?)\.(?P<kind>down|up)\.weight"
)
_XLABS_LAYERS = {
    ("qkv", "1"): "img_attn.qkv",
    ("qkv", "2"): "txt_attn.qkv",
    ("proj", "1"): "img_attn.proj",
    ("proj", "2"): "txt_attn.proj",
    ("qkv", ""): "linear1",  # only its first rows, because XLabs doesn't adapt the MLP of single blocks
    ("proj", ""): "linear2",
}
_TEXT = ("text_encoder", "lora_te")
# Methods other than plain LoRA, by the beginning of their tensors' names.
_OTHERS = {
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "lokr_": "LoKr",
    "hada_": "LoHa",
    "oft_": "OFT",
    "glora_": "GLoRA",
    "diff": "full differences",
}


@dataclass(frozen=True, eq=False)
class LowRank:
    """A low-rank branch of one stored layer: y += x Aᵀ Bᵀ. The scale is included in B.

    Attributes:
        down: A, [R, in]. up: B, [out, R].
    """

    down: Tensor
    up: Tensor


def read_adapter(path: Path, config: TransformerConfig) -> dict[str, LowRank]:
    """Read every low-rank branch of a LoRA, by the stored layer that it belongs to.

    ``path`` is a safetensors file or a folder written by peft. Layers may have diffusers' names or FLUX's own, with the
    prefixes of diffusers, peft or ComfyUI, or be named as by kohya (``lora_unet_…``) or XLabs. The scale is alpha /
    rank, where alpha comes from an ``X.alpha`` tensor, the file's metadata, or ``adapter_config.json`` beside the file.
    Without any of these the scale is 1.

    Raises:
        CheckpointError: a key is none of these, half of a pair is missing, shapes don't match the layer, two scales
            contradict each other, or the adapter is not a LoRA for the transformer.
    """
    file = adapter_file(path)
    tensors, metadata = read_header(file)
    settings = adapter_settings(file, metadata)
    spellings, shapes = _spellings(config), schema.transformer_tensors(config)
    parts: dict[str, dict[str, StoredTensor]] = {}
    for key, info in tensors.items():
        name, kind = _layer_and_kind(key, file)
        if kind in parts.get(name, {}):
            raise CheckpointError(f"{file}: {key!r} is there twice, under two spellings of its name")
        parts.setdefault(name, {})[kind] = StoredTensor(file, info)
    result: dict[str, LowRank] = {}
    for name, pair in parts.items():
        rows = spellings.get(name)
        if rows is None:
            raise CheckpointError(f"{file}: unexpected LoRA of layer {name!r}")
        for layer, branch in _branches(name, pair, rows, config, shapes, settings, file):
            if layer in result:
                raise CheckpointError(f"{file}: layer {layer!r} has two LoRAs, under two spellings of its name")
            result[layer] = branch
    if not result:
        raise CheckpointError(f"{file}: holds no LoRA")
    return result


def read_lora(path: Path, config: TransformerConfig) -> dict[str, SourceTensor]:
    """Read the condition branch's LoRA, with a bundle's names ``X.lora_A.weight`` and ``X.lora_B.weight``.

    Raises:
        CheckpointError: see `read_adapter`; or the LoRA lacks a layer of the branch, or has one that is not in it.
    """
    branches = read_adapter(path, config)
    modules = schema.lora_modules(config)
    for name in branches:
        if name not in modules:
            raise CheckpointError(f"{path}: unexpected LoRA of layer {name!r}")
    for name in modules:
        if name not in branches:
            raise CheckpointError(f"{path}: missing LoRA of layer {name!r}")
    result: dict[str, SourceTensor] = {}
    for name, branch in branches.items():
        result[f"{name}.lora_A.weight"] = HeldTensor(branch.down)
        result[f"{name}.lora_B.weight"] = HeldTensor(branch.up)
    return result


def _layer_and_kind(key: str, file: Path) -> tuple[str, str]:
    """``transformer.X.lora_down.weight`` -> (X, "A")."""
    if key.startswith(_TEXT):
        raise CheckpointError(
            f"{file}: {key!r} adapts a text encoder, which is not supported; train or export the LoRA for the "
            "transformer alone"
        )
    bare = key
    for prefix in PREFIXES:  # peft's prefix comes before the others
        bare = bare.removeprefix(prefix)
    if match := _XLABS.fullmatch(bare):
        layer = _XLABS_LAYERS.get((match["part"], match["of"]))
        if layer is not None:
            return f"{match['block']}.{layer}", "A" if match["kind"] == "down" else "B"
    if bare.endswith(".alpha"):
        return bare.removesuffix(".alpha"), "alpha"
    if match := _KEY.fullmatch(bare):
        return match["name"], _KINDS[match["kind"]]
    leaf = bare.rpartition(".")[2] if not bare.endswith(".weight") else bare.removesuffix(".weight").rpartition(".")[2]
    for mark, method in _OTHERS.items():
        if leaf.startswith(mark):
            raise CheckpointError(f"{file}: {key!r} belongs to {method}; only plain LoRA is supported")
    raise CheckpointError(f"{file}: {key!r} is not a LoRA key (…lora_A.weight, …lora_B.weight or …alpha)")


def _spellings(config: TransformerConfig) -> dict[str, Rows]:
    """Every name that a layer can have in LoRA files, with the stored layers that it corresponds to."""
    layers = [
        name.removesuffix(".weight") for name, shape in schema.transformer_tensors(config).items() if len(shape) == 2
    ]
    named = {layer: Rows((layer,)) for layer in layers} | dict(flux_layers(config))
    with_underscores = {
        f"{prefix}{name.replace('.', '_')}": rows
        for prefix in ("lora_unet_", "lora_transformer_")
        for name, rows in named.items()
    }
    return named | with_underscores


def _branches(
    name: str,
    pair: Mapping[str, StoredTensor],
    rows: Rows,
    config: TransformerConfig,
    shapes: Mapping[str, schema.Shape],
    settings: AdapterSettings,
    file: Path,
) -> list[tuple[str, LowRank]]:
    """The branches of the layer ``name`` of the file, one for each stored layer that it corresponds to."""
    if not {"A", "B"} <= pair.keys():
        raise CheckpointError(f"{file}: layer {name!r} has only a part of its LoRA ({', '.join(pair)})")
    stored_down, stored_up = pair["A"].shape, pair["B"].shape
    if len(stored_down) == 4 and len(stored_up) == 4 and stored_down[2:] == stored_up[2:] == (1, 1):
        stored_down, stored_up = stored_down[:2], stored_up[:2]  # stored as 1 x 1 convolutions
    if not len(stored_down) == len(stored_up) == 2 or stored_down[0] != stored_up[1] or not stored_down[0]:
        raise CheckpointError(f"{file}: LoRA of {name!r}: shapes {list(stored_down)} and {list(stored_up)} don't fit")
    rank, given = stored_down
    outs = [shapes[f"{layer}.weight"][0] for layer in rows.layers]
    if stored_up[0] == 3 * config.width < sum(outs):  # XLabs adapts only q, k and v in single blocks
        outs, layers = outs[:3], rows.layers[:3]
    else:
        layers = rows.layers
    inner = shapes[f"{layers[0]}.weight"][1]
    if given != inner or stored_up[0] != sum(outs):
        raise CheckpointError(
            f"{file}: LoRA of {name!r} goes from {given} to {stored_up[0]} channels, the layer from {inner} to "
            f"{sum(outs)}"
        )
    if rank > RANKS.most:
        raise CheckpointError(f"{file}: LoRA of {name!r} has rank {rank}; at most {RANKS.most:g} is read")
    if "alpha" in pair and math.prod(pair["alpha"].shape) != 1:
        raise CheckpointError(f"{file}: alpha of {name!r} must be one number, has shape {list(pair['alpha'].shape)}")
    # Nothing has been read so far: a header can describe more than there is memory for.
    down, up = pair["A"].load().view(rank, inner), pair["B"].load().view(-1, rank)
    scale = settings.scale(name, rank, pair["alpha"].load().item() if "alpha" in pair else None, file)
    up = up if scale == 1 else (up.double() * scale).to(up.dtype)
    if rows.swapped:
        up = torch.cat(up.chunk(2)[::-1])
    return [(layer, LowRank(down, part)) for layer, part in zip(layers, up.split(outs), strict=True)]
