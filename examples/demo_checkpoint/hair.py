"""The geometry of hair and hats: a shell over the scalp, a curtain around the head, a bun, a brim.

All shapes are made on the base head and move with it. A *field* is a number at each point that is positive inside the
shape and negative outside.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from examples.demo_checkpoint.heads import HeadModel

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

CENTRE_Z = 0.35  # the skull's vertical axis
AZIMUTHS = np.radians([0, 30, 55, 72, 84, 100, 125, 180])  # from the front, at which a hairline's height is given


@dataclass
class Shape:
    """A mesh on the base head.

    Attributes:
        points: [V, 3], on the base head. faces: [F, 3]. field: [V].
        shell: [V, 2] vertices of the head between which a point rests, or None for a free shape.
        thickness: [V] above the head.
    """

    points: Floats
    faces: Ints
    field: Floats
    shell: Ints | None = None
    thickness: Floats | None = None


def azimuth(points: Floats) -> Floats:
    """Angle around the skull's axis: 0 at the front, positive to the head's left, ±π at the back."""
    return np.arctan2(points[:, 0], points[:, 2] - CENTRE_Z)


def smooth(x: Floats) -> Floats:
    """0 for x below 0, 1 for x above 1, and smooth between."""
    x = x.clip(0, 1)
    return x * x * (3 - 2 * x)


def _noise(rng: np.random.Generator, points: Floats, waves: int, frequency: float) -> Floats:
    """Smooth noise of unit size."""
    total = np.zeros(len(points))
    for _ in range(waves):
        total += np.sin(points @ rng.normal(0, frequency, 3) + rng.uniform(0, 6.3))
    return total / waves**0.5


def _halved(faces: Ints) -> tuple[Ints, Ints]:
    """Cut each triangle into four. Returns the new points as pairs [V, 2] of old ones, and the new triangles."""
    a, b, c = faces.T
    count = len(faces)
    corners = np.concatenate([np.stack([v, v], 1) for v in (a, b, c)])
    middles = np.concatenate([np.sort(np.stack(pair, 1), 1) for pair in ((a, b), (b, c), (c, a))])
    pairs, number = np.unique(np.concatenate([corners, middles]), axis=0, return_inverse=True)
    A, B, C, ab, bc, ca = number.reshape(6, count)
    return pairs, np.concatenate([np.stack(t, 1) for t in ((A, ab, ca), (ab, B, bc), (ca, bc, C), (ab, bc, ca))])


def shell(
    model: HeadModel, line: Floats, thickness: float, rng: np.random.Generator, *, curls: float = 0.0, edge: float = 0.0
) -> Shape:
    """A layer over the scalp, above a line.

    Args:
        line: heights at `AZIMUTHS`. thickness: far from the line. edge: thickness at the line.
        curls: size of lumps.
    """
    shell, faces = _halved(model.faces[model.scalp])
    points = model.vertices[shell].mean(1)
    angle = azimuth(points)
    field = points[:, 1] - np.interp(np.abs(angle), AZIMUTHS, line) + 0.02 * np.sin(9 * angle + rng.uniform(0, 6))
    body = smooth(field / 0.45)
    thick = edge + (thickness - edge) * body
    if curls:
        thick = thick + curls * body * _noise(rng, points, 6, 7.0)
    return Shape(points, faces, field, shell, thick)


def _grid(rows: int, columns: int, offset: int = 0) -> Ints:
    i, j = np.meshgrid(np.arange(rows - 1), np.arange(columns - 1), indexing="ij")
    a = (i * columns + j).reshape(-1) + offset
    return np.concatenate([np.stack([a, a + 1, a + columns], 1), np.stack([a + 1, a + columns + 1, a + columns], 1)])


def curtain(rng: np.random.Generator, bottom: float, opening: float, width: float, waves: float) -> Shape:
    """Hair that falls down at the back and at the sides.

    Args:
        bottom: height where it ends. opening: half of the angle left open at the front, radians.
        width: above the head's own. waves: size of waves.
    """
    rows, columns = 26, 56
    angle = np.linspace(opening, 2 * np.pi - opening, columns)
    height = np.linspace(8.05, bottom - 0.15, rows)
    levels = [4.6, 5.4, 6.0, 6.4, 6.9, 7.4, 7.8, 8.05]
    rx = np.interp(height, levels, [1.12, 1.05, 0.92, 0.88, 0.92, 0.9, 0.8, 0.66])[:, None] + width
    rz = np.interp(height, levels, [0.72, 0.8, 0.85, 0.92, 1.0, 1.05, 0.98, 0.8])[:, None] + width
    top = smooth((8.0 - height) / 0.5)[:, None]
    ripple = waves * top * np.sin(5.5 * height[:, None] + 1.5 * np.sin(3 * angle) + rng.uniform(0, 6))
    strands = 0.025 * np.sin(17 * angle + rng.uniform(0, 6)) * top
    radius = 1 + ripple + strands
    x, z = rx * np.sin(angle) * radius, CENTRE_Z - 0.1 + rz * np.cos(angle) * radius
    y = np.broadcast_to(height[:, None], x.shape)
    ragged = 0.05 * np.sin(13 * angle + rng.uniform(0, 6)) + 0.04 * np.sin(29 * angle + rng.uniform(0, 6))
    field = y - bottom - ragged
    edge = np.minimum(angle - opening, 2 * np.pi - opening - angle)
    field = np.minimum(field, 2 * (edge - 0.09 * (1 + np.sin(4.1 * y + rng.uniform(0, 6))) * top))
    points = np.stack([x, y, z], -1).reshape(-1, 3)
    return Shape(points, _grid(rows, columns), field.reshape(-1))


def ball(centre: tuple[float, float, float], radius: float) -> Shape:
    """A bun."""
    rows, columns = 12, 20
    a = np.linspace(0, np.pi, rows)[:, None]
    b = np.linspace(0, 2 * np.pi, columns)
    lumps = radius * (1 + 0.06 * np.sin(6 * a + 3 * b))
    points = np.stack([lumps * np.sin(a) * np.cos(b), lumps * np.cos(a) + 0 * b, lumps * np.sin(a) * np.sin(b)], -1)
    return Shape(points.reshape(-1, 3) + centre, _grid(rows, columns), np.ones(rows * columns))


def brim(height: float, width: float, tilt: float) -> Shape:
    """A hat's brim."""
    rows, columns = 4, 48
    out = np.linspace(0, 1, rows)[:, None]
    angle = np.linspace(0, 2 * np.pi, columns)
    x = (0.74 + (0.12 + width) * out) * np.sin(angle)
    z = CENTRE_Z + (0.86 + (0.16 + width) * out) * np.cos(angle)
    y = height - 0.09 + tilt * (z - CENTRE_Z) - 0.08 * out + 0 * angle
    return Shape(np.stack([x, y, z], -1).reshape(-1, 3), _grid(rows, columns), np.ones(rows * columns))


