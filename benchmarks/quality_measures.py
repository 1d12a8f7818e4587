"""Measures of faces: do shapes fit the mask, do colours fit the prompt, and are the faces like held-out renders?

The segmentation network and the table of colours, which are the judges, were made from other renders than those that are
judged (`examples.demo_checkpoint.train_segmenter`).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg import sqrtm
from torch import Tensor

from benchmarks.segmenter import Segmenter, load_segmenter
from mogle_rt import Pipeline
from mogle_rt.config import NUM_CLASSES
from mogle_rt.encoders.mask_planes import MaskPlanes

COLOUR_TABLE = Path(__file__).with_name("colours.npz")
REGIONS = {"background": (0,), "hair": (13,), "clothes": (18,), "skin": (1, 2), "lips": (11, 12), "hat": (14,)}
LEAST_PIXELS = {"lips": 12}  # that a region must have for its colour to be judged; others need 40
NEIGHBOURS = 15
Bytes = NDArray[np.uint8]
Floats = NDArray[np.float64]


@dataclass
class Cases:
    """Held-out renders: images [n, S, S, 3], labels [n, S, S], a prompt for each, and the colours that it names."""

    images: Bytes
    labels: Bytes
    prompts: list[str]
    named: list[dict[str, str]]

    def first(self, count: int) -> Cases:
        return Cases(self.images[:count], self.labels[:count], self.prompts[:count], self.named[:count])

    def __len__(self) -> int:
        return len(self.prompts)


def load_cases(path: Path, seed: int = 0) -> Cases:
    """Load renders, with prompts that name nearly all attributes."""
    from examples.demo_checkpoint.attributes import Attributes, describe

    rng = np.random.default_rng(seed)
    with np.load(path) as data:
        people = [Attributes(**a) for a in json.loads(str(data["attributes"]))]
        told = [describe(a, rng, keep=0.9) for a in people]
        return Cases(data["images"], data["labels"], [t for t, _ in told], [n for _, n in told])


def to_tensor(images: Bytes) -> Tensor:
    """[n, H, W, 3] -> [n, 3, H, W] in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def iou(found: Bytes, wanted: Bytes) -> dict[int, float]:
    """Intersection over union of each class that occurs in ``wanted``, over all pictures together."""
    result = {}
    for c in range(NUM_CLASSES):
        if (wanted == c).any():
            result[c] = float(((found == c) & (wanted == c)).sum() / ((found == c) | (wanted == c)).sum())
    return result


def region_colour(image: Bytes, labels: Bytes, attribute: str) -> Floats | None:
    """The mean colour [3] of an attribute's region; None if the region is too small."""
    region = np.isin(labels, REGIONS[attribute])
    return image[region].mean(0) if region.sum() >= LEAST_PIXELS.get(attribute, 40) else None


class ColourJudge:
    """Names the colour of a region after its nearest neighbours among renders."""

    def __init__(self) -> None:
        with np.load(COLOUR_TABLE) as table:
            self.table = {a: (table[f"{a}_colours"].astype(float), table[f"{a}_names"]) for a in REGIONS}

    def name(self, colour: Floats, attribute: str) -> str:
        colours, names = self.table[attribute]
        near = names[np.argsort(((colours - colour) ** 2).sum(1))[:NEIGHBOURS]]
        found, counts = np.unique(near, return_counts=True)
        return str(found[counts.argmax()])

    def right(self, images: Bytes, labels: Bytes, named: Sequence[dict[str, str]]) -> dict[str, tuple[int, int]]:
        """For each attribute, how many colours are those that the prompts name, and how many were judged."""
        result = {}
        for attribute in REGIONS:
            hits = []
            for image, label, words in zip(images, labels, named, strict=True):
                if attribute not in words:
                    continue
                colour = region_colour(image, label, attribute)
                if colour is not None:
                    hits.append(self.name(colour, attribute) == words[attribute])
            result[attribute] = (sum(hits), len(hits))
        return result


