"""Products by oneDNN: their results beside float64, when they are used, and how packed weights are loaded and kept."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mogle_rt import Pipeline
from mogle_rt.bundle.bundle import Bundle
from mogle_rt.bundle.schema import transformer_tensors
from mogle_rt.engines.torch_engine import TorchEngine
from mogle_rt.linear import onednn
from mogle_rt.linear import packed as packed_format
from mogle_rt.linear.contract import Place
from mogle_rt.linear.layer import Linear
from mogle_rt.linear.packed import MOST_PACKED_RANK, PackedWeight
from mogle_rt.linear.plain import PlainWeight
from mogle_rt.memory.budget import Budget
from tests.checkpoints import Files
from tests.conftest import CASES, GOLDEN, GoldenCase, assert_close
from tests.linear.layers import RandomLayer, run
from tests.linear.test_formats import golden_run
from tests.test_golden import TOLERANCE

Bundles = Callable[[str], Path]
CPU = torch.device("cpu")

pytestmark = pytest.mark.skipif(
    not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"), reason="this PyTorch has no oneDNN"
)


@pytest.fixture
def rng() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bool, bool]]:
    """Compute every product by oneDNN, whatever its size. For each is noted whether its weight is packed, and whether
    it does GELU."""
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
@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("branch", ["", "condition", "style"])
@pytest.mark.parametrize("columns", [slice(None), slice(3, 20)])
@pytest.mark.parametrize("stays", [True, False])
def test_product(
    stays: bool, columns: slice, branch: str, gelu: bool, packed: bool, calls: list[tuple[bool, bool]]
) -> None:
    """oneDNN does GELU too where no branch acts on any of the rows. (The branch "style" acts on none of them.)"""
    parts = (columns,) if columns == slice(None) else (slice(0, 3), columns, slice(20, 24))
    random, streams = RandomLayer(12, 24, ((4, branch),) if branch else ()), (("image", 5), ("condition", 4))
    x = torch.randn(18, 12, generator=torch.Generator().manual_seed(1))
    layer = random.load(PackedWeight if packed else PlainWeight, parts=parts)
    y, out = run(layer, x, streams, 2, columns=columns, gelu=gelu, stays=stays)
    assert_close(y, random.exact(x, streams, 2, gelu=gelu)[:, columns].float(), rms=1e-6)
    assert (y.data_ptr() == out.data_ptr()) == stays
    assert calls == [(packed, gelu and branch != "condition")] * 2


@pytest.mark.parametrize("rank", [4, 16, 20, 32, 33])
def test_branch_rides(rank: int, calls: list[tuple[bool, bool]]) -> None:
    """A branch of small rank rides in a packed layer's product if its input has room for it. It needs no product of its
    own then, and oneDNN does GELU too."""
    parts, streams = (slice(0, 8), slice(8, 24)), (("image", 5), ("condition", 4))
    random = RandomLayer(12, 24, ((rank, "condition"),))
    layer = random.load(PackedWeight, Place.AFTER_NORM, parts)
    x = torch.randn(9, 12, generator=torch.Generator().manual_seed(1))
    exact = random.exact(x, streams, 1, gelu=True).float()
    for part in parts:
        assert_close(run(layer, x, streams, 1, columns=part, gelu=True)[0], exact[:, part], rms=1e-6)
    assert calls == [(True, rank <= MOST_PACKED_RANK)] * 4


@pytest.mark.parametrize(("weights", "rides"), [("plain", False), ("packed", False), ("packed", True)])
@pytest.mark.parametrize("name", CASES)
def test_golden_steps(
    name: str,
    weights: str,
    rides: bool,
    golden_bundle: Bundles,
    calls: list[tuple[bool, bool]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All switches, with every product by oneDNN. By themselves the golden models are too small for oneDNN."""
    monkeypatch.setattr(packed_format, "MOST_PACKED_RANK", 1000 if rides else 0)
    case = GoldenCase.load(name)
    engine, latents = golden_run(case, Bundle(golden_bundle(case.settings["checkpoint"])), "torch", weights)
    assert_close(latents, case.tensors["final_latents"], rms=TOLERANCE)
    assert {(weights == "packed", True), (weights == "packed", False)} <= set(calls)
    for layer_name, layer in engine.transformer.layers():
        fed_by_norm = layer_name.endswith((".qkv", ".qkv_mlp"))
        assert (layer.before is not None) == (rides and fed_by_norm), layer_name
        assert layer.weight.name == (weights if "blocks" in layer_name else "plain"), layer_name


@pytest.mark.quick
def test_when_it_serves() -> None:
    """It serves for large float32 weights on a CPU: packed ones for any number of rows, plain ones for many rows if they
    have no gaps."""
    large = torch.empty(512, 256)
    assert PackedWeight.takes((512, 256), CPU, torch.float32)
    assert not PackedWeight.takes((511, 256), CPU, torch.float32)
    assert not PackedWeight.takes((512, 256), torch.device("meta"), torch.float32)
    assert not PackedWeight.takes((512, 256), CPU, torch.bfloat16)
    assert onednn.serves(onednn.pack(large), 1)
    assert onednn.serves(large, 32)
    assert not onednn.serves(large, 31), "for few rows, packing takes longer than it saves"
    assert not onednn.serves(torch.empty(512, 512)[:, 256:], 32), "there are gaps between the weight's rows"