def peak(height: float, width: float) -> Shape:
    """A cap's peak, which bends down to the front."""
    rows, columns = 6, 40
    out = np.linspace(0, 1, rows)[:, None]
    angle = np.linspace(-1.1, 1.1, columns)
    reach = width * np.cos(0.5 * np.pi * angle / 1.1) ** 0.5 * out
    x = (0.88 + 0.1 * reach) * np.sin(angle)
    z = CENTRE_Z + (0.93 + reach) * np.cos(angle)
    y = height + 0.17 - 0.42 * reach - 0.22 * np.abs(np.sin(angle)) ** 2
    return Shape(np.stack([x, y, z], -1).reshape(-1, 3), _grid(rows, columns), np.ones(rows * columns))


def hairstyle(model: HeadModel, style: str, fringe: bool, rng: np.random.Generator) -> list[Shape]:
    """The shapes that make up a style of `attributes.STYLES`."""
    if style == "bald":
        return []
    top = rng.uniform(7.78, 7.98)
    temple = rng.uniform(0.0, 0.07)
    line = np.array([top, top + temple, top - 0.1, 7.45, 7.15, 7.3, 7.0, 6.75])
    if fringe:
        line[:3] = rng.uniform(7.56, 7.66) + np.array([0, 0.02, 0.02])
    if style == "very short":
        line[3:] += np.array([0, 0.05, 0.1, 0.1, 0.1])
        return [shell(model, line, rng.uniform(0.04, 0.07), rng, edge=0.012)]
    if style == "balding":
        line[:4] = [9, 9, 8.5, 7.6]
        part = shell(model, line, rng.uniform(0.06, 0.12), rng, edge=0.01)
        part.field = np.minimum(part.field, rng.uniform(7.75, 8.0) - part.points[:, 1])
        return [part]
    edge = 0.07 if fringe else 0.03
    if style == "short":
        return [shell(model, line, rng.uniform(0.13, 0.27), rng, edge=edge, curls=rng.choice([0, 0.02]))]
    if style == "curly":
        line[4:] -= 0.15
        thick = rng.uniform(0.3, 0.55)
        return [shell(model, line, thick, rng, edge=0.1, curls=0.13 * thick / 0.4)]
    if style == "bun":
        head = shell(model, line, rng.uniform(0.06, 0.1), rng, edge=0.02)
        return [head, ball((0, rng.uniform(8.6, 8.72), rng.uniform(-0.1, 0.3)), rng.uniform(0.3, 0.42))]
    cap = shell(model, line - np.array([0, 0, 0, 0, 0.1, 0.3, 0.3, 0.3]), rng.uniform(0.12, 0.22), rng, edge=edge)
    bottom = {"medium": (6.0, 6.45), "long": (4.9, 5.5), "long wavy": (4.9, 5.5)}[style]
    waves = {"medium": rng.choice([0.0, 0.03]), "long": 0.0, "long wavy": rng.uniform(0.06, 0.1)}[style]
    return [cap, curtain(rng, rng.uniform(*bottom), rng.uniform(0.95, 1.25), rng.uniform(0.02, 0.12), waves)]


def hat(model: HeadModel, over: float, rng: np.random.Generator) -> list[Shape]:
    """A knitted cap, a hat with a brim or a cap with a peak, over hair of thickness ``over``. The crown comes first."""
    height = rng.uniform(7.74, 7.9)
    line = height - np.array([0, 0, 0.03, 0.1, 0.15, 0.2, 0.25, 0.3])
    crown = shell(model, line, over + rng.uniform(0.12, 0.2), rng, edge=over + 0.07)
    assert crown.thickness is not None
    kind = rng.choice(["knitted", "brim", "peak"], p=[0.4, 0.35, 0.25])
    if kind == "knitted":
        crown.thickness += 0.05 * smooth((0.3 - crown.field) / 0.04)  # a fold
        return [crown]
    if kind == "peak":
        return [crown, peak(height, rng.uniform(0.4, 0.55))]
    crown.thickness += 0.25 * smooth((crown.points[:, 1] - 8.0) / 0.4)
    return [crown, brim(height, rng.uniform(0.28, 0.5), 0.12)]