def frechet(a: Floats, b: Floats) -> float:
    """The Fréchet distance between two sets of features [n, F]."""
    covariances = [np.cov(x, rowvar=False) + 1e-6 * np.eye(x.shape[1]) for x in (a, b)]
    root = np.real(sqrtm(covariances[0] @ covariances[1]))
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(covariances[0] + covariances[1] - 2 * root))


def face_like(labels: Bytes) -> bool:
    """Whether there are skin, eyes (or glasses), nose and mouth, with the eyes above the nose and that above the mouth."""

    def height(*classes: int) -> float | None:
        rows = np.nonzero(np.isin(labels, classes))[0]
        return float(rows.mean()) if len(rows) >= 4 else None

    skin = float((labels == 1).mean())
    eyes, nose, mouth = height(3, 4, 5), height(2), height(10, 11, 12)
    if not 0.05 < skin < 0.6 or eyes is None or nose is None or mouth is None:
        return False
    return eyes < nose < mouth


def psnr_outside(a: Bytes, b: Bytes, region: NDArray[np.bool_]) -> float:
    """The PSNR between two pictures outside of a region, in dB."""
    error = ((a[~region].astype(float) - b[~region]) / 255) ** 2
    return float(-10 * np.log10(error.mean() + 1e-12))


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
    """Measures a set of pictures."""

    def __init__(self, reference: Bytes) -> None:
        self.segmenter: Segmenter = load_segmenter()
        self.colours = ColourJudge()
        self.reference = self.features(reference)

    def features(self, images: Bytes) -> Floats:
        with torch.no_grad():
            parts = [self.segmenter.features(x) for x in to_tensor(images).split(8)]
        return torch.cat(parts).double().numpy()

    def labels(self, images: Bytes) -> Bytes:
        return self.segmenter.labels(to_tensor(images)).numpy().astype(np.uint8)

    def __call__(self, images: Bytes, cases: Cases, *, masked: bool = True, prompted: bool = True) -> dict[str, Any]:
        """All measures. Without a mask, the regions are those that the segmentation network finds."""
        found = self.labels(images)
        by_class = iou(found, cases.labels)
        result: dict[str, Any] = {
            "images": len(images),
            "faces": float(np.mean([face_like(one) for one in found])),
            "frechet": frechet(self.features(images), self.reference),
        }
        if masked:
            result["miou"] = float(np.mean(list(by_class.values())))
            result["iou"] = {c: round(v, 3) for c, v in by_class.items()}
        if prompted:
            result["colours"] = self.colours.right(images, cases.labels if masked else found, cases.named)
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
    """Draw all cases, case i with the seed ``seed + i``: images uint8 [n, S, S, 3], and the seconds that one image takes."""
    masks = cases.labels if labels is None else labels
    images, start = [], time.perf_counter()
    for i in range(0, len(cases), batch):
        some = range(i, min(i + batch, len(cases)))
        out = pipe(
            list(masks[some.start : some.stop]) if mask else None,
            [cases.prompts[k] for k in some] if prompt else None,
            num_inference_steps=steps,
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
    sets = np.stack([draw(pipe, cases, steps, seed=1000 * (k + 1), **options)[0] for k in range(seeds)]).astype(float)
    pairs = [(i, j) for i in range(seeds) for j in range(i)]
    return float(np.mean([np.sqrt(((sets[i] - sets[j]) ** 2).mean()) for i, j in pairs]))


def reconstruct(pipe: Pipeline, images: Bytes) -> Bytes:
    """Encode and decode pictures with the VAE, which shows the error that it makes alone."""
    with torch.no_grad():
        parts = [pipe.vae.decode(pipe.vae.encode(x).latent_dist.mean).sample for x in to_tensor(images).split(4)]
    made = (torch.cat(parts).clamp(-1, 1) + 1) * 127.5
    return made.round().byte().permute(0, 2, 3, 1).numpy()
