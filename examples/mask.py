"""Draws examples/mask.png, a face from the front, of ellipses in the class palette: ``python examples/mask.py``."""

from pathlib import Path

import numpy as np

from mogle_rt.masks import CLASS_NAMES, Labels, to_image

SIZE = 512


def ellipse(labels: Labels, name: str, x: float, y: float, rx: float, ry: float) -> None:
    """Fill an ellipse with a class. Centre and radii are fractions of the picture's size."""
    rows, columns = np.mgrid[0:SIZE, 0:SIZE] / SIZE
    labels[((columns - x) / rx) ** 2 + ((rows - y) / ry) ** 2 <= 1] = CLASS_NAMES.index(name)


def face() -> Labels:
    """The labels of the face, uint8 [512, 512]."""
    labels = np.zeros((SIZE, SIZE), dtype=np.uint8)
    ellipse(labels, "hair", 0.5, 0.45, 0.33, 0.40)
    ellipse(labels, "cloth", 0.5, 1.05, 0.48, 0.22)
    ellipse(labels, "neck", 0.5, 0.82, 0.12, 0.14)
    for side in (-1, 1):
        ellipse(labels, "r_ear" if side > 0 else "l_ear", 0.5 + side * 0.25, 0.52, 0.04, 0.08)
    ellipse(labels, "skin", 0.5, 0.52, 0.24, 0.32)
    for side in (-1, 1):
        ellipse(labels, "r_brow" if side > 0 else "l_brow", 0.5 + side * 0.10, 0.40, 0.065, 0.014)
        ellipse(labels, "r_eye" if side > 0 else "l_eye", 0.5 + side * 0.10, 0.455, 0.045, 0.022)
    ellipse(labels, "nose", 0.5, 0.56, 0.045, 0.085)
    ellipse(labels, "u_lip", 0.5, 0.695, 0.085, 0.022)
    ellipse(labels, "l_lip", 0.5, 0.722, 0.075, 0.026)
    ellipse(labels, "mouth", 0.5, 0.705, 0.06, 0.006)
    return labels


if __name__ == "__main__":
    path = Path(__file__).with_name("mask.png")
    to_image(face()).save(path, optimize=True)
    print(path)
