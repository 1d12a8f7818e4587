"""The images that a process draws, one batch after another, beside other processes that may work in the same folder.

`Work` says which images, and `draw_images` draws a batch of them.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mogle_rt.errors import OutputError
from mogle_rt.jobs.image_files import MASK, settings_of
from mogle_rt.jobs.plan import Drawing, Existing, batches
from mogle_rt.jobs.record import JobRecord
from mogle_rt.jobs.settings_read import mask_text
from mogle_rt.masks.labels import to_labels

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from mogle_rt.masks.labels import MaskLike
    from mogle_rt.pipeline import Pipeline

# Options of a call that the settings in an image hold already, some of them under another name.
IN_SETTINGS = {"num_inference_steps", "guidance_scale", "condition_scale", "height", "width", "mask_order"}


class Work:
    """Batches of images that no other process draws.

    Args:
        drawings: what is to be drawn.
        batch_size, alike: see `batches`.
        existing: what happens where an image is there meanwhile. Processes share the work if it is "skip".
        record: of the folder; None where one process alone is expected.
        share: whether images may be left to other processes; otherwise it is an error if one draws the same.

    Attributes:
        left: how many images were left to other processes.
    """

    def __init__(
        self,
        drawings: Sequence[Drawing],
        batch_size: int,
        alike: Callable[[Drawing], Hashable],
        record: JobRecord | None,
        existing: Existing,
        *,
        share: bool,
    ) -> None:
        self._drawings, self._batch_size, self._alike = drawings, batch_size, alike
        self._record, self._existing, self._share = record, existing, share
        self.left = 0

    def __iter__(self) -> Iterator[list[Drawing]]:
        """Batches in their order. At the end come images that another process had taken and did not draw.

        Raises:
            OutputError: another process draws the same images, and the work is not shared.
        """
        later: list[Drawing] = []
        for last in (False, True):
            waiting = later if last else self._drawings
            later = [] if last else later
            for batch in batches(waiting, self._batch_size, self._alike):
                mine = []
                for drawing in batch:
                    taken = self._take(drawing)
                    if taken:
                        mine.append(drawing)
                    elif last or taken is None:
                        self.left += 1
                    else:
                        later.append(drawing)
                try:
                    if mine:
                        yield mine
                finally:
                    for drawing in mine:
                        if self._record is not None:
                            self._record.release(drawing)

    def _take(self, drawing: Drawing) -> bool | None:
        """Whether this process draws an image. False: another process is drawing it. None: it is there already."""
        if self._record is None:
            return True
        claimed = self._record.claim(drawing)
        there = self._existing != "replace" and drawing.path.exists()  # since the job was planned
        if claimed and not there:
            return True
        if claimed:
            self._record.release(drawing)
        if not self._share:
            raise OutputError(
                f"{drawing.path}: another process draws it at the same time; choose another name, or share the work with "
                "--skip-existing or --shard"
            )
        return None if there else False


def draw_images(
    pipe: Pipeline,
    batch: Sequence[Drawing],
    masks: Sequence[MaskLike],
    call: Mapping[str, Any],
    *,
    embeddings: Mapping[str, tuple[Tensor, Tensor]] | None = None,
    metadata: bool = True,
) -> list[tuple[Image.Image, dict[str, Any] | None]]:
    """Draw one batch.

    Args:
        batch: images that have the same options.
        masks: one for each image; or none, if the images have no masks.
        call: arguments of the call that the whole job shares. The images' own options come before them.
        embeddings: T5's [T, J] and CLIP's [P] by prompt, where the text encoders are not to be used.
        metadata: whether the settings are wanted.

    Returns:
        Each image, and the settings to write into its file, if they are wanted.
    """
    import torch

    from mogle_rt.config import PATCH
    from mogle_rt.memory.threads import suitable_threads

    call = {**call, **dict(batch[0].options)}
    transformer, side = pipe.bundle.config.transformer, pipe.bundle.default_size
    tokens = (call["height"] or side) // PATCH * ((call["width"] or side) // PATCH)
    rows = len(batch) * (2 * tokens + pipe.bundle.default_text_tokens)
    prompts: dict[str, Any] = {"prompt": [drawing.prompt for drawing in batch]}
    if embeddings is not None:
        sequence, pooled = (torch.stack(x) for x in zip(*(embeddings[d.prompt] for d in batch), strict=True))
        prompts = {"prompt_embeds": sequence, "pooled_prompt_embeds": pooled}
    with suitable_threads(rows, transformer.width, pipe.device):
        images = pipe(
            list(masks) or None,
            **prompts,
            # The generators are on the CPU, so that a seed gives the same noise on every device.
            generator=[torch.Generator("cpu").manual_seed(drawing.seed) for drawing in batch],
            **call,
        ).images
    results: list[tuple[Image.Image, dict[str, Any] | None]] = []
    for place, (drawing, image) in enumerate(zip(batch, images, strict=True)):
        described = settings_of(
            pipe,
            image.size,
            prompt=drawing.prompt,
            seed=drawing.seed,
            mask=drawing.mask.name if drawing.mask else None,
            num_inference_steps=call["num_inference_steps"],
            guidance_scale=call["guidance_scale"],
            condition_scale=call["condition_scale"],
        )
        described |= {name: value for name, value in drawing.options if name not in IN_SETTINGS}
        if masks and metadata:
            described[MASK] = mask_text(to_labels(masks[place], order=call["mask_order"]))
        results.append((image, described if metadata else None))
    return results
