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
from contextlib import ExitStack, contextmanager
from typing import Any

from mogle_rt.start.stand_ins import StandIn, few_distributions

# Packages that diffusers and transformers use only if they are installed. None of them is needed for drawing.
OPTIONAL = (
    "accelerate", "peft", "scipy", "sklearn", "pandas", "torchvision", "torchaudio", "librosa", "onnxruntime",
    "gguf", "jinja2",
)  # fmt: skip
COMPILER = "torch._dynamo"
SHAPES = "torch.fx.experimental.symbolic_shapes"  # imports all of sympy
CONDITIONS = (
    "expect_true",
    "guard_or_false",
    "guard_or_true",
    "guard_size_oblivious",
)  # its functions that return a plain condition as it is
TEXT_MODELS = {
    "CLIPTextModel": "transformers.models.clip.modeling_clip",
    "CLIPTextConfig": "transformers.models.clip.configuration_clip",
    "CLIPTokenizer": "transformers.models.clip.tokenization_clip",
    "T5EncoderModel": "transformers.models.t5.modeling_t5",
    "T5Config": "transformers.models.t5.configuration_t5",
    "T5Tokenizer": "transformers.models.t5.tokenization_t5",
}
# Names that diffusers imports from transformers for what isn't done here.
UNUSED = {"PreTrainedModel": "transformers.modeling_utils", "AutoImageProcessor": None}


def import_models(*, text: bool = True) -> None:
    """Import the classes of diffusers and transformers that a pipeline needs.

    Args:
        text: whether text encoders are needed. Without them nearly nothing of transformers is imported.

    This does nothing if one of the libraries or the compiler is imported already. If a version of the libraries can't
    be imported in this way, the attempt is undone, and they are imported later in the ordinary way.
    """
    if any(name in sys.modules for name in (COMPILER, "diffusers", "transformers")):
        return
    import torch

    before = set(sys.modules)
    try:
        with ExitStack() as stack:
            for context in (
                _hidden(OPTIONAL),
                few_distributions(),
                without_compiler(torch),
                _without_distribution(torch),
            ):
                stack.enter_context(context)
            StandIn(SHAPES, {name: _of_plain_values(name) for name in (*CONDITIONS, "sym_eq", "is_nested_int")})
            unused = UNUSED if text else dict.fromkeys(UNUSED)
            transformers = StandIn("transformers", TEXT_MODELS | unused, version="transformers")
            StandIn("transformers.models", {})
            stack.enter_context(_not_twice(transformers))
            diffusers = importlib.import_module("diffusers")
            importlib.import_module("diffusers.models")
            for folder in ("autoencoders", "transformers", "unets"):
                StandIn(f"diffusers.models.{folder}", {})
            for name in ("AutoencoderKL", "FlowMatchEulerDiscreteScheduler"):
                getattr(diffusers, name)
            importlib.import_module("diffusers.image_processor")
            for name in TEXT_MODELS if text else ():
                getattr(transformers, name)
            transformers.forget(UNUSED)
    except Exception:
        for name in set(sys.modules) - before:
            if name.partition(".")[0] in ("diffusers", "transformers") or isinstance(sys.modules[name], StandIn):
                del sys.modules[name]


def _of_plain_values(name: str) -> Callable[..., Any]:
    """A function of PyTorch's symbolic shapes that needs none of them where all is plain, as where nothing is compiled.

    Those of `CONDITIONS` return a plain condition as it is, and ``sym_eq`` compares numbers or shapes.
    """

    def function(value: Any, *others: Any, **options: Any) -> Any:
        if name in CONDITIONS and type(value) is bool:
            return value
        if name == "sym_eq" and all(type(n) is int for both in (value, *others) for n in _numbers(both)):
            return _numbers(value) == _numbers(*others)
        if name == "is_nested_int" and type(value) is int:
            return False
        stand_in = sys.modules[SHAPES]
        if isinstance(stand_in, StandIn):
            stand_in.load()
        return getattr(sys.modules[SHAPES], name)(value, *others, **options)

    return function


def _numbers(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


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
def without_compiler(torch: Any) -> Iterator[None]:
    """Replace the compiler meanwhile by a module whose decorators do nothing. Its submodules are the real ones.

    PyTorch marks some of its own functions for the compiler when they are first called, as those that count operations; so
    whoever compiles nothing may call them in here, and is spared the import of the compiler. If that is imported already,
    nothing is changed.

    Args:
        torch: the module.
    """
    spec = importlib.machinery.PathFinder.find_spec(COMPILER, torch.__path__)
    if COMPILER in sys.modules or spec is None or spec.submodule_search_locations is None:
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


@contextmanager
def _not_twice(transformers: StandIn) -> Iterator[None]:
    """A module of transformers' imports all of it a second time, under its own name, to look up classes in it later."""
    utils: Any = importlib.import_module("transformers.utils")
    again = utils.direct_transformers_import
    utils.direct_transformers_import = lambda *_, **__: transformers
    try:
        yield
    finally:
        utils.direct_transformers_import = again
