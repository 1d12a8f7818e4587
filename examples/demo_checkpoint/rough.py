"""Masks as people make them by hand or as other programs find them: rough versions of exact masks, to train with."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy.ndimage import distance_transform_edt, label
from torch import Tensor

from mogle_rt.config import NUM_CLASSES
from mogle_rt.masks import CLASS_NAMES

Bytes = NDArray[np.uint8]

BACKGROUND, SKIN, NECK, CLOTH = (CLASS_NAMES.index(name) for name in ("background", "skin", "neck", "cloth"))
HAIR, HAT = CLASS_NAMES.index("hair"), CLASS_NAMES.index("hat")
NECKLACE, EARRING = CLASS_NAMES.index("necklace"), CLASS_NAMES.index("ear_ring")
IN_PIECES = (HAIR, EARRING)  # of which each piece becomes an ellipse
IN_FACE = tuple(CLASS_NAMES.index(name) for name in (
    "nose", "eye_glasses", "l_eye", "r_eye", "l_brow", "r_brow", "mouth", "u_lip", "l_lip"
))  # fmt: skip
LOSABLE = (*IN_FACE, *(CLASS_NAMES.index(name) for name in ("l_ear", "r_ear", "ear_ring", "necklace")))
# What a drawing by hand puts on top of what.
LAYERS = [CLASS_NAMES.index(name) for name in (
    "background", "hair", "neck", "cloth", "l_ear", "r_ear", "skin", "necklace", "ear_ring", "nose", "l_brow", "r_brow",
    "l_eye", "r_eye", "mouth", "u_lip", "l_lip", "eye_glasses", "hat",
)]  # fmt: skip


def rough(labels: Bytes, rng: np.random.Generator) -> Bytes:
    """A rough version of a mask [H, W]: redrawn borders, ellipses, and parts that are missing."""
    changed = labels
    if rng.random() < 0.3:
        changed = ellipses(changed, rng)
    if rng.random() < 0.4:
        changed = lose_parts(changed, rng)
    if rng.random() < 0.8 or changed is labels:
        changed = redraw(changed, rng)
    return changed


def redraw(labels: Bytes, rng: np.random.Generator) -> Bytes:
    """Move borders to and fro, smooth them, and make small parts larger or smaller."""
    height, width = labels.shape
    size = min(height, width)
    planes = (torch.from_numpy(labels) == torch.arange(NUM_CLASSES)[:, None, None]).float()[None]
    planes = _bend(planes, rng, float(rng.uniform(0, 0.02)))
    planes = _blur(planes, float(rng.uniform(0.002, 0.018)) * size)
    weight = torch.ones(NUM_CLASSES)
    weight[list(IN_FACE)] = torch.from_numpy(rng.uniform(0.9, 1.8, len(IN_FACE))).float()
    return (planes[0] * weight[:, None, None]).argmax(0).byte().numpy()


def _bend(planes: Tensor, rng: np.random.Generator, reach: float) -> Tensor:
    """Move [1, C, H, W] by smooth random ways of at most about ``reach`` of the picture."""
    coarse = torch.from_numpy(rng.normal(0, 1, (1, 2, 7, 7))).float()
    ways = F.interpolate(coarse, planes.shape[2:], mode="bicubic", align_corners=True) * reach
    grid = F.affine_grid(torch.eye(2, 3)[None], list(planes.shape), align_corners=False)
    return F.grid_sample(planes, grid + ways.permute(0, 2, 3, 1), padding_mode="border", align_corners=False)


def _blur(planes: Tensor, deviation: float) -> Tensor:
    """Gaussian blur of [1, C, H, W]."""
    reach = max(1, int(2.5 * deviation))
    kernel = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / max(deviation, 0.3)).square())
    kernel = (kernel / kernel.sum()).expand(planes.shape[1], 1, 1, -1)
    padded = F.pad(planes, (reach, reach, reach, reach), mode="replicate")
    rows = F.conv2d(padded, kernel, groups=planes.shape[1])
    return F.conv2d(rows, kernel.transpose(2, 3), groups=planes.shape[1])


def lose_parts(labels: Bytes, rng: np.random.Generator) -> Bytes:
    """Leave out some small parts, which become skin in the face, and elsewhere the nearest of what is left."""
    present = [c for c in LOSABLE if (labels == c).any()]
    if not present:
        return labels
    lost = [c for c in present if rng.random() < rng.choice([0.15, 0.5])] or [int(rng.choice(present))]
    changed = labels.copy()
    changed[np.isin(labels, [c for c in lost if c in IN_FACE])] = SKIN
    outside = np.isin(changed, [c for c in lost if c not in IN_FACE])
    if outside.any() and not outside.all():
        nearest = distance_transform_edt(outside, return_distances=False, return_indices=True)
        changed = changed[tuple(nearest)]
    return changed


def ellipses(labels: Bytes, rng: np.random.Generator) -> Bytes:
    """Draw every part as an ellipse of its size and place; clothes and background stay, and perhaps hair and hat."""
    keep = {BACKGROUND, CLOTH, NECKLACE} | ({HAIR, HAT} if rng.random() < 0.5 else set())
    rows, columns = np.mgrid[: labels.shape[0], : labels.shape[1]].astype(float)
    drawn = np.full_like(labels, BACKGROUND)
    face = np.isin(labels, (SKIN, *IN_FACE))
    for c in LAYERS:
        region = face if c == SKIN else labels == c
        if not region.any() or c == BACKGROUND:
            continue
        if c in keep or (c == NECK and rng.random() < 0.5):
            drawn[region] = c
            continue
        pieces, count = label(region) if c in IN_PIECES else (region, 1)
        for piece in range(1, count + 1):
            points = np.stack([rows[pieces == piece], columns[pieces == piece]])
            middle = points.mean(1)
            spread = np.cov(points) + 0.3 * np.eye(2) if points.shape[1] > 2 else np.eye(2)
            size = 4 * rng.uniform(0.85, 1.2)
            apart = np.stack([rows - middle[0], columns - middle[1]])
            drawn[np.einsum("ihw,ij,jhw->hw", apart, np.linalg.inv(spread), apart) < size] = c
    return drawn
