"""What a new process does for `test_turns`. It imports little at first, so that it can import the libraries quickly."""

from __future__ import annotations

import pickle
from typing import TYPE_CHECKING

from mogle_rt.start.quick_imports import import_models

if TYPE_CHECKING:
    from torch import Tensor

    from mogle_rt import Pipeline


def draw(pipe: Pipeline) -> Tensor:
    """A small image, always the same."""
    images: Tensor = pipe(None, "a hat", 2, height=32, width=32, seed=0, output_type="pt").images  # type: ignore[assignment]
    return images


def draw_into(pickled: bytes, path: str) -> None:
    """Unpickle a pipeline and write what it draws."""
    import_models()
    import torch

    torch.save(draw(pickle.loads(pickled)), path)
