"""What can go wrong, as types. Every message is one line: what was wrong, with which value, what would be right."""


class MogleError(Exception):
    """Base of every error that mogle_rt raises on purpose."""


class ConfigError(MogleError, ValueError):
    """An option or a model configuration has an unknown name or a value out of range."""


class InputError(MogleError, ValueError):
    """An argument of a call is wrong: a shape, a count, a size, a missing embedding."""


class MaskError(InputError):
    """A semantic mask can't be read as labels of the 19 classes."""


class CheckpointError(MogleError, ValueError):
    """A checkpoint file is missing, damaged, of another format, or doesn't fit its configuration."""


class DownloadError(CheckpointError):
    """A file could not be had from the hub: offline, unknown, or access not granted."""


class DeviceError(MogleError, RuntimeError):
    """The device or dtype asked for can't be used on this machine."""


class NumericalError(MogleError, ArithmeticError):
    """Latents or weights hold NaN or infinity."""


class OutputError(MogleError, OSError):
    """A result can't be written where it was asked for."""
