"""A small software rasteriser with a depth buffer, barycentric weights and cut-outs, compiled by numba."""

from __future__ import annotations

import numba as nb
import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@nb.njit(cache=True)
def rasterise(
    screen: Floats, faces: Ints, use: NDArray[np.bool_], field: Floats, size: int
) -> tuple[Ints, Floats, Floats]:
    """Find the nearest triangle at every pixel.

    Args:
        screen: [V, 3], x and y in pixels, z towards the viewer.
        faces: [F, 3]. use: [F], False leaves a triangle out.
        field: [V], interpolated over a triangle; where it is negative, the triangle has a hole.
        size: pixels of the square picture.

    Returns:
        Triangle numbers [S, S] (-1: none), barycentric weights [S, S, 3], depth [S, S].
    """
    depth = np.full((size, size), -1e9)
    number = np.full((size, size), -1, np.int64)
    weights = np.zeros((size, size, 3))
    for i in range(faces.shape[0]):
        if not use[i]:
            continue
        a, b, c = faces[i, 0], faces[i, 1], faces[i, 2]
        if field[a] < 0 and field[b] < 0 and field[c] < 0:
            continue
        ax, ay, bx, by, cx, cy = screen[a, 0], screen[a, 1], screen[b, 0], screen[b, 1], screen[c, 0], screen[c, 1]
        x0, x1 = max(0, int(min(ax, bx, cx))), min(size - 1, int(max(ax, bx, cx) + 1))
        y0, y1 = max(0, int(min(ay, by, cy))), min(size - 1, int(max(ay, by, cy) + 1))
        area = (by - cy) * (ax - cx) + (cx - bx) * (ay - cy)
        if abs(area) < 1e-9:
            continue
        for y in range(y0, y1 + 1):
            for x in range(x0, x1 + 1):
                u = ((by - cy) * (x - cx) + (cx - bx) * (y - cy)) / area
                v = ((cy - ay) * (x - cx) + (ax - cx) * (y - cy)) / area
                w = 1 - u - v
                if u < -1e-3 or v < -1e-3 or w < -1e-3:
                    continue
                z = u * screen[a, 2] + v * screen[b, 2] + w * screen[c, 2]
                if z <= depth[y, x] or u * field[a] + v * field[b] + w * field[c] < 0:
                    continue
                depth[y, x] = z
                number[y, x] = i
                weights[y, x, 0], weights[y, x, 1], weights[y, x, 2] = u, v, w
    return number, weights, depth


@nb.njit(cache=True)
def vertex_normals(points: Floats, faces: Ints) -> Floats:
    """Unit normals [V, 3]. A vertex has the average of its triangles' normals, weighted by area."""
    normals = np.zeros_like(points)
    for i in range(faces.shape[0]):
        a, b, c = faces[i, 0], faces[i, 1], faces[i, 2]
        ux, uy, uz = points[b, 0] - points[a, 0], points[b, 1] - points[a, 1], points[b, 2] - points[a, 2]
        vx, vy, vz = points[c, 0] - points[a, 0], points[c, 1] - points[a, 1], points[c, 2] - points[a, 2]
        nx, ny, nz = uy * vz - uz * vy, uz * vx - ux * vz, ux * vy - uy * vx
        for k in range(3):
            v = faces[i, k]
            normals[v, 0] += nx
            normals[v, 1] += ny
            normals[v, 2] += nz
    for v in range(points.shape[0]):
        length = (normals[v, 0] ** 2 + normals[v, 1] ** 2 + normals[v, 2] ** 2) ** 0.5 + 1e-12
        normals[v] /= length
    return normals
