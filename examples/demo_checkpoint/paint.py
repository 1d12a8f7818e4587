"""Labels, colours and light of every pixel that shows a head: one pass, compiled by numba.

Places on the base head decide what a pixel is and how it is painted, so that everything moves with the mesh. Lengths are
decimetres. A class's border is where its paint begins, so that masks are exact.
"""

from __future__ import annotations

from typing import NamedTuple

import numba as nb
import numpy as np
from numpy.typing import NDArray

from examples.demo_checkpoint.raster import CROWN, lit, noise, openness, strand

Floats = NDArray[np.float64]
Singles = NDArray[np.float32]
Ints = NDArray[np.int64]
Bytes = NDArray[np.uint8]

BACKGROUND, SKIN, NOSE, GLASSES, L_EYE, R_EYE, L_BROW, R_BROW, L_EAR, R_EAR = range(10)
MOUTH, U_LIP, L_LIP, HAIR, HAT, EARRING, NECKLACE, NECK, CLOTH = range(10, 19)
EYE_X, EYE_Y = 0.308, 7.284  # of the left eye's middle on the base head
NO_BEARD, STUBBLE, MUSTACHE, BEARD = range(4)


class Surface(NamedTuple):
    """All that is rasterised: the head, then hair and hat.

    Attributes:
        base: [V, 3] on the base head. screen: [V, 3] in pixels. turned: [V, 3] in the viewer's space.
        normals: [V, 3] of ``turned``. field: [V]. nose: [V], see `HeadModel.nose_way`.
        faces: [F, 3]. group: [F]. ragged: [F]. use: [F]. uv: [H, 3, 2] of the head's faces, which come first.
        scale: pixels a decimetre.
    """

    base: Floats
    screen: Floats
    turned: Floats
    normals: Floats
    field: Floats
    nose: Floats
    faces: Ints
    group: Ints
    ragged: Floats
    use: NDArray[np.bool_]
    uv: Floats
    scale: float


class Look(NamedTuple):
    """What to paint: see `Scene`. The rows of ``light`` are key, rim, key_colour, rim_colour, sky and ground.

    Attributes:
        table: [19, 3], the classes' colours. eyes, hair: [3]. beard: one of the numbers above.
        to_light: [4, 3], axes of the shadow map, and its origin; pixels.
    """

    table: Floats
    eyes: Floats
    hair: Floats
    light: Floats
    turn: Floats
    shadow: Floats
    to_light: Floats
    gaze: Floats
    old: float
    beard: int
    curly: bool
    knit: bool
    necklace: bool
    parting: float
    neckline: float
    v_neck: float
    brow: Floats


class Textures(NamedTuple):
    """Masks of parts of the skin, by texture coordinates."""

    lips: NDArray[np.bool_]
    inside_mouth: NDArray[np.bool_]
    ears: NDArray[np.bool_]


@nb.njit(cache=True, fastmath=True)
def smooth(x: float) -> float:
    """0 below 0, 1 above 1, and smooth between."""
    x = min(max(x, 0.0), 1.0)
    return x * x * (3 - 2 * x)


@nb.njit(cache=True, fastmath=True)
def _to_unit(v: Floats) -> None:
    length = np.sqrt(v[0] * v[0] + v[1] * v[1] + v[2] * v[2]) + 1e-9
    for d in range(3):
        v[d] /= length


@nb.njit(cache=True, fastmath=True)
def beard_density(ax: float, y: float, z: float, kind: int) -> float:
    """How much beard grows at a place of the base head, from 0 to 1. ax: distance from the middle."""
    if kind == NO_BEARD or z < 0.2:
        return 0.0
    lip = smooth((0.085 - abs(y - 6.735 + 0.12 * ax)) / 0.04) * smooth((0.36 - ax) / 0.05) * (1.0 if z > 1 else 0.0)
    if kind == MUSTACHE:
        return lip
    chin = smooth((6.72 + 0.8 * min(max(ax - 0.3, 0.0), 0.6) - y) / 0.1) * smooth((0.9 - ax) / 0.05)
    return max(chin, lip)


