"""Writes the lists in docs/demo.md: what the demo can draw, and all words that its text encoder knows.

    python -m examples.demo_checkpoint.words

A test fails while the page says something else.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from examples.demo_checkpoint.attributes import (
    AGES,
    BEARD_WORDS,
    COLOURS,
    EYE_COLOURS,
    GLASSES,
    HAIR_COLOURS,
    HAIR_WORDS,
    LIP_COLOURS,
    NOUNS,
    SKINS,
    SYNONYMS,
)
from mogle_rt.bundle.bundle import Bundle
from mogle_rt.encoders.words import words_of

PAGE = Path(__file__).parents[2] / "docs" / "demo.md"


def table() -> str:
    """What can be named, and with which words, as a table in Markdown."""
    styles = [words.format(c="red") for words in HAIR_WORDS.values()]
    other_words = [(word, other) for word, other in SYNONYMS if other.strip(" ,") not in word.split()]
    rows = {
        "age": _listed(AGES),
        "sex": _listed([word for nouns in NOUNS.values() for word in dict.fromkeys(nouns)] + ["person"]),
        "skin": _listed([f"{skin} skin" for skin in SKINS] + ["a dark complexion"]),
        "hair's colour": _listed(HAIR_COLOURS),
        "hair": _listed([*styles, "red hair and a fringe", "red hair with bangs", "no hair", "a bald head"]),
        "eyes": _listed([f"{colour} eyes" for colour in EYE_COLOURS]),
        "beard": _listed([words.format(c="") for words in BEARD_WORDS.values()])
        + "; with a colour of hair: "
        + _listed([words.format(c="gray ") for words in BEARD_WORDS.values()]),
        "lips": f"{_listed(['red lips', 'red lipstick'])}; {_listed(LIP_COLOURS)}",
        "mouth": _listed(["smiling", "with an open mouth"]),
        "glasses": _listed(GLASSES),
        "hat": f"`a red hat`; {_listed(COLOURS)}",
        "clothes": f"{_listed(['a red shirt', 'a red top', 'red clothes'])}; the colours of hats",
        "jewellery": _listed(["earrings", "a necklace"]),
        "looks": _listed(["looking left", "looking right"]),
        "background": f"{_listed(['on a red background', 'in front of a red wall'])}; the colours of hats",
        "other words for the same": ", ".join(f"`{other.strip()}` for `{word.strip()}`" for word, other in other_words),
    }
    return "\n".join(["| what | words |", "|---|---|", *(f"| {name} | {words} |" for name, words in rows.items())])


def known() -> str:
    """All words that the text encoder of the demo in the package was trained with."""
    found = words_of(Bundle("demo"))
    assert found is not None
    return ", ".join(f"`{word}`" for word in sorted(found.words, key=lambda word: (word.lower(), word)))


def page(text: str) -> str:
    """The page with its lists as they are now."""
    for name, made in (("table", table()), ("known", known())):
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        before, found, rest = text.partition(begin)
        _, also, after = rest.partition(end)
        if not (found and also):
            raise SystemExit(f"{PAGE}: lacks the lines {begin} and {end}")
        text = f"{before}{begin}\n\n{made}\n\n{end}{after}"
    return text


def _listed(words: Iterable[str]) -> str:
    return ", ".join(f"`{word}`" for word in words)


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
