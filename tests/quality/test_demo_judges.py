"""The judges of the demo's images: what the network finds, and which colours a prompt names."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from examples.demo_checkpoint.attributes import SKINS, STYLES, Attributes, describe
from mogle_rt.quality.judges.colours import REGIONS, ColourJudge
from mogle_rt.quality.judges.demo import DemoJudge


def people() -> list[Attributes]:
    """Every kind of hair and skin, with the colours in turn."""
    colours = itertools.cycle(("red", "gray", "blue", None, "green", "white"))
    hair = itertools.cycle(("blond", "black", "red", "gray", "brown"))
    return [
        Attributes(
            sex=sex, age="young", skin=skin, hair_style=style, hair=None if style == "bald" else next(hair), fringe=True,
            eyes="blue", beard=None, lips=next(itertools.islice(colours, 1, None)) and "pink", glasses="glasses",
            hat=next(colours), earrings=True, necklace=True, smile=True, mouth_open=True, clothes=next(colours),
            background="orange", looks="left",
        )
        for sex in ("man", "woman") for skin in SKINS for style in STYLES
    ]  # fmt: skip


def test_the_colours_that_a_prompt_names_are_read_off_it() -> None:
    """The generator of the demo's prompts says which colours it named."""
    judge, rng = ColourJudge(), np.random.default_rng(0)
    for person in people() * 4:
        prompt, named = describe(person, rng, keep=0.8)
        assert judge.named(prompt) == {a: named[a] for a in REGIONS if a in named}, prompt


@pytest.mark.parametrize(
    ("prompt", "named"),
    [
        ("A lady with long ginger hair and a grey hat", {"hair": "red", "hat": "gray"}),
        ("a bald man, no hair", {}),
        ("She has wavy hair. The background is pink.", {"background": "pink"}),
        ("", {}),
    ],
)
def test_other_words_for_colours(prompt: str, named: dict[str, str]) -> None:
    assert ColourJudge().named(prompt) == named


def test_a_colour_is_judged_where_its_region_is_large_enough() -> None:
    labels = np.zeros((32, 32), np.uint8)
    labels[:16] = 13
    labels[16, :5] = 14  # five pixels of a hat
    image = np.zeros((32, 32, 3), np.uint8)
    image[:16], image[16:] = (214, 176, 104), (200, 45, 40)
    named = {"hair": "blond", "background": "green", "hat": "red"}
    judge = ColourJudge()
    assert judge.verdicts(image, labels, named) == {"background": False, "hair": True}
    right = judge.right([image, image], [labels, labels], [named, {}])
    assert (right["hair"], right["background"], right["hat"]) == ((1, 1), (0, 1), (0, 0))


def test_labels_are_as_large_as_the_picture() -> None:
    judge = DemoJudge()
    picture = np.zeros((40, 56, 3), np.uint8)
    assert judge.labels([picture])[0].shape == (40, 56)
    assert judge.features([picture, picture]).shape == (2, 224)
    assert [len(m) for m in judge.maps([picture])] == [1, 1]
