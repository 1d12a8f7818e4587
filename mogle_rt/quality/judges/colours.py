"""Whether the colours in the demo's images are those that their prompts name, by a table made from renders."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from mogle_rt.bundle.shipped import DATA
from mogle_rt.masks.classes import Labels
from mogle_rt.quality.pictures import Picture

TABLE = DATA / "demo_colours.npz"
REGIONS = {"background": (0,), "hair": (13,), "clothes": (18,), "skin": (1, 2), "lips": (11, 12), "hat": (14,)}
LEAST_PIXELS = {"lips": 12}  # that a region must have for its colour to be judged; others need 40
NEIGHBOURS = 15
Floats = NDArray[np.float64]

# The nouns that follow a colour in the prompts that the demo was trained on.
NOUNS = {
    "background": "background|wall",
    "hair": "hair",
    "clothes": "shirt|clothes|top|sweater|jacket|dress",
    "skin": "skin|complexion",
    "lips": "lips|lipstick",
    "hat": "hat",
}
OTHER_WORDS = {"grey": "gray", "blonde": "blond", "ginger": "red", "pale": "light"}


def region_colour(image: Picture, labels: Labels, attribute: str) -> Floats | None:
    """The mean colour [3] of an attribute's region; None if the region is too small."""
    region = np.isin(labels, REGIONS[attribute])
    return image[region].mean(0) if region.sum() >= LEAST_PIXELS.get(attribute, 40) else None


class ColourJudge:
    """Names the colour of a region after its nearest neighbours among renders."""

    def __init__(self) -> None:
        with np.load(TABLE, allow_pickle=False) as table:
            self.table = {a: (table[f"{a}_colours"].astype(float), table[f"{a}_names"]) for a in REGIONS}

    def name(self, colour: Floats, attribute: str) -> str:
        """The name of a colour [3], 0 to 255, of an attribute in `REGIONS`."""
        colours, names = self.table[attribute]
        near = names[np.argsort(((colours - colour) ** 2).sum(1))[:NEIGHBOURS]]
        found, counts = np.unique(near, return_counts=True)
        return str(found[counts.argmax()])

    def named(self, prompt: str) -> dict[str, str]:
        """The colours that a prompt names, by attribute: "a woman with red hair" names {"hair": "red"}."""
        result = {}
        for attribute, nouns in NOUNS.items():
            for word in re.findall(rf"(\w+) (?:{nouns})\b", prompt.lower()):
                colour = OTHER_WORDS.get(word, word)
                if colour in self.table[attribute][1]:
                    result[attribute] = colour
        if found := re.search(r"\bbackground is (\w+)", prompt.lower()):
            result["background"] = OTHER_WORDS.get(found[1], found[1])
        return result

    def verdicts(self, image: Picture, labels: Labels, named: Mapping[str, str]) -> dict[str, bool]:
        """For each colour that a prompt names, and whose region is large enough: whether it is right."""
        result = {}
        for attribute in REGIONS:
            colour = region_colour(image, labels, attribute) if attribute in named else None
            if colour is not None:
                result[attribute] = self.name(colour, attribute) == named[attribute]
        return result

    def right(
        self, images: Sequence[Picture], labels: Sequence[Labels], named: Sequence[Mapping[str, str]]
    ) -> dict[str, tuple[int, int]]:
        """For each attribute, how many colours are those that the prompts name, and how many were judged."""
        verdicts = [self.verdicts(*one) for one in zip(images, labels, named, strict=True)]
        return {
            attribute: (sum(hits), len(hits))
            for attribute in REGIONS
            for hits in [[one[attribute] for one in verdicts if attribute in one]]
        }
