"""Streamed weights give the same bytes as resident ones, whichever are streamed, and faults in the ring are noticed."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mogle_rt.bundle.bundle import Bundle
from mogle_rt.bundle.source import TensorSource
from mogle_rt.config import ModelConfig
from mogle_rt.engines.contract import Conditions
from mogle_rt.engines.torch_engine import TorchEngine
from mogle_rt.errors import CheckpointError
from mogle_rt.linear.packed import PackedWeight
from mogle_rt.loop.denoise import denoise
from mogle_rt.loop.schedule import make_schedule
from mogle_rt.loop.step import Section, Step
from mogle_rt.memory.streaming import CudaRing, HostRing, Ring, spread
from mogle_rt.model.transformer import sublayers
from tests.conftest import make_once, needs_triton
from tests.linear.quantised import quantised_bundle
from tests.memory.streams import Simulator

CPU = torch.device("cpu")
GRID, STEPS = (2, 3), 3


@pytest.fixture(scope="module")
def demo() -> Bundle:
    """The package's checkpoint: some of its weights are packed, others plain."""
    return Bundle("demo")


@pytest.fixture
def tiny(tiny_bundle: Path) -> Bundle:
    return Bundle(tiny_bundle)


def conditions(bundle: TensorSource, batch: int = 1, text: int = 5) -> Conditions:
    t, g = bundle.config.transformer, torch.Generator().manual_seed(batch)
    return Conditions.from_mask_latents(
        torch.randn(batch, 20, GRID[0] * GRID[1], 64, generator=g),
        prompt_embeds=torch.randn(batch, text, t.joint_attention_dim, generator=g),
        pooled_prompt_embeds=torch.randn(batch, t.pooled_projection_dim, generator=g),
        guidance_scale=3.0,
        grid=GRID,
    )


def start(engine: TorchEngine, bundle: TensorSource, asked: Conditions) -> Tensor:
    """Prepare a run. Returns its noise."""
    tokens = GRID[0] * GRID[1]
    engine.prepare(asked, make_schedule(bundle.config.scheduler, STEPS, tokens))
    return torch.randn(asked.masks.batch, tokens, 64, generator=torch.Generator().manual_seed(1))


def drawn(engine: TorchEngine, bundle: TensorSource, asked: Conditions) -> Tensor:
    noise = start(engine, bundle, asked)
    return denoise(engine, noise, make_schedule(bundle.config.scheduler, STEPS, noise.shape[1]))


def engine(
    bundle: TensorSource, streamed: Sequence[int] = (), model: ModelConfig | None = None, **options: Any
) -> TorchEngine:
    return TorchEngine(bundle, CPU, torch.float32, model or ModelConfig(), streamed=streamed, **options)


def count(bundle: TensorSource) -> int:
    return len(sublayers(bundle.config.transformer))


def test_spread_evenly() -> None:
    assert spread(8, 8) == list(range(8))
    assert spread(6, 3) == [1, 3, 5]
    assert spread(7, 2) == [2, 6]
    assert spread(7, 0) == []


