"""The result of a pipeline's call, and the report on how it ran."""

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
    """The images of a call.

    ``images``, by ``output_type``: "pil" is a list of PIL images, "np" an array [B, H, W, 3] in [0, 1], "pt" a tensor
    [B, 3, H, W] in [0, 1], and "latent" a tensor of packed latents [B, N, 64].
    """

    images: list[Image.Image] | NDArray[np.float32] | Tensor


@dataclass
class RunReport:
    """A report on the last call.

    ``steps``: of the schedule, from the first that was run; ``computed_steps``: those in which the model was computed;
    ``condition_steps``: those of them that computed the condition too. In a fast mode there are fewer of both.
    ``execution``: how steps were run, "cuda graph" or "eager: …" with the reason. ``weights``: the formats and sizes of
    the weights that the steps used, such as "packed 1.2 GB, plain 0.1 GB"; formats differ in their rounding.
    ``seconds``: wall-clock time of each stage (text, mask, prepare, denoise, decode).
    """

    batch_size: int = 0
    steps: int = 0
    computed_steps: int = 0
    condition_steps: int = 0
    interrupted: bool = False
    execution: str = ""
    weights: str = ""
    seconds: dict[str, float] = field(default_factory=dict)
