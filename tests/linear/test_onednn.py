"""Products by oneDNN against float64 and against PyTorch's own; and when they are taken."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from mogle_rt import Pipeline
from mogle_rt.bundle.bundle import Bundle
from mogle_rt.bundle.schema import transformer_tensors
from mogle_rt.engines import torch_engine as engines
from mogle_rt.engines.torch_engine import TorchEngine
from mogle_rt.linear import layers as lora
from mogle_rt.linear import onednn
from mogle_rt.linear.layers import MOST_PACKED_RANK, Linear, LoraLinear, Ride
from mogle_rt.linear.product import Product
from mogle_rt.memory import budget, packing
from mogle_rt.model.loading import load_transformer
from mogle_rt.model.transformer import Transformer
from tests.checkpoints import Files
from tests.conftest import CASES, GOLDEN, GoldenCase, assert_close
from tests.test_golden import TOLERANCE, run_steps

Bundles = Callable[[str], Path]

pytestmark = pytest.mark.skipif(
    not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"), reason="this PyTorch has no oneDNN"
)


def random_layer(
    g: torch.Generator, inner: int, outer: int, rank: int, parts: tuple[slice, ...], packed_ride: Ride = Ride.NONE
) -> LoraLinear:
    layer = LoraLinear(inner, outer, rank, packed_ride=packed_ride, parts=parts)
    for name, parameter in layer.named_parameters():
        value = torch.randn(parameter.shape, generator=g) * 0.3
        setattr(layer, name, torch.nn.Parameter(value, requires_grad=False))
    return layer


@pytest.fixture
def rng() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bool, bool]]:
    """oneDNN for every product, whatever its size; says of each whether the weight was packed and GELU done."""
    calls: list[tuple[bool, bool]] = []
    linear = onednn.linear

    def noted(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, gelu: bool = False) -> Tensor:
        calls.append((weight.is_mkldnn, gelu))
        return linear(x, weight, bias, gelu=gelu)

    monkeypatch.setattr(onednn, "LEAST_WEIGHT", 0)
    monkeypatch.setattr(onednn, "ROWS_A_CHANNEL", 0)
    monkeypatch.setattr(onednn, "linear", noted)
    return calls


@pytest.mark.quick
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize(("rows", "inner", "outer"), [(1, 65, 33), (7, 33, 5), (64, 48, 192), (130, 257, 66)])
def test_linear(rows: int, inner: int, outer: int, gelu: bool, packed: bool, rng: torch.Generator) -> None:
    x, weight, bias = (torch.randn(*shape, generator=rng) for shape in ((rows, inner), (outer, inner), (outer,)))
    exact = F.linear(x.double(), weight.double(), bias.double())
    exact = F.gelu(exact, approximate="tanh") if gelu else exact
    weight = onednn.pack(weight) if packed else weight
    assert_close(onednn.linear(x, weight, bias, gelu=gelu), exact, rms=1e-6)


@pytest.mark.quick
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("with_gelu", [False, True])
@pytest.mark.parametrize("lora_from", [0, 5, 9])
@pytest.mark.parametrize("columns", [slice(None), slice(3, 20)])
@pytest.mark.parametrize("stays", [True, False])
def test_product(
    stays: bool,
    columns: slice,
    lora_from: int,
    with_gelu: bool,
    packed: bool,
    rng: torch.Generator,
    calls: list[tuple[bool, bool]],
) -> None:
    """The same as PyTorch's, with LoRA on a tail of the rows (9: on none), and before GELU."""
    parts = (columns,) if columns == slice(None) else (slice(0, 3), columns, slice(20, 24))
    layer, batch = random_layer(rng, 12, 24, 4, parts), 2
    x, weight = torch.randn(9 * batch, 12, generator=rng), layer.weight[columns]
    out = torch.full((9, batch, len(weight)), float("nan"))
    scratch = torch.empty_like(out) if with_gelu else None
    exact = F.linear(x.double(), weight.double(), layer.bias[columns].double())
    low = x[lora_from * batch :].double() @ layer.lora_down.double()
    exact[lora_from * batch :] += low @ layer.lora_up[:, columns].double()
    exact = F.gelu(exact, approximate="tanh") if with_gelu else exact
    if packed:
        layer.pack(lambda: None)
    result = Product(layer, out, lora_from, columns=columns, gelu_scratch=scratch, stays=stays)(x)
    assert_close(result, exact, rms=1e-6)
    assert (result.data_ptr() == out.data_ptr()) == stays
    assert calls == [(packed, with_gelu and lora_from == 9)]


