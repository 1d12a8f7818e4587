"""Read the file of the experts and the gate: the released pickle, or safetensors."""

from __future__ import annotations

import pickle
import warnings
from pathlib import Path

import torch

from mogle_rt.config import MogleConfig
from mogle_rt.conversion.folders import read_safetensors
from mogle_rt.conversion.tensors import HeldTensor, SourceTensor
from mogle_rt.errors import CheckpointError, ConfigError


def read_mogle(path: Path) -> tuple[dict[str, SourceTensor], MogleConfig]:
    """Read experts and gate from the released pickle (with weights_only, so no code in it is run) or from safetensors.

    Returns:
        The tensors, and the configuration that follows from their names and shapes.

    Raises:
        CheckpointError: the file can't be read, would run code, or holds neither experts nor a gate.
    """
    if path.suffix == ".safetensors":
        tensors: dict[str, SourceTensor] = {name: HeldTensor(t.load()) for name, t in read_safetensors(path).items()}
    else:
        tensors = {name: HeldTensor(t) for name, t in _read_pickle(path).items()}
    has_gating = any(n.startswith("gating.") for n in tensors)
    has_expert = any("expert" in n for n in tensors)
    if not (has_gating or has_expert):
        raise CheckpointError(f"{path}: holds neither experts nor a gate")
    dims: dict[str, int] = {}
    for dim, name, axis in (
        ("latent_dim", "global_expert.net.0.weight", 1),
        ("expert_dim", "global_expert.net.0.weight", 0),
        ("latent_dim", "gating.noise_proj.weight", 1),
        ("gate_dim", "gating.gate.0.weight", 0),
    ):
        if name in tensors and len(tensors[name].shape) == 2:
            dims[dim] = tensors[name].shape[axis]
    try:
        return tensors, MogleConfig(has_gating=has_gating, has_expert=has_expert, **dims)
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from None


def _read_pickle(path: Path) -> dict[str, torch.Tensor]:
    """Read a state dict saved by torch.save, without running any code in it."""
    try:
        with warnings.catch_warnings(action="ignore"):  # PyTorch warns of unusual pickle protocols
            state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except pickle.UnpicklingError:
        raise CheckpointError(
            f"{path}: refused: it is damaged, or holds more than tensors and would run code"
        ) from None
    except Exception as error:  # the reader can raise any error when a pickle is damaged
        if isinstance(error, OSError) and error.filename:
            raise CheckpointError(f"{path}: can't be read: {error.strerror}") from None
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path}: not a PyTorch file, damaged or cut short: {reason}") from None
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: must hold a state dict of tensors, holds {type(state).__name__}")
    for name, value in state.items():
        if not isinstance(value, torch.Tensor):
            raise CheckpointError(f"{path}: must hold a state dict of tensors; {name!r} is {type(value).__name__}")
        if value.layout != torch.strided or value.is_meta or value.is_quantized:
            raise CheckpointError(f"{path}: tensor {name!r} must be a dense one that holds its data")
    return {str(name): value for name, value in state.items()}
