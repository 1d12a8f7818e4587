"""The loop over fixed buffers: their reuse, the refusal of changed inputs, and the fallback to eager steps, which is
reported. On a GPU, CUDA graphs themselves are tested."""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mogle_rt import Pipeline
from mogle_rt.bundle.bundle import Bundle
from mogle_rt.config import ModelConfig
from mogle_rt.engines.contract import Conditions
from mogle_rt.engines.torch_engine import TorchEngine
from mogle_rt.errors import ConfigError
from mogle_rt.loop.blend import Kept
from mogle_rt.loop.buffers import tensors_of
from mogle_rt.loop.denoise import denoise
from mogle_rt.loop.graphs import GRAPH, why_eager
from mogle_rt.loop.schedule import make_schedule
from mogle_rt.loop.step import Section, Step
from mogle_rt.model.mixture import MixtureOfExperts
from mogle_rt.model.modulation import ModulationTables, modulation_tables
from mogle_rt.ops.choice import KERNELS_VARIABLE, choice, choose
from tests.conftest import CASES, GoldenCase, assert_close, needs_triton
from tests.test_golden import TOLERANCE, Bundles

CPU = torch.device("cpu")
GRID, STEPS = (2, 3), 3


@pytest.fixture
def bundle(tiny_bundle: Path) -> Bundle:
    return Bundle(tiny_bundle)


def run(engine: TorchEngine, bundle: Bundle, asked: Conditions, seed: int = 0, steps: int = STEPS) -> Tensor:
    tokens = GRID[0] * GRID[1]
    schedule = make_schedule(bundle.config.scheduler, steps, tokens)
    engine.prepare(asked, schedule)
    g = torch.Generator().manual_seed(seed)
    noise = torch.randn(asked.masks.batch, tokens, 64, generator=g)
    return denoise(engine, noise.to(engine.device, engine.dtype), schedule)


def asked_of(bundle: Bundle) -> Callable[..., Conditions]:
    """A function that makes random conditions for a bundle, from a seed, the number of text tokens and the batch."""
    t = bundle.config.transformer

    def make(seed: int, text: int = 5, batch: int = 1) -> Conditions:
        g = torch.Generator().manual_seed(seed)
        return Conditions.from_mask_latents(
            torch.randn(batch, 20, GRID[0] * GRID[1], 64, generator=g),
            prompt_embeds=torch.randn(batch, text, t.joint_attention_dim, generator=g),
            pooled_prompt_embeds=torch.randn(batch, t.pooled_projection_dim, generator=g),
            guidance_scale=3.0 + seed,
            grid=GRID,
            position_delta=(seed, 0),
        )

    return make


@pytest.mark.quick
@pytest.mark.parametrize("batch", [1, 2])
def test_runs_of_one_shape_share_their_buffers(bundle: Bundle, batch: int) -> None:
    """A second run goes through the first run's memory, and its result equals that of a new engine."""
    asked = asked_of(bundle)
    engine = TorchEngine(bundle, CPU, torch.float32, ModelConfig())
    run(engine, bundle, asked(1, batch=batch))
    step, addresses = engine.prepared, engine.prepared.addresses()
    second = run(engine, bundle, asked(2, batch=batch))
    assert engine.prepared is step
    assert step.addresses() == addresses
    fresh = run(TorchEngine(bundle, CPU, torch.float32, ModelConfig()), bundle, asked(2, batch=batch))
    assert torch.equal(second, fresh)
    assert not torch.equal(second, run(engine, bundle, asked(1, batch=batch)))