@pytest.mark.parametrize(("packed", "rides"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("name", CASES)
def test_golden_steps(
    name: str,
    packed: bool,
    rides: bool,
    golden_bundle: Bundles,
    calls: list[tuple[bool, bool]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All switches with every product by oneDNN, which the golden sizes are too small for by themselves."""
    if not packed:
        monkeypatch.setattr(packing, "free_memory", lambda: 0)
    monkeypatch.setattr(lora, "MOST_PACKED_RANK", 1000 if rides else 0)
    case = GoldenCase.load(name)
    loaded: list[Transformer] = []

    def load(*args: Any, **options: Any) -> Transformer:
        loaded.append(load_transformer(*args, **options))
        return loaded[-1]

    monkeypatch.setattr(engines, "load_transformer", load)
    trace = run_steps(case, Bundle(golden_bundle(case.settings["checkpoint"])), case.model, "torch", None)
    for key in (f"noise_pred.{case.settings['steps'] - 1}", "final_latents"):
        assert_close(trace[key], case.tensors[key], rms=TOLERANCE)
    assert {(packed, True), (packed, False)} <= set(calls)
    for name, layer in loaded[0].named_modules():
        if isinstance(layer, LoraLinear):
            fed_by_norm = name.endswith((".qkv", ".qkv_mlp"))
            assert (layer.ride is Ride.INPUT) == (rides and fed_by_norm), name


@pytest.mark.quick
@pytest.mark.parametrize("rank", [4, 16, 20, 32, 33])
def test_branch_rides(rank: int, rng: torch.Generator, calls: list[tuple[bool, bool]]) -> None:
    """In a packed layer whose input has room for it, and if its rank is small: no product of its own, GELU within."""
    parts, rows, tail = (slice(0, 8), slice(8, 24)), 9, 5
    layer = random_layer(rng, 12, 24, rank, parts, Ride.INPUT)
    x = torch.randn(rows, 12, generator=rng)
    exact = F.linear(x.double(), layer.weight.double(), layer.bias.double())
    exact[tail:] += x[tail:].double() @ layer.lora_down.double() @ layer.lora_up.double()
    exact = F.gelu(exact, approximate="tanh")
    layer.pack(lambda: None)
    rides = rank <= MOST_PACKED_RANK
    assert (layer.ride is Ride.INPUT) == rides
    assert layer.in_columns == 12 + (-(-rank // 16) * 16 if rides else 0)
    widened = torch.cat([x, torch.zeros(rows, layer.in_columns - 12)], dim=1)
    if layer.down_before is not None:
        widened[tail:, 12:] = x[tail:] @ layer.down_before
    out = torch.empty(rows, 1, 24)
    for part in parts:
        room = torch.empty(rows, 1, part.stop - part.start)
        product = Product(layer, room, tail, columns=part, gelu_scratch=torch.empty_like(room))
        out[:, 0, part] = product(widened)
    assert_close(out[:, 0], exact, rms=1e-6)
    assert calls == [(True, rides)] * 2


@pytest.mark.quick
def test_when_it_serves() -> None:
    """Large float32 weights on a CPU: packed for any rows, plain ones whole and with enough rows."""
    large = torch.empty(512, 256)
    assert onednn.packs(large)
    assert not onednn.packs(large[1:])
    assert not onednn.packs(large.to("meta"))
    assert not onednn.packs(large.bfloat16())
    assert onednn.serves(onednn.pack(large), 1)
    assert onednn.serves(large, 32)
    assert not onednn.serves(large, 31), "few rows: packing takes longer than it saves"
    assert not onednn.serves(torch.empty(512, 512)[:, 256:], 32), "gaps between rows"


def linears(pipe: Pipeline) -> list[Linear]:
    """Those of the blocks."""
    assert isinstance(pipe.engine, TorchEngine)
    blocks = [*pipe.engine.transformer.blocks, *pipe.engine.transformer.single_blocks]
    return [layer for block in blocks for layer in block.modules() if isinstance(layer, Linear)]


class Draw:
    """A pipeline of the golden checkpoint, in which every weight may be packed."""

    def __init__(self, bundle: Path) -> None:
        self.pipe = Pipeline(bundle, "cpu", "fp32")
        config = self.pipe.bundle.config.transformer
        self.prompt = torch.randn(1, 5, config.joint_attention_dim, generator=torch.Generator().manual_seed(1))
        self.pooled = torch.ones(1, config.pooled_projection_dim)

    def __call__(self, steps: int, pixels: int = 32) -> Tensor:
        images = self.pipe(
            num_inference_steps=steps,
            height=pixels,
            width=pixels,
            generator=torch.Generator().manual_seed(0),
            prompt_embeds=self.prompt,
            pooled_prompt_embeds=self.pooled,
            output_type="latent",
        ).images
        assert isinstance(images, Tensor)
        return images


@pytest.fixture
def draw(golden_bundle: Bundles, calls: list[tuple[bool, bool]]) -> Draw:
    return Draw(golden_bundle("tiny"))


def test_file_is_let_go_of(draw: Draw, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pages of every packed weight, and of no other; a second time there is nothing to do."""
    released: list[str] = []
    monkeypatch.setattr(draw.pipe.bundle, "release", released.extend)
    draw(2)
    stored = [f"transformer.{name}" for name in transformer_tensors(draw.pipe.bundle.config.transformer)]
    blocks = {n for n in stored if "blocks" in n and n.endswith(".weight") and "norm" not in n}
    assert {n for n in released if "blocks" in n and "norm" not in n} == blocks
    released.clear()
    draw(2, 48)
    assert not blocks & set(released)


def test_one_weight_in_memory(tmp_path: Path, calls: list[tuple[bool, bool]], monkeypatch: pytest.MonkeyPatch) -> None:
    """The plain weights go, with the steps of earlier runs that used them. (In float16 in the file: they are copies.)"""
    draw = Draw(Files(GOLDEN / "checkpoints" / "tiny").convert(tmp_path / "half.safetensors", dtype="fp16"))
    with monkeypatch.context() as short:
        short.setattr(packing, "free_memory", lambda: 0)
        draw(2)
    plain = [StorageWeakRef(layer.weight.untyped_storage()) for layer in linears(draw.pipe)]
    assert not any(ref.expired() for ref in plain)
    draw(2)
    gc.collect()
    assert all(ref.expired() for ref in plain)


@pytest.mark.quick
def test_history_does_not_count(golden_bundle: Bundles, calls: list[tuple[bool, bool]]) -> None:
    """One seed, one image, to the last bit, whatever was drawn before."""
    draw = Draw(golden_bundle("tiny"))
    draw(6, 48)
    assert torch.equal(draw(1), Draw(golden_bundle("tiny"))(1))
    assert any(packed for packed, _ in calls)


def test_no_room(draw: Draw, calls: list[tuple[bool, bool]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights are packed as soon as they find room, for shapes that were drawn before too."""
    weights = [layer.weight.nbytes for layer in linears(draw.pipe)]
    needed = (sum(weights) + 2 * max(weights)) / packing.ROOM
    monkeypatch.setattr(packing, "free_memory", lambda: needed - 1)
    before = draw(2)
    assert not any(packed for packed, _ in calls)
    monkeypatch.setattr(packing, "free_memory", lambda: needed + 1)
    calls.clear()
    assert_close(draw(2), before, rms=1e-6)
    assert any(packed for packed, _ in calls)


@pytest.mark.quick
@pytest.mark.parametrize(("written", "share"), [("max", None), ("1000000000000000", None), ("150000000000", 1.5e11)])
def test_free_memory(written: str, share: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine's, or what a container's limit leaves."""
    machine = 2 * 10**11
    (tmp_path / "memory.max").write_text(f"{written}\n")
    monkeypatch.setattr(budget, "CONTAINER_LIMITS", (tmp_path / "missing", tmp_path / "memory.max"))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=machine))
    taken = psutil.Process().memory_info()
    expected = machine if share is None else share - (taken.rss - taken.shared)
    assert budget.free_memory() == pytest.approx(expected, abs=1e8)


@pytest.mark.parametrize("packed_ride", [Ride.NONE, Ride.INPUT])
def test_interrupted(packed_ride: Ride, rng: torch.Generator) -> None:
    """A layer is packed whole or not at all."""
    parts = (slice(0, 8), slice(8, 24))
    layer = random_layer(rng, 12, 24, 4, parts, packed_ride)
    weight = layer.weight.clone()

    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        layer.pack(interrupt)
    assert torch.equal(torch.cat([layer.rows(part) for part in parts]), weight)
    assert layer.ride is Ride.NONE
