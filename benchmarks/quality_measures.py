"""Held-out renders, images drawn for them, and what is measured of these: by the measures of `mogle_rt.quality`.

The segmentation network and the table of colours, which are the judges, were made from other renders than those that are
judged (`examples.demo_checkpoint.train_segmenter`).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mogle_rt import Pipeline
from mogle_rt.encoders.mask_planes import MaskPlanes
from mogle_rt.quality.distances import frechet
from mogle_rt.quality.drift import rms_difference
from mogle_rt.quality.judges.colours import ColourJudge
from mogle_rt.quality.judges.demo import DemoJudge
from mogle_rt.quality.pictures import to_tensor
from mogle_rt.quality.regions import face_like, iou

Bytes = NDArray[np.uint8]
RIDGE = 1e-6  # of Fréchet distances: without it, those of 50 images are of covariances that are mostly zeros


@dataclass
class Cases:
    """Held-out renders: images [n, H, W, 3], labels [n, H, W], a prompt for each, and the colours that it names."""

    images: Bytes
    labels: Bytes
    prompts: list[str]
    named: list[dict[str, str]]

    def first(self, count: int) -> Cases:
        return Cases(self.images[:count], self.labels[:count], self.prompts[:count], self.named[:count])

    def __len__(self) -> int:
        return len(self.prompts)


def load_cases(path: Path, size: tuple[int, int] = (128, 128), count: int | None = None, seed: int = 0) -> Cases:
    """Load renders, with prompts that name nearly all attributes.

    Args:
        size: height and width. Portraits are the middle of the render. count: of renders, at most.
    """
    from examples.demo_checkpoint.attributes import Attributes, describe, visible
    from examples.demo_checkpoint.renders import Renders, middle, resize

    rng = np.random.default_rng(seed)
    data = Renders(path, count)
    parts = [resize(*middle(data.images[i : i + 1], data.labels[i : i + 1], size), *size) for i in range(len(data))]
    images, labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    people = [visible(Attributes(**a), mask) for a, mask in zip(data.attributes, labels, strict=True)]
    told = [describe(a, rng, keep=0.9) for a in people]
    return Cases(images, labels, [t for t, _ in told], [n for _, n in told])


def grow(region: NDArray[np.bool_], pixels: int) -> NDArray[np.bool_]:
    """A region and everything within this distance of it, in steps to the side, up or down."""
    from scipy.ndimage import binary_dilation

    return np.asarray(binary_dilation(region, iterations=pixels))


def more_hair(labels: Bytes, pixels: int = 9) -> Bytes:
    """The mask with hair that has grown into the background."""
    edited = labels.copy()
    edited[grow(labels == 13, pixels) & (labels == 0)] = 13
    return edited


class Judge:
    """Measures a set of pictures, by the package's own measures and its judge of the demo's images."""

    def __init__(self, reference: Bytes) -> None:
        self.network, self.colours = DemoJudge(), ColourJudge()
        self.reference = self.network.features(list(reference))

    def labels(self, images: Bytes) -> Bytes:
        return np.stack(self.network.labels(list(images)))

    def __call__(self, images: Bytes, cases: Cases, *, masked: bool = True, prompted: bool = True) -> dict[str, Any]:
        """All measures. Without a mask, the regions are those that the segmentation network finds."""
        found = self.labels(images)
        by_class = iou(found, cases.labels)
        result: dict[str, Any] = {
            "images": len(images),
            "faces": float(np.mean([face_like(one) for one in found])),
            "frechet": frechet(self.network.features(list(images)), self.reference, RIDGE),
        }
        if masked:
            result["miou"] = float(np.mean(list(by_class.values())))
            result["iou"] = {c: round(v, 3) for c, v in by_class.items()}
        if prompted:
            result["colours"] = self.colours.right(list(images), list(cases.labels if masked else found), cases.named)
        return result


def draw(
    pipe: Pipeline,
    cases: Cases,
    steps: int,
    *,
    mask: bool = True,
    prompt: bool = True,
    batch: int = 20,
    seed: int = 0,
    labels: Bytes | None = None,
) -> tuple[Bytes, float]:
    """Draw all cases, case i with the seed ``seed + i``: images uint8 [n, H, W, 3], and the seconds that one image takes."""
    masks = cases.labels if labels is None else labels
    images, start = [], time.perf_counter()
    for i in range(0, len(cases), batch):
        some = range(i, min(i + batch, len(cases)))
        out = pipe(
            list(masks[some.start : some.stop]) if mask else None,
            [cases.prompts[k] for k in some] if prompt else None,
            num_inference_steps=steps,
            height=masks.shape[1],
            width=masks.shape[2],
            num_images_per_prompt=1 if mask or prompt else len(some),
            generator=[torch.Generator().manual_seed(seed + k) for k in some],
            output_type="np",
        ).images
        images.append((np.asarray(out) * 255).round().astype(np.uint8))
    return np.concatenate(images), (time.perf_counter() - start) / len(cases)


def without_regions(pipe: Pipeline) -> Callable[..., MaskPlanes]:
    """A conditioner whose 19 region planes are all black, so that the local experts see nothing."""
    original = pipe.conditioner

    def conditioner(labels: Any, **options: Any) -> MaskPlanes:
        masks = original(labels, **options)
        black = original([np.full_like(labels[0], 1)]).seen_by(1)  # if all is skin, the background's plane is black
        index = np.full_like(masks.index, masks.batch)
        index[:, 0] = np.arange(masks.batch)
        return MaskPlanes(torch.cat([masks.seen_by(0), black]), index)

    return conditioner


def diversity(pipe: Pipeline, cases: Cases, steps: int, seeds: int = 4, **options: Any) -> float:
    """The RMS difference of pixels (0 to 255) between images of the same mask and prompt with different seeds."""
    sets = [draw(pipe, cases, steps, seed=1000 * (k + 1), **options)[0] for k in range(seeds)]
    return float(np.mean([rms_difference(sets[i], sets[j]) for i in range(seeds) for j in range(i)]))


def reconstruct(pipe: Pipeline, images: Bytes) -> Bytes:
    """Encode and decode pictures with the VAE, which shows the error that it makes alone."""
    with torch.no_grad():
        parts = [pipe.vae.decode(pipe.vae.encode(x).latent_dist.mean).sample for x in to_tensor(images).split(4)]
    made = (torch.cat(parts).clamp(-1, 1) + 1) * 127.5
    return made.round().byte().permute(0, 2, 3, 1).numpy()
