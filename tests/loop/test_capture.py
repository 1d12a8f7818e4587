"""Fake CUDA tensors show that the whole step of FLUX.1-dev, at full size, can be captured in a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.utils._python_dispatch import TorchDispatchMode

from mogle_rt.bundle import schema
from mogle_rt.config import FLUX_DEV, NUM_EXPERTS, ModelConfig, TransformerConfig
from mogle_rt.conversion.lora import LowRank
from mogle_rt.cost.counting import Count, counting
from mogle_rt.cost.job import FLUX_BUNDLE, Job, WeightlessBundle
from mogle_rt.engines.contract import Conditions
from mogle_rt.engines.torch_engine import TorchEngine
from mogle_rt.fast.course import Course, Kind, ways_of
from mogle_rt.fast.settings import FastConfig
from mogle_rt.loop.blend import Kept
from mogle_rt.loop.schedule import Schedule
from mogle_rt.loop.step import Step
from mogle_rt.ops.attention import attention_with_lse
from tests.conftest import make_once, needs_triton
from tests.loop.fake_cuda import compile_guard, fake_mode, install_guard, trace

pytestmark = needs_triton

CUDA = torch.device("cuda")
MOST_LAUNCHES, MOST_MOVED = 511, 44.22e9  # launches and bytes of a step at full size today; it should never take more
FEW_BLOCKS = replace(FLUX_DEV, num_layers=1, num_single_layers=2)  # FLUX's width; enough where all blocks are alike


@pytest.fixture(scope="module", autouse=True)
def _cuda_guard(shared_folder: Path) -> None:
    if torch.version.cuda is None:
        install_guard(make_once(shared_folder / "no_op_cuda_guard.so", compile_guard))


@contextmanager
def full_size(
    model: ModelConfig | None = None,
    kernels: str = "triton",
    condition_scale: float = 1.0,
    transformer: TransformerConfig = FLUX_DEV,
    mixture: str | None = None,
    style_rank: int = 0,
    edit: bool = False,
    fast: FastConfig | None = None,
) -> Iterator[tuple[Step, Callable[[], Count]]]:
    """A prepared step of FLUX.1-dev, 512 x 512, bf16, on fake CUDA, and a function that gives the counts since its last
    call."""
    ranks = dict.fromkeys(schema.lora_modules(transformer), 4)
    job, batch = Job(config=replace(FLUX_BUNDLE, transformer=transformer), ranks=ranks), 1
    with fake_mode(), counting() as counter, torch.inference_mode():

        def empty(*shape: int) -> Tensor:
            return torch.empty(*shape, device=CUDA, dtype=job.dtype)

        bundle = WeightlessBundle(job.config, job.ranks)
        chosen: dict[str, Any] = {"kernels": kernels, "cuda_graphs": False, "mixture": mixture}
        engine = TorchEngine(bundle, CUDA, job.dtype, model or ModelConfig(), **chosen)
        flux = job.config.transformer
        if style_rank:
            shapes = schema.transformer_tensors(flux).items()
            layers = {name.removesuffix(".weight"): shape for name, shape in shapes if len(shape) == 2}
            style = {n: LowRank(empty(style_rank, inner), empty(out, style_rank)) for n, (out, inner) in layers.items()}
            engine.styles.load("style", style, 0.5)
        latents = [empty(batch, job.tokens, 64) for _ in range(3)]
        kept = Kept(original=latents[0], difference=latents[1], amount=latents[2], sigmas=torch.empty(4))
        conditions = Conditions.from_mask_latents(
            empty(batch, NUM_EXPERTS, job.tokens, 64),
            prompt_embeds=empty(batch, job.text_tokens, flux.joint_attention_dim),
            pooled_prompt_embeds=empty(batch, flux.pooled_projection_dim),
            guidance_scale=3.5,
            grid=(32, 32),
            condition_scale=condition_scale,
            kept=kept if edit else None,
            fast=fast,
        )
        engine.prepare(conditions, Schedule(torch.empty(5), torch.empty(4), torch.empty(4)))
        counter.take()
        yield engine.prepared, counter.take


SWITCHES = [
    ({}, 1.0),
    ({"add_cond_attn": True, "latent_lora": True, "weight_is_scale": True}, 1.0),
    ({"independent_condition": True}, 1.0),
    ({"union_cond_attn": False}, 1.0),
    ({}, 2.0),
]


@pytest.mark.parametrize(("switches", "condition_scale"), SWITCHES, ids=str)
@pytest.mark.parametrize("kernels", ["triton", "torch"])
def test_step_waits_for_nothing(switches: dict[str, bool], condition_scale: float, kernels: str) -> None:
    """It doesn't synchronise or copy between devices, and every step has the same operations on the same shapes."""
    with full_size(ModelConfig(**switches), kernels, condition_scale, FEW_BLOCKS) as (step, _):
        first = trace(step.advance)
        assert trace(step.advance) == first
    assert len(first) > 50