class Draw:
    """A pipeline of the golden checkpoint, which draws with packed weights wherever the format allows it."""

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

    def layers(self) -> list[Linear]:
        """The layers of all blocks."""
        assert isinstance(self.pipe.engine, TorchEngine)
        return [layer for name, layer in self.pipe.engine.transformer.layers() if "blocks" in name]


@pytest.fixture
def draw(golden_bundle: Bundles, calls: list[tuple[bool, bool]]) -> Draw:
    return Draw(golden_bundle("tiny"))


def test_file_is_let_go_of(draw: Draw, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file's pages of every packed weight are released, and of no other one. The next run releases nothing."""
    released: list[str] = []
    monkeypatch.setattr(draw.pipe.bundle, "release", released.extend)
    draw(2)
    stored = [f"transformer.{name}" for name in transformer_tensors(draw.pipe.bundle.config.transformer)]
    blocks = {n for n in stored if "blocks" in n and n.endswith(".weight") and "norm" not in n}
    assert {n for n in released if "blocks" in n and "norm" not in n} == blocks
    released.clear()
    draw(2, 48)
    assert not blocks & set(released)
    held, plain = draw.pipe.last_run.weights.split(", ")
    assert held.startswith("packed ")
    assert plain.startswith("plain ")


def test_one_weight_in_memory(tmp_path: Path, calls: list[tuple[bool, bool]], monkeypatch: pytest.MonkeyPatch) -> None:
    """A file in another dtype needs a plain copy of each weight. It is gone before the next weight is read, and the
    largest weight comes first."""
    bundle = Bundle(Files(GOLDEN / "checkpoints" / "tiny").convert(tmp_path / "half.safetensors", dtype="fp16"))
    copies: list[tuple[int, weakref.ref[Tensor]]] = []
    load = bundle.load

    def noted(names: Any, device: Any, dtype: Any) -> Tensor:
        loaded = load(names, device, dtype)
        if "blocks" in names[0] and names[0].endswith(".weight") and loaded.dim() == 2 and "lora" not in names[0]:
            assert not any(copy() is not None for _, copy in copies)
            copies.append((loaded.numel(), weakref.ref(loaded)))
        return loaded

    monkeypatch.setattr(bundle, "load", noted)
    case = GoldenCase.load("base")
    assert len(list(TorchEngine(bundle, CPU, torch.float32, case.model).transformer.layers())) == len(copies) + 2
    assert [size for size, _ in copies] == sorted((size for size, _ in copies), reverse=True)


def test_weights_are_read_after_the_modulations(draw: Draw, monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU reads the blocks' weights after the modulation's, a quarter of the model, were used and freed."""
    read: list[str] = []
    load = draw.pipe.bundle.load

    def noted(names: Any, device: Any, dtype: Any) -> Tensor:
        read.extend(names)
        return load(names, device, dtype)

    monkeypatch.setattr(draw.pipe.bundle, "load", noted)
    draw(1)
    modulations = [i for i, name in enumerate(read) if name.endswith(".linear.weight")]
    weights = [i for i, name in enumerate(read) if name.endswith("attn.to_q.weight")]
    assert modulations
    assert max(modulations) < min(weights)


@pytest.mark.quick
def test_history_does_not_count(golden_bundle: Bundles, calls: list[tuple[bool, bool]]) -> None:
    """A seed gives the same image to the last bit, whatever was drawn before."""
    draw = Draw(golden_bundle("tiny"))
    draw(6, 48)
    assert torch.equal(draw(1), Draw(golden_bundle("tiny"))(1))
    assert any(packed for packed, _ in calls)


def test_memory_does_not_count(golden_bundle: Bundles, draw: Draw, monkeypatch: pytest.MonkeyPatch) -> None:
    """Formats round differently, so the free memory doesn't choose the format. Where packed weights don't fit, they are
    streamed, and each product is the same to the bit."""
    expected = draw(2)
    monkeypatch.setattr("mogle_rt.calls.memory.budget_for", lambda device, asked: Budget(2_100_000, 0))
    small = Draw(golden_bundle("tiny"))
    assert small.pipe.plan.streamed
    assert torch.equal(small(2), expected)
    assert "streamed" in small.pipe.last_run.weights


def test_interrupted(draw: Draw, golden_bundle: Bundles, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that is interrupted while weights are packed leaves the pipeline as it was."""
    count = 0
    pack = onednn.pack

    def interrupt(weight: Tensor) -> Tensor:
        nonlocal count
        count += 1
        if count == 5:
            raise KeyboardInterrupt
        return pack(weight)

    monkeypatch.setattr(onednn, "pack", interrupt)
    with pytest.raises(KeyboardInterrupt):
        draw(2)
    monkeypatch.setattr(onednn, "pack", pack)
    assert torch.equal(draw(2), Draw(golden_bundle("tiny"))(2))
