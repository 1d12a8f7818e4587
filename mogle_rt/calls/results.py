"""What a call of the pipeline returns, and what it reports about itself."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from diffusers.utils import BaseOutput
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

OutputType = Literal["pil", "np", "pt", "latent"]


@dataclass
class PipelineOutput(BaseOutput):  # type: ignore[misc]
    """``images``: a list of PIL images, or an array [B, H, W, 3] or tensor [B, 3, H, W] in [0, 1], or packed latents."""

    images: list[Image.Image] | NDArray[np.float32] | Tensor


@dataclass
class RunReport:
    """What the last call did.

    ``execution``: how steps were run, "cuda graph" or "eager: …" with the reason. ``weights``: the formats in which the
    steps' weights were held, which round differently, such as "packed 1.2 GB, plain 0.1 GB". ``seconds``: wall-clock
    time by stage (text, mask, prepare, denoise, decode).
    """

    batch_size: int = 0
    steps: int = 0
    interrupted: bool = False
    execution: str = ""
    weights: str = ""
    seconds: dict[str, float] = field(default_factory=dict)
