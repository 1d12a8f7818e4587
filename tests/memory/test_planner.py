"""Plans fit into the memory, hold as much of the model as they can, and give parts up in the documented order."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from mogle_rt.errors import InsufficientMemoryError
from mogle_rt.memory.planner import KEPT, NONE, STREAMED, Demand, SublayerBytes, least_plan, make_plan, same_plan

MB = 10**6
DEMAND = Demand(
    always=10 * MB,
    sublayers=(SublayerBytes(100 * MB, 100 * MB),) * 8 + (SublayerBytes(50 * MB, 50 * MB),) * 8,
    run=20 * MB,
    tables=5 * MB,
    vae=30 * MB,
    text=700 * MB,
    text_streamed=60 * MB,
    text_work=10 * MB,
    modulation=500 * MB,
    encode=40 * MB,
    prepare=15 * MB,
    step=25 * MB,
    decode=90 * MB,
)
WEIGHTS = 1210 * MB


def test_all_is_kept_where_there_is_room() -> None:
    plan = make_plan(DEMAND, device="cuda", room=3000 * MB)
    assert (plan.streamed, plan.text, plan.modulation, plan.takes_turns) == ((), KEPT, KEPT, False)
    assert plan.resident == WEIGHTS + 500 * MB
    # The weights, modulations, text encoders, VAE, buffers, two runs' tables, and the memory that decoding takes.
    assert plan.peak == plan.stages["decode"] == (1210 + 500 + 700 + 30 + 20 + 2 * 5 + 90) * MB
    assert plan.peak == make_plan(DEMAND, device="cuda", room=plan.peak).peak


def test_parts_are_given_up_in_order() -> None:
    """With a byte less than a plan takes, more is streamed: modulations, then text encoders, then more and more
    sublayers."""
    room, seen = 3000 * MB, []
    while True:
        try:
            plan = make_plan(DEMAND, device="cuda", room=room)
        except InsufficientMemoryError:
            break
        seen.append((plan.modulation, plan.text, len(plan.streamed)))
        room = plan.peak - 1
    assert seen[:3] == [(KEPT, KEPT, 0), (STREAMED, KEPT, 0), (STREAMED, STREAMED, 0)]
    counts = [streamed for *_, streamed in seen[3:]]
    # The first plan with streamed sublayers has four: two slots of 100 MB each take what fewer sublayers would free.
    # With an even number, the last sublayer of a step and the first of the next one have different slots.
    assert counts == list(range(4, 17, 2))
    assert {(modulation, text) for modulation, text, _ in seen[3:]} == {(STREAMED, STREAMED)}


def test_on_a_cpu_parts_take_turns_at_last() -> None:
    """A CPU always reads modulations anew for every prompt. If everything is streamed and memory still doesn't suffice,
    the VAE and the steps' weights take turns."""
    assert make_plan(DEMAND, device="cpu", room=3000 * MB).modulation == STREAMED
    least = least_plan(DEMAND, device="cpu")
    assert least.takes_turns
    assert least.streamed == tuple(range(16))
    assert least.peak == (10 + 200 + 20 + 25) * MB  # the steps' memory, without the VAE
    assert not make_plan(DEMAND, device="cpu", room=400 * MB).takes_turns
    assert make_plan(DEMAND, device="cpu", room=least.peak).takes_turns


def test_on_apples_gpu_nothing_is_streamed() -> None:
    assert make_plan(DEMAND, device="mps", room=1400 * MB).streamed == ()
    with pytest.raises(InsufficientMemoryError, match=r"needs at least 1\.4 GB of GPU memory, and 1\.2 GB may be used"):
        make_plan(DEMAND, device="mps", room=1200 * MB)


def test_weights_that_cant_be_streamed_stay() -> None:
    fixed = replace(DEMAND, sublayers=(SublayerBytes(100 * MB, None),) * 4 + DEMAND.sublayers[4:])
    least = least_plan(fixed, device="cpu")
    assert least.streamed == tuple(range(4, 16))
    assert not least.takes_turns


def test_a_job_that_cant_fit_says_what_would_do() -> None:
    least = least_plan(DEMAND, device="cuda")
    with pytest.raises(
        InsufficientMemoryError, match=r"^this job needs at least 0\.5 GB of GPU memory, and 0\.2 GB "
    ) as caught:
        make_plan(DEMAND, device="cuda", room=100 * MB, set_aside=101 * MB)
    assert least.peak == 360 * MB
    assert "\n" not in str(caught.value)
    assert make_plan(DEMAND, device="cuda", room=least.peak).peak == least.peak


def test_plans_fit_and_more_room_never_holds_less() -> None:
    """Checked for 200 random jobs."""
    draw = random.Random(0)
    for _ in range(200):
        sizes = {name: draw.randrange(100) * MB for name, value in vars(DEMAND).items() if isinstance(value, int)}
        able = [SublayerBytes(n, n) for n in (draw.randrange(1, 100) * MB for _ in range(draw.randrange(1, 12)))]
        demand, device = Demand(sublayers=tuple(able), **sizes), draw.choice(["cpu", "cuda"])
        least, held = least_plan(demand, device=device).peak, -1
        for room in sorted(draw.randrange(2000) * MB for _ in range(6)):
            if room < least:
                with pytest.raises(InsufficientMemoryError):
                    make_plan(demand, device=device, room=room)
                continue
            plan = make_plan(demand, device=device, room=room)
            assert plan.peak <= room
            # How much is held is compared by sublayers first, then by text encoders, then by modulations.
            kinds = (not plan.takes_turns, -len(plan.streamed), plan.text == KEPT, plan.modulation == KEPT)
            rank = sum(kind * 1000 ** (3 - i) for i, kind in enumerate(kinds))
            assert rank >= held or held == -1
            held = rank


def test_a_plan_serves_the_next_job_if_it_fits() -> None:
    plan = make_plan(DEMAND, device="cpu", room=1200 * MB)
    assert plan.streamed
    larger = replace(DEMAND, run=40 * MB, decode=100 * MB)
    again = same_plan(plan, larger, room=plan.peak + 30 * MB, set_aside=0)
    assert again is not None
    assert (again.streamed, again.peak) == (plan.streamed, plan.peak + 30 * MB)
    assert same_plan(plan, larger, room=plan.peak + 30 * MB - 1, set_aside=0) is None
    without = same_plan(plan, replace(DEMAND, text=0, text_streamed=0, text_work=0), room=1200 * MB, set_aside=0)
    assert without is not None
    assert without.text == NONE


def test_a_plan_is_described_in_a_few_lines() -> None:
    plan = make_plan(DEMAND, device="cpu", room=700 * MB, set_aside=800 * MB)
    lines = str(plan).splitlines()
    assert lines[0].startswith("plan: 1.5 GB of 1.5 GB memory at the peak (0.8 GB set aside)")
    assert "streamed in every step through 0.2 GB" in lines[1]
    assert "text encoders: read layer by layer for each new prompt" in lines
    assert len(lines) == 5
