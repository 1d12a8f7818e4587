"""Draws every case in every way, and measures each image beside the exact one."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mogle_rt.fast.settings import FastConfig
from mogle_rt.masks.classes import Labels
from mogle_rt.masks.labels import resize, to_labels
from mogle_rt.masks.sizes import default_size
from mogle_rt.memory.threads import suitable_threads
from mogle_rt.quality.calibration.cases import Case
from mogle_rt.quality.calibration.results import Drawn, Results
from mogle_rt.quality.calibration.ways import EXACT, computed
from mogle_rt.quality.drift import latents_error, psnr, ssim
from mogle_rt.quality.judges.contract import Parser
from mogle_rt.quality.pictures import Picture
from mogle_rt.quality.regions import Overlap

if TYPE_CHECKING:
    from mogle_rt.pipeline import Pipeline


class Bar(Protocol):
    """What tells how far the work is, as tqdm's."""

    def update(self, n: float) -> object: ...


def work_left(results: Results, cases: Sequence[Case], ways: Sequence[FastConfig], steps: int) -> int:
    """How many steps are to be computed until every image is there, with an exact one beside those of each case."""
    left = 0
    for case in cases:
        todo = [way for way in ways if not results.has(case, way)]
        if todo or not results.has(case, EXACT):
            left += sum(computed(way, steps) for way in (EXACT, *todo))
    return left


@dataclass(frozen=True)
class _Image:
    """An image as it was drawn: packed latents on the CPU, float32 [1, N, C]; its picture; what it took."""

    latents: Tensor
    picture: Image.Image
    seconds: float
    computed: int
    condition: int


class Calibration:
    """Draws with one pipeline.

    Args:
        pipe: its ``fast`` is set to each way in turn.
        results: where images and measures go.
        call: arguments of the pipeline's call that all cases share: ``num_inference_steps`` and the like.
        mask_order: of the masks' labels, see `mogle_rt.masks.to_labels`.
        judge: measures the mask consistency; None leaves it out.
        with_ssim: whether to measure the structural similarity, which needs torchmetrics.
    """

    def __init__(
        self,
        pipe: Pipeline,
        results: Results,
        call: Mapping[str, Any],
        mask_order: Any,
        judge: Parser | None,
        *,
        with_ssim: bool,
    ) -> None:
        self._pipe, self._results, self._call, self._order = pipe, results, dict(call), mask_order
        self._judge, self._with_ssim = judge, with_ssim
        self._warm = False

    def run(self, cases: Sequence[Case], ways: Sequence[FastConfig], bar: Bar) -> None:
        """Draw what is not there yet, case by case, so that a busy time of the machine meets all ways alike.

        An exact image that is there is drawn again, to know what it takes at this time.

        Args:
            bar: gets the number of steps that each image took.
        """
        for case in cases:
            todo = [way for way in ways if not self._results.has(case, way)]
            new = not self._results.has(case, EXACT)
            if not todo and not new:
                continue
            labels = None if case.mask is None else to_labels(case.mask, order=self._order)
            if not self._warm:  # the first call loads and prepares what later ones find ready
                self._draw(case, labels, EXACT, num_inference_steps=1)
                self._warm = True
            exact = self._draw(case, labels, EXACT)
            bar.update(exact.computed)
            if new:
                self._add(case, labels, EXACT, exact, exact.seconds)
            for way in todo:
                image = self._draw(case, labels, way)
                bar.update(image.computed)
                self._add(case, labels, way, image, exact.seconds)

    def _add(self, case: Case, labels: Labels | None, way: FastConfig, image: _Image, beside: float) -> None:
        picture = np.asarray(image.picture)
        if way.exact:
            self._results.keep_latents(case, image.latents.numpy())
            exact_latents, exact = image.latents.numpy(), picture
        else:
            exact_latents, exact = self._results.exact(case)
        drawn = Drawn(
            case=case.key,
            way=str(way),
            seconds=image.seconds,
            beside=beside,
            computed=image.computed,
            condition=image.condition,
            psnr=float(psnr(picture[None], exact[None])[0]),
            ssim=float(ssim(picture[None], exact[None])[0]) if self._with_ssim else None,
            latents=latents_error(image.latents, torch.from_numpy(exact_latents)),
            mask=self._consistency(picture, labels),
        )
        self._results.add(case, way, image.picture, drawn)

    def _draw(self, case: Case, labels: Labels | None, way: FastConfig, **changed: Any) -> _Image:
        pipe, side = self._pipe, self._pipe.bundle.default_size
        call = self._call | changed
        height, width = call.pop("height", None), call.pop("width", None)
        if height is None and width is None and labels is not None:
            height, width = default_size([labels], side)
        height, width = height or side, width or side
        pipe.fast = way
        rows = 2 * height * width // 256 + pipe.bundle.default_text_tokens
        with suitable_threads(rows, pipe.bundle.config.transformer.width, pipe.device):
            latents = pipe(
                labels,
                case.prompt,
                height=height,
                width=width,
                condition_scale=case.condition_scale,
                seed=case.seed,
                output_type="latent",
                **call,
            ).images
            assert isinstance(latents, Tensor)
            begun = time.perf_counter()
            (picture,) = pipe.decode(latents, height, width)
            decoding = time.perf_counter() - begun
        report = pipe.last_run
        seconds = report.seconds["prepare"] + report.seconds["denoise"] + decoding
        return _Image(latents.float().cpu(), picture, seconds, report.computed_steps, report.condition_steps)

    def _consistency(self, picture: Picture, labels: Labels | None) -> float | None:
        if self._judge is None or labels is None:
            return None
        wanted = resize(labels, *picture.shape[:2])
        return float(Overlap.of(self._judge.labels([picture]), [wanted]).iou_of_images()[0])
