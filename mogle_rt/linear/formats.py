"""The table of weight formats. A new format is one more row; tests and plug-ins may add rows at run time."""

from __future__ import annotations

from mogle_rt.errors import ConfigError
from mogle_rt.linear.contract import WeightFormat
from mogle_rt.linear.packed import PackedWeight
from mogle_rt.linear.plain import PlainWeight

FORMATS: dict[str, type[WeightFormat]] = {
    PlainWeight.name: PlainWeight,
    PackedWeight.name: PackedWeight,
}


def format_named(name: str) -> type[WeightFormat]:
    """The format of this name.

    Raises:
        ConfigError: there is no such format.
    """
    if name not in FORMATS:
        raise ConfigError(f"the weight format must be one of {', '.join(FORMATS)}, got {name!r}")
    return FORMATS[name]
