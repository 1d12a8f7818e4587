"""Read the file of the experts and the gate: the released pickle, or safetensors."""

from __future__ import annotations

import pickle
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mogle_rt.config import MogleConfig
from mogle_rt.conversion.folders import read_safetensors
from mogle_rt.conversion.tensors import HeldTensor, SourceTensor
from mogle_rt.errors import CheckpointError, ConfigError
from mogle_rt.values import quoted


def read_mogle(path: Path) -> tuple[dict[str, SourceTensor], MogleConfig]:
    """Read experts and gate from the released pickle (with weights_only, so no code in it is run) or from safetensors.

    Returns:
        The tensors, and the configuration that follows from their names and shapes.

    Raises:
        CheckpointError: the file can't be read, would run code, or holds neither experts nor a gate.
    """
    if path.is_dir():
        raise CheckpointError(f"{path}: is a folder; name the file of the experts and the gate in it")
    if path.suffix == ".safetensors":
        tensors: dict[str, SourceTensor] = dict(read_safetensors(path))
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
        _check_archive(path)
        with warnings.catch_warnings(action="ignore"):  # PyTorch warns of unusual pickle protocols
            state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except CheckpointError:
        raise
    except pickle.UnpicklingError:
        raise CheckpointError(
            f"{path}: refused: it is damaged, or holds more than tensors and would run code"
        ) from None
    except Exception as error:  # the reader can raise any error when a pickle is damaged
        if isinstance(error, OSError) and error.filename:
            raise CheckpointError(f"{path}: can't be read: {error.strerror}") from None
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{path}: not a PyTorch file, damaged or cut short: {reason}") from None
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: must hold a state dict of tensors, holds {type(state).__name__}")
    for name, value in state.items():
        if not isinstance(value, torch.Tensor):
            name = quoted(name)
            raise CheckpointError(f"{path}: must hold a state dict of tensors; {name} is {type(value).__name__}")
        if value.layout != torch.strided or value.is_meta or value.is_quantized or value.is_nested:
            raise CheckpointError(f"{path}: tensor {quoted(name)} must be a dense one that holds its data")
    _check_sizes(state, path)
    return {str(name): value.detach().resolve_conj().resolve_neg() for name, value in state.items()}


def _check_archive(path: Path) -> None:
    """Refuse a compressed archive: a few kilobytes of it can become gigabytes. PyTorch itself never compresses.

    Raises:
        CheckpointError: an entry is compressed, or the archive is damaged.
    """
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            if entry.compress_type != zipfile.ZIP_STORED or entry.file_size > path.stat().st_size:
                raise CheckpointError(f"{path}: {quoted(entry.filename)} in it is compressed, which PyTorch never does")


def _check_sizes(state: Mapping[Any, torch.Tensor], path: Path) -> None:
    """A pickle can describe tensors of gigabytes by a few numbers that they repeat; all tensors must be in the file.

    Raises:
        CheckpointError: together they hold more than the file does.
    """
    stored = path.stat().st_size
    held = sum(value.numel() * value.element_size() for value in state.values())
    if held > stored:
        raise CheckpointError(f"{path}: its tensors would take {held:,} bytes, but the file has only {stored:,}")
