"""The scale of a LoRA: what peft and diffusers say of it beside the file or in its header."""

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
LONGEST_PATTERN = 500  # characters of a regular expression that names layers


def adapter_file(path: Path) -> Path:
    """The file of weights of an adapter that is given as a file or as peft's folder.

    Raises:
        CheckpointError: a folder without one.
    """
    if not path.is_dir():
        return path
    for name in FILE_NAMES:
        if (path / name).is_file():
            return path / name
    raise CheckpointError(f"{path}: holds no adapter; expected {' or '.join(FILE_NAMES)} in it")


@dataclass(frozen=True)
class AdapterSettings:
    """What peft knows of a LoRA's scale: alpha / rank, or alpha / √rank where it is rank-stabilised.

    Attributes:
        alpha: of all layers that no pattern names; None if nothing is said, and the scale is then 1.
        alphas, ranks: of layers that a regular expression names. rank: of all others.
        stabilised: peft's ``use_rslora``.
        where: the file that says so, for messages.
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
            rank: what the tensors have. own_alpha: of a tensor ``X.alpha`` in the file.

        Raises:
            CheckpointError: the settings speak of another rank or another alpha than the file.
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
    """From the file's header, as diffusers writes it, or from ``adapter_config.json`` beside the file, as peft does.

    Raises:
        CheckpointError: damaged, of an adapter that is no plain LoRA, or both are there and differ.
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
        raise CheckpointError(f"{where}: peft_type is {kind!r}; only LORA is read")
    if values.get("use_dora"):
        raise CheckpointError(f"{where}: the adapter uses DoRA (use_dora), which is not read; only plain LoRA is")
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
    re.compile(text)  # by itself: parentheses that close ours are refused
    return re.compile(rf"(.*\.)?({text})$").pattern


def _matched(patterns: Mapping[str, Any], name: str, otherwise: Any) -> Any:
    """The value of the first pattern that names a layer, as peft matches them."""
    for pattern, value in patterns.items():
        if re.match(pattern, name):
            return value
    return otherwise
