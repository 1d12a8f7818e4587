"""The loop over fixed buffers: reuse, refusal of changed inputs, fallback that is told; on a GPU, graphs themselves."""

from __future__ import annotations

import logging
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
from mogle_rt.loop.buffers import tensors_of
from mogle_rt.loop.denoise import denoise
from mogle_rt.loop.graphs import GRAPH, why_eager
from mogle_rt.loop.schedule import make_schedule
from mogle_rt.loop.step import Step
from mogle_rt.model.modulation import ModulationTables, modulation_tables
from mogle_rt.ops.choice import VARIABLE, choose
from tests.conftest import CASES, GoldenCase, assert_close, needs_triton
from tests.test_golden import TOLERANCE, Bundles

CPU = torch.device("cpu")
GRID, STEPS = (2, 3), 3


@pytest.fixture
def bundle(tiny_bundle: Path) -> Bundle:
    return Bundle(tiny_bundle)


def run(engine: TorchEngine, bundle: Bundle, asked: Conditions, seed: int = 0) -> Tensor:
    tokens = GRID[0] * GRID[1]
    schedule = make_schedule(bundle.config.scheduler, STEPS, tokens)
    engine.prepare(asked, schedule)
    g = torch.Generator().manual_seed(seed)
    noise = torch.randn(asked.mask_latents.shape[0], tokens, 64, generator=g)
    return denoise(engine, noise.to(engine.device, engine.dtype), schedule)


def asked_of(bundle: Bundle) -> Callable[..., Conditions]:
    """Random conditions for a bundle, by seed, text tokens and batch."""
    t = bundle.config.transformer

    def make(seed: int, text: int = 5, batch: int = 1) -> Conditions:
        g = torch.Generator().manual_seed(seed)
        return Conditions(
            mask_latents=torch.randn(batch, 20, GRID[0] * GRID[1], 64, generator=g),
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
    """The second run's result is a new engine's, through the first run's memory."""
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
    """CUDA's memory-efficient kernel, which float32 takes, gives [B, L, H, d] transposed."""
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
    """Their weights, a quarter of the model's, are read for another prompt or guidance, not for another mask."""
    asked = asked_of(bundle)
    made: list[int] = []

    def noted(*args: Any, **options: Any) -> ModulationTables:
        made.append(len(made))
        return modulation_tables(*args, **options)

    monkeypatch.setattr("mogle_rt.engines.torch_engine.modulation_tables", noted)
    engine = TorchEngine(bundle, CPU, torch.float32, ModelConfig())
    first, other_mask = asked(1), replace(asked(1), mask_latents=asked(2).mask_latents)
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
    assert len(engine._runners) == 1  # activations of old shapes don't stay


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
    """What capture takes of torch.cuda, on the CPU: work under capture leaves no trace, a replay does it.

    Attributes:
        engine: whose step is captured. fault: raised by the capture's end. captures: pool and stream of each.
    """

    engine: TorchEngine

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.fault: Exception | None = None
        self.captures: list[tuple[object, object]] = []
        fakes = {
            "CUDAGraph": lambda: SimpleNamespace(replay=lambda: self.engine.prepared.advance()),
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
    def capture(self, graph: object, pool: object, stream: object, capture_error_mode: str) -> Iterator[None]:
        step = self.engine.prepared
        written = tensors_of((list(vars(step.buffers).values()), step.modulation, step.time, step.sigma_step))
        saved = [t.clone() for t in written]
        yield
        for t, before in zip(written, saved, strict=True):
            t.copy_(before)
        self.captures.append((pool, stream))
        if self.fault is not None:
            raise self.fault


@pytest.fixture
def expected(bundle: Bundle) -> Tensor:
    """Of eager steps."""
    return run(TorchEngine(bundle, CPU, torch.float32, ModelConfig()), bundle, asked_of(bundle)(1))


@pytest.fixture
def fake_cuda(bundle: Bundle, expected: Tensor, monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    fake = FakeCuda(monkeypatch)
    fake.engine = TorchEngine(bundle, CPU, torch.float32, ModelConfig())
    return fake


@pytest.mark.quick
def test_capture_changes_no_result(bundle: Bundle, fake_cuda: FakeCuda, expected: Tensor) -> None:
    """Warm-up and capture leave latents and index as they were; every step is a replay."""
    for _ in range(2):
        assert torch.equal(run(fake_cuda.engine, bundle, asked_of(bundle)(1)), expected)
        assert fake_cuda.engine.execution == GRAPH
    assert len(fake_cuda.captures) == 1


def test_graphs_share_memory(bundle: Bundle, fake_cuda: FakeCuda) -> None:
    """A pool's blocks are of one stream: it has to be the same for every capture."""
    for text in (5, 6):
        run(fake_cuda.engine, bundle, asked_of(bundle)(1, text=text))
    first, second = fake_cuda.captures
    assert first[0] is second[0]
    assert first[1] is second[1]


@pytest.mark.quick
def test_failed_capture_is_told(
    bundle: Bundle, fake_cuda: FakeCuda, expected: Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    """Steps run eagerly, from where they were, everyone is told, and the next capture has another pool."""
    fake_cuda.fault = RuntimeError("CUDA error: operation not permitted\nwhen stream is capturing")
    with caplog.at_level(logging.WARNING):
        assert torch.equal(run(fake_cuda.engine, bundle, asked_of(bundle)(1)), expected)
    told = "eager: capturing the step failed: CUDA error: operation not permitted"
    assert fake_cuda.engine.execution == told
    assert told in caplog.text
    assert len(fake_cuda.captures) == 1
    fake_cuda.fault = None
    run(fake_cuda.engine, bundle, asked_of(bundle)(1, text=6))
    assert fake_cuda.engine.execution == GRAPH
    first, second = fake_cuda.captures
    assert first[0] is not second[0]


def test_errors_of_the_step_are_its_own(bundle: Bundle, fake_cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    """They would come in eager steps too: no fallback hides them."""

    def broken(self: Step) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(Step, "advance", broken)
    with pytest.raises(RuntimeError, match=r"^out of memory$"):
        run(fake_cuda.engine, bundle, asked_of(bundle)(1))
    assert fake_cuda.captures == []
    assert fake_cuda.engine.execution == GRAPH  # no word of a failed capture


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

    monkeypatch.delenv(VARIABLE, raising=False)
    names = [chosen(None, device) for device in ("cpu", "mps", "cuda", "meta")]
    assert names == ["torch_ops", "torch_ops", "triton_ops", "triton_ops"]
    assert chosen("torch", "cuda") == "torch_ops"
    monkeypatch.setenv(VARIABLE, "torch")
    assert chosen(None, "cuda") == "torch_ops"
    assert chosen("triton", "cuda") == "triton_ops"
    monkeypatch.setenv(VARIABLE, "fast")
    with pytest.raises(ConfigError, match="MOGLE_RT_KERNELS must be one of 'triton', 'torch', got 'fast'"):
        choose(None, CPU)
    monkeypatch.setattr(triton_ops, "interpreted", lambda: False)
    with pytest.raises(ConfigError, match=r"kernels='triton' can't run on cpu: .* need a GPU"):
        choose("triton", CPU)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="triton is not installed"):
        choose("triton", torch.device("cuda"))


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
@pytest.mark.parametrize(("dtype", "rms"), [(torch.float32, 10 * TOLERANCE), (torch.bfloat16, 0.05)])
@pytest.mark.parametrize("name", CASES)
def test_golden_on_a_gpu(name: str, dtype: torch.dtype, rms: float, golden_bundle: Bundles) -> None:
    """Final latents through kernels and graphs."""
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
