"""The ways that are tried, their competitors, and the cases that they are tried on."""

from __future__ import annotations

from pathlib import Path

import pytest

from mogle_rt.fast.settings import FastConfig
from mogle_rt.quality.calibration.cases import cases_of, spread
from mogle_rt.quality.calibration.ways import (
    candidates,
    competitor,
    computed,
    course_of,
    fewer_steps,
    file_stem,
    label,
    price,
    with_competitors,
)
from tests.apps.test_cli import draw_mask

pytestmark = pytest.mark.quick


@pytest.mark.parametrize("steps", [1, 2, 3, 8, 28, 50])
def test_every_way_has_fewer_steps_beside_it(steps: int) -> None:
    """At an equal number of computed steps; and no two ways do the same."""
    ways = with_competitors(candidates(steps), steps)
    known = [way for way in ways if not way.adapts]
    assert len({course_of(way, steps) for way in known}) == len(known)
    assert len(set(ways)) == len(ways)
    assert len({file_stem(way) for way in ways}) == len(ways)
    assert not any(way.exact for way in ways)
    for way in known:
        if way.most_steps is None and not way.keeps_condition and computed(way, steps) < steps:
            rival = competitor(way, steps)
            assert rival in ways
            assert rival == FastConfig(most_steps=computed(way, steps))
    assert bool(ways) == (steps > 1)


def test_the_usual_ways() -> None:
    """Each mask of 28 steps in both orders, refreshing the condition, and both together."""
    ways = candidates(28)
    assert {computed(way, 28) for way in ways if not (way.keeps_condition or way.adapts)} == {18, 15, 11, 8}
    assert {way.order for way in ways} == {0, 1}
    assert {(way.steps_mask, way.refresh_every) for way in ways if way.keeps_condition} == {
        (None, 2),
        (None, 4),
        ("medium", 4),
        ("fast", 4),
    }
    assert competitor(FastConfig(refresh_every=4), 28) == FastConfig(most_steps=20)  # 7 whole steps and 21 of 0.6
    assert competitor(FastConfig(most_steps=7), 28) is None
    assert {way.max_change for way in ways if way.adapts} == {0.05, 0.1, 0.2}
    assert competitor(FastConfig(max_change=0.1), 28) is None  # its price isn't known beforehand
    assert fewer_steps(FastConfig(max_change=0.1), 9.6, 28) == FastConfig(most_steps=10)
    assert fewer_steps(FastConfig(max_change=0.1), 28.0, 28) is None
    assert price(9, 3) == pytest.approx(3 + 6 * 0.6)


def test_names() -> None:
    assert label(FastConfig()) == "exact"
    assert label(FastConfig(most_steps=1)) == "1 step"
    assert label(FastConfig(most_steps=15)) == "15 steps"
    both = FastConfig(most_steps=15, order=0, steps_mask="fast")
    assert FastConfig.parse(label(both)) == both
    assert len(file_stem(FastConfig(steps_mask="10" * 500))) < 100


def test_cases(tmp_path: Path) -> None:
    masks = [draw_mask(tmp_path / f"{i}.png", seed=i) for i in range(3)]
    cases = cases_of(masks, ["a", "b", ""], seed=0, scales=[1, 0.3, 1], text_only=True)
    assert [(case.mask, case.prompt, case.condition_scale) for case in cases] == [
        (masks[0], "a", 1.0),
        (masks[0], "a", 0.3),
        (None, "a", 1.0),
        (masks[1], "b", 1.0),
        (masks[1], "b", 0.3),
        (None, "b", 1.0),
        (masks[2], "", 1.0),
        (masks[2], "", 0.3),
    ]
    assert len({case.key for case in cases}) == len({case.name for case in cases}) == 8
    assert len({case.seed for case in cases}) == 3
    fewer = cases_of(masks[1:], ["b", ""], seed=0, scales=[1], text_only=False)
    assert set(fewer) < set(cases)  # a case stays what it is, whatever other masks there are
    other = cases_of(masks, ["a", "b", ""], seed=1, scales=[1], text_only=False)
    assert not {case.key for case in other} & {case.key for case in cases}
    masks[0].write_bytes(masks[1].read_bytes())
    assert cases_of(masks[:1], ["a"], seed=0, scales=[1], text_only=False)[0].key != cases[0].key


def test_masks_are_spread() -> None:
    paths = [Path(str(i)) for i in range(10)]
    assert spread(paths, 3) == [paths[0], paths[3], paths[6]]
    assert spread(paths, 20) == paths
