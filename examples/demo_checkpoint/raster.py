"""A small software rasteriser, compiled by numba: nearest triangles, shadow maps and what closes in on a surface.

Pictures have a depth buffer, z towards the viewer. Triangles have holes where an interpolated *field* is negative; the
edges of hair are ragged, because noise that runs along the strands is taken from their field.
"""

from __future__ import annotations

import numba as nb
import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

NOWHERE = -1e9  # depth where no triangle is
TABLE = np.random.default_rng(5).uniform(-1, 1, (256, 256))  # what `noise` interpolates
CROWN = (8.2, 0.05)  # y and z on the base head of the place from which hair runs


@nb.njit(cache=True, fastmath=True)
def noise(x: float, y: float) -> float:
    """Smooth noise from -1 to 1, which changes over distances of 1."""
    i, j = int(np.floor(x)), int(np.floor(y))
    u, v = x - i, y - j
    u, v = u * u * (3 - 2 * u), v * v * (3 - 2 * v)
    i0, i1, j0, j1 = i & 255, (i + 1) & 255, j & 255, (j + 1) & 255
    low = TABLE[i0, j0] + u * (TABLE[i1, j0] - TABLE[i0, j0])
    high = TABLE[i0, j1] + u * (TABLE[i1, j1] - TABLE[i0, j1])
    return low + v * (high - low)


@nb.njit(cache=True, fastmath=True)
def strand(x: float, y: float, z: float, parting: float) -> float:
    """Which strand of hair runs through a point of the base head: an angle around the crown."""
    high = min(max((y - 7.4) / 0.8, 0.0), 1.0)
    return np.arctan2(x - parting * high, z - CROWN[1]) + 0.12 * np.sin(2.5 * y)


@nb.njit(cache=True, fastmath=True)
def rasterise(
    screen: Floats,
    base: Floats,
    faces: Ints,
    use: NDArray[np.bool_],
    field: Floats,
    ragged: Floats,
    parting: float,
    size: int,
) -> tuple[Ints, Floats, Floats]:
    """Find the nearest triangle at every pixel.

    Args:
        screen: [V, 3], x and y in pixels, z towards the viewer. base: [V, 3], the same points on the base head.
        faces: [F, 3]. use: [F], False leaves a triangle out.
        field: [V], see above. ragged: [F], how far noise reaches into the field, in decimetres.
        parting: of the hair, see `strand`. size: pixels of the square picture.

    Returns:
        Triangle numbers [S, S] (-1: none), barycentric weights [S, S, 3], depth [S, S].
    """
    depth = np.full((size, size), NOWHERE)
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
                if z <= depth[y, x]:
                    continue
                inside = u * field[a] + v * field[b] + w * field[c]
                if inside < 0:
                    continue
                reach = ragged[i]
                if inside < reach:
                    px = u * base[a, 0] + v * base[b, 0] + w * base[c, 0]
                    py = u * base[a, 1] + v * base[b, 1] + w * base[c, 1]
                    pz = u * base[a, 2] + v * base[b, 2] + w * base[c, 2]
                    along = strand(px, py, pz, parting)
                    tips = 0.5 + 0.32 * noise(11 * along, 0.5 * py) + 0.18 * noise(29 * along, 0.5 * py + 9)
                    if inside < reach * tips:
                        continue
                depth[y, x] = z
                number[y, x] = i
                weights[y, x, 0], weights[y, x, 1], weights[y, x, 2] = u, v, w
    return number, weights, depth


@nb.njit(cache=True, fastmath=True)
def depth_map(screen: Floats, faces: Ints, field: Floats, size: int) -> Floats:
    """The depth buffer [S, S] alone, of all triangles: what a light sees."""
    depth = np.full((size, size), NOWHERE)
    for i in range(faces.shape[0]):
        a, b, c = faces[i, 0], faces[i, 1], faces[i, 2]
        if field[a] < 0 or field[b] < 0 or field[c] < 0:
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
                if u < -1e-3 or v < -1e-3 or 1 - u - v < -1e-3:
                    continue
                z = u * screen[a, 2] + v * screen[b, 2] + (1 - u - v) * screen[c, 2]
                depth[y, x] = max(depth[y, x], z)
    return depth


@nb.njit(cache=True, fastmath=True)
def lit(depth: Floats, x: float, y: float, z: float, bias: float) -> float:
    """The part of the light that reaches a point, from 0 to 1: a soft look-up in a light's depth buffer."""
    size = depth.shape[0]
    total, count = 0.0, 0
    for i in range(-2, 3):
        for j in range(-2, 3):
            if abs(i) + abs(j) == 4:
                continue
            px, py = int(x + 0.5) + i, int(y + 0.5) + j
            count += 1
            if 0 <= px < size and 0 <= py < size and depth[py, px] > z + bias:
                continue
            total += 1.0
    return total / count


@nb.njit(cache=True, fastmath=True)
def openness(depth: Floats, x: int, y: int, nx: float, ny: float, nz: float, radius: float) -> float:
    """How open the surroundings of a pixel's surface are, from 0 in a hole to 1 on a plain (ambient occlusion).

    Args:
        nx, ny, nz: the surface's normal, y up. radius: in pixels, of what is looked at.
    """
    size = depth.shape[0]
    closed, z = 0.0, depth[y, x]
    for k in range(14):
        angle, reach = 2.39996 * k, radius * (0.08 + 0.92 * (k + 0.5) / 14)
        dx, dy = reach * np.cos(angle), reach * np.sin(angle)
        px, py = int(x + dx + 0.5), int(y - dy + 0.5)
        if px < 0 or py < 0 or px >= size or py >= size or depth[py, px] <= NOWHERE:
            continue
        dz = depth[py, px] - z
        length = np.sqrt(dx * dx + dy * dy + dz * dz) + 1e-6
        rise = (dx * nx + dy * ny + dz * nz) / length
        near = 1 - length / (2.2 * radius)
        if rise > 0.12 and near > 0:
            closed += (rise - 0.12) * near
    return max(0.0, 1 - 2.6 * closed / 14)


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


@nb.njit(cache=True)
def move(points: Floats, moved: Ints, way: Floats, amount: float) -> None:
    """Add ``amount`` times a target's ways [M, 3] to the vertices that it moves, [M]. A vertex may occur twice."""
    for i in range(moved.shape[0]):
        for k in range(3):
            points[moved[i], k] += amount * way[i, k]
