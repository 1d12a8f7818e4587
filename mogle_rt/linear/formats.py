"""The table of weight formats. A new format is one more row; tests and plug-ins may add rows at run time."""

from __future__ import annotations

from mogle_rt.bundle.source import TensorSource
from mogle_rt.errors import ConfigError
from mogle_rt.linear.contract import WeightFormat
from mogle_rt.linear.packed import PackedWeight
from mogle_rt.linear.plain import PlainWeight
from mogle_rt.linear.quantised.base import QuantisedWeight
from mogle_rt.linear.quantised.eight_bits import Fp8Weight, Int8Weight
from mogle_rt.linear.quantised.four_bits import Int4Weight

FORMATS: dict[str, type[WeightFormat]] = {
    PlainWeight.name: PlainWeight,
    PackedWeight.name: PackedWeight,
    Int8Weight.name: Int8Weight,
    Fp8Weight.name: Fp8Weight,
    Int4Weight.name: Int4Weight,
}


def format_named(name: str) -> type[WeightFormat]:
    """The format of this name.

    Raises:
        ConfigError: there is no such format.
    """
    if name not in FORMATS:
        raise ConfigError(f"the weight format must be one of {', '.join(FORMATS)}, got {name!r}")
    return FORMATS[name]


def choose_format(asked: str | None, source: TensorSource) -> str:
    """The name of the format of weights that are stored plainly: the one that is asked for, by default "packed".

    Layers that a format can't hold are plain. Neither the machine's memory nor how much of it is free plays a part:
    formats round differently, and a seed gives the same bytes in every run. Weights that are stored in eight or four bits
    are held as they are stored, whatever is chosen.

    Raises:
        ConfigError: there is no such format, or no layer is stored in it, because loading quantises nothing.
    """
    if asked is None:
        return PackedWeight.name
    stored = {storage.name for storage in source.storages.values()}
    if issubclass(format_named(asked), QuantisedWeight) and asked not in stored:
        raise ConfigError(
            f"no weight of this bundle is stored in {asked}, and loading quantises nothing; make such a bundle with "
            f"`mogle-rt quantize --weights {asked}`"
        )
    return asked
