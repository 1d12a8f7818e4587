"""Open the weights of judges: models of transformers by a folder or a hub id, networks in single files.

Code that comes with weights is never run: no remote code of transformers, no pickled objects, no TorchScript.
"""

from __future__ import annotations

import logging
import pickle
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mogle_rt.errors import CheckpointError, DownloadError, MogleError
from mogle_rt.masks.files import one_line

TIMEOUT = 10.0  # seconds: of the one question to the hub


def transformers_model(spec: str, kind: str, option: str, *, kinds: tuple[str, ...] = ()) -> tuple[Any, Any]:
    """A model of transformers and what prepares its input.

    Args:
        spec: a folder, or a hub id, which is fetched unless it is in the cache.
        kind: the class of transformers that opens it, such as "CLIPModel".
        option: what the spec was given as, for messages.
        kinds: the model types that will do; empty for any that the class opens.

    Returns:
        The model, in evaluation mode and float32, on the CPU; and its processor, that of PIL where there are several.

    Raises:
        CheckpointError: the folder doesn't hold such a model, or its code would have to be run.
        DownloadError: the hub can't be reached, and the model is not in the cache.
    """
    import transformers

    local = Path(spec).expanduser()
    source = str(local) if local.is_dir() else spec
    if not local.is_dir() and (local.exists() or spec.startswith((".", "/", "~")) or spec.count("/") != 1):
        raise CheckpointError(f"{option} {spec}: no such folder; give a folder of a model, or a hub id like owner/name")

    def opened(**options: Any) -> tuple[Any, Any]:
        options["trust_remote_code"] = False
        config = transformers.AutoConfig.from_pretrained(source, **options)
        if kinds and config.model_type not in kinds:
            raise CheckpointError(f"{option} {spec}: is a {config.model_type} model; needed is {' or '.join(kinds)}")
        model = getattr(transformers, kind).from_pretrained(source, config=config, **options)
        if kind == "CLIPModel":
            return model, transformers.CLIPProcessor(
                transformers.AutoImageProcessor.from_pretrained(source, backend="pil", **options),
                transformers.AutoTokenizer.from_pretrained(source, **options),
            )
        return model, transformers.AutoImageProcessor.from_pretrained(source, backend="pil", **options)

    with _quiet():
        try:
            try:
                model, prepare = opened(local_files_only=True)
            except OSError:
                if local.is_dir():
                    raise
                _reach(spec, option)
                model, prepare = opened()
        except MogleError:
            raise
        except Exception as error:  # a config or weights that don't fit raise nearly any error
            raise CheckpointError(f"{option} {spec}: can't be opened as {kind}: {one_line(error)}") from None
    return model.eval().requires_grad_(False).float(), prepare


def weights_in(path: Path, option: str) -> Mapping[str, Tensor]:
    """The tensors of a file: safetensors, or a state dict that PyTorch saved.

    Raises:
        CheckpointError: there is no such file, it holds something else than tensors, or code.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise CheckpointError(f"{option} {path}: no such file")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with warnings.catch_warnings(action="ignore"):  # that it is TorchScript, which is refused
            weights = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        if "TorchScript" in str(error) or "torch.jit" in str(error):
            raise CheckpointError(
                f"{option} {path}: is TorchScript, which holds code; code of files is not run: give weights alone"
            ) from None
        raise CheckpointError(f"{option} {path}: can't be read as weights: {one_line(error)}") from None
    if not isinstance(weights, Mapping) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise CheckpointError(f"{option} {path}: must hold tensors by name, holds {type(weights).__name__}")
    return weights


def _reach(spec: str, option: str) -> None:
    """Ask the hub once for a model that is not in the cache.

    Raises:
        DownloadError: there is no connection, no such model, or no access to it.
    """
    from huggingface_hub import HfApi

    try:
        HfApi().model_info(spec, timeout=TIMEOUT)
    except Exception as error:  # of the hub's client, and of the library that it connects by
        reason = one_line(error).partition(". ")[0]
        raise DownloadError(
            f"{option} {spec}: is not in the cache, and can't be had from the hub ({reason}); where there is a "
            f"connection, fetch it with hf download {spec} --local-dir FOLDER; then give {option} FOLDER"
        ) from None


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' notes on what it falls back to."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logger.setLevel(level)
