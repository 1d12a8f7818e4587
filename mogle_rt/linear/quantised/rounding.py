"""From a matrix to its stored tensors in eight or four bits, and back."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from mogle_rt.bundle.storage import Int4Storage, Int8Storage, WeightStorage
from mogle_rt.linear.quantised.rotation import rotate

INT8_LARGEST = 127
FP8_LARGEST = 448  # of float8_e4m3
INT4_LARGEST = 7
REFINEMENTS = 4  # rounds in which the low-rank part and the rounded rest are fitted to each other
IN_CACHE = 1 << 16  # numbers that are rounded at a time
SPARE_COLUMNS = 8  # with which the largest singular vectors are sought, beyond those that are kept
# Of a group's largest value over 7: a smaller scale cuts the largest values off and rounds all others less.
SHRUNK = (1.0, 0.93, 0.86, 0.8)


def quantised(matrix: Tensor, storage: WeightStorage) -> dict[str, Tensor]:
    """The tensors of a matrix as it is stored, by the kinds of `WeightStorage.kinds`. The same matrix gives the same bytes.

    Args:
        matrix: float32 [out, in].
    """
    if isinstance(storage, Int4Storage):
        return _int4(matrix, storage)
    (dtype, shape), (_, heights) = storage.kinds((matrix.shape[0], matrix.shape[1])).values()
    values, scales = torch.empty(shape, dtype=dtype), torch.empty(heights, dtype=torch.float32)
    largest = INT8_LARGEST if isinstance(storage, Int8Storage) else FP8_LARGEST
    for rows in _row_slices(matrix):
        part = rotate(matrix[rows], storage.rotation) if isinstance(storage, Int8Storage) else matrix[rows]
        scales[rows] = part.abs().amax(1) / largest
        scaled = (part / _divisor(scales[rows])[:, None]).clamp_(-largest, largest)
        values[rows] = (scaled.round_() if isinstance(storage, Int8Storage) else scaled).to(dtype)
    return {"weight": values, "weight_scale": scales}


def dequantised(tensors: Mapping[str, Tensor], storage: WeightStorage) -> Tensor:
    """The matrix that stored tensors stand for, in float32 [out, in]."""
    weight = tensors["weight"]
    inner = weight.shape[1] * (2 if isinstance(storage, Int4Storage) else 1)
    out = torch.empty(weight.shape[0], inner, dtype=torch.float32, device=weight.device)
    if isinstance(storage, Int4Storage):
        unpack_int4(weight, tensors["weight_scale"], out)
        return out.addmm_(tensors["weight_up"].float(), tensors["weight_down"].float()) if storage.rank else out
    out.copy_(weight).mul_(tensors["weight_scale"][:, None])
    return rotate(out, storage.rotation) if isinstance(storage, Int8Storage) else out


def unpack_int4(packed: Tensor, scales: Tensor, out: Tensor) -> None:
    """Two numbers of each byte, times the scale of their group.

    Args:
        packed: uint8 [out, in / 2]. scales: [out, groups]. out: [out, in], of which rows may have gaps between them.
    """
    pairs = out.unflatten(1, (-1, 2))
    pairs[..., 0].copy_(packed & 15)
    pairs[..., 1].copy_(packed >> 4)
    out.sub_(8)
    out.unflatten(1, (scales.shape[1], -1)).mul_(scales[..., None])


def signal_to_noise(exact: Tensor, tensors: Mapping[str, Tensor], storage: WeightStorage) -> float:
    """||exact||² / ||exact - what the stored tensors stand for||² in dB; infinite where nothing is lost."""
    signal = noise = 0.0
    for rows in _row_slices(exact):
        stored = dequantised({k: t if k == "weight_down" else t[rows] for k, t in tensors.items()}, storage)
        signal += float(exact[rows].square().sum(dtype=torch.float64))
        noise += float(stored.sub_(exact[rows]).square_().sum(dtype=torch.float64))
    return math.inf if noise == 0 else 10 * math.log10(signal / noise) if signal else -math.inf


def _row_slices(matrix: Tensor) -> list[slice]:
    """As many rows at a time as fit into the cache."""
    step = max(1, IN_CACHE // matrix.shape[1])
    return [slice(first, first + step) for first in range(0, len(matrix), step)]


def _divisor(scales: Tensor) -> Tensor:
    """Scales by which values can be divided: a row of zeros has the scale 0."""
    return torch.where(scales > 0, scales, 1)


def _int4(matrix: Tensor, storage: Int4Storage) -> dict[str, Tensor]:
    """Alternate between rounding, and the best low-rank part of what rounding leaves over; keep the best round."""
    if not storage.rank:
        packed, scales, _ = _int4_rows(matrix, None, None, storage.group, SHRUNK)
        return {"weight": packed, "weight_scale": scales}
    best: dict[str, Tensor] = {}
    least, rest = math.inf, matrix.clone()
    basis = torch.randn(
        matrix.shape[1],
        min(storage.rank + SPARE_COLUMNS, *matrix.shape),
        generator=torch.Generator(device="cpu").manual_seed(0),
        dtype=torch.float32,
        device="cpu",
    )
    for round_ in range(REFINEMENTS):
        up, down, basis = _low_rank(rest, storage.rank, basis, passes=3 if round_ == 0 else 1)
        last = round_ == REFINEMENTS - 1
        packed, scales, noise = _int4_rows(
            matrix, (up, down), None if last else rest, storage.group, SHRUNK if last else SHRUNK[1:2]
        )
        if noise < least or not best:
            least = noise
            best = {"weight": packed, "weight_scale": scales, "weight_down": down, "weight_up": up}
    return best


def _low_rank(matrix: Tensor, rank: int, basis: Tensor, *, passes: int) -> tuple[Tensor, Tensor, Tensor]:
    """up [out, rank] and down [rank, in] in bfloat16, whose product is close to the matrix, by subspace iteration.

    Args:
        basis: [in, rank or more], where the iteration starts.

    Returns:
        up, down, and the basis to start from next time.
    """
    for _ in range(passes):
        basis = torch.linalg.qr(matrix.t() @ torch.linalg.qr(matrix @ basis)[0])[0]
    left, sizes, right = torch.linalg.svd(matrix @ basis, full_matrices=False)
    root = sizes[:rank].sqrt()
    up = (left[:, :rank] * root).to(torch.bfloat16).contiguous()
    down = (root[:, None] * (right[:rank] @ basis.t())).to(torch.bfloat16).contiguous()
    return up, down, basis


def _int4_rows(
    matrix: Tensor, low: tuple[Tensor, Tensor] | None, rest: Tensor | None, group: int, shrunk: tuple[float, ...]
) -> tuple[Tensor, Tensor, float]:
    """Round the matrix less up @ down, as many rows at a time as fit into the cache.

    Args:
        low: up and down, or None.
        rest: becomes the matrix less what was rounded.

    Returns:
        Packed values, scales, and the sum of the squares of what is lost.
    """
    packed = torch.empty(matrix.shape[0], matrix.shape[1] // 2, dtype=torch.uint8)
    scales = torch.empty(matrix.shape[0], matrix.shape[1] // group, dtype=torch.bfloat16)
    noise = 0.0
    for rows in _row_slices(matrix):
        part = matrix[rows]
        if low is not None:
            part = torch.addmm(part, low[0][rows].float(), low[1].float(), alpha=-1)
        packed[rows], scales[rows], rounded = _int4_groups(part, group, shrunk)
        noise += float((part - rounded).square_().sum(dtype=torch.float64))
        if rest is not None:
            torch.sub(matrix[rows], rounded, out=rest[rows])
    return packed, scales, noise


def _int4_groups(matrix: Tensor, group: int, shrunk: tuple[float, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Packed values, scales, and the matrix that they stand for. Each group takes the best of some scales."""
    groups = matrix.unflatten(1, (-1, group))
    largest = groups.abs().amax(-1) / INT4_LARGEST
    least = torch.full_like(largest, math.inf)
    scales, values = torch.zeros_like(largest), torch.zeros_like(groups)
    for factor in shrunk:
        some = (largest * factor).to(torch.bfloat16).float()
        tried = (groups / _divisor(some)[..., None]).round_().clamp_(-8, INT4_LARGEST)
        noise = torch.addcmul(groups, tried, some[..., None], value=-1).square_().sum(-1)
        better = noise < least
        least = torch.where(better, noise, least)
        scales = torch.where(better, some, scales)
        values = torch.where(better[..., None], tried, values)
    rounded = (values * scales[..., None]).flatten(1)
    shifted = (values.flatten(1) + 8).to(torch.uint8).unflatten(1, (-1, 2))
    return shifted[..., 0] | shifted[..., 1] << 4, scales.to(torch.bfloat16), rounded
