"""Which steps are computed, and from what the others follow: pure functions of the settings and the noise levels."""

from __future__ import annotations

import pytest

from mogle_rt.fast.course import WHOLE, Course, Kind, Way, computed_steps, ways_of
from mogle_rt.fast.settings import POLICIES, FastConfig

pytestmark = pytest.mark.quick

SIGMAS = [1.0, 0.9, 0.7, 0.4, 0.3, 0.1]


def digits(computed: list[bool]) -> str:
    return "".join(str(int(c)) for c in computed)


def mask(text: str) -> tuple[bool, ...]:
    return tuple(c == "1" for c in text)


@pytest.mark.parametrize("name", POLICIES)
def test_a_mask_of_the_runs_length_is_kept(name: str) -> None:
    assert digits(computed_steps(mask(POLICIES[name]), 28)) == POLICIES[name]


@pytest.mark.parametrize(
    ("text", "steps", "expected"),
    [
        ("10", 8, "11110001"),  # the first half, and the last
        ("1010", 8, "11001101"),
        ("1101", 8, "11110011"),
        ("10", 2, "11"),
        ("1", 5, "11111"),
        ("000", 4, "1001"),
        ("0111", 4, "1111"),
        ("1100", 8, "11110001"),
        ("1100", 2, "11"),
        ("1000000000", 30, "111000000000000000000000000001"),
        (POLICIES["fast"], 14, "11110000100001"),
        (POLICIES["fast"], 1, "1"),
    ],
)
def test_masks_are_stretched(text: str, steps: int, expected: str) -> None:
    assert digits(computed_steps(mask(text), steps)) == expected


@pytest.mark.parametrize("name", POLICIES)
def test_any_number_of_steps(name: str) -> None:
    """The share of computed steps is the mask's; the first and the last step are always among them."""
    for steps in range(1, 200):
        computed = computed_steps(mask(POLICIES[name]), steps)
        assert len(computed) == steps
        assert computed[0]
        assert computed[-1]
        assert abs(sum(computed) - max(1, POLICIES[name].count("1") * steps // 28)) <= 1


def test_a_run_that_begins_later_has_the_rest_of_the_mask() -> None:
    assert digits(computed_steps(mask(POLICIES["fast"]), 28, first=8)) == "0000000010010000100000100001"
    assert digits(computed_steps(mask("110001"), 6, first=5)) == "000001"
    assert digits(computed_steps(mask("110001"), 6, first=6)) == "000000"
    assert digits(computed_steps(None, 3, first=1)) == "011"


def test_without_settings_every_step_is_whole() -> None:
    assert ways_of(None, SIGMAS) == [WHOLE] * 6 == ways_of(FastConfig(), SIGMAS)


def test_the_last_velocity_is_reused() -> None:
    ways = ways_of(FastConfig(steps_mask="110011", order=0), SIGMAS)
    assert ways == [WHOLE, WHOLE, Way(Kind.REUSED), Way(Kind.REUSED), WHOLE, WHOLE]


def test_a_straight_line_is_continued_over_the_noise_level() -> None:
    """For a velocity that is linear in the noise level, what is expected is what would be computed."""
    ways = ways_of(FastConfig(steps_mask="110101"), SIGMAS)

    def velocity(sigma: float) -> float:
        return 3.0 - 5.0 * sigma

    known: list[float] = []
    for sigma, way in zip(SIGMAS, ways, strict=True):
        if way.kind is Kind.WHOLE:
            known.append(velocity(sigma))
        else:
            assert known[-1] + way.weight * (known[-1] - known[-2]) == pytest.approx(velocity(sigma), abs=1e-12)
    assert [way.kind for way in ways].count(Kind.REUSED) == 2


def test_one_velocity_alone_is_reused_as_it_is() -> None:
    ways = ways_of(FastConfig(steps_mask="100111"), SIGMAS)
    assert ways[1:3] == [Way(Kind.REUSED, 0.0)] * 2
    later = ways_of(FastConfig(steps_mask="110001"), SIGMAS, first=2)  # nothing of steps 0 and 1 is known
    assert later[2:] == [WHOLE, Way(Kind.REUSED, 0.0), Way(Kind.REUSED, 0.0), WHOLE]


def test_a_course_begins_anew_out_of_turn() -> None:
    course = Course(FastConfig(steps_mask="100001"), SIGMAS)
    assert not course.may_go_on(0)  # there is nothing to go on with
    for k in range(3):
        assert course.way(k).kind is (Kind.WHOLE if k == 0 else Kind.REUSED)
        course.done(k)
    assert course.may_go_on(3)
    assert not course.may_go_on(2)
    course.begin(3)
    assert not course.may_go_on(3)
    assert course.way(3).kind is Kind.WHOLE
    course.done(3)
    assert course.way(1).kind is Kind.WHOLE  # back, where nothing is known any more
    course.done(1)
    assert course.computed == 3
    course = Course(FastConfig(steps_mask="100001"), SIGMAS)
    course.way(0)
    course.done(0)
    assert course.way(2).kind is Kind.WHOLE  # ahead: what step 1 would have kept isn't there


def test_a_course_without_settings_never_goes_on() -> None:
    """So that nothing is compared, which would wait for the device."""
    course = Course(None, SIGMAS)
    course.done(0)
    assert not course.may_go_on(1)
