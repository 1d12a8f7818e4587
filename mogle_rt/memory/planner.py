"""The plan of a job: what is held in memory, what is streamed, decided from sizes before anything is allocated.

The parts of a pipeline that take memory are the weights of the steps, the weights that make modulations, the text
encoders, the VAE, and what each stage of a call computes with. All their sizes follow from the bundle's shapes and the
job, see `mogle_rt.cost.demand`. The planner keeps as much as the budget allows. It gives up, in this order:

1. the modulations' weights, which are then read for every new prompt or guidance scale (on a CPU they always are);
2. the text encoders, whose layers are then read one by one for every new prompt;
3. the weights of some sublayers of the steps, which are then streamed in every step;
4. on a CPU where all sublayers are streamed, holding several parts at once: the VAE and the steps then take turns.

None of it changes the result by a single bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from mogle_rt.errors import InsufficientMemoryError
from mogle_rt.memory.streaming import SLOTS, spread

TABLES_KEPT = 2  # runs whose modulations are kept beside those of the last one
KEPT, STREAMED, NONE = "kept", "streamed", "none"


@dataclass(frozen=True)
class SublayerBytes:
    """Bytes of a sublayer's weights.

    Attributes:
        resident: if they are kept. slot: in a slot; None if their format can't be streamed.
    """

    resident: int
    slot: int | None


@dataclass(frozen=True, kw_only=True)
class Demand:
    """What a job needs, in bytes.

    Attributes:
        always: the weights of the steps that are too small to be streamed.
        sublayers: the large ones, in the order of a step.
        run: inputs and buffers of the steps, which stay for the next run of the same shape.
        tables: the modulations of a run, of which `TABLES_KEPT` more are kept.
        vae: the VAE's weights.
        text, modulation: weights, if they are kept; 0 if there are none.
        text_streamed: the most that the text encoders' weights take at once if their layers are read one by one.
        text_work: what the text encoders compute with.
        encode, prepare, step, decode: what each stage allocates for as long as it lasts.
    """

    always: int
    sublayers: tuple[SublayerBytes, ...]
    run: int
    tables: int
    vae: int
    text: int
    text_streamed: int
    text_work: int
    modulation: int
    encode: int
    prepare: int
    step: int
    decode: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is held, what is streamed, and the memory that it takes.

    Attributes:
        device: "cpu", "cuda" or "mps".
        room: bytes that the plan may use. set_aside: bytes of the budget that it may not: for the process itself, or
            for CUDA's own needs.
        streamed: places of the sublayers that are streamed, among ``sublayers`` in all.
        resident: bytes of the weights that are held during the steps. slots: bytes in which streamed ones take turns.
        streamed_bytes: of all weights that a step streams.
        text, modulation: "kept", "streamed", or "none" if the job needs none.
        takes_turns: the VAE and the steps are not in memory at the same time.
        stages: bytes in use at the peak of each stage of a call.
    """

    device: str
    room: int
    set_aside: int
    streamed: tuple[int, ...]
    sublayers: int
    resident: int
    slots: int
    streamed_bytes: int
    text: str
    modulation: str
    takes_turns: bool
    stages: dict[str, int] = field(hash=False)

    @property
    def peak(self) -> int:
        """The most bytes in use at once, without what is set aside."""
        return max(self.stages.values())

    def __str__(self) -> str:
        """The plan in a few lines."""
        where = "memory" if self.device == "cpu" else "GPU memory"
        total, peak = self.room + self.set_aside, self.peak + self.set_aside
        lines = [f"plan: {_gb(peak)} of {_gb(total)} {where} at the peak ({_gb(self.set_aside)} set aside)"]
        kept = self.sublayers - len(self.streamed)
        weights = f"weights: {kept} of {self.sublayers} sublayers kept, {_gb(self.resident)}"
        if self.streamed:
            weights += f"; {len(self.streamed)} streamed in every step through {_gb(self.slots)}"
        lines.append(weights)
        if self.text != NONE:
            lines.append(
                "text encoders: " + ("kept" if self.text == KEPT else "read layer by layer for each new prompt")
            )
        if self.modulation != NONE:
            lines.append(
                "modulations' weights: "
                + ("kept" if self.modulation == KEPT else "read for each new prompt or guidance")
            )
        if self.takes_turns:
            lines.append("the VAE and the steps take turns in memory")
        lines.append("at the peak of each stage: " + ", ".join(f"{n} {_gb(b)}" for n, b in self.stages.items()))
        return "\n".join(lines)


