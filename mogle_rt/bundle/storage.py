"""How a bundle stores a weight in eight or four bits: the tensors of each format, and the header that says so.

A layer that the header doesn't name is stored plainly, as one matrix of floating point numbers. Layers that the runtime
stacks into one are all stored in the same way, because one product multiplies with them.
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

from mogle_rt.config import Options
from mogle_rt.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    import torch

Kinds: TypeAlias = "dict[str, tuple[torch.dtype, tuple[int, ...]]]"  # what follows a layer's name -> dtype and shape

LARGEST_ROTATION = 256
INT4_GROUP = 64
INT4_RANK = 32


@dataclass(frozen=True, kw_only=True)
class WeightStorage(Options, ABC):
    """How one weight (out, in) is stored. Each format is a subclass; its fields are what the header says of a layer."""

    name: ClassVar[str]

    @abstractmethod
    def kinds(self, shape: tuple[int, int]) -> Kinds:
        """The tensors that take the place of the plain weight.

        Raises:
            ConfigError: the format can't hold a weight of this shape.
        """

    def shape_of(self, stored: tuple[int, ...]) -> tuple[int, int]:
        """(out, in) of the weight whose tensor "weight" has this shape."""
        return stored[0], stored[1]

    def nbytes(self, shape: tuple[int, int]) -> int:
        """Bytes of these tensors."""
        return sum(math.prod(s) * dtype.itemsize for dtype, s in self.kinds(shape).values())


@dataclass(frozen=True, kw_only=True)
class Int8Storage(WeightStorage):
    """Eight bits a number: int8 values times a float32 scale for each row, after a rotation of groups of columns.

    Attributes:
        rotation: columns that are rotated together by the regular Hadamard matrix of this size: a power of 4 that
            divides the columns. 1 is no rotation.
    """

    name = "int8"
    rotation: int = 1

    def __post_init__(self) -> None:
        _require_whole(self, "rotation")
        if self.rotation not in (1, 4, 16, 64, LARGEST_ROTATION):
            raise ConfigError(f"int8: rotation must be 1, 4, 16, 64 or {LARGEST_ROTATION}, got {self.rotation}")

    def kinds(self, shape: tuple[int, int]) -> Kinds:
        """See `WeightStorage.kinds`."""
        _require_divides("int8", "rotation", self.rotation, shape)
        import torch

        return {"weight": (torch.int8, shape), "weight_scale": (torch.float32, shape[:1])}

    @classmethod
    def of(cls, shape: tuple[int, int]) -> Int8Storage:
        """With the largest rotation that divides the columns."""
        return cls(rotation=next(size for size in (LARGEST_ROTATION, 64, 16, 4, 1) if shape[1] % size == 0))


@dataclass(frozen=True, kw_only=True)
class Fp8Storage(WeightStorage):
    """Eight bits a number: float8_e4m3 values times a float32 scale for each row."""

    name = "fp8"

    def kinds(self, shape: tuple[int, int]) -> Kinds:
        """See `WeightStorage.kinds`."""
        import torch

        return {"weight": (torch.float8_e4m3fn, shape), "weight_scale": (torch.float32, shape[:1])}

    @classmethod
    def of(cls, shape: tuple[int, int]) -> Fp8Storage:
        """Every shape is stored alike."""
        return cls()


@dataclass(frozen=True, kw_only=True)
class Int4Storage(WeightStorage):
    """Four bits a number and a low-rank part: integers from -8 to 7 times a bfloat16 scale for each group of a row's
    columns, plus up @ down in bfloat16.

    Two neighbouring columns share a byte: the first stands in the lower four bits, and 8 is added to each.

    Attributes:
        group: columns that share a scale; an even number that divides the columns.
        rank: of the low-rank part, 0 for none.
    """

    name = "int4"
    group: int = INT4_GROUP
    rank: int = INT4_RANK

    def __post_init__(self) -> None:
        _require_whole(self, "group", "rank")
        if self.group < 2 or self.group % 2:
            raise ConfigError(f"int4: group must be an even number from 2, got {self.group}")
        if self.rank < 0:
            raise ConfigError(f"int4: rank must be 0 or more, got {self.rank}")

    def kinds(self, shape: tuple[int, int]) -> Kinds:
        """See `WeightStorage.kinds`."""
        _require_divides("int4", "group", self.group, shape)
        out, inner = shape
        import torch

        kinds: Kinds = {
            "weight": (torch.uint8, (out, inner // 2)),
            "weight_scale": (torch.bfloat16, (out, inner // self.group)),
        }
        if self.rank:
            kinds |= {
                "weight_down": (torch.bfloat16, (self.rank, inner)),
                "weight_up": (torch.bfloat16, (out, self.rank)),
            }
        return kinds

    def shape_of(self, stored: tuple[int, ...]) -> tuple[int, int]:
        """See `WeightStorage.shape_of`."""
        return stored[0], 2 * stored[1]

    @classmethod
    def of(cls, shape: tuple[int, int]) -> Int4Storage:
        """Groups have 64 columns, or the next smaller power of two that divides the row. The rank is 32, or a quarter of
        the smaller side if that is less."""
        group = next((size for size in (INT4_GROUP, 32, 16, 8, 4, 2) if shape[1] % size == 0), None)
        if group is None:
            raise ConfigError(f"int4 needs an even number of columns, got a weight of shape {list(shape)}")
        return cls(group=group, rank=min(INT4_RANK, min(shape) // 4))


STORAGES: dict[str, type[Int8Storage] | type[Fp8Storage] | type[Int4Storage]] = {
    storage.name: storage for storage in (Int8Storage, Fp8Storage, Int4Storage)
}


def storage_named(name: str) -> type[Int8Storage] | type[Fp8Storage] | type[Int4Storage]:
    """The storage of this name.

    Raises:
        ConfigError: there is none.
    """
    if name not in STORAGES:
        raise ConfigError(f"weights must be one of {', '.join(STORAGES)}, got {name!r}")
    return STORAGES[name]


def written(storages: Mapping[str, WeightStorage]) -> str:
    """The header's text: JSON of how each layer is stored; "" where all are plain."""
    if not storages:
        return ""
    layers = {layer: {"format": storage.name} | storage.to_dict() for layer, storage in storages.items()}
    return json.dumps(layers, sort_keys=True)


