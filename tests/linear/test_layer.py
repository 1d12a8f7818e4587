"""Every format's product is compared with float64: with branches of any kind, odd sizes, parts, and GELU."""

from __future__ import annotations

import pytest
import torch

from mogle_rt.kernels.inputs import RANK_STEP, padded_rank
from mogle_rt.linear.branches import LowRankBranch, Streams
from mogle_rt.linear.contract import Place, WeightFormat
from mogle_rt.linear.layer import Product
from mogle_rt.linear.packed import MOST_PACKED_RANK, PackedWeight
from mogle_rt.linear.plain import PlainWeight
from tests.conftest import assert_close
from tests.linear.layers import RandomLayer, run

STREAMS: Streams = (("text", 3), ("image", 4), ("condition", 2))
NONE, TAIL, LAST_TWO, ALL, APART = "style", "condition", "image condition", "text image condition", "text condition"
# For sums of up to 257 products of numbers of size 1 in float32, in any order. The largest error seen is 3e-7.
TOLERANCE = 1e-6

formats = pytest.mark.parametrize(
    "weight_format",
    [
        PlainWeight,
        pytest.param(
            PackedWeight,
            marks=pytest.mark.skipif(
                not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"), reason="this PyTorch has no oneDNN"
            ),
        ),
    ],
)

pytestmark = pytest.mark.quick


@formats
@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("stays", [True, False])
@pytest.mark.parametrize(
    "branches",
    [(), ((4, TAIL),), ((4, NONE),), ((3, ALL),), ((5, APART),), ((4, TAIL), (7, ALL), (1, LAST_TWO), (2, NONE))],
    ids=lambda b: " + ".join(f"{rank} on {streams}" for rank, streams in b) or "none",
)
def test_branches_in_place(
    branches: tuple[tuple[int, str], ...], stays: bool, gelu: bool, weight_format: type[WeightFormat]
) -> None:
    random = RandomLayer(65, 33, branches)
    x = torch.randn(18, 65, generator=torch.Generator().manual_seed(1))
    y, out = run(random.load(weight_format), x, STREAMS, 2, gelu=gelu, stays=stays)
    assert_close(y, random.exact(x, STREAMS, 2, gelu=gelu).float(), rms=TOLERANCE)
    assert (y.data_ptr() == out.data_ptr()) or not stays


@formats
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("rank", [1, 16, 20, 32, 33])
@pytest.mark.parametrize("streams", [TAIL, LAST_TWO, ALL, NONE])
def test_branch_rides_in_the_input(streams: str, rank: int, fused: bool, weight_format: type[WeightFormat]) -> None:
    """After a norm, a branch rides in further columns of the weight, in each of its parts. The other branches are added
    to the result in place."""
    random = RandomLayer(12, 24, ((rank, streams), (3, ALL)))
    parts = (slice(0, 8), slice(8, 24))
    layer = random.load(weight_format, Place.AFTER_NORM, parts, fused=fused)
    rides = fused or (weight_format is PackedWeight and rank <= MOST_PACKED_RANK)
    assert (layer.before is not None) == rides
    assert layer.in_columns == 12 + (padded_rank(rank) if rides else 0)
    assert len(layer.branches) == 2 - rides
    x = torch.randn(18, 12, generator=torch.Generator().manual_seed(1))
    exact = random.exact(x, STREAMS, 2).float()
    for part in parts:
        y, _ = run(layer, x, STREAMS, 2, columns=part)
        assert_close(y, exact[:, part], rms=TOLERANCE)


@formats
@pytest.mark.parametrize("streams", [TAIL, LAST_TWO, ALL, NONE])
def test_branch_rides_in_the_output(streams: str, weight_format: type[WeightFormat]) -> None:
    """Before a fused residual, a branch rides in further rows of the weight."""
    random = RandomLayer(37, 24, ((4, streams), (3, APART)))
    layer = random.load(weight_format, Place.BEFORE_RESIDUAL, fused=True)
    assert layer.after is not None
    assert layer.out_columns == 24 + RANK_STEP
    x = torch.randn(9, 37, generator=torch.Generator().manual_seed(1))
    y, _ = run(layer, x, STREAMS, 1)
    assert_close(y, random.exact(x, STREAMS, 1).float(), rms=TOLERANCE)