@nb.njit(cache=True, fastmath=True)
def _brow(ax: float, y: float, x: float, brow: Floats) -> float:
    """How much brow there is at a place, from 0 to 1; the class begins at a half."""
    t = (ax - 0.11) / 0.43
    if t < 0 or t > 1:
        return 0.0
    middle = 7.485 + brow[1] + 0.075 * np.sin(2.5 * t + 0.1)
    half = brow[0] * (0.5 + 0.6 * smooth(t / 0.3) - 0.85 * smooth((t - 0.4) / 0.6))
    hairs = 0.008 * noise(55 * (x + 0.5 * y), 12 * y)
    return smooth((half + hairs - abs(y - middle)) / 0.024 + 0.5)


@nb.njit(cache=True, fastmath=True)
def _texel(mask: NDArray[np.bool_], u: float, v: float) -> bool:
    size = mask.shape[0]
    row, column = int((1 - v) * size), int(u * size)
    return bool(mask[min(max(row, 0), size - 1), min(max(column, 0), size - 1)])


@nb.njit(cache=True, fastmath=True)
def _label(
    x: float, y: float, z: float, u: float, v: float, nose: float, group: int, look: Look, textures: Textures
) -> int:
    """The class at a place of the base head."""
    if group == 7:
        return HAIR
    if group == 8:
        return HAT
    if group == 3 or group == 4:
        return MOUTH
    if group != 0:
        return L_EYE if group in (1, 5) else R_EYE
    ax = abs(x)
    if _texel(textures.lips, u, v):
        return U_LIP if y >= 6.602 else L_LIP
    if _texel(textures.ears, u, v):
        return L_EAR if x > 0 else R_EAR
    if z < 1.5 and _texel(textures.inside_mouth, u, v):
        return MOUTH
    if y - 6.24 - min(max(1.2 - z, -0.3), 2.0) * 0.44 > 0:  # above the jaw's edge
        if z > 0.9 and _brow(ax, y, x, look.brow) > 0.5:
            return L_BROW if x > 0 else R_BROW
        inside = ax < 0.27 - 0.12 * min(max(y - 6.75, 0.0), 1.0)
        return NOSE if nose > 0.05 and inside and 6.76 < y < 7.25 and z > 1 else SKIN
    if y < look.neckline + 0.2 * ax - look.v_neck * min(max(0.45 - ax, 0.0), 1.0):
        return CLOTH
    if look.necklace and z > 0.1 and abs(y - (5.86 + 0.3 * ax - (0.1 if z < 0.2 else 0.0))) < 0.05:
        return NECKLACE
    return NECK


