"""The files a person holds: diffusers folders, LoRA and MoGLE files, here or on the hub, as uniform lists of tensors."""

from __future__ import annotations

import json
import math
import pickle
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mogle_rt.bundle import schema
from mogle_rt.bundle.container import TensorInfo, read_chunks, read_header
from mogle_rt.config import MogleConfig, TransformerConfig
from mogle_rt.errors import CheckpointError, ConfigError, DownloadError

RELEASED_FLUX = "black-forest-labs/FLUX.1-dev"
RELEASED_LORA = "XavierJiezou/face-mogle-models/pytorch_lora_weights.safetensors"
RELEASED_MOGLE = "XavierJiezou/face-mogle-models/global_local_mask_moe.pt"

FLUX_FOLDERS = ("transformer", "vae", "scheduler", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
WEIGHT_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".sft")
_HUB_NAME = re.compile(r"[\w][\w.-]*/[\w][\w.-]*(/[\w./-]+)?")


@dataclass(frozen=True)
class SourceTensor:
    """A tensor still in its file, or (small ones) in memory."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    path: Path | None = None
    info: TensorInfo | None = None
    value: torch.Tensor | None = None

    def chunks(self) -> Iterator[torch.Tensor]:
        """Its elements in order, flat, a few MB at a time."""
        if self.value is not None:
            yield self.value.reshape(-1)
            return
        assert self.path is not None
        assert self.info is not None
        yield from read_chunks(self.path, self.info, once=True)

    def load(self) -> torch.Tensor:
        """The whole tensor, in memory of its own."""
        parts = [c.clone() for c in self.chunks()]
        return torch.cat(parts).view(self.shape) if parts else torch.empty(self.shape, dtype=self.dtype)

    @classmethod
    def of(cls, value: torch.Tensor) -> SourceTensor:
        """A tensor in memory."""
        return cls(tuple(value.shape), value.dtype, value=value.detach().contiguous())


def find(spec: str | Path, *, default_file: str | None = None) -> Path:
    """A local path, or the files of a hub id (``owner/name``, for one file ``owner/name/file``) fetched or from the cache.

    Args:
        default_file: the file meant when ``spec`` names only a repository; None means the FLUX folders.

    A name is looked up on the hub only if it can't be meant as a path here: see `_is_local`.

    Raises:
        CheckpointError: no such path, and not a hub id.
        DownloadError: offline, refused (gated) or unknown there.
    """
    name = str(spec)
    try:
        path = Path(spec).expanduser()
        path.stat()  # `exists` hides other errors from Python 3.14 on
        return path
    except (FileNotFoundError, NotADirectoryError, ValueError):  # the last: a name with a null character
        pass
    except (OSError, RuntimeError) as error:  # a name too long, a folder that is closed to us, ~ of an unknown user
        raise CheckpointError(f"{name}: can't be read: {error}") from None
    if not _HUB_NAME.fullmatch(name) or name.startswith("."):
        raise CheckpointError(f"{name}: no such file or folder, nor a hub id like {RELEASED_FLUX}")
    if _is_local(name):
        raise CheckpointError(f"{name}: no such file or folder")
    owner, repository, *rest = name.split("/", 2)
    return _download(f"{owner}/{repository}", rest[0] if rest else default_file, name)


def _is_local(name: str) -> bool:
    """Whether a name that fits a hub id's form is meant as a path here, so that a typing error stays on this machine.

    ``folder/file.safetensors`` is one, as no repository's name ends like a file of weights; and so is every name whose
    first part is a folder here.
    """
    first, *others = name.split("/")
    return (len(others) == 1 and Path(name).suffix.lower() in WEIGHT_SUFFIXES) or Path(first).is_dir()


def _download(repository: str, file: str | None, spec: str) -> Path:
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    try:
        if file is not None:
            return Path(hf_hub_download(repository, file))
        patterns = [f"{folder}/*" for folder in FLUX_FOLDERS]
        return Path(snapshot_download(repository, allow_patterns=patterns))
    except GatedRepoError:
        raise DownloadError(
            f"{spec}: access is gated; accept its licence on the model's page and log in with `hf auth login`"
        ) from None
    except RepositoryNotFoundError:
        raise DownloadError(f"{spec}: no such local path, and no such repository on the hub (or no access)") from None
    except (LocalEntryNotFoundError, OfflineModeIsEnabled):
        raise DownloadError(
            f"{spec}: not a local path, and the hub can't be reached; download it elsewhere and pass its path"
        ) from None
    except EntryNotFoundError:
        raise DownloadError(f"{spec}: the repository has no file {file!r}") from None
    except HFValidationError:
        raise CheckpointError(f"{spec}: no such file or folder, nor a hub id like {RELEASED_FLUX}") from None
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DownloadError(f"{spec}: not a local path, and the hub answered: {reason}") from None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        CheckpointError: missing, unreadable or not an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not readable as JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: must hold a JSON object, holds {type(value).__name__}")
    return value


def read_safetensors(path: Path) -> dict[str, SourceTensor]:
    """Every tensor of a safetensors file, unread."""
    tensors, _ = read_header(path)
    return {name: SourceTensor(i.shape, i.dtype, path=path, info=i) for name, i in tensors.items()}


def read_folder(folder: Path) -> dict[str, SourceTensor]:
    """Tensors of a diffusers or transformers folder: one safetensors file, or shards with an index.

    Raises:
        CheckpointError: there is neither, a shard is missing, or the index doesn't fit the shards.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder; a diffusers FLUX folder has {', '.join(FLUX_FOLDERS)}")
    indexes = sorted(folder.glob("*.safetensors.index.json"))
    if not indexes:
        files = [f for f in sorted(folder.glob("*.safetensors")) if ".fp16." not in f.name]
        if len(files) != 1:
            found = "no" if not files else f"{len(files)}"
            raise CheckpointError(f"{folder}: {found} .safetensors files and no index; expected one file or an index")
        return read_safetensors(files[0])
    weight_map = read_json(indexes[0]).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise CheckpointError(f"{indexes[0]}: has no weight_map from tensors to shards")
    shards = {shard: read_safetensors(folder / Path(shard).name) for shard in sorted(set(weight_map.values()))}
    for name, shard in weight_map.items():
        if name not in shards[shard]:
            raise CheckpointError(f"{folder / shard}: missing tensor {name!r}, which the index says is here")
    return {name: shards[shard][name] for name, shard in weight_map.items()}