def make_plan(demand: Demand, *, device: str, room: int, set_aside: int = 0) -> Plan:
    """The plan that keeps the most in a device's memory.

    Args:
        room: bytes that may be used. set_aside: bytes that are in use otherwise; only for what the plan says.

    Raises:
        InsufficientMemoryError: no plan fits; the message says the least budget that would do.
    """
    for plan in _plans(demand, device, room, set_aside):
        if plan.peak <= room:
            return plan
    least = least_plan(demand, device=device).peak + set_aside
    place = "memory" if device == "cpu" else "GPU memory"
    raise InsufficientMemoryError(
        f"this job needs at least {_gb(least, up=True)} of {place}, and {_gb(room + set_aside)} may be used; draw fewer "
        f"pixels or fewer images at once, or allow more with max_memory"
    )


def least_plan(demand: Demand, *, device: str, room: int = 0, set_aside: int = 0) -> Plan:
    """The plan that takes the least memory, whether it fits or not. Arguments as of `make_plan`."""
    return min(_plans(demand, device, room, set_aside), key=lambda plan: plan.peak)


def same_plan(plan: Plan, demand: Demand, *, room: int, set_aside: int) -> Plan | None:
    """What a plan comes to for another job, where the same parts are held and streamed; None if that doesn't fit.

    Args:
        plan: of an earlier job with the same weights.
        demand, room, set_aside: see `make_plan`.
    """
    text = plan.text
    if not demand.text_streamed:
        text = NONE
    elif text == NONE:
        text = KEPT if plan.peak + demand.text <= room else STREAMED
    again = _plan(
        demand, plan.device, room, set_aside, plan.streamed, text, plan.modulation, takes_turns=plan.takes_turns
    )
    return again if again.peak <= room else None


def _plans(demand: Demand, device: str, room: int, set_aside: int) -> Iterator[Plan]:
    """All plans that make sense, from the one that holds the most to the one that holds the least."""
    count, streams = len(demand.sublayers), device != "mps"
    text = NONE if not demand.text_streamed else KEPT
    modulation = NONE if not demand.modulation else KEPT if device == "cuda" else STREAMED

    def plan(streamed: int, text: str, modulation: str, *, takes_turns: bool = False) -> Plan:
        able = [place for place, sublayer in enumerate(demand.sublayers) if sublayer.slot is not None]
        places = tuple(able[n] for n in spread(len(able), streamed))
        return _plan(demand, device, room, set_aside, places, text, modulation, takes_turns=takes_turns)

    yield plan(0, text, modulation)
    if modulation == KEPT:
        modulation = STREAMED
        yield plan(0, text, modulation)
    if text == KEPT:
        text = STREAMED
        yield plan(0, text, modulation)
    if not streams:
        return
    able = sum(sublayer.slot is not None for sublayer in demand.sublayers)
    # A multiple of the slots: otherwise the last sublayer of a step has the slot of the first, whose weights could not be
    # read while the last is computed.
    for streamed in sorted({*range(SLOTS, able + 1, SLOTS), able} - {0}):
        yield plan(streamed, text, modulation)
    if device == "cpu" and able == count and count:
        yield plan(count, text, modulation, takes_turns=True)


def _plan(
    demand: Demand,
    device: str,
    room: int,
    set_aside: int,
    streamed: tuple[int, ...],
    text: str,
    modulation: str,
    *,
    takes_turns: bool,
) -> Plan:
    d = demand
    slots = min(SLOTS, len(streamed)) * max((d.sublayers[place].slot or 0 for place in streamed), default=0)
    kept = sum(s.resident for place, s in enumerate(d.sublayers) if place not in set(streamed))
    weights = d.always + kept + (d.modulation if modulation == KEPT else 0)
    texts = d.text if text == KEPT else 0
    of_steps = weights + slots + d.run + (0 if takes_turns else TABLES_KEPT * d.tables)
    # The steps' weights, inputs and buffers stay for the next call, unless they take turns with the VAE.
    beside = d.always if takes_turns else of_steps
    stages = {
        "text": beside + d.vae + (texts or (d.text_streamed if text == STREAMED else 0)) + d.text_work,
        "mask": beside + texts + d.vae + d.encode,
        "prepare": of_steps + texts + (0 if takes_turns else d.vae) + d.prepare,
        "denoise": of_steps + texts + (0 if takes_turns else d.vae) + d.step,
        "decode": beside + texts + d.vae + d.decode,
    }
    return Plan(
        device=device,
        room=room,
        set_aside=set_aside,
        streamed=streamed,
        sublayers=len(d.sublayers),
        resident=weights,
        slots=slots,
        streamed_bytes=sum(d.sublayers[place].slot or 0 for place in streamed),
        text=text,
        modulation=modulation,
        takes_turns=takes_turns,
        stages=stages,
    )


def _gb(number: int, *, up: bool = False) -> str:
    """Bytes, for people; rounded up if asked for."""
    unit = 1e9 if number >= 1e8 else 1e6
    tenths = -(-number * 10 // int(unit)) if up else round(number * 10 / unit)
    return f"{tenths / 10:.1f} {'GB' if unit == 1e9 else 'MB'}"
