"""The exceptions. Every message is one line that says what was wrong, with which value, and what would be right."""


class MogleError(Exception):
    """The base class of all errors that mogle_rt raises on purpose."""


class ConfigError(MogleError, ValueError):
    """An option or a model configuration has an unknown name or a value that is out of range."""


class InputError(MogleError, ValueError):
    """An argument of a call is wrong, such as a shape, a count, a size or a missing embedding."""


class MaskError(InputError):
    """A semantic mask can't be read as labels of the 19 classes."""


class CheckpointError(MogleError, ValueError):
    """A checkpoint file is missing, damaged or of another format, or does not fit its configuration."""


class DownloadError(CheckpointError):
    """A file can't be downloaded from the hub: there is no connection, no such file, or no access to it."""


class DeviceError(MogleError, RuntimeError):
    """The requested device or dtype can't be used on this machine."""


class NumericalError(MogleError, ArithmeticError):
    """Latents, embeddings or weights contain NaN or infinity."""


class OutputError(MogleError, OSError):
    """A result can't be written to the requested place."""


class InsufficientMemoryError(MogleError, MemoryError):
    """A job does not fit into the memory that may be used. The message says how much would do."""