@nb.njit(cache=True, fastmath=True)
def paint(
    number: Ints,
    weights: Floats,
    depth: Floats,
    mesh: Surface,
    look: Look,
    textures: Textures,
    image: Singles,
    labels: Bytes,
) -> None:
    """Paint all pixels of `rasterise`'s picture into ``image`` [S, S, 3], 0 to 255 and beyond, and ``labels`` [S, S]."""
    heads = mesh.uv.shape[0]
    p, n, at, c, w = np.zeros(3), np.zeros(3), np.zeros(3), np.zeros(3), np.zeros(3)
    t, half, side, spec = np.zeros(3), np.zeros(3), np.zeros(3), np.zeros(3)
    key, rim = look.light[0], look.light[1]
    half[:] = key
    half[2] += 1
    _to_unit(half)
    S = number.shape[0]
    # What surrounds a pixel and its shadow are found once in a square of 2 x 2 pixels, unless these show different things.
    around_of, seen_of, depth_of = np.zeros((3, S // 2, S // 2))
    group_of = np.full((S // 2, S // 2), -1, np.int8)
    for row in range(number.shape[0]):
        for column in range(number.shape[1]):
            f = number[row, column]
            if f < 0:
                dx, dy = column / S - 0.5 + 0.15 * np.sign(key[0]), row / S - 0.4
                glow = 1.06 - 0.42 * (dx * dx + dy * dy)
                for d in range(3):
                    image[row, column, d] = look.table[BACKGROUND, d] * glow
                labels[row, column] = BACKGROUND
                continue
            w[:] = weights[row, column]
            p[:], n[:], at[:] = 0.0, 0.0, 0.0
            nose, u, v = 0.0, 0.0, 0.0
            for k in range(3):
                corner = mesh.faces[f, k]
                for d in range(3):
                    p[d] += w[k] * mesh.base[corner, d]
                    n[d] += w[k] * mesh.normals[corner, d]
                    at[d] += w[k] * mesh.turned[corner, d]
                if f < heads:
                    nose += w[k] * mesh.nose[corner]
                    u += w[k] * mesh.uv[f, k, 0]
                    v += w[k] * mesh.uv[f, k, 1]
            group = mesh.group[f]
            inside = n[2] < 0
            if inside:
                n *= -1
            _to_unit(n)
            x, y, z = p[0], p[1], p[2]
            ax = abs(x)
            label = _label(x, y, z, u, v, nose, group, look, textures)
            labels[row, column] = label
            c[:] = look.table[label]
            spec[:] = 0.0
            gloss, wrap, shade = 0.0, 0.08, 1.0
            skin = label in (SKIN, NOSE, NECK, L_EAR, R_EAR)

            if skin or label in (L_BROW, R_BROW):
                gloss, wrap = 0.05, 0.22
                _paint_skin(c, ax, x, y, z, label, look)
                if label in (L_BROW, R_BROW):
                    gloss = 0.0
                cover = beard_density(ax, y, z, look.beard) if label == SKIN else 0.0
                if cover > 0:
                    hairs = noise(34 * x + 6 * y, 9 * y) * 0.6 + noise(80 * x, 26 * y + 3) * 0.4
                    full = (0.45 if look.beard == STUBBLE else 0.97) * smooth(1.5 * cover + 0.5 * hairs - 0.25)
                    for d in range(3):
                        c[d] += full * (look.hair[d] * (0.86 + 0.2 * hairs) - c[d])
                    gloss *= 1 - full
                    n[0] += 0.25 * full * hairs
            elif label in (U_LIP, L_LIP):
                gloss, wrap = 0.2, 0.12
                lines = 1 + 0.06 * noise(42 * x, 5 * y)
                c *= lines * (0.86 if label == U_LIP else 1.0)
            elif label == MOUTH:
                wrap = 0.1
                if group == 3:
                    tooth = abs((ax / 0.072) % 1.0 - 0.5)
                    c[0], c[1], c[2] = 238, 232, 220
                    c *= (1 - 0.22 * smooth((0.12 - tooth) / 0.1)) * (0.25 + 0.75 * smooth((z - 1.12) / 0.22))
                    gloss = 0.12
                elif group == 4:
                    c[0], c[1], c[2] = 196, 92, 98
                    gloss = 0.1
            elif label in (L_EYE, R_EYE):
                if group >= 5:
                    c[0], c[1], c[2] = 26, 19, 18
                else:
                    shade = _paint_eye(c, spec, x, y, look)
            elif label == HAIR:
                s, wrap = _hair(c, t, n, side, p, look), 0.1
                depth_in = 0.5 if inside else 1.0
                c *= (1 + 0.2 * s) * depth_in * (0.88 + 0.14 * smooth((y - 5.2) / 2.4))
                th = t[0] * half[0] + t[1] * half[1] + t[2] * half[2]
                line = np.sqrt(max(0.0, 1 - th * th))
                strong = (0.25 if look.curly else 0.5) * depth_in
                for d in range(3):
                    spec[d] = strong * look.light[2, d] * (34 * line**60 + 0.35 * (c[d] + 25) * line**14)
            elif label == HAT:
                _paint_hat(c, n, x, y, z, look)
            elif label == CLOTH:
                n[0] += 0.22 * noise(3.1 * x + 0.8 * y, 2.0 * y + 5)
                n[1] += 0.14 * noise(2.4 * x + 9, 2.9 * y)
                edge = look.neckline + 0.2 * ax - look.v_neck * min(max(0.45 - ax, 0.0), 1.0) - y
                if edge < 0.09:
                    c *= 0.86
                    n[1] += 0.3 * (edge - 0.045) / 0.045
            elif label == NECKLACE:
                gloss = 0.5
                c *= 0.85 + 0.3 * np.sin(42 * x)
            _to_unit(n)

            # Light: what comes from all around, less where it is narrow; the key light and its shadow; a bright edge.
            ndl = n[0] * key[0] + n[1] * key[1] + n[2] * key[2]
            i, j, z_here = row // 2, column // 2, depth[row, column]
            if group_of[i, j] != group or abs(depth_of[i, j] - z_here) > 0.02 * mesh.scale:
                group_of[i, j], depth_of[i, j] = group, z_here
                around_of[i, j] = openness(depth, column, row, n[0], n[1], n[2], 0.3 * mesh.scale)
                lx, ly, lz = look.to_light[3, 0], look.to_light[3, 1], look.to_light[3, 2]
                for d in range(3):
                    where = at[d] + 0.06 * n[d]  # a little above the surface, which must not shade itself
                    lx += look.to_light[0, d] * where
                    ly += look.to_light[1, d] * where
                    lz += look.to_light[2, d] * where
                seen_of[i, j] = lit(look.shadow, lx, ly, lz, 2.2)
            open_, seen = around_of[i, j], seen_of[i, j]
            if group in (1, 2, 3):
                open_, seen = 0.45 + 0.55 * open_, 0.5 + 0.5 * seen
            seen = 1 - (1 - seen) * smooth(ndl / 0.3) * 0.85
            edge_light = max(0.0, n[0] * rim[0] + n[1] * rim[1] + n[2] * rim[2])
            hn = max(0.0, n[0] * half[0] + n[1] * half[1] + n[2] * half[2])
            shine = gloss * seen * 255 * (0.7 * hn**18 + 0.5 * hn**70)
            up = 0.5 + 0.5 * n[1]
            for d in range(3):
                soft = wrap * (1.5 if skin and d == 0 else 0.75)
                diffuse = max(0.0, (ndl + soft) / (1 + soft))
                # Light that is thrown to and fro in the folds of skin comes out red.
                narrow = open_ ** (0.85 if skin and d == 0 else 1.1)
                around = look.light[5, d] + (look.light[4, d] - look.light[5, d]) * up
                total = around * narrow + look.light[2, d] * diffuse * seen * (0.4 + 0.6 * narrow)
                total += 0.8 * look.light[3, d] * edge_light
                image[row, column, d] = c[d] * total * shade + look.light[2, d] * shine + spec[d] * (0.3 + 0.7 * seen)


@nb.njit(cache=True, fastmath=True)
def _paint_skin(c: Floats, ax: float, x: float, y: float, z: float, label: int, look: Look) -> None:
    """Cheeks, lids, wrinkles, and brows over them."""
    if z > 0.7 and y > 6.2:
        cheek = np.exp(-(((ax - 0.42) / 0.17) ** 2) - ((y - 6.95) / 0.16) ** 2)
        tip = np.exp(-((ax / 0.14) ** 2) - ((y - 6.87) / 0.12) ** 2)
        red = cheek + 0.5 * tip
        c[0] += 0.05 * red * c[0]
        c[1] -= 0.05 * red * c[1]
        c[2] -= 0.04 * red * c[2]
        lid = np.exp(-(((ax - 0.31) / 0.2) ** 2) - ((y - 7.37) / 0.06) ** 2)
        under = np.exp(-(((ax - 0.3) / 0.16) ** 2) - ((y - 7.14) / 0.05) ** 2)
        c *= 1 - 0.16 * lid - (0.05 + 0.08 * look.old) * under
        if look.old > 0:
            wave = abs((abs(y - 7.72 - 0.02 * np.sin(7 * ax)) % 0.11) - 0.055)
            lines = np.exp(-((wave / 0.014) ** 2)) * smooth((y - 7.58) / 0.05) * smooth((0.55 - ax) / 0.2)
            fold = np.exp(-(((ax - 0.3 - (6.95 - y) * 0.35) / 0.022) ** 2))
            fold *= smooth((y - 6.55) / 0.08) * smooth((6.98 - y) / 0.08)
            feet = np.exp(-((((y - 7.27) - 0.35 * (ax - 0.5)) / 0.012) ** 2)) + np.exp(
                -((((y - 7.22) + 0.15 * (ax - 0.5)) / 0.012) ** 2)
            )
            feet *= smooth((ax - 0.5) / 0.03) * smooth((0.64 - ax) / 0.06)
            c *= 1 - 0.15 * look.old * min(1.0, lines + 1.2 * fold + feet)
    if label in (L_EAR, R_EAR):
        c[1] *= 0.95
        c[2] *= 0.94
    c *= 1 + 0.02 * noise(5 * x, 5 * y)
    if z > 0.9 and label in (SKIN, L_BROW, R_BROW):
        cover = 0.95 * _brow(ax, y, x, look.brow)
        if cover > 0:
            hairs = 0.85 + 0.25 * noise(60 * (x + 0.5 * y), 10 * y)
            for d in range(3):
                c[d] += cover * (look.table[L_BROW, d] * hairs - c[d])


@nb.njit(cache=True, fastmath=True)
def _paint_eye(c: Floats, spec: Floats, x: float, y: float, look: Look) -> float:
    """The white, the iris and the pupil of an eye, and a catchlight in ``spec``. Returns how the lid darkens it."""
    dx = (x - EYE_X if x > 0 else x + EYE_X) - look.gaze[0]
    dy = y - EYE_Y - look.gaze[1]
    r = np.sqrt(dx * dx + dy * dy)
    c[0], c[1], c[2] = 242, 240, 238
    corner = smooth((r - 0.1) / 0.16)
    c[1] *= 1 - 0.1 * corner
    c[2] *= 1 - 0.1 * corner
    iris = smooth((0.104 - r) / 0.008)
    if iris > 0:
        angle = np.arctan2(dy, dx)
        streaks = 1 + 0.16 * noise(5 * angle, 14 * r)
        bright = (1.0 + 0.55 * smooth((0.03 - dy) / 0.1)) * streaks
        ring = 1 - 0.62 * smooth((r - 0.078) / 0.02)
        pupil = smooth((0.05 - r) / 0.008)
        for d in range(3):
            colour = look.eyes[d] * bright * ring * (1 - 0.93 * pupil)
            c[d] += iris * (colour - c[d])
    lx, ly = 0.038 * np.sign(look.light[0, 0]), 0.036
    catch = smooth((0.03 - np.sqrt((dx - lx) ** 2 + (dy - ly) ** 2)) / 0.01)
    second = 0.4 * smooth((0.018 - np.sqrt((dx + lx) ** 2 + (dy + 0.8 * ly) ** 2)) / 0.01)
    spec[:] = 235 * max(catch, second)
    return 1.1 - 0.42 * smooth((dy + look.gaze[1] - 0.035) / 0.09)


@nb.njit(cache=True, fastmath=True)
def _hair(c: Floats, t: Floats, n: Floats, side: Floats, p: Floats, look: Look) -> float:
    """Sets ``t`` to the direction of the strand, tilts the normal ``n``; returns how bright the strand is, -1 to 1."""
    x, y, z = p[0], p[1], p[2]
    along = strand(x, y, z, look.parting)
    if look.curly:
        bend = 0.5 * noise(4 * x + 3, 4 * y)
        s = 1 - 2.2 * abs(noise(6.5 * x + 4 * bend, 6.5 * y + 3.5 * z + 3 * bend))
        s = 0.7 * s + 0.3 * noise(20 * x + 4 * bend, 20 * y + 8 * z)
    else:
        s = 0.5 * noise(13 * along, 0.45 * y) + 0.38 * noise(31 * along, 0.7 * y + 7)
        s += 0.22 * noise(67 * along, 0.9 * y + 3)
    high = min(max((y - 7.4) / 0.8, 0.0), 1.0)
    dx, dy, dz = x - look.parting * high, y - 9.0, z - CROWN[1]
    for d in range(3):
        t[d] = look.turn[d, 0] * dx + look.turn[d, 1] * dy + look.turn[d, 2] * dz
    dot = t[0] * n[0] + t[1] * n[1] + t[2] * n[2]
    for d in range(3):
        t[d] -= dot * n[d]
    _to_unit(t)
    side[0], side[1], side[2] = n[1] * t[2] - n[2] * t[1], n[2] * t[0] - n[0] * t[2], n[0] * t[1] - n[1] * t[0]
    for d in range(3):
        t[d] += 0.12 * s * n[d]
        n[d] += 0.3 * s * side[d]
    _to_unit(t)
    return s


@nb.njit(cache=True, fastmath=True)
def _paint_hat(c: Floats, n: Floats, x: float, y: float, z: float, look: Look) -> None:
    """Knitted ribs, or felt with a ribbon."""
    angle = np.arctan2(x, z - 0.35)
    if look.knit:
        wave = np.sin(46 * angle)
        for d in range(3):
            n[d] += 0.32 * wave * (look.turn[d, 0] * np.cos(angle) - look.turn[d, 2] * np.sin(angle))
        c *= 1 - 0.1 * abs(wave)
    else:
        n[0] += 0.1 * noise(5 * x, 5 * y)
        if 7.86 < y - 0.1 * (z - 0.35) < 8.02 and x * x + (z - 0.35) ** 2 < 1.6:
            c *= 0.72


@nb.njit(cache=True, fastmath=True)
def halve(image: Singles, labels: Bytes) -> tuple[Bytes, Bytes]:
    """Halve a picture, whose bright lights fade to white without an edge, and its labels.

    A small class wins a cell of 2 x 2 pixels if two of these have it and no other class has more.
    """
    S = image.shape[0] // 2
    small, classes = np.empty((S, S, 3), np.uint8), np.empty((S, S), np.uint8)
    cell = np.empty(4, np.uint8)
    for y in range(S):
        for x in range(S):
            for d in range(3):
                total = image[2 * y, 2 * x, d] + image[2 * y, 2 * x + 1, d]
                total += image[2 * y + 1, 2 * x, d] + image[2 * y + 1, 2 * x + 1, d]
                value = total / 1020
                if value > 0.8:
                    value = 0.8 + 0.2 * np.tanh((value - 0.8) / 0.2)
                small[y, x, d] = int(255 * max(value, 0.0) + 0.5)
            cell[0], cell[1] = labels[2 * y, 2 * x], labels[2 * y, 2 * x + 1]
            cell[2], cell[3] = labels[2 * y + 1, 2 * x], labels[2 * y + 1, 2 * x + 1]
            most, best = 0, 0
            for k in range(4):
                same = 0
                for m in range(4):
                    same += cell[m] == cell[k]
                if same > most or (same == most and cell[k] > best and cell[k] != SKIN):
                    most, best = same, cell[k]
            classes[y, x] = best
    return small, classes