@pytest.mark.quick
@pytest.mark.parametrize("weights", ["packed", "plain"])
@pytest.mark.parametrize(("batch", "text"), [(1, 5), (2, 7), (1, 1)])
def test_streamed_weights_give_the_same_bytes(demo: Bundle, weights: str, batch: int, text: int) -> None:
    """Checked for several numbers of streamed sublayers, in a first and a second run, and also for one row of text, which
    oneDNN multiplies in another way."""
    asked, total = conditions(demo, batch, text), count(demo)
    expected = drawn(engine(demo, weights=weights), demo, asked)
    for streamed in {1, 2, total // 2 + 1, total}:
        one = engine(demo, spread(total, streamed), weights=weights)
        for _ in range(2):
            assert torch.equal(drawn(one, demo, asked), expected), streamed
        assert f"{streamed} sublayers streamed" in one.weight_formats


@pytest.mark.parametrize(
    ("kernels", "switches"),
    [
        ("torch", {"union_cond_attn": False}),
        ("torch", {"add_cond_attn": True, "latent_lora": True}),
        ("torch", {"independent_condition": True}),
        pytest.param("triton", {}, marks=needs_triton),
        pytest.param("triton", {"latent_lora": True, "weight_is_scale": True}, marks=needs_triton),
    ],
    ids=str,
)
def test_streamed_weights_with_every_switch(tiny: Bundle, kernels: str, switches: dict[str, bool]) -> None:
    """Both kernels are run, as with Triton's the LoRA lies in further rows and columns of the weights."""
    model, asked = ModelConfig(**switches), conditions(tiny)
    expected = drawn(engine(tiny, model=model, kernels=kernels), tiny, asked)
    streamed = engine(tiny, range(count(tiny)), model, kernels=kernels)
    assert torch.equal(drawn(streamed, tiny, asked), expected)


@pytest.mark.parametrize("kernels", ["torch", pytest.param("triton", marks=needs_triton)])
@pytest.mark.parametrize("weights", ["int8", "fp8", "int4"])
def test_streamed_weights_of_few_bits(weights: str, kernels: str, tiny_bundle: Path, shared_folder: Path) -> None:
    """Their bytes travel as they are stored; what rides along stands beside them."""
    path = shared_folder / f"streamed-{weights}.safetensors"
    few = Bundle(make_once(path, lambda output: quantised_bundle(tiny_bundle, output, weights)))
    asked, total = conditions(few), count(few)
    expected = drawn(engine(few, kernels=kernels), few, asked)
    one = engine(few, spread(total, total - 1), kernels=kernels)
    for _ in range(2):
        assert torch.equal(drawn(one, few, asked), expected)
    assert f"{total - 1} sublayers streamed" in one.weight_formats
    ring, layers = one.transformer.stream, dict(one.transformer.layers())
    assert isinstance(ring, HostRing)
    names = [name for place in ring.numbers for name in sublayers(one.config)[place]]
    slots = [(slot.data_ptr(), slot.data_ptr() + slot.nbytes) for slot in ring.slots]
    for tensor in (tensor for name in names for tensor in layers[name].weight.tensors()):
        assert any(begin <= tensor.data_ptr() < end for begin, end in slots)


def test_one_memory_for_all(demo: Bundle) -> None:
    """All streamed weights go through two slots, each as large as the largest sublayer."""
    one = engine(demo, range(count(demo)))
    ring = one.transformer.stream
    assert isinstance(ring, HostRing)
    layers = dict(one.transformer.layers())
    places = {layers[n].weight.tensors()[0].data_ptr() for names in sublayers(one.config) for n in names[:1]}
    assert len(places) == 2
    weights = sum(t.nbytes for names in sublayers(one.config) for n in names for t in layers[n].weight.tensors())
    assert ring.nbytes == sum(len(slot) for slot in ring.slots) < weights / 2


def test_nothing_stays_of_what_is_let_go(demo: Bundle) -> None:
    """Weights, slots and buffers are freed at once, without Python's garbage collector."""
    one = engine(demo, [1, 2])
    drawn(one, demo, conditions(demo))
    ring = one.transformer.stream
    assert isinstance(ring, HostRing)
    held = [weakref.ref(x) for x in (one.prepared, one.prepared.buffers, one.transformer, ring, ring.slots[0])]
    ring._worker.submit(lambda: None).result()  # wait for the weights that are read ahead: that task holds the ring
    del ring
    gc.disable()
    try:
        one.let_go()
        assert [ref() for ref in held] == [None] * len(held)
    finally:
        gc.enable()


def test_residency_can_change(demo: Bundle) -> None:
    """It can change between runs, with or without a style. Weights that aren't needed any more are freed."""
    asked = conditions(demo)
    one = engine(demo)
    expected = drawn(one, demo, asked)
    for streamed in ([0, 3], [], range(count(demo))):
        one.stream_sublayers(streamed)
        assert torch.equal(drawn(one, demo, asked), expected)
        assert len(one.transformer.streamed) == len(streamed)


@pytest.mark.parametrize("stopped_at", [0, 1, 4])
def test_an_interrupted_step_leaves_the_ring_usable(
    demo: Bundle, stopped_at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = conditions(demo)
    expected = drawn(engine(demo), demo, asked)
    one = engine(demo, range(count(demo)))
    run, calls = Step.run, [0]

    def interrupted(step: Step, section: Section) -> None:
        calls[0] += 1
        if calls[0] == 10 + stopped_at:
            raise KeyboardInterrupt
        run(step, section)

    with monkeypatch.context() as patched:
        patched.setattr(Step, "run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            drawn(one, demo, asked)
    assert torch.equal(drawn(one, demo, asked), expected)


def test_an_unreadable_weight_is_an_error(demo: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread that reads the weight hits the error, and the step that needs the weight raises it. Later steps work."""
    asked = conditions(demo)
    expected = drawn(engine(demo), demo, asked)
    one = engine(demo, range(count(demo)))
    with monkeypatch.context() as patched:

        def fails(*_: object) -> None:
            raise CheckpointError("cut short while it was read")

        patched.setattr(PackedWeight, "fill_slot", fails)
        with pytest.raises(CheckpointError, match="cut short"):
            drawn(one, demo, asked)
    assert torch.equal(drawn(one, demo, asked), expected)


def test_weights_are_read_beside_the_computation(demo: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread reads them, so the next sublayer's weights can be read while a sublayer is computed."""
    readers: set[str] = set()
    read = HostRing._read

    def noted(ring: HostRing, number: int, into: Tensor) -> None:
        readers.add(threading.current_thread().name)
        read(ring, number, into)

    monkeypatch.setattr(HostRing, "_read", noted)
    drawn(engine(demo, range(count(demo))), demo, conditions(demo))
    assert len(readers) == 1
    assert readers != {threading.current_thread().name}


# The rest shows that the tests above and the simulated streams notice what can be wrong with a ring.


def too_early(ring: Ring, number: int) -> None:
    """A faulty ring: it frees a sublayer's slot before the sublayer was computed."""
    acquire(ring, number)
    ring._free[ring.slot_of(number)] = True
    ring._ask()


acquire = Ring.acquire


class AtOnce:
    """A worker that does each task at once, when it is submitted."""

    def submit(self, fn: Callable[..., Any], /, *args: Any) -> Future[None]:
        done: Future[None] = Future()
        done.set_result(fn(*args))
        return done


def test_a_slot_overwritten_too_early_is_seen(demo: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = conditions(demo)
    expected = drawn(engine(demo), demo, asked)

    def ring(sublayers: Any, streamed: Any, device: torch.device) -> Ring:
        return HostRing(sublayers, streamed, device, AtOnce())

    monkeypatch.setattr("mogle_rt.engines.torch_engine.make_ring", ring)
    assert torch.equal(drawn(engine(demo, range(count(demo))), demo, asked), expected)
    monkeypatch.setattr(Ring, "acquire", too_early)
    assert not torch.equal(drawn(engine(demo, range(count(demo))), demo, asked), expected)


def simulated(bundle: Bundle, monkeypatch: pytest.MonkeyPatch, seed: int, streamed: Sequence[int]) -> Tensor:
    """The latents after a run on simulated streams, through the ring that a GPU uses."""
    with monkeypatch.context() as patched:
        simulator = Simulator(patched, seed)

        def ring(sublayers: Any, places: Any, device: torch.device) -> Ring:
            return CudaRing(sublayers, places, device, simulator)

        patched.setattr("mogle_rt.engines.torch_engine.make_ring", ring)
        one = engine(bundle, streamed)
        noise = start(one, bundle, conditions(bundle))
        one.start(noise)
        for _ in range(STEPS):
            one.advance()
        ours = one.transformer.stream
        assert isinstance(ours, CudaRing)
        # The host waits only for pinned memory that is about to be written again, never for a computation.
        assert set(simulator.host_waits) <= set(ours._arrived)
        simulator.finish()
        return one.latents()


SEEDS = range(12)


@pytest.mark.parametrize("streamed", [1, 2, 3, 0])
def test_copies_and_computations_keep_their_order(tiny: Bundle, streamed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The result is right in whatever order a GPU does the work that the events allow. With an odd number of sublayers,
    a step ends with the slot that the next step begins with."""
    expected = drawn(engine(tiny), tiny, conditions(tiny))
    places = spread(count(tiny), streamed or count(tiny))
    for seed in SEEDS:
        assert torch.equal(simulated(tiny, monkeypatch, seed, places), expected), seed


@pytest.mark.parametrize("missing", ["_mark_used", "_wait_for_copy", "synchronize"])
def test_a_missing_event_is_seen(tiny: Bundle, missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = drawn(engine(tiny), tiny, conditions(tiny))
    owner = "tests.memory.streams.Event" if missing == "synchronize" else "mogle_rt.memory.streaming.CudaRing"
    monkeypatch.setattr(f"{owner}.{missing}", lambda *_: None)
    places = range(count(tiny))
    assert any(not torch.equal(simulated(tiny, monkeypatch, seed, places), expected) for seed in SEEDS)
