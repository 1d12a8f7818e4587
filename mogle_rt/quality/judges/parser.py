"""Face parsers: segmentation models of transformers, whose classes become the 19 of CelebAMask-HQ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from mogle_rt.errors import InputError, MaskError
from mogle_rt.masks.classes import CLASS_NAMES, Labels
from mogle_rt.masks.orders import ORDERS, class_name
from mogle_rt.quality.judges.loading import transformers_model
from mogle_rt.quality.pictures import Picture
from mogle_rt.values import quoted

DEFAULT = "jonathandinu/face-parsing"
OPTION, CLASSES = "--parser", "--parser-classes"


def class_table(names: Mapping[int, str], given: str | Mapping[str, str] | None) -> NDArray[np.int64]:
    """Which of the 19 classes each class of a parser is: int64 [n].

    Args:
        names: of the parser's classes, by number.
        given: an order's name (see `mogle_rt.masks.ORDERS`), or the name of one of the 19 for each of the parser's names;
            those that it leaves out, and all where it is None, must be named like one of the 19.

    Raises:
        InputError: a class of the parser is none of the 19, or what is given names a class that isn't there.
    """
    if isinstance(given, str):
        if given not in ORDERS or len(ORDERS[given]) != len(names):
            raise InputError(
                f"{CLASSES} must be {', '.join(ORDERS)} or a file, for {len(names)} classes, got {given!r}"
            )
        return np.array([CLASS_NAMES.index(name) for name in ORDERS[given]])
    given = given or {}
    unknown = set(given) - set(names.values())
    if unknown:
        raise InputError(f"{CLASSES} names {quoted(min(unknown))}, which is no class of the parser: {_joined(names)}")
    table, missing = [], []
    for number in range(len(names)):
        name = str(names.get(number, number))
        try:
            table.append(CLASS_NAMES.index(class_name(given.get(name, name))))
        except MaskError:
            if name in given:
                raise InputError(f"{CLASSES}: {quoted(given[name])} is none of {', '.join(CLASS_NAMES)}") from None
            missing.append(name)
    if missing:
        raise InputError(
            f"the parser's classes {', '.join(missing[:5])} are none of the 19 by their names; say with {CLASSES} FILE what "
            f'each is, as {{"{missing[0]}": "skin"}}'
        )
    return np.array(table)


class SegmentationModel:
    """A segmentation model of transformers; see `judges.contract.Parser`.

    Args:
        spec: a folder or a hub id. device: to compute on. classes: see `class_table`.

    Raises:
        CheckpointError, DownloadError: see `transformers_model`. InputError: see `class_table`.
    """

    def __init__(self, spec: str, device: torch.device, classes: str | Mapping[str, str] | None = None) -> None:
        self._model, self._processor = transformers_model(spec, "AutoModelForSemanticSegmentation", OPTION)
        names = {int(number): str(name) for number, name in self._model.config.id2label.items()}
        self._table = class_table(names, classes).astype(np.uint8)
        self._model.to(device)
        self._device = device
        self.name = f"{type(self._model).__name__}, {spec}"

    def labels(self, pictures: Sequence[Picture]) -> list[Labels]:
        """Logits are enlarged to the picture's size before the likeliest class is taken."""
        logits = self._logits(pictures)
        found = []
        for one, picture in zip(logits, pictures, strict=True):
            large = F.interpolate(one[None], picture.shape[:2], mode="bilinear", align_corners=False)
            found.append(self._table[large[0].argmax(0).cpu().numpy()])
        return found

    @torch.no_grad()
    def _logits(self, pictures: Sequence[Picture]) -> Tensor:
        pixels = self._processor(images=list(pictures), return_tensors="pt")["pixel_values"]
        return self._model(pixels.to(self._device)).logits


def _joined(names: Mapping[int, str]) -> str:
    return ", ".join(list(names.values())[:20])
