"""The scale of a LoRA, from the settings that peft writes beside the file and diffusers writes into its header."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mogle_rt.conversion.folders import read_json
from mogle_rt.conversion.hub import PEFT_SETTINGS, PEFT_WEIGHTS
from mogle_rt.errors import CheckpointError
from mogle_rt.values import Range, quoted, real, whole
from mogle_rt.values import read_json as parse_json

FILE_NAMES = (PEFT_WEIGHTS, "pytorch_lora_weights.safetensors")
LONGEST_PATTERN = 500  # the most characters of a regular expression that names layers
MOST_PATTERNS = 10_000
MOST_REPEATS = 2  # in a pattern: what it takes to match grows with the length of a name to this power
MOST_GROUPS = 3
MOST_REPEATING = 20  # patterns with any
ALPHAS, RANKS = Range(-1e6, 1e6), Range(1, 1 << 14)


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
            raw = parse_json(text)
            values = {key.removeprefix("transformer."): value for key, value in raw.items()}
        except (ValueError, AttributeError) as error:
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
        raise CheckpointError(f"{where}: peft_type is {quoted(kind)}; only LORA is supported")
    if values.get("use_dora"):
        raise CheckpointError(f"{where}: the adapter uses DoRA (use_dora); only plain LoRA is supported")
    try:
        alpha, rank = values.get("lora_alpha"), values.get("r")
        return AdapterSettings(
            alpha=None if alpha is None else real(alpha, "lora_alpha", ALPHAS),
            rank=None if rank is None else _rank(rank, "r"),
            alphas={k: real(v, "an alpha", ALPHAS) for k, v in _patterns(values.get("alpha_pattern"))},
            ranks={k: _rank(v, "a rank") for k, v in _patterns(values.get("rank_pattern"))},
            stabilised=bool(values.get("use_rslora")),
            where=where,
        )
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError, re.error) as error:
        raise CheckpointError(f"{where} is damaged: {error}") from None


def _rank(value: Any, what: str) -> int:
    return whole(int(value) if isinstance(value, float) and value.is_integer() else value, what, RANKS)


def _patterns(values: Any) -> Iterator[tuple[str, Any]]:
    """Regular expressions that name layers, compiled as peft does, each with its value.

    Raises:
        ValueError: too many or too long, or one that could take for ever. Python's matcher tries every way of dividing a
            name among the repeats of a pattern; with repeats inside of repeats there are exponentially many.
    """
    patterns = values or {}
    if len(patterns) > MOST_PATTERNS:
        raise ValueError(f"it has more than {MOST_PATTERNS:,} patterns")
    repeating = 0
    for text, value in patterns.items():
        if len(text) > LONGEST_PATTERN:
            raise ValueError(f"a pattern of {len(text)} characters")
        re.compile(text)  # compiled alone first, so that a parenthesis in it can't close the one added below
        bare = re.sub(r"\\.", "x", text)  # without escapes
        outside = re.sub(r"\[\^?\]?[^\]]*\]", "x", bare)  # and without sets of characters
        repeats = len(re.findall(r"[*+{?]", outside))
        repeating += repeats > 0
        if outside.count("(") > MOST_GROUPS:  # each can have several ways to match
            raise ValueError(f"pattern {quoted(text)}: at most {MOST_GROUPS} groups can be in a pattern")
        if repeats > MOST_REPEATS or repeating > MOST_REPEATING or re.search(r"\)[*+{?]", outside):
            raise ValueError(
                f"pattern {quoted(text)}: at most {MOST_REPEATS} repeats (*, +, ?, {{}}) of single characters can be in a "
                f"pattern, and at most {MOST_REPEATING} patterns can have any"
            )
        yield re.compile(rf"(.*\.)?({text})$").pattern, value


def _matched(patterns: Mapping[str, Any], name: str, otherwise: Any) -> Any:
    """The value of the first pattern that matches a layer's name, by the same rule as in peft."""
    for pattern, value in patterns.items():
        if re.match(pattern, name):
            return value
    return otherwise
