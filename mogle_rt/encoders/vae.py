"""The VAE: loading diffusers' autoencoder, and packing its latents into tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mogle_rt.bundle.components import component
from mogle_rt.bundle.schema import Shape, check_names
from mogle_rt.config import VAE_SCALE
from mogle_rt.encoders.group_norm import exact_norms
from mogle_rt.errors import CheckpointError, ConfigError, printable
from mogle_rt.torch_api.settings import NoInitialValues

# The most pixels that a GPU encodes or decodes at once, in several pictures or in one. These numbers don't depend on how
# much memory is free: other numbers of pictures are rounded otherwise, and a plan changes no image.
ENCODE_PIXELS = 512 * 512
DECODE_PIXELS = 1024 * 1024


def pictures_at_once(device: torch.device, pixels: int, most: int) -> int:
    """How many pictures of so many pixels the VAE works on at once. most: `ENCODE_PIXELS` or `DECODE_PIXELS`."""
    # A CPU is faster with one picture at a time, because the activations then stay in its caches.
    return 1 if device.type == "cpu" else max(1, most // pixels)


def pack_latents(z: Tensor) -> Tensor:
    """FLUX's 2x2 packing: [B, C, h, w] -> [B, h/2 * w/2, 4 C], by channel, then row, then column within the cell."""
    B, C, h, w = z.shape
    return z.view(B, C, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(B, h // 2 * (w // 2), C * 4)


def unpack_latents(latents: Tensor, height: int, width: int) -> Tensor:
    """Undo the packing, for an image of height x width pixels: [B, N, 4 C] -> [B, C, height / 8, width / 8]."""
    B, _, C4 = latents.shape
    h, w = height // VAE_SCALE // 2, width // VAE_SCALE // 2
    cells = latents.view(B, h, w, C4 // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return cells.reshape(B, C4 // 4, h * 2, w * 2)


def autoencoder(config: Mapping[str, Any]) -> Any:
    """Make diffusers' AutoencoderKL from a configuration, on the meta device, where its weights take no memory.

    Raises:
        CheckpointError: the configuration does not describe an AutoencoderKL that scales by 8.
    """
    from diffusers import AutoencoderKL

    try:
        with torch.device("meta"), NoInitialValues():
            vae = AutoencoderKL.from_config(component("vae", config))
    except ConfigError as error:
        raise CheckpointError(str(error)) from None
    except Exception as error:  # diffusers passes on any error of its layers
        raise CheckpointError(f"vae: not a valid AutoencoderKL configuration: {one_line_reason(error)}") from None
    if len(vae.config.block_out_channels) != 4:
        raise CheckpointError(f"vae: must scale by 8 (four blocks), has {len(vae.config.block_out_channels)} blocks")
    if vae.config.shift_factor is None:  # as diffusers takes it where nothing is said
        raise CheckpointError("vae: shift_factor must be a number, got none")
    return vae


def vae_dtype(config: Mapping[str, Any], dtype: torch.dtype) -> torch.dtype:
    """The dtype in which the VAE computes when the pipeline computes in ``dtype``.

    ``force_upcast`` in a VAE's configuration says that its activations are too large for float16, so float32 is used
    instead. It is true by default in diffusers, and true in FLUX's configuration.
    """
    upcast = dtype == torch.float16 and config.get("force_upcast", True)
    return torch.float32 if upcast else dtype


def one_line_reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {printable(str(error)[:600])}"


def tensor_shapes(module: torch.nn.Module) -> dict[str, Shape]:
    """The names and shapes of a module's tensors."""
    return {name: tuple(value.shape) for name, value in module.state_dict().items()}


def load_autoencoder(vae: Any, tensors: Mapping[str, torch.Tensor], where: str) -> Any:
    """Give a VAE on the meta device its weights, so that it can encode and decode.

    Args:
        vae: from `autoencoder`; it is changed in place.
        tensors: the weights, by name.
        where: the file that the tensors come from, for error messages.

    Raises:
        CheckpointError: a tensor is missing or unknown, or has the wrong shape.
    """
    expected = {name: tuple(p.shape) for name, p in vae.named_parameters()}
    check_names({name: tuple(t.shape) for name, t in tensors.items()}, expected, where)
    set_weights(vae, tensors)
    for module in vae.modules():
        if isinstance(module, torch.nn.SiLU):
            module.inplace = True  # nothing else reads the norm's output, so this saves a large tensor
    exact_norms(vae)
    return vae.eval()


def set_weights(vae: Any, tensors: Mapping[str, torch.Tensor]) -> None:
    """Exchange a VAE's weights for others of the same shapes. On the meta device, they take no memory.

    This takes a fraction of the time of `load_state_dict`, which would be a tenth of all loading.
    """
    for prefix, module in vae.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                value = tensors[f"{prefix}.{name}"]
                module._parameters[name] = torch.nn.Parameter(value, requires_grad=False)


VAE_TILE = 512  # pixels of a side of a tile


def set_tile(vae: Any, tile: int) -> None:
    """Let a VAE work on overlapping tiles of so many pixels a side, in images that are larger; 0 for whole images."""
    vae.use_tiling = bool(tile)
    if tile:
        vae.tile_sample_min_size, vae.tile_latent_min_size = tile, tile // VAE_SCALE
