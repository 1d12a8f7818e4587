"""Load the text encoders of the transformers library from a bundle."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from mogle_rt.bundle.components import check_layers, component
from mogle_rt.bundle.schema import Shape, check_names
from mogle_rt.encoders.vae import one_line_reason, tensor_shapes
from mogle_rt.errors import CheckpointError, ConfigError
from mogle_rt.torch_api.settings import NoInitialValues
from mogle_rt.values import quoted

_LOADING = threading.RLock()


@contextlib.contextmanager
def loading() -> Iterator[None]:
    """Let one thread at a time use transformers' loaders, and silence them, since the bundle has been checked already.

    While transformers loads a model, it replaces functions of PyTorch and of its own classes, and the default dtype,
    for the whole process. Afterwards it restores what it found. Two loads at once would restore each other's
    replacements, and every model that is loaded later would be broken. The library's verbosity is also a setting of the
    process.
    """
    from transformers.utils import logging

    with _LOADING:
        verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        try:
            yield
        finally:
            logging.set_verbosity(verbosity)
            if bars:
                logging.enable_progress_bar()


def _text_classes(part: str) -> tuple[Any, Any]:
    import transformers

    if part == "text_encoder":
        return transformers.CLIPTextModel, transformers.CLIPTextConfig
    return transformers.T5EncoderModel, transformers.T5Config


def _text_config(part: str, config: Mapping[str, Any], tensors: int | None = None) -> Any:
    model_type = config.get("model_type")
    wanted = ("clip_text_model", "clip") if part == "text_encoder" else ("t5",)
    if model_type not in wanted:
        raise CheckpointError(f"{part}: model_type must be {wanted[0]!r}, got {quoted(model_type)}")
    try:
        known = component(part, config)
        if tensors is not None:
            check_layers(part, known, tensors)
        return _text_classes(part)[1].from_dict(known)
    except ConfigError as error:
        raise CheckpointError(str(error)) from None


def text_encoder_shapes(part: str, config: Mapping[str, Any], found: Mapping[str, object]) -> dict[str, Shape]:
    """The names and shapes of a text encoder's tensors, with names spelled as in ``found``.

    CLIP's published files say ``text_model.X`` where newer versions of transformers say ``X``. T5's tied embedding
    counts once.

    Raises:
        CheckpointError: the configuration does not describe such an encoder.
    """
    try:
        with loading(), torch.device("meta"), NoInitialValues():
            model = _text_classes(part)[0](_text_config(part, config, len(found)))
    except CheckpointError:
        raise
    except Exception as error:  # transformers passes on any error of its checks and layers
        raise CheckpointError(f"{part}: not a valid configuration: {one_line_reason(error)}") from None
    shapes = tensor_shapes(model)
    if "shared.weight" in shapes:
        shapes.pop("encoder.embed_tokens.weight", None)
    if any(name.startswith("text_model.") for name in found):
        shapes = {f"text_model.{name.removeprefix('text_model.')}": shape for name, shape in shapes.items()}
    return shapes


def load_text_encoder(part: str, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> Any:
    """Load CLIP's encoder (``text_encoder``) or T5's (``text_encoder_2``) with its weights.

    Raises:
        CheckpointError: the configuration is not valid, or the tensors don't match it.
    """

    expected = text_encoder_shapes(part, config, tensors)
    check_names({name: tuple(t.shape) for name, t in tensors.items()}, expected, part)
    model_class, _ = _text_classes(part)
    dtype = next(iter(tensors.values())).dtype
    try:
        # All weights come from the file. Drawing random ones first would take time, and import PyTorch's compiler.
        with loading(), NoInitialValues():
            model, report = model_class.from_pretrained(
                None,
                config=_text_config(part, config, len(tensors)),
                state_dict=dict(tensors),
                dtype=dtype,
                output_loading_info=True,
            )
    except CheckpointError:
        raise
    except Exception as error:  # transformers passes on any error of its checks and layers
        raise CheckpointError(f"{part}: can't be made from its configuration: {one_line_reason(error)}") from None
    wrong = sorted(map(str, {*report["missing_keys"], *report["unexpected_keys"], *report["mismatched_keys"]}))
    if wrong:
        raise CheckpointError(f"{part}: tensors don't fit the configuration: {', '.join(wrong[:3])}")
    return model.eval().requires_grad_(False)


def empty_t5(config: Mapping[str, Any], dtype: torch.dtype) -> Any:
    """T5's encoder on the meta device, with each parameter in the dtype that `load_text_encoder` gives it.

    Raises:
        CheckpointError: the configuration is not valid.
    """
    model_class, _ = _text_classes("text_encoder_2")
    try:
        with loading(), torch.device("meta"), NoInitialValues():
            model = model_class(_text_config("text_encoder_2", config)).to(dtype)
    except CheckpointError:
        raise
    except Exception as error:  # transformers passes on any error of its checks and layers
        raise CheckpointError(
            f"text_encoder_2: can't be made from its configuration: {one_line_reason(error)}"
        ) from None
    if dtype == torch.float16:
        for name, module in model.named_modules():
            if name.rpartition(".")[2] in (model_class._keep_in_fp32_modules or ()):
                module.to(torch.float32)
    return model.eval().requires_grad_(False)
