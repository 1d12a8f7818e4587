"""Imports for a program that draws and ends: the libraries' models without what they bring along and never use here.

diffusers and transformers import PyTorch's compiler, its distributed tensors, peft, accelerate and scipy, and each of
them the libraries below it, only to mark functions for `torch.compile` or to look whether a package is there. That is
most of the time before a first image. The command line compiles and distributes nothing, so it imports the two with
these hidden. A program of the user's that imports `mogle_rt` is left alone, as it may want what is hidden here.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

# Packages that diffusers and transformers use only if they are there. None of them has a part in drawing.
OPTIONAL = ("accelerate", "peft", "scipy", "sklearn", "pandas", "torchvision", "torchaudio", "librosa", "onnxruntime")
COMPILER = "torch._dynamo"


def import_models() -> None:
    """Import the classes that a pipeline needs of diffusers and transformers. What is imported already stays as it is.

    Where a version of these libraries can't be imported in this way, nothing is left of the attempt, and they are
    imported later in the ordinary way.
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
    """These packages can't be found meanwhile, as if they were not installed; those that are imported already stay."""
    hidden = [name for name in names if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]  # None: the import system's word for "not there"
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]


@contextmanager
def _without_compiler(torch: Any) -> Iterator[None]:
    """A module in the compiler's place that marks no functions. Its submodules are the real ones."""
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
                del sys.modules[name]  # the real compiler, if it is imported later, brings its own


def _unmarked(name: str) -> Callable[..., Any]:
    """A decorator of the compiler's, with or without arguments, that changes nothing."""
    if name.startswith("__"):
        raise AttributeError(name)

    def mark(function: Any = None, *_: Any, **__: Any) -> Any:
        return function if callable(function) else mark

    return mark


@contextmanager
def _without_distribution(torch: Any) -> Iterator[None]:
    """transformers asks whether this PyTorch can distribute tensors, and if so imports all of it."""
    available = torch.distributed.is_available
    torch.distributed.is_available = lambda: False
    try:
        yield
    finally:
        torch.distributed.is_available = available
