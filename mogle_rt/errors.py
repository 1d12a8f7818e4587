"""The exceptions. Every message is one line that says what was wrong, with which value, and what would be right."""

LONGEST_MESSAGE = 1500  # characters; paths can have a few hundred


def printable(text: str) -> str:
    """A text on one line, without characters that a terminal would obey or that can't be written."""
    line = " ".join(line.strip() for line in text.splitlines())
    return line if line.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)


class MogleError(Exception):
    """Base of every error that mogle_rt raises on purpose.

    A message may repeat what stands in a file, whose author may be anyone. It is therefore always one line of printable
    characters, and a very long one loses its middle.
    """

    def __init__(self, *args: object) -> None:
        super().__init__(*(_message(arg) if isinstance(arg, str) else arg for arg in args))


def _message(text: str) -> str:
    if len(text) > 2 * LONGEST_MESSAGE:  # cut before it is worked on, too
        text = f"{text[:LONGEST_MESSAGE]}{text[-LONGEST_MESSAGE:]}"
    line = printable(text)
    half = LONGEST_MESSAGE // 2
    return line if len(line) <= LONGEST_MESSAGE else f"{line[:half]} … {line[-half:]}"


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


class ClusterError(MogleError, RuntimeError):
    """Ray can't start, there is no cluster where one was named, or it has stopped a job."""


class InsufficientMemoryError(MogleError, MemoryError):
    """A job does not fit into the memory that may be used. The message says how much would do."""