@pytest.mark.parametrize("switches", [{}, {"union_cond_attn": False}], ids=str)
def test_attention_may_come_in_any_layout(
    bundle: Bundle, switches: dict[str, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """CUDA's memory-efficient kernel, which runs in float32, returns a transposed view of [B, L, H, d]."""
    monkeypatch.setattr("mogle_rt.ops.attention.WHOLE_SCORES", 0)
    engine = TorchEngine(bundle, CPU, torch.float32, ModelConfig(**switches))
    expected = run(engine, bundle, asked_of(bundle)(1, batch=2))
    attention, calls = F.scaled_dot_product_attention, 0

    def transposed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return attention(q, k, v).transpose(1, 2).contiguous().transpose(1, 2)

    monkeypatch.setattr(F, "scaled_dot_product_attention", transposed)
    assert torch.equal(run(engine, bundle, asked_of(bundle)(1, batch=2)), expected)
    assert calls


def test_modulations_are_kept_while_nothing_they_hang_on_changes(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights of modulations are a quarter of the model. They are read for another prompt or guidance, but not for
    another mask."""
    asked = asked_of(bundle)
    made: list[int] = []

    def noted(*args: Any, **options: Any) -> ModulationTables:
        made.append(len(made))
        return modulation_tables(*args, **options)

    monkeypatch.setattr("mogle_rt.engines.torch_engine.modulation_tables", noted)
    engine = TorchEngine(bundle, CPU, torch.float32, ModelConfig())
    first, other_mask = asked(1), replace(asked(1), masks=asked(2).masks)
    results = [run(engine, bundle, c) for c in (first, other_mask, first)]
    assert len(made) == 1
    assert torch.equal(results[0], results[2])
    assert torch.equal(results[1], run(TorchEngine(bundle, CPU, torch.float32, ModelConfig()), bundle, other_mask))
    pooled = replace(first, pooled_prompt_embeds=first.pooled_prompt_embeds + 1)
    for count, changed in enumerate((pooled, replace(first, guidance_scale=9.0), first), start=3):
        run(engine, bundle, changed)
        assert len(made) == count
    first.pooled_prompt_embeds.zero_()  # the caller's own memory is neither kept nor written to
    run(engine, bundle, first)
    assert len(made) == 6


@pytest.mark.quick
def test_another_shape_has_its_own_step(bundle: Bundle) -> None:
    asked = asked_of(bundle)
    engine = TorchEngine(bundle, CPU, torch.float32, ModelConfig())
    run(engine, bundle, asked(1))
    step = engine.prepared
    run(engine, bundle, asked(1, text=6))
    assert engine.prepared is not step
    assert len(engine._runners) == 1  # on a CPU, activations of old shapes are freed


def test_sliders_change_no_shape(bundle: Bundle) -> None:
    """condition_scale and the number of steps are data. Runs with other values go through the same memory, and give
    what a new engine gives."""
    asked = asked_of(bundle)
    engine = TorchEngine(bundle, CPU, torch.float32, ModelConfig())
    run(engine, bundle, replace(asked(1), condition_scale=0.5))
    step, addresses = engine.prepared, engine.prepared.addresses()
    seen: list[Tensor] = []
    for scale, steps in ((0.7, STEPS), (3.0, STEPS), (3.0, 1), (3.0, 7), (0.7, 8), (0.5, STEPS)):
        asked_for = replace(asked(1), condition_scale=scale)
        made = run(engine, bundle, asked_for, steps=steps)
        assert engine.prepared is step
        assert step.addresses() == addresses
        fresh = TorchEngine(bundle, CPU, torch.float32, ModelConfig())
        assert torch.equal(made, run(fresh, bundle, asked_for, steps=steps))
        assert not any(torch.equal(made, other) for other in seen)
        seen.append(made)
    for scale in (1.0, 0.0):  # these two have an attention of their own, and are exact
        run(engine, bundle, replace(asked(1), condition_scale=scale))
        assert engine.prepared is not step


def test_steps_past_the_end_are_refused(bundle: Bundle) -> None:
    """Steps past the run's last one are refused, though its tables have room for more."""
    engine = TorchEngine(bundle, CPU, torch.float32, ModelConfig())
    with pytest.raises(RuntimeError, match=r"prepare\(\) must be called before a step"):
        engine.advance()
    final = run(engine, bundle, asked_of(bundle)(1))
    assert len(engine.prepared.inputs.sigma_steps) > STEPS
    with pytest.raises(IndexError, match=r"all 3 steps of the schedule are done: call start\(\)"):
        engine.advance()
    assert torch.equal(engine.latents(), final)
    for compute in (engine.condition, engine.step):
        with pytest.raises(IndexError, match="all 3 steps of the schedule are done"):
            compute(final, STEPS)
        with pytest.raises(IndexError, match="step must be 0 to 3, as the schedule has 3 steps, got 4"):
            compute(final, STEPS + 1)
    with pytest.raises(IndexError, match="got -1"):
        engine.start(final, -1)
    engine.start(final, STEPS - 1)
    engine.advance()


@pytest.mark.quick
def test_changed_inputs_are_refused(bundle: Bundle) -> None:
    asked = asked_of(bundle)
    engine = TorchEngine(bundle, CPU, torch.float32, ModelConfig())
    run(engine, bundle, asked(1))
    step = engine.prepared
    first = step.inputs
    run(engine, bundle, asked(1, text=6))
    with pytest.raises(ValueError, match=r"step inputs must be \[6, 1, \d+\] .* got \[5, 1, \d+\]"):
        engine.prepared.load(first)


@pytest.mark.quick
def test_exchanged_buffer_is_refused(bundle: Bundle) -> None:
    engine = TorchEngine(bundle, CPU, torch.float32, ModelConfig())
    run(engine, bundle, asked_of(bundle)(1))
    engine.prepared.buffers.latents = engine.prepared.buffers.latents.clone()
    with pytest.raises(RuntimeError, match="a buffer of the step was replaced"):
        engine.start(torch.zeros(1, 6, 64))


class FakeCuda:
    """Stands on a CPU for the parts of torch.cuda that a capture uses. Work under capture has no effect; a replay does it.

    Attributes:
        engine: the engine whose step is captured.
        faults: errors that the ends of the next captures raise.
        captures: the pool and the stream of each capture.
        sections: the sections that were run since the last capture began.
    """

    engine: TorchEngine

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.faults: list[Exception] = []
        self.captures: list[tuple[object, object]] = []
        self.sections: list[Section] = []
        cuda, run = self, Step.run

        def noted(step: Step, section: Section) -> None:
            cuda.sections.append(section)
            run(step, section)

        class Graph:
            def __init__(self) -> None:
                self.captured: list[Section] = []

            def replay(self) -> None:
                for section in self.captured:
                    cuda.engine.prepared.run(section)

        monkeypatch.setattr(Step, "run", noted)

        fakes = {
            "CUDAGraph": Graph,
            "Stream": lambda device: SimpleNamespace(wait_stream=lambda other: None),
            "current_stream": lambda device: SimpleNamespace(wait_stream=lambda other: None),
            "stream": lambda stream: nullcontext(),
            "graph_pool_handle": object,
            "graph": self.capture,
        }
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)
        monkeypatch.setattr("mogle_rt.loop.graphs.why_eager", lambda device, cuda_graphs: None)

    @contextmanager
    def capture(self, graph: Any, pool: object, stream: object, capture_error_mode: str) -> Iterator[None]:
        step = self.engine.prepared
        written = tensors_of((list(vars(step.buffers).values()), step.modulation, step.time, step.sigma_step))
        written += step.carried
        saved = [t.clone() for t in written]
        self.sections.clear()
        yield
        graph.captured += self.sections
        for t, before in zip(written, saved, strict=True):
            t.copy_(before)
        self.captures.append((pool, stream))
        if self.faults:
            raise self.faults.pop(0)


@pytest.fixture
def expected(bundle: Bundle) -> Tensor:
    """The result of eager steps."""
    return run(TorchEngine(bundle, CPU, torch.float32, ModelConfig()), bundle, asked_of(bundle)(1))


@pytest.fixture
def fake_cuda(bundle: Bundle, expected: Tensor, monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    fake = FakeCuda(monkeypatch)
    fake.engine = TorchEngine(bundle, CPU, torch.float32, ModelConfig())
    return fake


@pytest.mark.quick
def test_capture_changes_no_result(bundle: Bundle, fake_cuda: FakeCuda, expected: Tensor) -> None:
    """Warm-up and capture leave the latents and the index of the step unchanged, and every step is a replay."""
    for _ in range(2):
        assert torch.equal(run(fake_cuda.engine, bundle, asked_of(bundle)(1)), expected)
        assert fake_cuda.engine.execution == GRAPH
    assert len(fake_cuda.captures) == 1


def test_sliders_capture_nothing_anew(bundle: Bundle, fake_cuda: FakeCuda) -> None:
    asked = asked_of(bundle)
    for scale, steps in ((0.5, 3), (2.0, 3), (2.0, 8), (0.5, 1)):
        run(fake_cuda.engine, bundle, replace(asked(1), condition_scale=scale), steps=steps)
    assert len(fake_cuda.captures) == 1
    run(fake_cuda.engine, bundle, replace(asked(1), condition_scale=2.0), steps=9)  # the tables lack room for so many
    assert len(fake_cuda.captures) == 2


def test_kept_graphs_are_bounded_in_bytes(bundle: Bundle, fake_cuda: FakeCuda) -> None:
    """Graphs are given up when the bound is passed, those first that were not used for the longest time."""
    asked, engine = asked_of(bundle), fake_cuda.engine
    engine._runners.limit = 1 << 40
    sizes: dict[int, int] = {}
    for text in (5, 6, 7):
        run(engine, bundle, asked(1, text=text))
        sizes[text] = engine.prepared.nbytes
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors_of(held_by(engine.prepared))}
    assert sizes[7] == sum(held.values())
    assert engine._runners.nbytes == sum(sizes.values())
    run(engine, bundle, asked(1, text=5))  # so this one was used last
    assert len(fake_cuda.captures) == 3
    engine._runners.limit = sizes[5] + sizes[7] + sizes[7]
    run(engine, bundle, asked(1, text=8))  # 6 and 7 are given up
    assert engine._runners.nbytes == sizes[5] + engine.prepared.nbytes <= engine._runners.limit
    run(engine, bundle, asked(1, text=5))
    run(engine, bundle, asked(1, text=8))
    assert len(fake_cuda.captures) == 4
    run(engine, bundle, asked(1, text=6))
    assert len(fake_cuda.captures) == 5
    engine._runners.limit = 1  # even so, the one in use is kept
    run(engine, bundle, asked(1, text=7))
    assert len(engine._runners) == 1


def test_old_steps_are_freed_before_a_new_one_is_made(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU only the step in use is kept, and two are never in memory at the same time."""
    asked = asked_of(bundle)
    engine = TorchEngine(bundle, CPU, torch.float32, ModelConfig())
    run(engine, bundle, asked(1))
    old = weakref.ref(engine.prepared)
    at_the_making: list[Step | None] = []
    make = Step.__init__

    def noted(step: Step, *args: Any, **options: Any) -> None:
        at_the_making.append(old())
        make(step, *args, **options)

    monkeypatch.setattr(Step, "__init__", noted)
    run(engine, bundle, asked(1, text=6))
    assert at_the_making == [None]


def held_by(step: Step) -> object:
    """Everything that a step holds, without the weights."""
    return step.inputs, step.modulation, step.time, step.sigma_step, list(vars(step.buffers).values())


def short_of_memory(monkeypatch: pytest.MonkeyPatch, where: str, name: str, times: int) -> list[int]:
    """Let a method run out of memory in its next ``times`` calls. Returns a list that gets an entry for each call."""
    owner: Any = {"Step": Step, "MixtureOfExperts": MixtureOfExperts}[where]
    whole, calls = getattr(owner, name), list[int]()

    def short(*args: Any, **options: Any) -> Any:
        calls.append(len(calls))
        if len(calls) <= times:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return whole(*args, **options)

    monkeypatch.setattr(owner, name, short)
    return calls


OF_A_NEW_SHAPE = [("MixtureOfExperts", "prepare"), ("Step", "__init__"), ("Step", "advance")]


@pytest.mark.parametrize(("where", "name"), OF_A_NEW_SHAPE, ids=lambda x: x)
def test_graphs_are_given_up_when_memory_is_short(
    where: str,
    name: str,
    bundle: Bundle,
    fake_cuda: FakeCuda,
    expected: Tensor,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Memory may run out while inputs are computed, buffers are made or a graph is warmed up. Then all other graphs are
    given up, and it is tried once more."""
    engine, asked = fake_cuda.engine, asked_of(bundle)
    engine._runners.limit = 1 << 40
    for text in (6, 7):
        run(engine, bundle, asked(1, text=text))
    gone = [weakref.ref(runner.step) for runner in engine._runners._runners.values()]
    assert len(gone) == 2
    with monkeypatch.context() as patched:
        calls = short_of_memory(patched, where, name, 1)
        with caplog.at_level(logging.WARNING):
            assert torch.equal(run(engine, bundle, asked(1)), expected)
    assert len(calls) >= 2
    assert len(engine._runners) == 1
    gc.collect()
    assert [ref() for ref in gone] == [None, None]  # nothing else holds their memory
    assert engine.execution == GRAPH
    assert "memory is short: 2 kept steps of other shapes were given up" in caplog.text


@pytest.mark.parametrize(("where", "name"), OF_A_NEW_SHAPE, ids=lambda x: x)
def test_too_little_memory_is_an_error(
    where: str, name: str, bundle: Bundle, fake_cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is tried once more only if something could be given up."""
    engine, asked = fake_cuda.engine, asked_of(bundle)
    engine._runners.limit = 1 << 40
    run(engine, bundle, asked(1, text=6))
    for tries in (2, 1):
        with monkeypatch.context() as patched:
            calls = short_of_memory(patched, where, name, 9)
            with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate"):
                run(engine, bundle, asked(1, text=5 if tries == 2 else 7))
        if name != "advance":  # with "advance", the new runner stays, and the next run can give it up
            assert len(calls) == tries
    run(engine, bundle, asked(1))


def test_capture_short_of_memory(bundle: Bundle, fake_cuda: FakeCuda, expected: Tensor) -> None:
    """The other graphs are given up and the step is captured again. If there are no others, steps run eagerly."""
    engine, asked = fake_cuda.engine, asked_of(bundle)
    engine._runners.limit = 1 << 40
    run(engine, bundle, asked(1, text=6))
    fake_cuda.faults = [torch.OutOfMemoryError("CUDA out of memory")]
    assert torch.equal(run(engine, bundle, asked(1)), expected)
    assert engine.execution == GRAPH
    assert len(engine._runners) == 1
    assert len(fake_cuda.captures) == 3
    engine._runners.clear()
    fake_cuda.faults = [torch.OutOfMemoryError("CUDA out of memory")]
    assert torch.equal(run(engine, bundle, asked(1)), expected)
    assert engine.execution == "eager: capturing the step failed: CUDA out of memory"


def test_graphs_share_memory(bundle: Bundle, fake_cuda: FakeCuda) -> None:
    """All captures use one pool, and one stream, since a pool's memory can be used again only on the same stream."""
    for text in (5, 6):
        run(fake_cuda.engine, bundle, asked_of(bundle)(1, text=text))
    first, second = fake_cuda.captures
    assert first[0] is second[0]
    assert first[1] is second[1]


@pytest.mark.quick
def test_failed_capture_is_reported(
    bundle: Bundle, fake_cuda: FakeCuda, expected: Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    """Steps go on eagerly where they were, the reason is reported, and the next capture uses another pool."""
    fake_cuda.faults = [RuntimeError("CUDA error: operation not permitted\nwhen stream is capturing")]
    with caplog.at_level(logging.WARNING):
        assert torch.equal(run(fake_cuda.engine, bundle, asked_of(bundle)(1)), expected)
    told = "eager: capturing the step failed: CUDA error: operation not permitted"
    assert fake_cuda.engine.execution == told
    assert told in caplog.text
    assert len(fake_cuda.captures) == 1
    run(fake_cuda.engine, bundle, asked_of(bundle)(1, text=6))
    assert fake_cuda.engine.execution == GRAPH
    first, second = fake_cuda.captures
    assert first[0] is not second[0]


def test_errors_of_the_step_are_its_own(bundle: Bundle, fake_cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    """Errors that come in eager steps too are raised: no fallback hides them."""

    def broken(self: Step, *kind: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(Step, "advance", broken)
    with pytest.raises(RuntimeError, match=r"^out of memory$"):
        run(fake_cuda.engine, bundle, asked_of(bundle)(1))
    assert fake_cuda.captures == []
    assert fake_cuda.engine.execution == GRAPH  # it doesn't speak of a failed capture


def test_the_reason_is_given(tiny_bundle: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert why_eager(torch.device("cuda"), True) is None
    assert why_eager(torch.device("cuda"), False) == "cuda_graphs=False"
    with caplog.at_level(logging.INFO):
        pipe = Pipeline(tiny_bundle, device="cpu")
    assert "steps run one by one: CUDA graphs need a CUDA device, this is cpu" in caplog.text
    pipe(None, None, 1, height=32, width=32, output_type="latent")
    assert pipe.last_run.execution == "eager: CUDA graphs need a CUDA device, this is cpu"


@pytest.mark.quick
@needs_triton
def test_choice_of_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    from mogle_rt.ops import triton_ops

    def chosen(kernels: str | None, device: str) -> str:
        module: object = choose(kernels, torch.device(device))
        return vars(module)["__name__"].removeprefix("mogle_rt.ops.")

    monkeypatch.delenv(KERNELS_VARIABLE, raising=False)
    names = [chosen(None, device) for device in ("cpu", "mps", "cuda", "meta")]
    assert names == ["torch_ops", "torch_ops", "triton_ops", "triton_ops"]
    assert chosen("torch", "cuda") == "torch_ops"
    monkeypatch.setenv(KERNELS_VARIABLE, "torch")
    assert chosen(None, "cuda") == "torch_ops"
    assert chosen("triton", "cuda") == "triton_ops"
    monkeypatch.setenv(KERNELS_VARIABLE, "fast")
    with pytest.raises(ConfigError, match="MOGLE_RT_KERNELS must be one of 'triton', 'torch', got 'fast'"):
        choose(None, CPU)
    monkeypatch.setattr(triton_ops, "interpreted", lambda: False)
    with pytest.raises(ConfigError, match=r"kernels='triton' can't run on cpu: .* need a GPU"):
        choose("triton", CPU)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="triton is not installed"):
        choose("triton", torch.device("cuda"))


@needs_triton
@pytest.mark.parametrize(
    ("capability", "expected"), [((7, 5), "torch"), ((6, 1), "torch"), ((8, 0), "triton"), ((9, 0), "triton")]
)
def test_triton_is_for_gpus_that_its_kernels_were_compiled_for(
    capability: tuple[int, int], expected: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """On other GPUs PyTorch's operations are used, which is logged once, and to ask for Triton there is an error."""
    monkeypatch.delenv(KERNELS_VARIABLE, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"Card {capability[0]}")
    cuda, reason = torch.device("cuda"), f"Card {capability[0]} of compute capability {capability[0]}.{capability[1]}"
    with caplog.at_level(logging.WARNING):
        assert [choice(None, cuda) for _ in range(2)] == [expected] * 2
    assert caplog.text.count(reason) == (expected == "torch")
    assert choice("torch", cuda) == "torch"
    if expected == "triton":
        assert choice("triton", cuda) == "triton"
    else:
        with pytest.raises(ConfigError, match=f"kernels='triton', but .* {reason} .* sm_80, .*; use 'torch'"):
            choice("triton", cuda)
    monkeypatch.setattr(torch.version, "hip", "6.4")  # AMD's capabilities aren't NVIDIA's
    assert choice("triton", cuda) == "triton"


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("kernels", ["triton", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_graph_equals_eager(bundle: Bundle, dtype: torch.dtype, kernels: str, batch: int) -> None:
    asked, cuda = asked_of(bundle), torch.device("cuda")
    results = []
    for graphs in (True, False):
        engine = TorchEngine(bundle, cuda, dtype, ModelConfig(), kernels=kernels, cuda_graphs=graphs)
        runs = [run(engine, bundle, asked(seed, batch=batch), seed) for seed in (1, 2, 1)]
        assert (engine.execution == GRAPH) is graphs
        assert torch.equal(runs[0], runs[2])
        results.append(runs[:2])
    for a, b in zip(*results, strict=True):
        assert_close(a, b, rms=1e-6 if dtype == torch.float32 else 1e-2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_an_edit_s_graph_equals_eager(bundle: Bundle) -> None:
    """The blend is in the graph. It reads each run's own image, also after a run of the same shape without an edit."""
    asked, cuda = asked_of(bundle), torch.device("cuda")

    def edit(seed: int) -> Conditions:
        g = torch.Generator().manual_seed(seed)
        original, noise = (torch.randn(1, GRID[0] * GRID[1], 64, generator=g) for _ in range(2))
        amount = torch.rand(original.shape, generator=g).round()
        schedule = make_schedule(bundle.config.scheduler, STEPS, GRID[0] * GRID[1])
        kept = Kept(original=original, difference=noise - original, amount=amount, sigmas=schedule.sigmas[1:])
        return replace(asked(1), kept=kept)

    results = []
    for graphs in (True, False):
        engine = TorchEngine(bundle, cuda, torch.float32, ModelConfig(), cuda_graphs=graphs)
        runs = [run(engine, bundle, c) for c in (asked(1), edit(1), edit(2), asked(1), edit(1))]
        assert (engine.execution == GRAPH) is graphs
        assert torch.equal(runs[0], runs[3])
        assert torch.equal(runs[1], runs[4])
        kept = edit(2).kept
        assert kept is not None
        inside = kept.amount == 1
        assert torch.equal(runs[2].cpu()[inside], kept.original[inside])
        results.append(runs)
    for a, b in zip(*results, strict=True):
        assert_close(a, b, rms=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("dtype", "rms"), [(torch.float32, 10 * TOLERANCE), (torch.bfloat16, 0.05)])
@pytest.mark.parametrize("name", CASES)
def test_golden_on_a_gpu(name: str, dtype: torch.dtype, rms: float, golden_bundle: Bundles) -> None:
    """Kernels and graphs give the final latents of the golden cases."""
    torch.backends.cuda.matmul.allow_tf32 = False
    case = GoldenCase.load(name)
    bundle = Bundle(golden_bundle(case.settings["checkpoint"]))
    height, width = case.size
    schedule = make_schedule(bundle.config.scheduler, case.settings["steps"], height * width // 256)
    engine = TorchEngine(bundle, torch.device("cuda"), dtype, case.model)
    engine.prepare(case.conditions, schedule)
    final = denoise(engine, case.tensors["noise"].to("cuda", dtype), schedule)
    assert engine.execution == GRAPH
    assert_close(final.float().cpu(), case.tensors["final_latents"], rms=rms)