def read_lora(path: Path, config: TransformerConfig) -> dict[str, SourceTensor]:
    """The branch LoRA with the names ``X.lora_A.weight`` and ``X.lora_B.weight``, its scale multiplied into B.

    Takes keys with or without the prefix ``transformer.`` (or peft's ``base_model.model.``), ``lora_A/lora_B`` or
    ``lora_down/lora_up``, an ``X.alpha`` tensor or diffusers' adapter metadata; scale = alpha / rank, without alpha 1.

    Raises:
        CheckpointError: a key that is none of these, a half of a pair missing, or a rank that doesn't fit.
    """
    tensors, metadata = read_header(path)
    pairs: dict[str, dict[str, torch.Tensor]] = {}
    for key, info in tensors.items():
        name, kind = _lora_key(key, path)
        if kind in pairs.get(name, {}):
            raise CheckpointError(f"{path}: {key!r} is there twice, under two spellings of its name")
        pairs.setdefault(name, {})[kind] = SourceTensor(info.shape, info.dtype, path=path, info=info).load()
    settings = _adapter_settings(metadata, path)
    modules = schema.lora_modules(config)
    result: dict[str, SourceTensor] = {}
    for name, pair in pairs.items():
        if name not in modules:
            raise CheckpointError(f"{path}: unexpected LoRA of layer {name!r}")
        if not {"A", "B"} <= pair.keys():
            raise CheckpointError(f"{path}: layer {name!r} has only a part of its LoRA ({', '.join(pair)})")
        a, b = pair["A"], pair["B"]
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1] or not len(a):
            raise CheckpointError(f"{path}: LoRA of {name!r}: shapes {list(a.shape)} and {list(b.shape)} don't fit")
        if "alpha" in pair and pair["alpha"].numel() != 1:
            raise CheckpointError(
                f"{path}: alpha of {name!r} must be one number, has shape {list(pair['alpha'].shape)}"
            )
        rank = a.shape[0]
        scale = pair["alpha"].item() / rank if "alpha" in pair else settings.scale(name, rank)
        result[f"{name}.lora_A.weight"] = SourceTensor.of(a)
        result[f"{name}.lora_B.weight"] = SourceTensor.of(b if scale == 1 else (b.double() * scale).to(b.dtype))
    for name in modules:
        if name not in pairs:
            raise CheckpointError(f"{path}: missing LoRA of layer {name!r}")
    return result