@formats
def test_padding(weight_format: type[WeightFormat]) -> None:
    """The output has further columns, which are zeros."""
    random = RandomLayer(12, 24)
    layer = random.load(weight_format, padding=16)
    x = torch.randn(9, 12, generator=torch.Generator().manual_seed(1))
    y, _ = run(layer, x, STREAMS, 1)
    assert y.shape == (9, 40)
    assert not y[:, 24:].any()
    assert_close(y[:, :24], random.exact(x, STREAMS, 1).float(), rms=TOLERANCE)


@pytest.mark.parametrize("branches", [(), ((4, TAIL), (2, APART))], ids=["none", "two"])
def test_inputs_side_by_side(branches: tuple[tuple[int, str], ...]) -> None:
    """The input is given as several tensors side by side, as for single blocks' output layer on a GPU."""
    random = RandomLayer(30, 12, branches)
    x = torch.randn(18, 30, generator=torch.Generator().manual_seed(1))
    y, _ = run(random.load(PlainWeight), x, STREAMS, 2, split=(10, 20))
    assert_close(y, random.exact(x, STREAMS, 2).float(), rms=TOLERANCE)


@formats
def test_branches_come_and_go(weight_format: type[WeightFormat]) -> None:
    """A branch that is added later, as a style is, is never merged. Once it is removed, the result is the old one to
    the bit."""
    random = RandomLayer(65, 33, ((4, TAIL),))
    layer = random.load(weight_format, Place.AFTER_NORM)
    x = torch.randn(9, 65, generator=torch.Generator().manual_seed(1))
    before, _ = run(layer, x, STREAMS, 1)
    style = LowRankBranch(torch.ones(65, 2), torch.ones(2, 33), {"text", "image"})
    layer.branches.append(style)
    random.low_rank.append(style)
    assert_close(run(layer, x, STREAMS, 1)[0], random.exact(x, STREAMS, 1).float(), rms=TOLERANCE)
    layer.branches.remove(style)
    assert torch.equal(run(layer, x, STREAMS, 1)[0], before)


@pytest.mark.parametrize(
    ("acts_on", "spans", "tail"),
    [
        (TAIL, [slice(7, 9)], 7),
        (LAST_TWO, [slice(3, 9)], 3),
        (ALL, [slice(0, 9)], 0),
        (NONE, [], 9),
        (APART, [slice(0, 3), slice(7, 9)], None),
        ("image", [slice(3, 7)], None),
    ],
)
def test_rows_of_a_branch(acts_on: str, spans: list[slice], tail: int | None) -> None:
    branch = LowRankBranch(torch.empty(2, 1), torch.empty(1, 2), frozenset(acts_on.split()))
    assert branch.spans(STREAMS) == spans
    if tail is not None:
        assert branch.tail_from(STREAMS) == tail
    else:
        with pytest.raises(ValueError, match="must act on the last ones"):
            branch.tail_from(STREAMS)


def test_streams_without_rows() -> None:
    """Where a stream has no rows, the rows on both sides of it are one span."""
    branch = LowRankBranch(torch.empty(2, 1), torch.empty(1, 2), {"text", "image"})
    assert branch.spans((("text", 2), ("condition", 0), ("image", 3))) == [slice(0, 5)]
    assert branch.spans((("text", 0), ("condition", 3), ("image", 2))) == [slice(3, 5)]
    assert branch.tail_from((("text", 0), ("condition", 3), ("image", 2))) == 3


def test_streams_must_be_the_rows() -> None:
    layer = RandomLayer(12, 24).load(PlainWeight)
    with pytest.raises(AssertionError, match="are not 8 positions"):
        Product(layer, torch.empty(8, 1, 24), STREAMS)


@formats
def test_bytes_held(weight_format: type[WeightFormat]) -> None:
    random = RandomLayer(64, 96, ((16, TAIL),))
    plain = random.load(weight_format)
    assert plain.weight.nbytes == 4 * 64 * 96
    assert plain.nbytes == 4 * (64 * 96 + 96 + 16 * (64 + 96))
    riding = random.load(weight_format, Place.AFTER_NORM, fused=True)
    assert riding.weight.nbytes == 4 * (64 + 16) * 96
    assert (riding.weight.shape, riding.weight.dtype) == ((96, 80), torch.float32)
