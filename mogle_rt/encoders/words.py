"""The words that a text encoder was trained with, where its tokenizer tells them.

T5's published tokenizer takes words apart, so nobody can say which words its encoder never saw. The demo's has one token
for each word of its training's captions, and spells every other word letter by letter. In training the encoder met no
spelled word, so such a word tells it nothing, or something else than it says.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from typing import Any

from mogle_rt.bundle.bundle import Bundle
from mogle_rt.encoders.tokenizers import load_tokenizer, without_panic

BEGIN = "▁"  # what T5's tokenizers put before a word
PUNCTUATION = ".,;:!?"
ALIKE = 0.8  # how alike a known word must be to be named, from 0 to 1: "bearded" is to "beard", "tall" is not to "wall"
MOST_NAMED = 8  # words in a message
LONGEST = 30  # letters of a word in a message


class KnownWords:
    """The words that have a token of their own in a T5 tokenizer that takes no word apart.

    Attributes:
        words: without their mark; "man" and "Man" are two words.
    """

    def __init__(self, tokenizer: Any, words: Iterable[str]) -> None:
        self.words = frozenset(words)
        self._tokenizer = tokenizer
        self._pieces = set(tokenizer.get_vocab())

    def unseen(self, prompt: str) -> list[str]:
        """The words of a prompt that the encoder reads letter by letter, each once, in their order."""
        return list(dict.fromkeys(self._spelled(prompt)))

    def _spelled(self, prompt: str) -> Iterator[str]:
        group: list[str] = []
        pieces = without_panic(
            lambda: self._tokenizer.tokenize(prompt, verbose=False), "T5's tokenizer can't read this prompt"
        )
        for piece in [*pieces, BEGIN]:
            if piece.startswith(BEGIN):
                if any(one.isalnum() or one not in self._pieces for one in group):
                    word = "".join(group).removeprefix(BEGIN)
                    yield word.strip(PUNCTUATION) or word
                group = []
            group.append(piece)

    def warning(self, words: list[str]) -> str:
        """One line about words that `unseen` found, with the known words that are written nearly as they are."""
        named = []
        for word in words[:MOST_NAMED]:
            near = difflib.get_close_matches(word.lower(), sorted(self.words), 1, ALIKE)
            named.append(repr(word[:LONGEST]) + (f" (it knows {near[0]!r})" if near else ""))
        more = f" and {len(words) - MOST_NAMED} more" if len(words) > MOST_NAMED else ""
        return (
            f"this model's text encoder never saw {', '.join(named)}{more} in its training; of what such words say, "
            f"the image shows nothing for sure"
        )


def words_of(bundle: Bundle) -> KnownWords | None:
    """The words that a bundle's T5 tokenizer tells; None if it tells none, or the bundle holds no text encoders.

    Raises:
        CheckpointError: the tokenizer's files can't be read.
    """
    if not bundle.has_text_encoders:
        return None
    return known_words(load_tokenizer("tokenizer_2", bundle.files("tokenizer_2")))


def known_words(tokenizer: Any) -> KnownWords | None:
    """The words that a T5 tokenizer tells, or None if it takes words apart, as T5's published one does."""
    pieces = set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens)
    words = {piece.removeprefix(BEGIN) for piece in pieces if piece.startswith(BEGIN)} - {""}
    parts = any(len(piece) > 1 and not piece.startswith(BEGIN) for piece in pieces)
    return KnownWords(tokenizer, words) if words and not parts else None
