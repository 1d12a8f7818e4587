"""The cases that are drawn in every way: masks with their prompts, each with a seed of its own."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mogle_rt.jobs.plan import digest_of, short_digest

SEEDS = 1_000_000  # different ones; a mask's own follows from its contents, so that further masks don't change it
LONGEST_STEM = 60  # characters


@dataclass(frozen=True)
class Case:
    """An image to draw in every way.

    Attributes:
        mask: None draws from the prompt alone.
        prompt: the text. seed: of the noise. condition_scale: the strength of the mask.
        key: a digest of all that the image depends on in this case.
        name: of its files, and for people.
    """

    mask: Path | None
    prompt: str
    seed: int
    condition_scale: float
    key: str
    name: str


def cases_of(
    masks: Sequence[Path], prompts: Sequence[str], *, seed: int, scales: Sequence[float], text_only: bool
) -> list[Case]:
    """The cases of some masks.

    Args:
        prompts: of each mask.
        seed: another one gives all cases other noise.
        scales: strengths of the mask; there is a case for each.
        text_only: whether there is also a case of each prompt without its mask. Prompts that are empty have none.

    Raises:
        OSError: a mask can't be read.
    """
    cases: dict[str, Case] = {}
    for mask, prompt in zip(masks, prompts, strict=True):
        digest = digest_of(mask)
        own = seed + int(digest, 16) % SEEDS
        kinds: list[tuple[Path | None, float]] = [(mask, scale) for scale in dict.fromkeys(scales)]
        if text_only and prompt:
            kinds.append((None, 1.0))
        for shown, scale in kinds:
            key = short_digest(json.dumps([digest if shown else "", prompt, own, scale]).encode())
            kind = "-text" if shown is None else "" if scale == 1 else f"-{scale:g}"
            cases.setdefault(key, Case(shown, prompt, own, scale, key, f"{mask.stem[:LONGEST_STEM]}{kind}-{key[:6]}"))
    return list(cases.values())


def spread(masks: Sequence[Path], most: int) -> list[Path]:
    """At most so many masks, evenly spread over all of them."""
    count = min(most, len(masks))
    return [masks[i * len(masks) // count] for i in range(count)]