@pytest.mark.parametrize("kernels", ["triton", "torch"])
def test_fused_mixture_waits_for_nothing(kernels: str) -> None:
    with full_size(kernels=kernels, transformer=FEW_BLOCKS, mixture="fused") as (step, _):
        assert trace(step.condition) == trace(step.condition)


@pytest.mark.parametrize("kernels", ["triton", "torch"])
def test_styles_wait_for_nothing(kernels: str) -> None:
    """For each layer that a style adapts there are two small products, on the same shapes in every step."""
    with full_size(kernels=kernels, transformer=FEW_BLOCKS) as (step, _):
        plain = trace(step.advance)
    with full_size(kernels=kernels, transformer=FEW_BLOCKS, style_rank=16) as (step, _):
        first = trace(step.advance)
        assert trace(step.advance) == first
        layers = len(list(step.transformer.layers()))
    assert len(first) >= len(plain) + 2 * layers


@pytest.mark.parametrize("kernels", ["triton", "torch"])
def test_edits_wait_for_nothing(kernels: str) -> None:
    """An edit takes three more launches: for the noise level, for the image's latents at this level, and for the blend."""
    with full_size(kernels=kernels, transformer=FEW_BLOCKS) as (step, taken):
        step.advance()
        plain = taken()
    with full_size(kernels=kernels, transformer=FEW_BLOCKS, edit=True) as (step, taken):
        first = trace(step.advance)
        assert taken().launches == plain.launches + 3
        assert trace(step.advance) == first


class Epilogues(TorchDispatchMode):
    """Refuses products whose bias PyTorch would first copy into the output. It does so where the output's rows have
    gaps, since cuBLAS then can't add the bias."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.overloadpacket in (torch.ops.aten.addmm, torch.ops.aten._addmm_activation) and args[0].dim() == 1:
            out = kwargs.get("out")  # without it, PyTorch makes the result, which has no gaps
            assert args[0].is_contiguous()
            assert out is None or out.is_contiguous(), f"{func} into strides {out.stride()}"
        return func(*args, **kwargs)


@pytest.mark.parametrize("kernels", ["triton", "torch"])
def test_biases_are_added_in_epilogues(kernels: str) -> None:
    """So each product really takes one launch, as it is counted."""
    with full_size(kernels=kernels, transformer=FEW_BLOCKS) as (step, _), Epilogues():
        step.advance()


@dataclass(frozen=True)
class WholeModel:
    """The operations of two steps of the whole model, and the counts of a step and of its mixture."""

    first: list[Any]
    second: list[Any]
    step: Count
    mixture: Count


@pytest.fixture(scope="module")
def whole_model() -> WholeModel:
    """The whole model at 512 x 512, batch 1, bf16."""
    with full_size() as (step, taken):
        first, counted = trace(step.advance), taken()
        second, again = trace(step.advance), taken()
        step.condition()
        mixture = taken()
    assert replace(counted, peak=again.peak) == again
    return WholeModel(first, second, counted, mixture)


def test_the_whole_model_waits_for_nothing(whole_model: WholeModel) -> None:
    assert whole_model.first == whole_model.second
    assert len(whole_model.first) > 500


def test_counts_at_full_size(whole_model: WholeModel) -> None:
    """For comparison: the reference takes 9,632 launches and 215.8 GB a step."""
    assert whole_model.step.launches <= MOST_LAUNCHES
    assert whole_model.step.moved <= MOST_MOVED
    assert whole_model.mixture.launches == 1  # gate and mix; the experts run once an image


FAST = {
    "refresh": FastConfig(refresh_every=4),
    "mask": FastConfig(steps_mask="fast"),
    "both": FastConfig(steps_mask="fast", refresh_every=4),
}


@pytest.fixture
def no_levels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fake noise levels have no values; the kinds of steps don't depend on them."""

    def of(config: FastConfig | None, schedule: Schedule, batch: int) -> Course:
        return Course(config, [float(-k) for k in range(len(schedule))])

    monkeypatch.setattr("mogle_rt.engines.torch_engine.course_of", of)


@pytest.mark.parametrize("kernels", ["triton", "torch"])
@pytest.mark.parametrize("fast", FAST.values(), ids=FAST)
@pytest.mark.usefixtures("no_levels")
def test_fast_modes_wait_for_nothing(kernels: str, fast: FastConfig) -> None:
    """Every kind of step does the same each time. In a whole step, only what is kept is more than without the mode."""
    with full_size(kernels=kernels, transformer=FEW_BLOCKS) as (step, taken):
        step.advance()
        plain = taken().launches
    with full_size(kernels=kernels, transformer=FEW_BLOCKS, fast=fast) as (step, taken):
        for kind in step.sections:
            first = trace(partial(step.advance, kind))
            assert trace(partial(step.advance, kind)) == first
        taken()
        step.advance()
        more = 3 * fast.keeps_condition + 2 * fast.extrapolates  # keys and values of three blocks; a difference
        assert taken().launches == plain + more
        step.advance(Kind.REUSED)
        assert taken().launches == 3 + fast.extrapolates  # noise level, (continuation), update, number of the step


