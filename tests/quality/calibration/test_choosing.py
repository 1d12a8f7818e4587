"""Which way is chosen: a pure function of what was measured and of the bounds."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given

from mogle_rt.errors import ConfigError
from mogle_rt.fast.settings import FastConfig
from mogle_rt.quality.calibration.choosing import (
    ALIKE,
    DEFAULT_BOUNDS,
    Bounds,
    Figures,
    choose,
    parse_bounds,
    within,
)
from mogle_rt.quality.calibration.table import Table
from mogle_rt.quality.calibration.ways import EXACT
from tests.conftest import examples

pytestmark = pytest.mark.quick


def figures(way: FastConfig, seconds: float, psnr: float = 40.0, **others: Any) -> Figures:
    measured = {
        "worst": psnr,
        "ssim": 0.99,
        "latents": 0.01,
        "mask": 0.8,
        "mask_loss": 0.0,
        "computed": 5,
        "price": 5,
    } | others
    return Figures(way=way, seconds=seconds, psnr=psnr, **measured)


NOTHING_LEFT_OUT = figures(EXACT, 10.0, 120.0, latents=0.0, ssim=1.0)
numbers = st.floats(0, 60)


@st.composite
def measured(draw: st.DrawFn) -> list[Figures]:
    ways = [FastConfig(steps_mask="10" * k) for k in range(1, draw(st.integers(0, 8)) + 1)]
    drawn = [
        figures(
            way,
            draw(st.floats(0.5, 12)),
            draw(numbers),
            worst=draw(numbers),
            ssim=draw(st.none() | st.floats(0, 1)),
            latents=draw(st.floats(0, 1)),
            mask_loss=draw(st.none() | st.floats(-0.2, 0.2)),
        )
        for way in ways
    ]
    return [NOTHING_LEFT_OUT, *drawn]


bounds = st.builds(
    Bounds,
    psnr=st.none() | numbers,
    worst=st.none() | numbers,
    ssim=st.none() | st.floats(0, 1),
    latents=st.none() | st.floats(0, 1),
    mask=st.none() | st.floats(0, 0.2),
)


def meets(one: Figures, asked: Bounds) -> bool:
    return all(
        (
            asked.psnr is None or one.psnr >= asked.psnr,
            asked.worst is None or one.worst >= asked.worst,
            asked.ssim is None or one.ssim is None or one.ssim >= asked.ssim,
            asked.latents is None or one.latents <= asked.latents,
            asked.mask is None or one.mask_loss is None or one.mask_loss <= asked.mask,
        )
    )


@examples(200)
@given(ways=measured(), asked=bounds)
def test_the_choice_is_within_the_bounds_and_the_fastest(ways: list[Figures], asked: Bounds) -> None:
    chosen = choose(ways, asked)
    assert chosen is not None  # nothing left out is within any bounds
    allowed = [one for one in ways if meets(one, asked)]
    assert chosen in allowed
    for one in allowed:
        assert chosen.seconds <= ALIKE * one.seconds
        if one.seconds <= chosen.seconds:  # not slower, so no nearer to the exact images
            assert one.psnr <= chosen.psnr


@examples(100)
@given(ways=measured(), asked=bounds, data=st.data())
def test_the_order_of_the_ways_does_not_matter(ways: list[Figures], asked: Bounds, data: st.DataObject) -> None:
    chosen, other = choose(ways, asked), choose(data.draw(st.permutations(ways)), asked)
    assert chosen is not None
    assert other is not None
    assert (chosen.seconds, chosen.psnr) == (other.seconds, other.psnr)


def test_none_is_chosen_of_none() -> None:
    assert choose([figures(FastConfig(steps_mask="10"), 1, 20)], Bounds(psnr=30)) is None
    assert choose([], Bounds()) is None


@pytest.mark.parametrize(("fewer", "mask", "expected"), [(41, 40, True), (40, 41, False)])
def test_fewer_steps_are_chosen_where_they_are_better(fewer: float, mask: float, expected: bool) -> None:
    """At an equal number of computed steps both take about as long."""
    rival = figures(FastConfig(most_steps=5), 5.1, fewer)
    way = figures(FastConfig(steps_mask="1" * 5 + "0" * 5), 5.0, mask)
    chosen = choose([NOTHING_LEFT_OUT, rival, way], Bounds(psnr=35))
    assert chosen is (rival if expected else way)
    assert chosen is not None
    assert chosen.fewer_steps == expected


@pytest.mark.parametrize(("fewer", "mask", "says"), [(41, 40, "better"), (40, 41, ""), (40, 40, "better")])
def test_the_table_says_where_fewer_steps_are_better(fewer: float, mask: float, says: str) -> None:
    rival = figures(FastConfig(most_steps=6), 5.1, fewer, price=6)
    way = figures(FastConfig(max_change=0.1), 5.0, mask, computed=6.2, price=6.2)
    table = Table([NOTHING_LEFT_OUT, rival, way], {"fast": Bounds(psnr=35)}, 10, {"model": "m"})
    (row,) = (row for row in table.rows() if row[0].startswith("max_change"))
    assert row[-2] == f"6 steps: {fewer:.1f}" + (f", {says}" if says else "")
    assert table.settings == {"fast": rival.way if fewer > mask else way.way}
    sentences = " ".join(table.sentences())
    assert ("an exact run of a shorter schedule" in sentences) == (fewer > mask)
    assert f"better than {int(fewer >= mask)} of 1 ways" in sentences
    taken = [row[0] for row in table.rows() if row[-1] == "fast"]
    assert taken == ["6 steps" if fewer > mask else "max_change=0.1"]
    assert table.markdown().count("\n| ") == 5


def test_where_nothing_is_within_the_bounds_nothing_is_left_out() -> None:
    table = Table([NOTHING_LEFT_OUT, figures(FastConfig(most_steps=5), 5, 30)], {"balanced": Bounds(psnr=99)}, 10, {})
    assert table.settings == {"balanced": FastConfig()}
    assert "nothing is left out" in table.sentences()[0]


def test_a_bound_on_what_was_not_measured_does_not_count() -> None:
    one = figures(FastConfig(steps_mask="10"), 1, ssim=None, mask=None, mask_loss=None)
    assert within(one, Bounds(ssim=1, mask=0))
    assert not within(one, Bounds(psnr=41))


def test_bounds_are_read() -> None:
    assert parse_bounds([]) == DEFAULT_BOUNDS
    read = parse_bounds(["balanced:psnr=40, mask=none", "fast:latents=0.1", "fast:worst=20"])
    assert read["balanced"] == Bounds(psnr=40, worst=DEFAULT_BOUNDS["balanced"].worst)
    assert (read["fast"].latents, read["fast"].worst) == (0.1, 20)
    assert parse_bounds([f"balanced:{read['balanced']}"])["balanced"].psnr == 40


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("psnr=30", "--max-drift must be balanced or fast with bounds"),
        ("slow:psnr=30", "--max-drift must be balanced or fast with bounds"),
        ("fast:", "--max-drift must be"),
        ("fast:psnr", "--max-drift must be"),
        ("fast:psnr=many", "a bound must be a number or none, got 'fast:psnr=many'"),
        ("fast:psnr=nan", "psnr must be a finite number, got nan"),
        ("fast:psnr=300", "psnr must be from 0 to 120, got 300"),
        ("fast:mask=2", "mask must be from 0 to 1, got 2"),
        ("fast:colour=2", "unknown option 'colour'"),
    ],
)
def test_wrong_bounds_are_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_bounds([text])