def parse(text: str, *, what: str) -> dict[str, WeightStorage]:
    """The inverse of `written`.

    Raises:
        CheckpointError: not JSON of this form, an unknown format, or a value that the format refuses.
    """
    try:
        raw: Any = json.loads(text) if text else {}
        if not isinstance(raw, dict):
            raise TypeError("not an object")
        return {layer: _parse_layer(layer, entry) for layer, entry in raw.items()}
    except (ValueError, TypeError, RecursionError) as error:
        reason = str(error) if isinstance(error, ConfigError) else f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{what}: the header of weight formats is damaged: {reason}") from None


def _parse_layer(layer: str, entry: Any) -> WeightStorage:
    if not isinstance(entry, dict) or not isinstance(entry.get("format"), str):
        raise ConfigError(f"layer {layer!r} names no format")
    name, fields = entry["format"], {key: value for key, value in entry.items() if key != "format"}
    if name not in STORAGES:
        raise ConfigError(f"layer {layer!r} is stored in the format {name!r}; this version reads {', '.join(STORAGES)}")
    try:
        return STORAGES[name].from_mapping(fields, what=name)
    except ConfigError as error:
        raise ConfigError(f"layer {layer!r}: {error}") from None


def stored_shapes(
    plain: Mapping[str, tuple[int, ...]], storages: Mapping[str, WeightStorage]
) -> tuple[dict[str, tuple[int, ...]], dict[str, torch.dtype]]:
    """Names and shapes of a part whose layers are stored so, from those of plain layers; and the dtypes that are fixed.

    Raises:
        ConfigError: a layer can't be stored so.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    dtypes: dict[str, torch.dtype] = {}
    for name, shape in plain.items():
        layer, _, kind = name.rpartition(".")
        if kind != "weight" or layer not in storages:
            shapes[name] = shape
            continue
        try:
            kinds = storages[layer].kinds((shape[0], shape[1]))
        except ConfigError as error:
            raise ConfigError(f"layer {layer!r}: {error}") from None
        for of, (dtype, stored) in kinds.items():
            shapes[f"{layer}.{of}"], dtypes[f"{layer}.{of}"] = stored, dtype
    return shapes, dtypes


def check_stacks(storages: Mapping[str, WeightStorage], stacks: Iterable[tuple[str, ...]]) -> None:
    """Check that only layers of blocks are stored so, and those of a stack all alike.

    Raises:
        ConfigError: names the layer.
    """
    rest = set(storages)
    for stack in stacks:
        rest -= set(stack)
        kinds = {repr(storages.get(layer)) for layer in stack}
        if len(kinds) > 1:
            raise ConfigError(f"layers {', '.join(stack)} must be stored in one format: they are multiplied as one")
    if rest:
        raise ConfigError(f"layer {min(rest)!r} can't be stored in a weight format: it is no linear layer of a block")


def _require_whole(owner: WeightStorage, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        if not isinstance(value, int) or isinstance(value, bool):
            raise ConfigError(f"{owner.name}: {name} must be a whole number, got {value!r}")


def _require_divides(what: str, name: str, size: int, shape: tuple[int, int]) -> None:
    if shape[1] % size:
        raise ConfigError(f"{what}: {name} {size} doesn't divide the weight's {shape[1]} columns")
