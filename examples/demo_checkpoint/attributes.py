"""The attributes that a picture shows, their colours, and the sentences that captions say about them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mogle_rt.config import NUM_CLASSES
from mogle_rt.masks import CLASS_NAMES

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
    "purple": (118, 66, 168),
    "green": (66, 140, 84),
}
EYE_COLOURS: dict[str, Colour] = {"blue": (80, 125, 190), "brown": (85, 55, 30), "green": (80, 135, 75)}
LIP_COLOURS: dict[str, Colour] = {
    "red": (192, 22, 38),
    "pink": (236, 100, 152),
    "purple": (118, 40, 130),
    "orange": (226, 104, 40),
    "brown": (104, 56, 36),
    "blue": (52, 74, 178),
    "black": (34, 24, 30),
}
AGES = ("young", "old")
SKINS = ("light", "tan", "dark")
GLASSES = ("round glasses", "square glasses", "sunglasses")
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
BEARD_WORDS = {"beard": "a full {c}beard", "stubble": "{c}stubble", "mustache": "a {c}mustache"}
NOUNS = {"man": ("man", "man", "guy"), "woman": ("woman", "woman", "lady")}


@dataclass(frozen=True, kw_only=True)
class Attributes:
    """What captions can name. None means that the picture does not have it, or does not show it clearly."""

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


def visible(a: Attributes, labels: NDArray[np.uint8]) -> Attributes:
    """The attributes without those that a mask [H, W] doesn't show, such as hair under a hat or what was cut off."""
    area = np.bincount(labels.reshape(-1), minlength=NUM_CLASSES) * (128 * 128 / labels.size)
    shown = {name: int(area[c]) for c, name in enumerate(CLASS_NAMES)}
    values = a.to_dict()
    for name, part in (("hair", "hair"), ("clothes", "cloth"), ("hat", "hat")):
        if shown[part] < 60:
            values[name] = None
    values["fringe"] = bool(a.fringe and values["hair"] and not values["hat"])
    values["necklace"] = bool(a.necklace and shown["necklace"] > 12)
    values["earrings"] = bool(a.earrings and shown["ear_ring"] > 6)
    return Attributes(**values)


def caption(a: Attributes, rng: np.random.Generator, keep: float = 0.82) -> str:
    """A few varied sentences. They name each attribute with probability ``keep``."""
    return describe(a, rng, keep)[0]


def describe(a: Attributes, rng: np.random.Generator, keep: float = 0.82) -> tuple[str, dict[str, str]]:
    """A caption, and the attributes that it names with their values."""
    said: dict[str, str] = {}

    def chance(probability: float) -> bool:
        return bool(rng.random() < probability)

    def named(attribute: str, probability: float = keep) -> bool:
        value = getattr(a, attribute)
        if not value or not chance(probability):
            return False
        said[attribute] = "yes" if value is True else value
        return True

    def one(*words: str) -> str:
        return words[rng.integers(len(words))]

    noun = one(*NOUNS[a.sex]) if named("sex", 0.93) else "person"
    subject = f"{a.age} {noun}" if named("age") else noun
    opening = one("", "", "a photo of ", "a portrait of ", "the face of ")
    start = f"{opening}{'an' if subject[0] in 'aeiou' else 'a'} {subject}"

    features: list[str] = []
    if named("skin"):
        features.append(one(f"{a.skin} skin", f"a {a.skin} complexion"))
    if a.hair_style == "bald":
        if not a.hat and named("hair_style"):
            features.append(one("no hair", "a bald head"))
    elif named("hair", 0.88):
        words = HAIR_WORDS[a.hair_style] if named("hair_style", 0.8) else "{c} hair"
        fringe = one(" and a fringe", " with bangs") if named("fringe", 0.7) else ""
        features.append(words.format(c=a.hair) + fringe)
    if named("eyes", 0.6):
        features.append(f"{a.eyes} eyes")
    if named("beard"):
        words = BEARD_WORDS[str(a.beard)]
        features.append(words.format(c=f"{a.hair} " if "hair" in said and chance(0.4) else ""))
    if named("lips", 0.92):
        features.append(one(f"{a.lips} lips", f"{a.lips} lipstick"))

    worn: list[str] = []
    if named("clothes", 0.88):
        worn.append(one(f"a {a.clothes} shirt", f"{a.clothes} clothes", f"a {a.clothes} top"))
    if named("hat", 0.94):
        worn.append(f"a {a.hat} hat")
    if named("glasses", 0.88):
        worn.append(str(a.glasses))
    if named("earrings"):
        worn.append("earrings")
    if named("necklace"):
        worn.append("a necklace")

    doing: list[str] = []
    if named("smile"):
        doing.append("smiling")
    if named("mouth_open"):
        doing.append("with an open mouth")
    if a.looks != "front" and named("looks", 0.4):
        doing.append(f"looking {a.looks}")
    place = f"{one('on', 'in front of', 'before', 'with')} a {a.background} {one('background', 'wall')}"
    rng.shuffle(features)
    rng.shuffle(worn)
    last = named("background", 0.88)

    if chance(0.5):  # one sentence
        text = start
        if features:
            text += f" with {_join(features)}"
        if worn:
            text += f", wearing {_join(worn)}"
        if doing:
            text += f", {_join(doing)}"
        return text + (f", {place}" if last else "") + one("", "."), said
    early = last and chance(0.5)
    parts = [f"{start} {place}" if early else start]
    pronoun = {"man": "he", "woman": "she"}[a.sex] if noun != "person" else "this person"
    if features:
        parts.append(f"{pronoun} has {_join(features)}")
    if worn:
        parts.append(f"{pronoun} {one('wears', 'is wearing')} {_join(worn)}")
    if doing:
        parts.append(f"{pronoun} is {_join(doing)}")
    if last and not early:
        parts.append(one(f"the background is {a.background}", f"a {a.background} background"))
    return ". ".join(p[0].upper() + p[1:] for p in parts) + ".", said


SYNONYMS = (
    ("gray", "grey"),
    ("blond", "blonde"),
    ("red hair", "ginger hair"),
    ("mustache", "moustache"),
    ("a full ", "a "),
    ("shirt", "sweater"),
    ("shirt", "jacket"),
    ("top", "dress"),
    ("light skin", "pale skin"),
    ("young ", "young, "),
    ("old ", "elderly "),
    ("in front of", "against"),
    ("smiling", "laughing"),
)


def reword(text: str, rng: np.random.Generator) -> str:
    """The same in other words or in small letters, as people write who have not read these captions."""
    for word, other in SYNONYMS:
        if rng.random() < 0.15:
            text = text.replace(word, other)
    return text.lower() if rng.random() < 0.4 else text


def _join(words: list[str]) -> str:
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]
