"""The scale of a LoRA, from the settings that peft writes beside the file and diffusers writes into its header."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mogle_rt.conversion.folders import read_json
from mogle_rt.conversion.hub import PEFT_SETTINGS, PEFT_WEIGHTS
from mogle_rt.errors import CheckpointError

FILE_NAMES = (PEFT_WEIGHTS, "pytorch_lora_weights.safetensors")
LONGEST_PATTERN = 500  # the most characters of a regular expression that names layers


def adapter_file(path: Path) -> Path:
    """The weights file of an adapter, which is given as a file or as a folder written by peft.

    Raises:
        CheckpointError: the folder holds no adapter.
    """
    if not path.is_dir():
        return path
    for name in FILE_NAMES:
        if (path / name).is_file():
            return path / name
    raise CheckpointError(f"{path}: holds no adapter; expected {' or '.join(FILE_NAMES)} in it")


@dataclass(frozen=True)
class AdapterSettings:
    """peft's settings for a LoRA's scale, which is alpha / rank, or alpha / √rank if the LoRA is rank-stabilised.

    Attributes:
        alpha: the alpha of all layers that no pattern in ``alphas`` matches; None if it is not set, and the scale is
            then 1.
        rank: the rank of all layers that no pattern in ``ranks`` matches; None if it is not set.
        alphas, ranks: alphas and ranks by a regular expression that matches the names of layers.
        stabilised: peft's ``use_rslora``.
        where: the file that holds these settings, for error messages.
    """

    alpha: float | None = None
    rank: int | None = None
    alphas: Mapping[str, float] = field(default_factory=dict)
    ranks: Mapping[str, int] = field(default_factory=dict)
    stabilised: bool = False
    where: str = ""

    def scale(self, name: str, rank: int, own_alpha: float | None, file: Path) -> float:
        """The factor of a layer's branch.

        Args:
            name: the layer's name.
            rank: the rank of the tensors in the file.
            own_alpha: the value of the tensor ``X.alpha`` in the file, or None if there is none.
            file: the LoRA's file, for error messages.

        Raises:
            CheckpointError: the settings contradict the file's rank or alpha, or the scale is not finite.
        """
        expected = _matched(self.ranks, name, self.rank)
        if expected is not None and expected != rank:
            raise CheckpointError(f"{file}: LoRA of {name!r} has rank {rank}, {self.where} says {expected}")
        alpha = _matched(self.alphas, name, self.alpha)
        if own_alpha is not None:
            if alpha is not None and alpha != own_alpha:
                raise CheckpointError(f"{file}: alpha of {name!r} is {own_alpha:g}, {self.where} says {alpha:g}")
            alpha = own_alpha
        if alpha is None:
            return 1.0
        scale = alpha / (math.sqrt(rank) if self.stabilised else rank)
        if not math.isfinite(scale):
            raise CheckpointError(f"{file}: the scale of {name!r} is {scale}; alpha must be a finite number")
        return scale


def adapter_settings(file: Path, metadata: Mapping[str, str]) -> AdapterSettings:
    """Read the settings from the file's header (diffusers) or from ``adapter_config.json`` beside the file (peft).

    Raises:
        CheckpointError: the settings are damaged, the adapter is not a plain LoRA, or both places exist and differ.
    """
    found: list[AdapterSettings] = []
    text = metadata.get("lora_adapter_metadata")
    if text is not None:
        where = f"{file}: its lora_adapter_metadata"
        try:
            raw = json.loads(text)
            values = {key.removeprefix("transformer."): value for key, value in raw.items()}
        except (ValueError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"{where} is damaged: {error}") from None
        found.append(_parsed(values, where))
    beside = file.parent / PEFT_SETTINGS
    if beside.is_file() and file.name in FILE_NAMES:
        found.append(_parsed(read_json(beside), str(beside)))
    if len(found) == 2 and _said(found[0]) != _said(found[1]):
        raise CheckpointError(f"{found[0].where} and {found[1].where} contradict each other; remove the wrong one")
    return found[0] if found else AdapterSettings()


def _said(settings: AdapterSettings) -> tuple[Any, ...]:
    return settings.alpha, settings.rank, dict(settings.alphas), dict(settings.ranks), settings.stabilised


def _parsed(values: Mapping[str, Any], where: str) -> AdapterSettings:
    kind = values.get("peft_type", "LORA")
    if kind != "LORA":
        raise CheckpointError(f"{where}: peft_type is {kind!r}; only LORA is supported")
    if values.get("use_dora"):
        raise CheckpointError(f"{where}: the adapter uses DoRA (use_dora); only plain LoRA is supported")
    try:
        alpha, rank = values.get("lora_alpha"), values.get("r")
        return AdapterSettings(
            alpha=None if alpha is None else float(alpha),
            rank=None if rank is None else _whole(rank),
            alphas={_pattern(k): float(v) for k, v in (values.get("alpha_pattern") or {}).items()},
            ranks={_pattern(k): _whole(v) for k, v in (values.get("rank_pattern") or {}).items()},
            stabilised=bool(values.get("use_rslora")),
            where=where,
        )
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError, re.error) as error:
        raise CheckpointError(f"{where} is damaged: {error}") from None


def _whole(value: Any) -> int:
    if isinstance(value, bool) or int(value) != value:
        raise ValueError(f"a rank must be a whole number, got {value!r}")
    return int(value)


def _pattern(text: str) -> str:
    if len(text) > LONGEST_PATTERN:
        raise ValueError(f"a pattern of {len(text)} characters")
    re.compile(text)  # compiled alone first, so that a parenthesis in it can't close the one added below
    return re.compile(rf"(.*\.)?({text})$").pattern


def _matched(patterns: Mapping[str, Any], name: str, otherwise: Any) -> Any:
    """The value of the first pattern that matches a layer's name, by the same rule as in peft."""
    for pattern, value in patterns.items():
        if re.match(pattern, name):
            return value
    return otherwise
