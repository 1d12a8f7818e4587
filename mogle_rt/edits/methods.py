"""A pipeline's methods that start from an image: edits by region, inpainting by classes, and image-to-image."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from mogle_rt.calls.results import PipelineOutput
from mogle_rt.edits.images import ImageLike
from mogle_rt.edits.preparation import AreaLike, start_of_edit, start_of_image
from mogle_rt.edits.start import StartImage
from mogle_rt.errors import InputError
from mogle_rt.masks.classes import Labels
from mogle_rt.masks.labels import MaskLike
from mogle_rt.masks.orders import Order

EDIT_STRENGTH, IMAGE_STRENGTH = 1.0, 0.6
NOT_FOR_EDITS = ("height", "width", "start")


class EditMethods:
    """The pipeline's methods that start from an image. Each makes one call of the pipeline."""

    __call__: Callable[..., PipelineOutput]

    def edit(
        self,
        image: ImageLike | Sequence[ImageLike],
        mask_before: MaskLike | Sequence[MaskLike],
        mask_after: MaskLike | Sequence[MaskLike],
        prompt: str | Sequence[str] | None = None,
        strength: float = EDIT_STRENGTH,
        keep: str | Sequence[str] = (),
        regions: str | Sequence[str] = (),
        margin: int | None = None,
        feather: int | None = None,
        *,
        area: AreaLike | Sequence[AreaLike] | None = None,
        mask_order: Order = "celebamask",
        **options: Any,
    ) -> PipelineOutput:
        """Draw anew what a mask's change touches, and keep the rest of the image.

        The region is where the two masks differ, grown by ``margin``. After each step the latents outside of it are set
        back to the image's own, and at the end its pixels are put back. So the result equals the image, pixel by pixel,
        everywhere farther than ``margin`` from a change, and where nothing changes it is the image.

        Args:
            image: an image or a list of images of one size, whose sides are multiples of 16: paths, PIL images, arrays
                [H, W, 3] or tensors [3, H, W], see `mogle_rt.edits.images.to_pixels`.
            mask_before: the mask that belongs to the image. mask_after: the mask of the result. Each is one mask, or
                one for each image, and is resized to the image's size.
            prompt: what the result shows; one text or one for each image.
            strength: how much noise the region starts with, more than 0 and at most 1. At 1 nothing of the image shows
                through within the region. About ``strength`` of the steps are run, as in diffusers.
            keep: names of classes that stay even within the margin, such as "nose" or ["l_eye", "r_eye"]: the pixels
                that are of one of these classes in both masks.
            regions: names of classes that are drawn anew even where the masks agree.
            margin: pixels by which the region is grown on all sides; by default 1/32 of the shorter side, and at least
                8.
            feather: the outermost pixels of the margin, in which the result fades into the image; by default half of
                the margin. 0 is a hard edge.
            area: pixels that are drawn anew besides: an array or tensor [H, W] of the image's size, True or not 0 where
                they are; or a list with one for each image.
            mask_order: what the numbers in both masks mean, see `mogle_rt.masks.to_labels`.
            options: all other arguments of `Pipeline.__call__`, such as ``seed`` or ``num_inference_steps``. The
                image's size is the result's, so height and width are not among them.

        Returns:
            The images. Floating point results ("np" and "pt") are float32; packed latents are those before the pixels
            are put back.

        Raises:
            InputError: an image can't be read, counts or sizes don't match, or an option is out of range.
            MaskError: a mask can't be read.
        """
        start, labels = start_of_edit(
            image,
            mask_before,
            mask_after,
            strength,
            keep=keep,
            regions=regions,
            area=area,
            margin=margin,
            feather=feather,
            mask_order=mask_order,
        )
        return self._from(start, labels, prompt, options)

    def inpaint(
        self,
        image: ImageLike | Sequence[ImageLike],
        mask: MaskLike | Sequence[MaskLike],
        prompt: str | Sequence[str] | None = None,
        regions: str | Sequence[str] = (),
        strength: float = EDIT_STRENGTH,
        **options: Any,
    ) -> PipelineOutput:
        """Draw some classes of a mask anew, such as the hair for another prompt, and keep the rest of the image.

        Args:
            image, mask, prompt, strength: see `edit`. mask: belongs to the image, and to the result too.
            regions: the names of the classes to draw anew, such as "hair" or ["hair", "hat"].
            options: all other arguments of `edit`.

        Raises:
            InputError: see `edit`, or no region is named.
            MaskError: a mask can't be read.
        """
        if not regions:
            raise InputError("inpaint needs the classes to draw anew: regions=['hair'], for example")
        return self.edit(image, mask, mask, prompt, strength, regions=regions, **options)

    def image_to_image(
        self,
        image: ImageLike | Sequence[ImageLike],
        mask: MaskLike | Sequence[MaskLike] | None = None,
        prompt: str | Sequence[str] | None = None,
        strength: float = IMAGE_STRENGTH,
        *,
        mask_order: Order = "celebamask",
        **options: Any,
    ) -> PipelineOutput:
        """Draw all of an image anew, starting from the image with noise.

        Args:
            image: see `edit`.
            mask: the mask of the result: one, or one for each image; None means a mask of background only.
            prompt: what the result shows; one text or one for each image.
            strength: how much noise the run starts with, see `edit`. At 1 the result is that of a call without an image.
            mask_order: what the numbers in the mask mean, see `mogle_rt.masks.to_labels`.
            options: all other arguments of `Pipeline.__call__`, except height and width.

        Raises:
            InputError, MaskError: see `edit`.
        """
        start, labels = start_of_image(image, mask, strength, mask_order=mask_order)
        return self._from(start, labels, prompt, options)

    def _from(
        self, start: StartImage, labels: list[Labels], prompt: str | Sequence[str] | None, options: dict[str, Any]
    ) -> PipelineOutput:
        """Call the pipeline with images to start from."""
        height, width = start.pixels.shape[2:]
        for name in NOT_FOR_EDITS:
            if options.pop(name, None) is not None:
                raise InputError(f"{name} can't be chosen here: the result has the image's size, {width} x {height}")
        return self(labels, prompt, height=height, width=width, start=start, **options)
