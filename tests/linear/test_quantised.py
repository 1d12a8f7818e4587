"""Formats of eight and four bits: what rounding loses, and products that lose nothing more."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mogle_rt.bundle.bundle import Bundle
from mogle_rt.bundle.storage import STORAGES, Fp8Storage, Int4Storage, Int8Storage, WeightStorage
from mogle_rt.engines.torch_engine import TorchEngine
from mogle_rt.errors import CheckpointError, ConfigError
from mogle_rt.linear.contract import Further, Place, RowForm, StoredLayer, WeightFormat
from mogle_rt.linear.formats import FORMATS
from mogle_rt.linear.quantised import base
from mogle_rt.linear.quantised.base import QuantisedWeight
from mogle_rt.linear.quantised.rotation import regular_hadamard, rotate
from mogle_rt.linear.quantised.rounding import dequantised, quantised, signal_to_noise, unpack_int4
from tests.conftest import CASES, GoldenCase, assert_close, make_once, relative_rms
from tests.linear.layers import CPU, Held, run
from tests.linear.quantised import QuantisedLayer, quantised_bundle
from tests.linear.test_formats import golden_run
from tests.linear.test_layer import ALL, LAST_TWO, NONE, STREAMS, TAIL

Bundles = Callable[[str], Path]
FEW_BITS = ("int8", "fp8", "int4")

# How much the golden models' latents may change, relative to how far the loop moves them. The RMS error of a rounded
# number, relative to its row's standard deviation, is for
# - int8: a 127th of the largest (about 2.4 deviations) / sqrt(12), 0.6 %;
# - fp8: uniform within half a step, where a step is 1/8 to 1/16 of the number, 2.7 %;
# - int4: a 7th of the largest of few numbers / sqrt(12), less what the low-rank part takes off, about 7 %.
# A product has the same relative error. The squares of the five blocks' errors add up to about twice that, and softmax
# and gate may magnify them three times.
GOLDEN_TOLERANCE = {"int8": 0.03, "fp8": 0.13, "int4": 0.35}


@pytest.fixture(scope="session")
def small_bundle(golden_bundle: Bundles, shared_folder: Path) -> Callable[[str, str], Path]:
    """A function that makes a golden bundle in a format."""

    def made(name: str, weights: str) -> Path:
        path = shared_folder / f"{name}-{weights}.safetensors"
        return make_once(path, lambda output: quantised_bundle(golden_bundle(name), output, weights))

    return made


@pytest.mark.quick
@pytest.mark.parametrize("size", [1, 4, 16, 64, 256])
def test_rotation(size: int) -> None:
    """It is orthogonal, its own inverse and exact in 16 bits, and all its columns have sums of 1 or -1."""
    matrix = regular_hadamard(size, CPU, torch.float64)
    assert torch.equal(matrix @ matrix, torch.eye(size, dtype=torch.float64))
    assert torch.equal(matrix, matrix.t())
    assert torch.equal(matrix.abs(), torch.full_like(matrix, size**-0.5))
    assert torch.equal(matrix.sum(0).abs(), torch.ones(size, dtype=torch.float64))
    assert torch.equal(regular_hadamard(size, CPU, torch.bfloat16).double(), matrix)
    x = torch.randn(7, 3 * size, dtype=torch.float64)
    turned = rotate(x, size)
    assert_close(turned.view(7, 3, size), x.view(7, 3, size) @ matrix, rms=1e-15)
    assert_close(rotate(turned, size), x, rms=1e-15)
    wide = torch.full((7, 3 * size + 5), torch.nan, dtype=torch.float64)
    rotate(x, size, out=wide[:, : 3 * size])
    assert torch.equal(wide[:, : 3 * size], turned)


@pytest.mark.quick
@pytest.mark.parametrize(("weights", "least"), [("int8", 41), ("fp8", 31), ("int4", 20)])
def test_signal_to_noise(weights: str, least: float) -> None:
    """The bounds are for normal numbers: a row's largest is about 3.5 standard deviations, a group's 2.5."""
    matrix = torch.randn(256, 512) * 0.02
    storage = STORAGES[weights].of((256, 512))
    tensors = quantised(matrix, storage)
    assert signal_to_noise(matrix, tensors, storage) > least
    again = quantised(matrix.clone(), storage)
    assert all(torch.equal(t.view(torch.uint8), again[kind].view(torch.uint8)) for kind, t in tensors.items())
    for kind, (dtype, shape) in storage.kinds((256, 512)).items():
        assert (tensors[kind].dtype, tuple(tensors[kind].shape)) == (dtype, shape)


@pytest.mark.quick
@pytest.mark.parametrize("weights", FEW_BITS)
def test_rows_of_zeros(weights: str) -> None:
    storage = STORAGES[weights].of((64, 64))
    matrix = torch.randn(64, 64)
    matrix[3] = 0
    exact = dequantised(quantised(matrix, storage), storage)
    assert bool(exact.isfinite().all())
    assert float(exact[3].abs().max()) < 0.2 if weights == "int4" else torch.equal(exact[3], matrix[3])
    assert torch.equal(dequantised(quantised(torch.zeros(64, 64), storage), storage), torch.zeros(64, 64))


@pytest.mark.quick
def test_rotation_keeps_outliers_from_deciding() -> None:
    """With a few columns thirty times as large as others, the rotation gains more than 12 dB."""
    matrix = torch.randn(128, 512)
    matrix[:, [5, 77, 300]] *= 30
    turned, plain = Int8Storage(rotation=256), Int8Storage()
    with_it, without = (signal_to_noise(matrix, quantised(matrix, s), s) for s in (turned, plain))
    assert with_it > 40
    assert with_it > without + 12


@pytest.mark.quick
def test_low_rank_part_earns_its_place() -> None:
    """The largest singular vectors are taken off before rounding, which gains more than 10 dB where they hold much."""
    matrix = torch.randn(256, 256) + torch.randn(256, 8) @ torch.randn(8, 256) * 2
    ratios = [
        signal_to_noise(matrix, quantised(matrix, storage), storage) for storage in (Int4Storage(), Int4Storage(rank=0))
    ]
    assert ratios[0] > ratios[1] + 10


@pytest.mark.quick
def test_four_bits_lie_as_in_onnx() -> None:
    """A byte holds two neighbours, the first one in its lower half, and 8 is added to each."""
    packed = torch.tensor([[0x08 | 0x0 << 4, 0xF | 0x9 << 4]], dtype=torch.uint8)
    out = torch.empty(1, 4)
    unpack_int4(packed, torch.tensor([[2.0, 0.5]], dtype=torch.bfloat16), out)
    assert out.tolist() == [[0.0, -16.0, 3.5, 0.5]]


def storages() -> list[WeightStorage]:
    return [
        Int8Storage(rotation=16),
        Int8Storage(),
        Fp8Storage(),
        Int4Storage(group=16, rank=8),
        Int4Storage(rank=0, group=4),
    ]


@pytest.mark.parametrize("storage", storages(), ids=str)
@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("branch", [(4, TAIL), (7, ALL), (4, NONE)], ids=str)
def test_product(branch: tuple[int, str], gelu: bool, storage: WeightStorage) -> None:
    """It is the product of the matrix that the stored tensors stand for. Branches beside it are never rounded."""
    random = QuantisedLayer(48, 24, (branch, (3, LAST_TWO))).quantise(storage)
    layer = random.load(FORMATS[storage.name])
    x = torch.randn(18, 48, generator=torch.Generator().manual_seed(1))
    y, _ = run(layer, x, STREAMS, 2, gelu=gelu)
    assert_close(y, random.exact(x, STREAMS, 2, gelu=gelu).float(), rms=1e-6)
    assert torch.equal(run(layer, x, STREAMS, 2, gelu=gelu)[0], y)


@pytest.mark.parametrize("storage", storages(), ids=str)
@pytest.mark.parametrize("split", [None, (16, 32)], ids=str)
def test_parts_and_inputs_side_by_side(split: tuple[int, ...] | None, storage: WeightStorage) -> None:
    parts = (slice(0, 5), slice(5, 24))
    random = QuantisedLayer(48, 24).quantise(storage)
    layer = random.load(FORMATS[storage.name], parts=parts)
    x = torch.randn(9, 48, generator=torch.Generator().manual_seed(1))
    for part in (*parts, slice(7, 10)):
        y, _ = run(layer, x, STREAMS, 1, columns=part, split=split)
        assert_close(y, random.exact(x, STREAMS, 1)[:, part].float(), rms=1e-6)


@pytest.mark.parametrize("storage", storages(), ids=str)
@pytest.mark.parametrize("place", [Place.AFTER_NORM, Place.BEFORE_RESIDUAL])
def test_branch_rides(place: Place, storage: WeightStorage) -> None:
    random = QuantisedLayer(48, 24, ((4, TAIL), (3, ALL))).quantise(storage)
    layer = random.load(FORMATS[storage.name], place, fused=True)
    assert (layer.before is not None, layer.after is not None) == (
        place is Place.AFTER_NORM,
        place is Place.BEFORE_RESIDUAL,
    )
    x = torch.randn(9, 48, generator=torch.Generator().manual_seed(1))
    y, _ = run(layer, x, STREAMS, 1)
    assert_close(y, random.exact(x, STREAMS, 1).float(), rms=1e-6)


@pytest.mark.parametrize("weights", FEW_BITS)
def test_one_room_for_all_layers(weights: str, small_bundle: Callable[[str, str], Path]) -> None:
    """Weights stay views of the file. Each product unpacks its weight into memory that all layers share."""
    engine, _ = golden_run(GoldenCase.load("base"), Bundle(small_bundle("tiny", weights)), "torch", None)
    held = [layer.weight for _, layer in engine.transformer.layers() if isinstance(layer.weight, QuantisedWeight)]
    assert len(held) > 10
    assert len({weight._scratch for weight in held}) == 1
    rooms = held[0]._scratch._rooms
    largest = max(weight.shape[0] * weight.shape[1] for weight in held)
    (room,) = [room for (use, *_), room in rooms.items() if use == "weight"]
    assert largest / 2 < room.numel() <= largest
    assert f"{weights} (unpacked) " in engine.weight_formats
    file = engine.weights.source
    assert isinstance(file, Bundle)
    begin = file._file._bytes.data_ptr()
    for weight in held:
        assert begin <= weight.values.data_ptr() < begin + file.path.stat().st_size


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("weights", FEW_BITS)
def test_golden_steps(weights: str, name: str, small_bundle: Callable[[str, str], Path]) -> None:
    """With all switches, errors are as small as the format allows, and not smaller than they can be. A second run gives
    the same bytes."""
    case = GoldenCase.load(name)
    path = small_bundle(case.settings["checkpoint"], weights)
    engine, latents = golden_run(case, Bundle(path), "torch", None)
    moved, expected = (x - case.tensors["noise"] for x in (latents, case.tensors["final_latents"]))
    assert 1e-4 < relative_rms(moved, expected) < GOLDEN_TOLERANCE[weights]
    blocks = [layer for layer_name, layer in engine.transformer.layers() if "blocks" in layer_name]
    assert {layer.weight.name for layer in blocks} == {weights}
    if name == "base":
        assert torch.equal(golden_run(case, Bundle(path), "torch", None)[1], latents)


@pytest.mark.quick
@pytest.mark.parametrize("weights", FEW_BITS)
def test_loading_quantises_nothing(weights: str, golden_bundle: Bundles) -> None:
    case = GoldenCase.load("base")
    with pytest.raises(ConfigError, match=f"is stored in {weights}, and loading quantises nothing"):
        TorchEngine(Bundle(golden_bundle("tiny")), CPU, torch.float32, case.model, weights=weights)


@pytest.mark.parametrize("weights", FEW_BITS)
@pytest.mark.parametrize("asked", ["plain", "packed"])
def test_stored_format_decides(asked: str, weights: str, small_bundle: Callable[[str, str], Path]) -> None:
    case = GoldenCase.load("base")
    engine = TorchEngine(Bundle(small_bundle("tiny", weights)), CPU, torch.float32, case.model, weights=asked)
    assert {layer.weight.name for name, layer in engine.transformer.layers() if "blocks" in name} == {weights}


def test_what_formats_want_of_their_input() -> None:
    wanted = [
        QuantisedLayer(48, 24).quantise(storage).load(FORMATS[storage.name]).weight.wants
        for storage in (Int8Storage(rotation=16), Fp8Storage(), Int4Storage(group=16, rank=8))
    ]
    assert wanted == [RowForm(torch.int8, 16), RowForm(torch.float8_e4m3fn), None]


def loaded(source: Held, weights: str) -> WeightFormat:
    """The layers a and b as one resident weight."""
    return FORMATS[weights].load(stored_in(source), Further(), (slice(None),))


def streamed(source: Held, weights: str) -> WeightFormat:
    """The same as a streamed weight."""
    stored, weight_format = stored_in(source), FORMATS[weights]
    slot = [torch.empty(shape, dtype=dtype) for shape, dtype in weight_format.slot_layout(stored, stored.shape)]
    return weight_format.in_slot(stored, Further(), (slice(None),), slot)


def stored_in(source: Held) -> StoredLayer:
    return StoredLayer(source, ("a", "b"), CPU, torch.float32)


def damaged(weights: str, name: str, value: float) -> Held:
    """Layers a and b in a format, of which the last number of a tensor is replaced."""
    random = QuantisedLayer(48, 24).quantise(STORAGES[weights].of((8, 48)))
    held: dict[str, Tensor] = dict(random.source._held)
    held[name] = held[name].clone()
    held[name].view(-1)[-1] = value
    return Held(held, random.source.storages)


@pytest.mark.parametrize("hold", [loaded, streamed])
@pytest.mark.parametrize("weights", FEW_BITS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -1.0])
def test_damaged_scales(value: float, weights: str, hold: Callable[[Held, str], WeightFormat]) -> None:
    with pytest.raises(CheckpointError, match="the weight scales of a, b hold NaN, infinite or negative values"):
        hold(damaged(weights, "b.weight_scale", value), weights)


@pytest.mark.parametrize("hold", [loaded, streamed])
@pytest.mark.parametrize(("weights", "kind"), [("fp8", "weight"), ("int4", "weight_down"), ("int4", "weight_up")])
def test_damaged_numbers(
    weights: str, kind: str, hold: Callable[[Held, str], WeightFormat], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "IN_CACHE", 8)
    with pytest.raises(CheckpointError, match=f"the tensors '{kind}' of a, b hold NaN or infinite values"):
        hold(damaged(weights, f"a.{kind}", torch.nan), weights)
