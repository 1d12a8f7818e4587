"""Other networks that see features in images, or faces: any image model of transformers, and faces' networks as ONNX."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mogle_rt.engines.onnxruntime_import import import_onnxruntime
from mogle_rt.errors import CheckpointError
from mogle_rt.installed import install_command
from mogle_rt.masks.files import one_line
from mogle_rt.quality.judges.loading import transformers_model
from mogle_rt.quality.pictures import Picture, resized

FACE_SIDE = 112  # pixels, of the networks that came after ArcFace


class VisionModel:
    """An image model of transformers, such as DINOv2; see `judges.contract.FeatureJudge`.

    Its features are what the model pools, or else the first token's state.

    Args:
        spec: a folder or a hub id. device: to compute on. option: what the spec was given as.

    Raises:
        CheckpointError, DownloadError: see `transformers_model`.
    """

    def __init__(self, spec: str, device: torch.device, option: str) -> None:
        self._model, self._processor = transformers_model(spec, "AutoModel", option)
        if hasattr(self._model, "vision_model"):  # of a model of images and texts, its half for images
            self._model = self._model.vision_model
        self._model.to(device)
        self._device = device
        self.name = f"{type(self._model).__name__}, {spec}"

    def features(self, pictures: Sequence[Picture]) -> Tensor:
        seen = self._run(pictures)
        pooled = getattr(seen, "pooler_output", None)
        return (seen.last_hidden_state[:, 0] if pooled is None else pooled.flatten(1)).cpu()

    def maps(self, pictures: Sequence[Picture]) -> list[Tensor]:
        states = self._run(pictures).last_hidden_state
        return [(states if states.dim() == 4 else states.transpose(1, 2)).cpu()]

    @torch.no_grad()
    def _run(self, pictures: Sequence[Picture]) -> Any:
        pixels = self._processor(images=list(pictures), return_tensors="pt")["pixel_values"]
        return self._model(pixels.to(self._device))


class FaceModel:
    """A network for faces as an ONNX file, such as ArcFace's: pictures -> embeddings of length 1.

    Faces are taken as they lie in the picture, without alignment, RGB from -1 to 1.

    Args:
        path: of the file, with one input [n, 3, side, side].

    Raises:
        CheckpointError: it can't be opened, or has other inputs.
    """

    def __init__(self, path: Path, option: str) -> None:
        try:
            onnxruntime = import_onnxruntime()
        except ImportError:
            raise CheckpointError(
                f"{option} {path}: needs onnxruntime; install it with {install_command('export')}"
            ) from None
        try:
            self._session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime has its own errors for each kind of damage
            raise CheckpointError(f"{option} {path}: can't be opened as ONNX: {one_line(error)}") from None
        inputs = self._session.get_inputs()
        shape = inputs[0].shape
        shapes = [i.shape for i in inputs]
        if len(inputs) != 1 or len(shape) != 4 or shape[1] != 3:
            raise CheckpointError(f"{option} {path}: must have one input [n, 3, side, side], has {shapes}")
        self._input, self._one = inputs[0].name, shape[0] == 1
        self._side = shape[2] if isinstance(shape[2], int) else FACE_SIDE
        self.name = f"faces, {path.name}"

    def features(self, pictures: Sequence[Picture]) -> Tensor:
        """Float32 [n, F] of length 1."""
        x = np.stack([resized(picture, self._side, self._side) for picture in pictures]).transpose(0, 3, 1, 2)
        x = x / np.float32(127.5) - np.float32(1)
        parts = np.split(x, len(x)) if self._one else [x]
        seen = [self._session.run(None, {self._input: part})[0].reshape(len(part), -1) for part in parts]
        return F.normalize(torch.from_numpy(np.concatenate(seen)), dim=1)