_LORA_KINDS = {"lora_A": "A", "lora_down": "A", "lora_B": "B", "lora_up": "B"}
_LORA_KEY = re.compile(r"(?P<name>.+)\.(?P<kind>lora_A|lora_B|lora_down|lora_up)(\.default)?\.weight")


def _lora_key(key: str, path: Path) -> tuple[str, str]:
    """``transformer.X.lora_down.weight`` -> (X, "A")."""
    bare = key.removeprefix("base_model.model.").removeprefix("transformer.")
    if bare.endswith(".alpha"):
        return bare.removesuffix(".alpha"), "alpha"
    match = _LORA_KEY.fullmatch(bare)
    if match is None:
        raise CheckpointError(f"{path}: {key!r} is not a LoRA key (…lora_A.weight, …lora_B.weight or …alpha)")
    return match["name"], _LORA_KINDS[match["kind"]]


@dataclass(frozen=True)
class _AdapterSettings:
    """What peft knows of a LoRA's scale: alpha / rank, or alpha / √rank (rank-stabilised), alpha by layer or for all."""

    alpha: float | None = None
    patterns: Mapping[str, float] = field(default_factory=dict)
    stabilised: bool = False

    def scale(self, name: str, rank: int) -> float:
        alpha = float(rank) if self.alpha is None else self.alpha
        for pattern, value in self.patterns.items():
            if re.match(rf"(.*\.)?({pattern})$", name):  # as peft matches them
                alpha = value
                break
        return alpha / (math.sqrt(rank) if self.stabilised else rank)


def _adapter_settings(metadata: Mapping[str, str], path: Path) -> _AdapterSettings:
    """From the metadata that diffusers' save_lora_weights writes; without any, the scale is 1."""
    try:
        raw = json.loads(metadata.get("lora_adapter_metadata", "{}"))
        values = {k.removeprefix("transformer."): v for k, v in raw.items()}
        alpha = values.get("lora_alpha")
        patterns = {re.compile(k).pattern: float(v) for k, v in (values.get("alpha_pattern") or {}).items()}
        return _AdapterSettings(
            None if alpha is None else float(alpha), patterns, stabilised=bool(values.get("use_rslora"))
        )
    except (ValueError, TypeError, AttributeError, RecursionError, re.error) as error:
        raise CheckpointError(f"{path}: its lora_adapter_metadata is damaged: {error}") from None


def read_mogle(path: Path) -> tuple[dict[str, SourceTensor], MogleConfig]:
    """Experts and gate, from the released pickle (never executed: weights_only) or from safetensors.

    Returns:
        The tensors and the configuration that their presence and shapes tell.

    Raises:
        CheckpointError: unreadable, would run code, or without any experts or gate.
    """
    if path.suffix == ".safetensors":
        tensors = {name: SourceTensor.of(t.load()) for name, t in read_safetensors(path).items()}
    else:
        tensors = {name: SourceTensor.of(t) for name, t in _read_pickle(path).items()}
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
    """A state dict saved by torch.save, without running any code in it."""
    try:
        with warnings.catch_warnings(action="ignore"):  # of a pickle's unusual protocol
            state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except pickle.UnpicklingError:
        raise CheckpointError(
            f"{path}: refused: it is damaged, or holds more than tensors and would run code"
        ) from None
    except Exception as error:  # a damaged pickle makes its reader raise anything
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
