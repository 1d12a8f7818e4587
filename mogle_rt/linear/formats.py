"""The table of weight formats. A new format is one more row; tests and plug-ins may add rows at run time."""

from __future__ import annotations

from mogle_rt.errors import ConfigError
from mogle_rt.linear.contract import WeightFormat
from mogle_rt.linear.packed import PackedWeight
from mogle_rt.linear.plain import PlainWeight
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
