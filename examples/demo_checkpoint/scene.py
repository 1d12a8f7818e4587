"""Chooses people, what they wear, their poses and the light, at random, before anything is rendered."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from examples.demo_checkpoint.attributes import (
    COLOURS,
    EYE_COLOURS,
    GLASSES,
    HAIR_COLOURS,
    LIP_COLOURS,
    STYLES,
    Attributes,
)
from examples.demo_checkpoint.hair import Shape, hairstyle, hat
from examples.demo_checkpoint.heads import HeadModel

Floats = NDArray[np.float64]

HAIR_GROUP, HAT_GROUP = 7, 8  # after those of `heads.GROUPS`
SKIN_TONES = np.array([[242, 204, 182], [218, 166, 124], [116, 77, 56]], float)
FRAMES = ((22, 22, 26), (22, 22, 26), (110, 60, 30), (170, 30, 35), (60, 70, 120), (205, 175, 90))
LESS_HAIR = ("bald", "very short", "balding")


@dataclass
class Light:
    """Where light comes from, in the viewer's space: x to the right, y up, z to the viewer.

    Attributes:
        key, rim: [3], unit directions of the light that throws shadows, and of one from behind.
        key_colour, rim_colour, sky, ground: [3], colours of these and of what comes from above and below; 1 is full.
    """

    key: Floats
    rim: Floats
    key_colour: Floats
    rim_colour: Floats
    sky: Floats
    ground: Floats


@dataclass
class Scene:
    """All that is chosen at random.

    Attributes:
        points: [V, 3], the head. shapes: hair and hat, with their groups. turn: [3, 3], a rotation.
        zoom: decimetres that the picture shows. centre: of the face in the picture, from 0 to 1.
        colours: [3] of 0 to 255, by part. neckline: its height. v_neck: how deep it is cut.
        brow: half of the brows' thickness, and how far they are raised. gaze: [2], how far the eyes look aside and up.
    """

    points: Floats
    shapes: list[tuple[int, Shape]]
    turn: Floats
    zoom: float
    centre: tuple[float, float]
    light: Light
    colours: dict[str, Floats]
    attributes: Attributes
    neckline: float
    v_neck: float
    brow: tuple[float, float]
    gaze: Floats
    parting: float
    ring: bool
    seed: int


def _pick(rng: np.random.Generator, table: dict[str, tuple[int, int, int]], spread: float) -> tuple[str, Floats]:
    name = list(table)[rng.integers(len(table))]
    return name, _vary(rng, table[name], spread)


def _vary(rng: np.random.Generator, colour: Any, spread: float) -> Floats:
    base = np.array(colour, float) * rng.uniform(1 - spread, 1 + spread)
    return (base + rng.normal(0, 40 * spread, 3)).clip(6, 248)


def _unit(*parts: float) -> Floats:
    return np.array(parts) / np.linalg.norm(parts)


def _light(rng: np.random.Generator) -> Light:
    """One of five set-ups: soft from the front, from either side, from above, or evening light with a bright edge."""
    side = rng.choice([-1.0, 1.0])
    kind = rng.choice(["soft", "side", "above", "evening", "studio"], p=[0.3, 0.25, 0.12, 0.13, 0.2])
    key = {
        "soft": _unit(side * rng.uniform(0.1, 0.4), rng.uniform(0.25, 0.6), 1),
        "side": _unit(side * rng.uniform(0.7, 1.2), rng.uniform(0.2, 0.7), 0.8),
        "above": _unit(side * rng.uniform(0.0, 0.3), rng.uniform(0.8, 1.2), 0.9),
        "evening": _unit(side * rng.uniform(0.6, 1.0), rng.uniform(0.1, 0.4), 0.8),
        "studio": _unit(side * rng.uniform(0.4, 0.8), rng.uniform(0.4, 0.7), 0.9),
    }[kind]
    fill = {"soft": 0.55, "side": 0.4, "above": 0.45, "evening": 0.42, "studio": 0.48}[kind] * rng.uniform(0.92, 1.1)
    warmth = rng.normal(0, 0.025) + (0.05 if kind == "evening" else 0.0)
    warm = np.array([1 + warmth, 1.0, 1 - 1.3 * warmth])
    rim = rng.uniform(0.15, 0.4) + (0.25 if kind in ("evening", "studio") else 0.0)
    return Light(
        key=key,
        rim=_unit(-np.sign(key[0]) * 1.0, 0.45, -0.55),
        key_colour=warm * (1.12 - fill),
        rim_colour=rim * np.array([1 - warmth, 1.0, 1 + warmth]),
        sky=fill * 1.08 * np.array([1 - 0.4 * warmth, 1.0, 1 + 0.6 * warmth]),
        ground=fill * 0.78 * np.array([1.05, 0.98, 0.94]),
    )


def draw_scene(rng: np.random.Generator, model: HeadModel) -> Scene:
    """Choose a person, a pose and a light at random."""
    races = rng.dirichlet([0.4] * 3)
    male = bool(rng.random() < 0.5)
    old = float(rng.choice([0.0, 0.0, 0.85]))
    smile = float(rng.uniform(0.5, 1.0)) if rng.random() < 0.45 else 0.0
    jaw = float(rng.uniform(0.3, 0.75)) if rng.random() < 0.28 else 0.0
    points = model.person(rng, races, male, old, smile, jaw)

    skin = _vary(rng, races @ SKIN_TONES, 0.05)
    tone = "light" if skin.mean() > 182 else "tan" if skin.mean() > 128 else "dark"
    weights = [0.1, 0.12 if old else 0.03, 0.2, 0.32, 0.12, 0.04, 0.06, 0.02, 0.01] if male else [
        0.02, 0.0, 0.05, 0.13, 0.15, 0.12, 0.18, 0.18, 0.17]  # fmt: skip
    style = str(rng.choice(STYLES, p=np.array(weights) / sum(weights)))
    fringe = bool(rng.random() < 0.3) and style in ("short", "medium", "long", "long wavy", "bun")
    chances = np.array([1, 1, 1, 1, 0.4 + 2 * (old > 0), 0.3 + (old > 0), 0.5, 0.5, 0.5, 0.4])
    hair_name = str(rng.choice(list(HAIR_COLOURS), p=chances / chances.sum()))
    background_name, background = _pick(rng, COLOURS, 0.07)
    clothes_name, clothes = _pick(rng, COLOURS, 0.07)
    eyes_name, eyes = _pick(rng, EYE_COLOURS, 0.06)
    hat_name, hat_colour = _pick(rng, COLOURS, 0.07)
    lips_name, lips = None, skin * 0.62 + np.array([188, 78, 82]) * 0.38
    if rng.random() < (0.04 if male else 0.6):
        lips_name, lips = _pick(rng, LIP_COLOURS, 0.06)
    beard = (
        str(rng.choice(["beard", "stubble", "mustache"], p=[0.5, 0.25, 0.25])) if male and rng.random() < 0.5 else None
    )
    glasses = str(rng.choice(GLASSES)) if rng.random() < 0.26 else None

    parting = float(rng.uniform(-0.4, 0.4))
    shapes = [(HAIR_GROUP, s) for s in hairstyle(model, style, fringe, rng)]
    with_hat = bool(rng.random() < 0.2) and style not in ("curly", "bun")
    if with_hat:
        for _, shape in shapes:  # hair lies flat under a hat
            if shape.thickness is not None:
                shape.thickness = np.minimum(shape.thickness, 0.1)
        shapes += [(HAT_GROUP, s) for s in hat(model, 0.05 if style in LESS_HAIR else 0.14, rng)]
    yaw = float(rng.normal(0, 0.08) if rng.random() < 0.6 else rng.uniform(-0.55, 0.55))
    pitch, roll = rng.normal(0.0, 0.06), rng.normal(0, 0.04)
    looks = "left" if yaw > 0.25 else "right" if yaw < -0.25 else "front"
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
    dark_brow = np.array([70.0, 50, 40]) if style == "bald" and not beard else np.array(HAIR_COLOURS[hair_name], float)
    hair = _vary(rng, HAIR_COLOURS[hair_name], 0.06)
    return Scene(
        points=points,
        shapes=shapes,
        turn=_rotation(yaw, pitch, roll),
        zoom=rng.uniform(2.5, 2.95),
        centre=(rng.uniform(0.48, 0.52) + 0.11 * yaw, rng.uniform(0.505, 0.55)),
        light=_light(rng),
        colours={
            "skin": skin, "hair": hair, "background": background, "clothes": clothes, "eyes": eyes, "hat": hat_colour,
            "lips": lips, "frame": _vary(rng, FRAMES[rng.integers(len(FRAMES))], 0.05), "brow": 0.72 * dark_brow,
            "gold": np.array([232.0, 196, 84] if rng.random() < 0.6 else [205.0, 208, 214]),
        },
        attributes=attributes,
        neckline=rng.choice([5.62, 5.75, 5.95]) + rng.uniform(-0.05, 0.05),
        v_neck=rng.choice([0.0, 0.6]),
        brow=(rng.uniform(0.022, 0.045) + 0.008 * male, rng.uniform(-0.02, 0.035)),
        gaze=np.array([-0.06 * np.sin(yaw) * rng.uniform(0, 1.6) + rng.normal(0, 0.008), rng.normal(0, 0.005)]),
        parting=parting,
        ring=bool(rng.random() < 0.5),
        seed=int(rng.integers(2**31)),
    )  # fmt: skip


def _rotation(yaw: float, pitch: float, roll: float) -> Floats:
    (cy, cp, cr), (sy, sp, sr) = np.cos([yaw, pitch, roll]), np.sin([yaw, pitch, roll])
    around_y = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    around_x = np.array([[1, 0, 0], [0, cp, -sp], [0, sp, cp]])
    around_z = np.array([[cr, -sr, 0], [sr, cr, 0], [0, 0, 1]])
    return around_z @ around_x @ around_y
