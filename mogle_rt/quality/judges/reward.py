"""ImageReward, which scores an image and its prompt as people would (arXiv 2304.05977), where its package is installed."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from mogle_rt.errors import CheckpointError
from mogle_rt.masks.files import one_line
from mogle_rt.quality import UnmeasurableError
from mogle_rt.quality.pictures import Picture

MODEL, CONFIG = "ImageReward.pt", "med_config.json"
RELEASED = "ImageReward-v1.0"
OPTION = "--reward"


class Reward:
    """ImageReward's own package.

    Args:
        folder: with its files ``ImageReward.pt`` and ``med_config.json``; None has the package fetch them.
        device: to compute on.

    Raises:
        UnmeasurableError: the package isn't installed. CheckpointError: the files are not there, or it can't open them.
    """

    def __init__(self, folder: str | None, device: torch.device) -> None:
        try:
            import ImageReward
        except Exception as error:  # it imports parts of transformers that newer ones lack
            raise UnmeasurableError(
                f"reward needs the package image-reward, which can't be imported ({one_line(error)}); install it with pip "
                "install image-reward, beside a transformers that it works with"
            ) from None
        files: dict[str, str] = {}
        if folder is not None:
            model, config = Path(folder) / MODEL, Path(folder) / CONFIG
            for path in (model, config):
                if not path.is_file():
                    raise CheckpointError(f"{OPTION} {folder}: has no {path.name}; it must hold {MODEL} and {CONFIG}")
            files = {"name": str(model), "med_config": str(config)}
        try:
            with contextlib.redirect_stdout(sys.stderr):  # it reports there what it loads
                self._model = ImageReward.load(**({"name": RELEASED} | files), device=device)
        except Exception as error:  # the hub's errors and PyTorch's
            raise CheckpointError(f"{OPTION}: ImageReward can't be loaded: {one_line(error)}") from None
        self.name = f"ImageReward, {folder or RELEASED}"

    def scores(self, pictures: Sequence[Picture], prompts: Sequence[str]) -> NDArray[np.float64]:
        """One score for each picture and prompt, [n]."""
        with torch.no_grad():
            pairs = zip(pictures, prompts, strict=True)
            return np.array([float(self._model.score(prompt, Image.fromarray(picture))) for picture, prompt in pairs])
