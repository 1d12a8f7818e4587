"""What commands share: the console, options, running a program, and reporting errors in one line."""

from __future__ import annotations

import json
import logging
import signal
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console

from mogle_rt.errors import ConfigError, MogleError, printable

console = Console(stderr=True, highlight=False, emoji=False)
HELP_OPTIONS = {"help_option_names": ["-h", "--help"]}

FACE, OUTPUT, MODEL = "What is drawn", "Files", "How it is computed"  # the groups of options on a help page

# Options that several commands have.
MaskOrder = Annotated[
    str,
    typer.Option(
        help="What a label map's numbers mean: celebamask, bisenet, farl, or class names separated by commas.",
        rich_help_panel=FACE,
    ),
]
Steps = Annotated[int, typer.Option(help="Denoising steps.", rich_help_panel=FACE)]
Guidance = Annotated[float, typer.Option(help="Guidance scale.", rich_help_panel=FACE)]
ConditionScale = Annotated[
    float, typer.Option(help="Strength of the mask; 1 is as trained, 0 is none.", rich_help_panel=FACE)
]
Pixels = Annotated[
    int | None,
    typer.Option(help="Pixels, a multiple of 16; default: from the mask's aspect ratio.", rich_help_panel=FACE),
]
Metadata = Annotated[
    bool,
    typer.Option(help="Write prompt, seed, settings and the mask's file name into the images.", rich_help_panel=OUTPUT),
]
Kernels = Annotated[
    str | None,
    typer.Option(
        help="Operations that compute a step: triton or torch; default: what suits the device.", rich_help_panel=MODEL
    ),
]
Switches = Annotated[str | None, typer.Option(help="The reference's switches as JSON.", rich_help_panel=MODEL)]
Device = Annotated[
    str | None, typer.Option(help="cpu, cuda, cuda:N or mps; default: the best available.", rich_help_panel=MODEL)
]
Dtype = Annotated[
    str | None,
    typer.Option(help="bf16, fp16 or fp32; default: one that is fast on the device.", rich_help_panel=MODEL),
]
WhichEngine = Annotated[
    str, typer.Option(help="torch, or for an export: onnxruntime, tensorrt, tensorrt-rtx.", rich_help_panel=MODEL)
]
EnginePath = Annotated[
    Path | None, typer.Option(help="The export's folder; default: the bundle's folder.", rich_help_panel=MODEL)
]
MaxMemory = Annotated[
    str | None,
    typer.Option(
        help="The most memory to use on the device, such as 8GB; weights that don't fit are streamed. Default: what is "
        "free.",
        rich_help_panel=MODEL,
    ),
]


def run_app(program: typer.Typer) -> None:
    """Run a program. An error becomes one line on stderr and a non-zero exit code, never a traceback."""
    signal.signal(signal.SIGTERM, _terminate)
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup has it ignored
        signal.signal(signal.SIGHUP, _terminate)  # the terminal was closed
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _warn  # type: ignore[assignment]
            program()
    except MogleError as error:
        _fail(str(error))
    except OSError as error:
        _fail(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    except MemoryError:
        _fail("not enough memory; try a smaller size or batch")
    except ImportError as error:
        if "map segment" not in str(error) and "allocate memory" not in str(error):
            raise
        _fail(f"not enough memory to load the libraries ({error})")
    except RuntimeError as error:
        if "DefaultCPUAllocator" in str(error):
            _fail("not enough memory; try a smaller size or batch")
        if type(error).__name__ != "OutOfMemoryError":
            raise
        _fail(f"not enough GPU memory; try a smaller size or batch, or --device cpu ({str(error).splitlines()[0]})")


def parse_json(text: str | None) -> dict[str, Any] | None:
    """The value of --model-config as a dictionary; None stays None.

    Raises:
        ConfigError: the text is not a JSON object.
    """
    if text is None:
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise ConfigError(f"--model-config must be a JSON object like '{{\"add_cond_attn\": true}}', got {text[:80]!r}")
    return value


def say(line: str) -> None:
    """Print a line for the user on standard error."""
    console.print(line, markup=False, soft_wrap=True)


def tell_details() -> None:
    """Let the package's own log messages, such as the plan of what is held in memory, show on standard error."""
    details = logging.getLogger("mogle_rt")
    details.setLevel(logging.INFO)
    details.addHandler(logging.StreamHandler())
    details.propagate = False


def must_exist(path: Path, error: type[MogleError]) -> None:
    """Check that a file exists. Its contents are checked later, when the libraries are loaded.

    Raises:
        error: it doesn't exist.
    """
    try:
        path.stat()  # not `exists`, which hides the error of too long a name from Python 3.14 on
    except (FileNotFoundError, NotADirectoryError):
        raise error(f"{path}: no such file") from None


def format_bytes(count: float) -> str:
    """A readable number of bytes, such as ``1.3 MB``. The units are powers of 1000."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.1f} {unit}" if unit != "B" else f"{count:.0f} B"
        count /= 1000
    return f"{count:.1f} GB"


def _terminate(signum: int, frame: object) -> NoReturn:
    """Exit by an exception, so that half-written files are removed on the way."""
    raise SystemExit(128 + signum)


def _warn(message: Warning | str, *_: object) -> None:
    """A warning in one line, without the place in the code."""
    console.print(f"warning: {printable(str(message))}", markup=False, soft_wrap=True)


def _fail(message: str) -> NoReturn:
    console.print(f"error: {printable(message)}", markup=False, soft_wrap=True)
    sys.exit(1)
