"""What a picture shows and how a caption says it: the attributes, their colours, and sentences about them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

Colour = tuple[int, int, int]

COLOURS: dict[str, Colour] = {
    "red": (200, 45, 40),
    "orange": (238, 140, 40),
    "yellow": (238, 218, 75),
    "green": (60, 150, 70),
    "blue": (50, 85, 200),
    "purple": (125, 60, 170),
    "pink": (240, 150, 195),
    "white": (238, 238, 235),
    "gray": (128, 128, 130),
    "black": (32, 32, 36),
    "brown": (115, 72, 42),
}
HAIR_COLOURS: dict[str, Colour] = {
    "black": (34, 28, 27),
    "brown": (100, 62, 36),
    "blond": (214, 176, 104),
    "red": (176, 76, 32),
    "gray": (156, 153, 150),
    "white": (226, 224, 220),
    "pink": (225, 110, 165),
    "blue": (60, 95, 190),
}
EYE_COLOURS: dict[str, Colour] = {"blue": (80, 125, 190), "brown": (85, 55, 30), "green": (80, 135, 75)}
LIP_COLOURS: dict[str, Colour] = {"red": (185, 25, 40), "pink": (232, 105, 150), "purple": (110, 40, 110)}
SKINS = ("light", "tan", "dark")
STYLES = ("bald", "balding", "very short", "short", "curly", "bun", "medium", "long", "long wavy")
HAIR_WORDS = {
    "balding": "thin {c} hair around a bald top",
    "very short": "very short {c} hair",
    "short": "short {c} hair",
    "curly": "big curly {c} hair",
    "bun": "{c} hair tied in a bun",
    "medium": "medium length {c} hair",
    "long": "long straight {c} hair",
    "long wavy": "long wavy {c} hair",
}


@dataclass(frozen=True, kw_only=True)
class Attributes:
    """What captions can name. None: can't be told from the picture, or not there."""

    sex: str
    age: str
    skin: str
    hair_style: str
    hair: str | None
    fringe: bool
    eyes: str
    beard: str | None
    lips: str | None
    glasses: str | None
    hat: str | None
    earrings: bool
    necklace: bool
    smile: bool
    mouth_open: bool
    clothes: str | None
    background: str
    looks: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def caption(a: Attributes, rng: np.random.Generator, keep: float = 0.82) -> str:
    """A few varied sentences that name most attributes: each with probability ``keep``."""

    def named(probability: float = keep) -> bool:
        return bool(rng.random() < probability)

    def one(*words: str) -> str:
        return words[rng.integers(len(words))]

    nouns = {"man": ("man", "man", "guy"), "woman": ("woman", "woman", "lady")}[a.sex]
    noun = one(*nouns) if named(0.93) else "person"
    age = a.age if named() else ""
    subject = " ".join(w for w in (age, noun) if w)
    article = "an" if subject[0] in "aeiou" else "a"
    opening = one("", "", "a photo of ", "a portrait of ", "the face of ")
    start = f"{opening}{article} {subject}"

    features: list[str] = []
    if named():
        features.append(one(f"{a.skin} skin", f"a {a.skin} complexion"))
    if a.hair_style == "bald":
        if named() and not a.hat:
            features.append(one("no hair", "a bald head"))
    elif a.hair and named(0.88):
        words = HAIR_WORDS[a.hair_style]
        if not named(0.8):
            words = "{c} hair"
        text = words.format(c=a.hair)
        features.append(text + (one(" and a fringe", " with bangs") if a.fringe and named(0.7) else ""))
    if named(0.6):
        features.append(f"{a.eyes} eyes")
    if a.beard and named():
        features.append({"beard": "a full beard", "stubble": "stubble", "mustache": "a mustache"}[a.beard])
    if a.lips and named():
        features.append(one(f"{a.lips} lips", f"{a.lips} lipstick"))

    worn: list[str] = []
    if a.clothes and named(0.88):
        worn.append(one(f"a {a.clothes} shirt", f"{a.clothes} clothes", f"a {a.clothes} top"))
    if a.hat and named(0.88):
        worn.append(f"a {a.hat} hat")
    if a.glasses and named(0.88):
        worn.append(a.glasses)
    if a.earrings and named():
        worn.append("earrings")
    if a.necklace and named():
        worn.append("a necklace")

    doing: list[str] = []
    if a.smile and named():
        doing.append("smiling")
    if a.mouth_open and named():
        doing.append("with an open mouth")
    if a.looks != "front" and named(0.4):
        doing.append(f"looking {a.looks}")
    background = f"{one('on', 'in front of', 'before', 'with')} a {a.background} {one('background', 'wall')}"
    rng.shuffle(features)
    rng.shuffle(worn)
    last = named(0.88)

    pronoun = {"man": "he", "woman": "she"}[a.sex] if noun != "person" else "this person"
    if rng.random() < 0.5:  # one sentence
        text = start
        if features:
            text += f" with {_join(features)}"
        if worn:
            text += f", wearing {_join(worn)}"
        if doing:
            text += f", {_join(doing)}"
        return text + (f", {background}" if last else "") + one("", ".")
    parts = [start + (f" {background}" if last and rng.random() < 0.5 else "")]
    said = " a " in parts[0][len(start) :]
    if features:
        parts.append(f"{pronoun} has {_join(features)}")
    if worn:
        parts.append(f"{pronoun} {one('wears', 'is wearing')} {_join(worn)}")
    if doing:
        parts.append(f"{pronoun} is {_join(doing)}")
    if last and not said:
        parts.append(one(f"the background is {a.background}", f"a {a.background} background"))
    return ". ".join(p[0].upper() + p[1:] for p in parts) + "."


def _join(words: list[str]) -> str:
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]