@pytest.mark.parametrize("kernels", ["triton", "torch"])
@pytest.mark.usefixtures("no_levels")
def test_adaptive_steps_wait_for_nothing(kernels: str) -> None:
    """Within a step; between two, the host reads how much the velocities have changed."""
    with full_size(kernels=kernels, transformer=FEW_BLOCKS, fast=FastConfig(max_change=0.1)) as (step, _):
        for kind in step.sections:
            first = trace(partial(step.advance, kind))
            assert trace(partial(step.advance, kind)) == first


@pytest.mark.usefixtures("no_levels")
def test_fast_modes_at_full_size(whole_model: WholeModel) -> None:
    """The share of the FLOPs that a run of 28 steps takes."""
    with full_size(fast=FAST["both"]) as (step, taken):
        counts = {}
        for kind in step.sections:
            step.advance(kind)
            counts[kind] = taken()
    assert counts[Kind.WHOLE].flops == whole_model.step.flops
    assert counts[Kind.REUSED].flops == 0
    assert counts[Kind.KEPT].moved < counts[Kind.WHOLE].moved < 1.04 * whole_model.step.moved
    shares = {
        name: sum(counts[way.kind].flops for way in ways_of(config, range(28))) / (28 * whole_model.step.flops)
        for name, config in FAST.items()
    }
    assert shares["refresh"] <= 0.70
    assert shares["mask"] <= 0.40
    assert shares["both"] <= 0.30


def test_fused_mixture_is_one_launch() -> None:
    """Experts, gate and mix are one launch. Fake pictures have no contents, so none of them count as equal."""
    with full_size(transformer=FEW_BLOCKS, mixture="fused") as (step, taken):
        step.condition()
        mixture = taken()
    assert mixture.launches == 1
    assert mixture.written == 1024 * 64 * 2


@pytest.mark.parametrize(
    ("capability", "dtype", "kernel"),
    [
        ((7, 5), torch.float16, "efficient"),
        ((8, 0), torch.float16, "flash"),
        ((9, 0), torch.bfloat16, "flash"),
        ((9, 0), torch.float32, "efficient"),
    ],
)
def test_attention_takes_what_the_card_has(
    capability: tuple[int, int], dtype: torch.dtype, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where log-sum-exps are needed too, PyTorch doesn't choose the kernel itself, so the package does."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    with fake_mode(), torch.inference_mode():
        q, k = (torch.empty(2, 3, length, 16, dtype=dtype, device=CUDA) for length in (5, 40))
        (name, made), *_ = trace(lambda: attention_with_lse(q, k, k))
    assert kernel in name
    assert made[0] == ((2, 3, 5, 16), dtype)


def item(step: Step) -> None:
    step.buffers.velocity.sum().item()


def branch(step: Step) -> None:
    if step.buffers.velocity.sum() > 0:
        step.buffers.velocity.neg_()


def to_host(step: Step) -> None:
    step.buffers.velocity.cpu()


def from_host(step: Step) -> None:
    step.buffers.velocity.add_(torch.ones(64).to(CUDA))


def scalar_to_host(step: Step) -> None:
    step.buffers.velocity.sum().cpu()


def scalar_from_host(step: Step) -> None:
    step.buffers.velocity.mul_(torch.tensor(3.0).to(CUDA))


def scalar_copied(step: Step) -> None:
    step.buffers.index.copy_(torch.tensor(3))


def data_dependent(step: Step) -> None:
    step.buffers.velocity[step.buffers.velocity > 0].sum()


FAULTS: list[tuple[Callable[[Step], None], type[Exception]]] = [
    (item, DataDependentOutputException),
    (branch, DataDependentOutputException),
    (to_host, AssertionError),
    (from_host, AssertionError),
    (scalar_to_host, AssertionError),
    (scalar_from_host, AssertionError),
    (scalar_copied, AssertionError),
    (data_dependent, DynamicOutputShapeException),
]


@pytest.mark.parametrize(("fault", "error"), FAULTS, ids=lambda f: getattr(f, "__name__", ""))
def test_planted_faults_are_caught(fault: Callable[[Step], None], error: type[Exception]) -> None:
    def faulty() -> None:
        step.velocity()
        fault(step)

    with full_size(transformer=FEW_BLOCKS) as (step, _), pytest.raises(error):
        trace(faulty)


def test_growing_step_is_caught() -> None:
    """The planted fault is a step that allocates more than the step before it."""
    held: list[Tensor] = []

    def grows(step: Step) -> None:
        held.append(step.buffers.velocity.new_empty(len(held) + 1))

    with full_size(transformer=FEW_BLOCKS) as (step, _):
        assert trace(lambda: grows(step)) != trace(lambda: grows(step))
