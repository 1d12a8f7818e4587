"""A new weight format is one class and one row in the table. No other code needs to know it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mogle_rt.bundle.bundle import Bundle
from mogle_rt.engines.torch_engine import TorchEngine
from mogle_rt.errors import ConfigError
from mogle_rt.linear.branches import LowRankBranch
from mogle_rt.linear.contract import Further, Multiply, StoredLayer, WeightFormat
from mogle_rt.linear.formats import FORMATS
from mogle_rt.loop.schedule import make_schedule
from tests.conftest import CASES, GoldenCase, assert_close, in_the_interpreter, relative_rms
from tests.linear.layers import RandomLayer, run
from tests.linear.test_layer import ALL, LAST_TWO, NONE, STREAMS, TAIL

Bundles = Callable[[str], Path]
CPU = torch.device("cpu")

# A step of the 8 bits is a 127th of a row's largest number, which among 48 normal ones is about 2.4 standard deviations.
# The error of rounding is uniform within half a step, so its RMS is a step / sqrt(12): 0.6 % of a product's size. Over
# the golden models' five blocks these errors add up to less than four times that; softmax and gate may magnify them.
TOLERANCE = 0.03


class Toy(WeightFormat):
    """Eight bits for a number, and a scale for a row. Each product first writes the numbers into a buffer.

    Branches that ride in the product stand beside the weight as they are.
    """

    name = "toy"

    def __init__(self, values: Tensor, scales: Tensor, further: Further) -> None:
        self.values, self.scales, self.further, self.dtype = values, scales, further, scales.dtype
        rows = 0 if further.rows is None else len(further.rows)
        columns = 0 if further.columns is None else further.columns.shape[1]
        self.shape = (values.shape[0] + rows, values.shape[1] + columns)

    @classmethod
    def load(cls, stored: StoredLayer, further: Further, parts: tuple[slice, ...]) -> Toy:
        matrix = stored.load("weight")
        scales = matrix.abs().amax(1, keepdim=True) / 127
        values = (matrix / scales).round().to(torch.int8)
        stored.release("weight")
        return cls(values, scales, further)

    def tensors(self) -> list[Tensor]:
        beside = [t for t in (self.further.columns, self.further.rows) if t is not None]
        return [self.values, self.scales, *beside]

    def dequantised(self) -> Tensor:
        matrix = self.values * self.scales
        if self.further.columns is not None:
            matrix = torch.cat([matrix, self.further.columns], dim=1)
        return matrix if self.further.rows is None else torch.cat([matrix, self.further.rows])

    def product(
        self, out: Tensor, bias: Tensor, *, columns: slice, widths: tuple[int, ...], gelu: bool
    ) -> tuple[Multiply, bool]:
        def multiply(*inputs: Tensor) -> Tensor:
            weight = self.dequantised()[columns]
            return torch.addmm(bias, torch.cat(inputs, dim=1), weight.t(), out=out)

        return multiply, False


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FORMATS, Toy.name, Toy)


def golden_run(
    case: GoldenCase, bundle: Bundle, kernels: str, weights: str | None, steps: int | None = None
) -> tuple[TorchEngine, Tensor]:
    """An engine, and the latents after the case's loop, or after its first steps."""
    height, width = case.size
    schedule = make_schedule(bundle.config.scheduler, case.settings["steps"], height * width // 256)
    engine = TorchEngine(bundle, CPU, torch.float32, case.model, kernels=kernels, weights=weights)
    engine.prepare(case.conditions, schedule)
    engine.start(case.tensors["noise"])
    for _ in range(len(schedule) if steps is None else steps):
        engine.advance()
    return engine, engine.latents()


@pytest.mark.parametrize(
    ("name", "kernels"),
    [(name, "torch") for name in CASES] + [pytest.param("base", "triton", marks=in_the_interpreter)],
)
@pytest.mark.usefixtures("toy")
def test_golden_steps(name: str, kernels: str, golden_bundle: Bundles) -> None:
    """The ordinary engine runs it with all switches. Errors are as small as 8 bits allow, and not smaller than they can be,
    which shows that the format was used."""
    case = GoldenCase.load(name)
    bundle = Bundle(golden_bundle(case.settings["checkpoint"]))
    engine, latents = golden_run(case, bundle, kernels, "toy")
    moved, expected = (x - case.tensors["noise"] for x in (latents, case.tensors["final_latents"]))
    assert 1e-4 < relative_rms(moved, expected) < TOLERANCE
    blocks = [layer for name, layer in engine.transformer.layers() if "blocks" in name]
    assert len(blocks) > 10
    assert {type(layer.weight) for layer in blocks} == {Toy}
    assert engine.weight_formats.startswith(("toy ", "plain "))
    assert "toy " in engine.weight_formats


@pytest.mark.parametrize("branch", [(4, TAIL), (4, LAST_TWO), (7, ALL), (4, NONE)], ids=str)
@pytest.mark.parametrize("gelu", [False, True])
def test_product(gelu: bool, branch: tuple[int, str]) -> None:
    """Only the weight is rounded, never a branch: the product equals that of the rounded weight."""
    random = RandomLayer(48, 24, (branch,))
    layer = random.load(Toy)
    assert isinstance(layer.weight, Toy)
    assert_close(layer.weight.dequantised(), random.weight, rms=0.01, largest=0.01)
    random.weight = layer.weight.dequantised()
    x = torch.randn(9, 48, generator=torch.Generator().manual_seed(1))
    assert_close(run(layer, x, STREAMS, 1, gelu=gelu)[0], random.exact(x, STREAMS, 1, gelu=gelu).float(), rms=1e-6)


def test_unknown_format(golden_bundle: Bundles) -> None:
    case = GoldenCase.load("base")
    bundle = Bundle(golden_bundle(case.settings["checkpoint"]))
    with pytest.raises(ConfigError, match="the weight format must be one of plain, packed, int8, fp8, int4, got 'toy'"):
        TorchEngine(bundle, CPU, torch.float32, case.model, weights="toy")


def test_filled_branch_is_the_same() -> None:
    g = torch.Generator().manual_seed(0)
    branch = LowRankBranch(torch.randn(7, 5, generator=g), torch.randn(5, 9, generator=g), {"text"})
    for contiguous in (False, True):
        filled = branch.filled(contiguous=contiguous)
        assert filled.rank == 16
        assert_close(filled.down @ filled.up, branch.down @ branch.up, rms=1e-6)
        assert filled.down.is_contiguous() == filled.up.is_contiguous() == contiguous
    assert F.pad(branch.down, (0, 11)).equal(filled.down)
