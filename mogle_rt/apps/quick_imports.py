"""Import the models of diffusers and transformers quickly, without packages that they import but don't use here.

diffusers and transformers import PyTorch's compiler, its distributed tensors, peft, accelerate and scipy, and these
import other libraries, only to mark functions for `torch.compile` or to check whether a package is installed. That is
most of the time before the first image. The command line compiles and distributes nothing, so it hides these packages
while it imports the two libraries. Other programs that import `mogle_rt` are not affected, as they may need them.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

# Packages that diffusers and transformers use only if they are installed. None of them is needed for drawing.
OPTIONAL = ("accelerate", "peft", "scipy", "sklearn", "pandas", "torchvision", "torchaudio", "librosa", "onnxruntime")
COMPILER = "torch._dynamo"


def import_models() -> None:
    """Import the classes of diffusers and transformers that a pipeline needs.

    This does nothing if one of the libraries or the compiler is imported already. If a version of the libraries can't
    be imported in this way, the attempt is undone, and they are imported later in the ordinary way.
    """
    if any(name in sys.modules for name in (COMPILER, "diffusers", "transformers")):
        return
    import torch

    before = set(sys.modules)
    try:
        with _hidden(OPTIONAL), _without_compiler(torch), _without_distribution(torch):
            diffusers = importlib.import_module("diffusers")
            for name in ("AutoencoderKL", "FlowMatchEulerDiscreteScheduler"):
                getattr(diffusers, name)
            importlib.import_module("diffusers.image_processor")
            transformers = importlib.import_module("transformers")
            for name in (
                "CLIPTextModel",
                "CLIPTextConfig",
                "CLIPTokenizer",
                "T5EncoderModel",
                "T5Config",
                "T5Tokenizer",
            ):
                getattr(transformers, name)
    except Exception:
        for name in set(sys.modules) - before:
            if name.partition(".")[0] in ("diffusers", "transformers"):
                del sys.modules[name]


@contextmanager
def _hidden(names: tuple[str, ...]) -> Iterator[None]:
    """Make importing these packages fail meanwhile, as if they were not installed, unless they are imported already."""
    hidden = [name for name in names if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]  # None makes the import of a module fail
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]


@contextmanager
def _without_compiler(torch: Any) -> Iterator[None]:
    """Replace the compiler meanwhile by a module whose decorators do nothing. Its submodules are the real ones."""
    spec = importlib.machinery.PathFinder.find_spec(COMPILER, torch.__path__)
    if spec is None or spec.submodule_search_locations is None:
        yield
        return
    stand_in: Any = types.ModuleType(COMPILER)
    stand_in.__path__ = list(spec.submodule_search_locations)
    stand_in.__spec__ = spec
    stand_in.__getattr__ = _unmarked
    sys.modules[COMPILER] = stand_in
    before = set(sys.modules)
    try:
        yield
    finally:
        del sys.modules[COMPILER]
        vars(torch).pop("_dynamo", None)
        for name in set(sys.modules) - before:
            if name.startswith(f"{COMPILER}."):
                del sys.modules[name]  # if the real compiler is imported later, it imports them again


def _unmarked(name: str) -> Callable[..., Any]:
    """Stand in for any decorator of the compiler, with or without arguments. It changes nothing."""
    if name.startswith("__"):
        raise AttributeError(name)

    def mark(function: Any = None, *_: Any, **__: Any) -> Any:
        return function if callable(function) else mark

    return mark


@contextmanager
def _without_distribution(torch: Any) -> Iterator[None]:
    """Say that PyTorch can't distribute tensors; otherwise transformers imports everything that this needs."""
    available = torch.distributed.is_available
    torch.distributed.is_available = lambda: False
    try:
        yield
    finally:
        torch.distributed.is_available = available
