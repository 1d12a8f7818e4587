"""Random arguments of any size for every kernel. There is NaN wherever a kernel must not read, and in its outputs."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mogle_rt.kernels.common import KernelCost
from mogle_rt.kernels.gate_mix import (
    gate_mix,
    gate_mix_cost,
    gate_mix_mean,
    gate_mix_mean_cost,
    gate_mix_mean_ref,
    gate_mix_ref,
    partial_sums,
)
from mogle_rt.kernels.inputs import Experts, Gate
from mogle_rt.kernels.joint_attention import joint_attention, joint_attention_cost, joint_attention_ref
from mogle_rt.kernels.norm_modulate import norm_modulate, norm_modulate_cost, norm_modulate_ref
from mogle_rt.kernels.qk_norm_rope import qk_norm_rope, qk_norm_rope_cost, qk_norm_rope_ref
from mogle_rt.kernels.region_expert_mix import region_expert_mix, region_expert_mix_cost, region_expert_mix_ref
from mogle_rt.kernels.region_experts import region_experts, region_experts_cost, region_experts_ref
from mogle_rt.kernels.residual_norm_modulate import (
    residual,
    residual_cost,
    residual_norm_modulate,
    residual_norm_modulate_cost,
    residual_norm_modulate_ref,
    residual_ref,
)
from mogle_rt.kernels.workloads import tensors

Arguments = dict[str, Any]

# How far a result may lie from float64, as a relative RMS error (`Case.bound`). The errors of roundings are independent,
# and each is uniform within u times a power of two that is at most the value. So relative to the value, the RMS of one
# rounding is at most u / sqrt(3). The squares of several roundings in a row add up.
#
# - `roundings` to the dtype on the way to an output: u sqrt(roundings / 3).
# - Sums in fp32. Where n random terms are added one by one, the partial sum after k of them has an RMS of sqrt(k) times
#   a term's, and each addition rounds its partial sum. So the squares of the errors add up to n^2 / 2 times u^2 / 3 times
#   a term's square. The whole sum is sqrt(n) times a term, and relative to it the error is u sqrt(n / 6). (Where all
#   terms have one sign, partial sums grow as k, and it is u sqrt(n / 9). Where terms are added in pairs, it is less.)
#   The squared errors of several sums in a row add up as well, so n counts the terms of all of them.
#
# Outputs can share an error, as a row's values share the error of its mean. Such errors don't average out, so the part
# of the sums may be SHARED times as large. Both parts grow by the `gain` of a case where a value is a small difference
# of large ones, or the argument of an exponential function. An RMS over m values scatters around its mean by a share
# of 1 / sqrt(m); three times that is allowed.
SHARED = 4.0
# u: half the distance from 1 to the next number.
FP32_UNIT = 2.0**-24
UNITS = {torch.float32: FP32_UNIT, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


class Random:
    """Makes random tensors from a seed, of one dtype and device. Around views lies NaN; see `guards_kept`."""

    def __init__(self, seed: int, dtype: torch.dtype, device: str) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype, self.device = dtype, device

    def __call__(self, *shape: int, extra: int = 0, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        """Normally distributed values, with ``extra`` columns of NaN behind each row."""
        values = torch.randn(shape, generator=self.generator) * scale
        view = self.empty(*shape, extra=extra, dtype=dtype)
        view.copy_(values)
        return view

    def empty(self, *shape: int, extra: int = 0, dtype: torch.dtype | None = None) -> Tensor:
        """A tensor for an output, filled with NaN."""
        whole = (*shape[:-1], shape[-1] + extra)
        buffer = torch.full(whole, float("nan"), dtype=dtype or self.dtype, device=self.device)
        return buffer[..., : shape[-1]]


def guards_kept(x: Tensor) -> bool:
    """Whether a view has no NaN left, and the rest of its buffer is still NaN."""
    whole = x if x._base is None else x._base
    return int(whole.isnan().sum()) == whole.numel() - x.numel() and not bool(x.isnan().any())


def with_tensor(arguments: Arguments, name: str, value: Tensor) -> Arguments:
    """The arguments with one tensor replaced. Names are those of `tensors`."""
    outer, _, field = name.partition(".")
    return arguments | {outer: replace(arguments[outer], **{field: value}) if field else value}


def in_float64(arguments: Arguments) -> Arguments:
    """The same values in float64."""
    for name, value in tensors(arguments).items():
        if value.is_floating_point():
            arguments = with_tensor(arguments, name, value.double())
    return arguments


@dataclass(frozen=True)
class Case:
    """A kernel and how to make its arguments.

    Attributes:
        outputs: names of arguments that are written. scratch: names of arguments whose contents nobody else reads.
        make: makes the arguments from a `Random` and sizes.
        small: odd sizes, one set for each call. Where one call is enough, the first is used.
        full: the sizes of FLUX.1-dev at 512 x 512 pixels.
        terms: how many terms all sums on the way to an output have, for given sizes.
        roundings: how often a value is rounded to the dtype on the way to an output.
        gain: by how much errors may grow on the way. See `SHARED`.
    """

    name: str
    run: Callable[..., None]
    reference: Callable[..., None]
    cost: Callable[..., KernelCost]
    outputs: tuple[str, ...]
    make: Callable[..., Arguments]
    small: tuple[dict[str, Any], ...]
    full: dict[str, Any]
    terms: Callable[[dict[str, Any]], int]
    roundings: int
    gain: float = 2.0
    scratch: tuple[str, ...] = ()

    def bound(self, sizes: dict[str, Any], dtype: torch.dtype, count: int) -> float:
        """The largest relative RMS error that an output of `count` elements may have. See `SHARED`."""
        rounded = UNITS[dtype] * (self.roundings / 3) ** 0.5
        return (1 + 3 * count**-0.5) * self.gain * (rounded + self.summed(sizes))

    def summed(self, sizes: dict[str, Any]) -> float:
        """The part of `bound` that comes from sums, and so depends on the order of their terms."""
        return SHARED * FP32_UNIT * (self.terms(sizes) / 6) ** 0.5

    def arguments(self, seed: int, dtype: torch.dtype, device: str = "cpu", **sizes: Any) -> Arguments:
        """Arguments of these sizes; the same seed gives the same ones."""
        return self.make(Random(seed, dtype, device), **sizes)

    def views(self, arguments: Arguments) -> tuple[list[Tensor], list[Tensor]]:
        """The tensors that may be read, and those that may be written."""
        found, written = tensors(arguments), (*self.outputs, *self.scratch)
        return [x for n, x in found.items() if n not in written], [found[name] for name in written]


def _bounds(L: int, groups: int) -> list[int]:
    """Where groups of rows end, at odd places."""
    return {1: [L], 2: [L // 3, L], 3: [L // 5, L // 2, L]}[groups]


def _norm(
    r: Random, *, L: int, B: int, D: int, R: int, G: int, lora_from: int, extra: int = 0, ends: list[int] | None = None
) -> Arguments:
    return {
        "x": r(L, B, D, extra=extra) + 3.0 if extra == 0 else r(L, B, D, extra=extra).add_(3.0),
        "scale": r(G, B, D, scale=0.3).add_(1.0),
        "shift": r(G, B, D),
        "bounds": ends or _bounds(L, G),
        "out": r.empty(L, B, D + R, extra=extra),
        "lora_down": r(D, R, scale=D**-0.5) if R else None,
        "lora_from": lora_from,
    }


def _residual_norm(
    r: Random,
    *,
    Q: int,
    lora_up_from: int,
    clip: bool = False,
    L: int,
    B: int,
    D: int,
    extra: int = 0,
    G: int,
    **rest: Any,
) -> Arguments:
    return _norm(r, L=L, B=B, D=D, G=G, extra=extra, **rest) | {
        "y": r(L, B, D + Q, extra=extra, scale=1e5 if clip else 1.0),
        "gate": r(G, B, D),
        "lora_up": r(Q, D, scale=Q**-0.5) if Q else None,
        "lora_up_from": lora_up_from,
        "clip": clip,
    }


def _residual(r: Random, **sizes: Any) -> Arguments:
    made = _residual_norm(r, R=0, lora_from=sizes["L"], **sizes)
    return {name: made[name] for name in ("x", "y", "gate", "bounds", "lora_up", "lora_up_from", "clip")}


def _qk(
    r: Random,
    *,
    L: int,
    B: int,
    P: int,
    W: int,
    H: int,
    d: int,
    G: int,
    extra: int = 0,
    ends: list[int] | None = None,
) -> Arguments:
    angles = torch.rand((L, d // 2), generator=r.generator) * 6.3
    rope = torch.cat([angles.cos(), angles.sin()], dim=-1).to(r.device)
    buffer = r(L, B, P * H * d, extra=extra)
    return {
        "x": buffer.unflatten(-1, (P, H, d)),
        "norm_weight": r(G, W, d, scale=0.3).add_(1.0),
        "bounds": ends or _bounds(L, G),
        "rope": rope,
    }


def _gate(r: Random, *, N: int, B: int, C: int, G: int, E: int, extra: int = 0) -> Gate:
    return Gate(
        latents=r(N, B, C, extra=extra),
        gate_input=r(N, B, C, extra=extra),
        time=r(C),
        noise_weight=r(C, C, scale=C**-0.5),
        in_weight=r(G, C, scale=C**-0.5),
        in_bias=r(G),
        out_weight=r(E, G, scale=G**-0.5, extra=extra),
        out_bias=r(E),
    )


def _gate_mix(r: Random, *, N: int, B: int, C: int, G: int, E: int, extra: int = 0) -> Arguments:
    return {
        "gate": _gate(r, N=N, B=B, C=C, G=G, E=E, extra=extra),
        "bank": r(N, B, E, C, extra=extra),
        "out": r.empty(N, B, C, extra=extra),
    }


def _gate_mix_mean(r: Random, *, N: int, B: int, C: int, G: int, E: int, extra: int = 0) -> Arguments:
    made = _gate_mix(r, N=N, B=B, C=C, G=G, E=E, extra=extra)
    return made | {"sums": r.empty(partial_sums(made["bank"]), B, E, dtype=torch.float32)}


def _attention(
    r: Random,
    *,
    Lq: int,
    L: int,
    B: int,
    H: int,
    d: int,
    condition: int,
    visibility: str,
    log_scale: float = 0.0,
    fused: bool = True,
    extra: int = 0,
) -> Arguments:
    if fused:  # q, k and v side by side, as one projection writes them
        q, k, v = r(L, B, 3 * H * d).unflatten(-1, (3, H, d)).unbind(2)
    else:
        q, k, v = (r(L, B, H, d, extra=extra) for _ in range(3))
    return {
        "q": q[:Lq],
        "k": k,
        "v": v,
        "out": r.empty(Lq, B, H * d, extra=extra),
        "condition_from": condition,
        "visibility": visibility,
        "log_scale": r.empty(1, extra=extra, dtype=torch.float32).fill_(log_scale),
    }


GATE_SIZES = (
    {"N": 37, "B": 1, "C": 24, "G": 10, "E": 20, "extra": 3},
    {"N": 15, "B": 3, "C": 64, "G": 33, "E": 20},
    {"N": 50, "B": 2, "C": 17, "G": 64, "E": 3, "extra": 1},
    {"N": 1, "B": 1, "C": 4, "G": 2, "E": 1},
)


def _experts(r: Random, *, N: int, B: int, C: int, H: int, E: int, P: int, extra: int = 0) -> Experts:
    index = torch.randint(-1, P, (B, E), generator=r.generator, dtype=torch.int32)
    index[0, 0] = P - 1  # at least one expert has a picture, and the last picture is used
    return Experts(
        planes=r(P, N, C, extra=extra),
        index=index.to(r.device),
        absent=r(N, E, C, extra=extra),
        in_weight=r(E, H, C, scale=C**-0.5, extra=extra),
        in_bias=r(E, H),
        out_weight=r(E, C, H, scale=H**-0.5),
        out_bias=r(E, C),
    )


def _region_experts(r: Random, *, N: int, B: int, C: int, E: int, extra: int = 0, **rest: Any) -> Arguments:
    experts = _experts(r, N=N, B=B, C=C, E=E, extra=extra, **rest)
    return {"experts": experts, "bank": r.empty(N, B, E, C, extra=extra)}


def _region_expert_mix(
    r: Random, *, N: int, B: int, C: int, G: int, H: int, E: int, P: int, extra: int = 0
) -> Arguments:
    return {
        "gate": _gate(r, N=N, B=B, C=C, G=G, E=E, extra=extra),
        "experts": _experts(r, N=N, B=B, C=C, H=H, E=E, P=P, extra=extra),
        "out": r.empty(N, B, C, extra=extra),
    }


GATE_GAIN = (
    3.0  # logits are normal with a deviation of up to 3, and a weight's relative error is its logit's absolute one
)


def _gate_terms(sizes: dict[str, Any]) -> int:
    """The terms of the gate's layers, of its softmax and of the sum over the experts."""
    return 2 * int(sizes["C"]) + int(sizes["G"]) + 2 * int(sizes["E"])


CASES = [
    Case(
        "norm_modulate",
        norm_modulate,
        norm_modulate_ref,
        norm_modulate_cost,
        ("out",),
        _norm,
        (
            {"L": 37, "B": 1, "D": 48, "R": 5, "G": 2, "lora_from": 20, "extra": 3},
            {"L": 19, "B": 3, "D": 101, "R": 0, "G": 3, "lora_from": 0},
            {"L": 33, "B": 2, "D": 64, "R": 17, "G": 1, "lora_from": 0},
            {"L": 21, "B": 2, "D": 96, "R": 1, "G": 3, "lora_from": 21},
            {"L": 1, "B": 1, "D": 7, "R": 3, "G": 1, "lora_from": 0},
        ),
        {"L": 2560, "B": 1, "D": 3072, "R": 16, "G": 2, "lora_from": 1536, "ends": [1536, 2560]},
        terms=lambda s: 3 * s["D"],  # mean, variance, down-projection
        roundings=2,  # the row, the down-projection
        gain=4.0,  # the mean is 3 and the deviation 1: once the mean is taken off, errors weigh sqrt(10) times as much
    ),
    Case(
        "residual_norm_modulate",
        residual_norm_modulate,
        residual_norm_modulate_ref,
        residual_norm_modulate_cost,
        ("x", "out"),
        _residual_norm,
        (
            {"L": 37, "B": 1, "D": 48, "R": 5, "Q": 3, "G": 2, "lora_from": 20, "lora_up_from": 23, "extra": 3},
            {"L": 18, "B": 3, "D": 101, "R": 0, "Q": 8, "G": 3, "lora_from": 0, "lora_up_from": 11},
            {"L": 33, "B": 2, "D": 64, "R": 17, "Q": 0, "G": 1, "lora_from": 0, "lora_up_from": 0},
            {"L": 21, "B": 2, "D": 96, "R": 0, "Q": 0, "G": 3, "lora_from": 0, "lora_up_from": 0},
            {"L": 9, "B": 2, "D": 33, "R": 2, "Q": 20, "G": 2, "lora_from": 4, "lora_up_from": 0},
            {"L": 9, "B": 2, "D": 333, "R": 4, "Q": 3, "G": 2, "lora_from": 4, "lora_up_from": 2},  # three steps
        ),
        {
            "L": 2560, "B": 1, "D": 3072, "R": 16, "Q": 16, "G": 2, "lora_from": 1536, "lora_up_from": 1536,
            "ends": [1536, 2560],
        },
        terms=lambda s: s["Q"] + 3 * s["D"],
        roundings=3,  # the residual stream, the row, the down-projection
        gain=4.0,  # as for norm_modulate
    ),
    Case(
        "residual",
        residual,
        residual_ref,
        residual_cost,
        ("x",),
        _residual,
        (
            {"L": 37, "B": 2, "D": 48, "Q": 3, "G": 2, "lora_up_from": 23, "extra": 3},
            {"L": 17, "B": 1, "D": 101, "Q": 0, "G": 3, "lora_up_from": 0},
        ),
        {"L": 1024, "B": 1, "D": 3072, "Q": 16, "G": 1, "lora_up_from": 1024},
        terms=lambda s: s["Q"] + 2,
        roundings=1,
    ),
    Case(
        "qk_norm_rope",
        qk_norm_rope,
        qk_norm_rope_ref,
        qk_norm_rope_cost,
        ("x",),
        _qk,
        (
            {"L": 37, "B": 1, "P": 3, "W": 2, "H": 3, "d": 24, "G": 2, "extra": 5},
            {"L": 11, "B": 3, "P": 3, "W": 2, "H": 5, "d": 16, "G": 3},
            {"L": 13, "B": 2, "P": 1, "W": 1, "H": 1, "d": 2, "G": 1},
            {"L": 6, "B": 2, "P": 2, "W": 1, "H": 24, "d": 66, "G": 2},
        ),
        {"L": 2560, "B": 1, "P": 3, "W": 2, "H": 24, "d": 128, "G": 2, "ends": [512, 2560]},
        terms=lambda s: s["d"] + 2,
        roundings=1,
    ),
    Case(
        "gate_mix",
        gate_mix,
        gate_mix_ref,
        gate_mix_cost,
        ("out",),
        _gate_mix,
        GATE_SIZES,
        {"N": 1024, "B": 1, "C": 64, "G": 64, "E": 20},
        terms=_gate_terms,
        roundings=3,  # two layers, the output
        gain=GATE_GAIN,
    ),
    Case(
        "gate_mix_mean",
        gate_mix_mean,
        gate_mix_mean_ref,
        gate_mix_mean_cost,
        ("out",),
        _gate_mix_mean,
        (*GATE_SIZES, {"N": 600, "B": 1, "C": 4, "G": 2, "E": 3}),  # the last one's partial sums take several loads
        {"N": 1024, "B": 1, "C": 64, "G": 64, "E": 20},
        scratch=("sums",),
        terms=lambda s: _gate_terms(s) + s["N"],  # the mean
        roundings=3,
        gain=GATE_GAIN,
    ),
    Case(
        "region_experts",
        region_experts,
        region_experts_ref,
        region_experts_cost,
        ("bank",),
        _region_experts,
        (
            {"N": 21, "B": 2, "C": 24, "H": 10, "E": 20, "P": 5, "extra": 3},
            {"N": 70, "B": 1, "C": 64, "H": 32, "E": 3, "P": 2},
            {"N": 15, "B": 3, "C": 17, "H": 33, "E": 4, "P": 1, "extra": 1},
            {"N": 1, "B": 1, "C": 4, "H": 2, "E": 1, "P": 1},
        ),
        {"N": 1024, "B": 1, "C": 64, "H": 32, "E": 20, "P": 11},
        terms=lambda s: s["C"] + s["H"],
        roundings=2,  # a layer, the output
    ),
    Case(
        "region_expert_mix",
        region_expert_mix,
        region_expert_mix_ref,
        region_expert_mix_cost,
        ("out",),
        _region_expert_mix,
        (
            {"N": 21, "B": 2, "C": 24, "G": 40, "H": 10, "E": 20, "P": 5, "extra": 3},
            {"N": 50, "B": 1, "C": 64, "G": 64, "H": 32, "E": 3, "P": 2},
            {"N": 15, "B": 3, "C": 17, "G": 5, "H": 33, "E": 4, "P": 1, "extra": 1},
        ),
        {"N": 1024, "B": 1, "C": 64, "G": 64, "H": 32, "E": 20, "P": 11},
        terms=lambda s: _gate_terms(s) + s["C"] + s["H"],
        roundings=4,  # two layers of the gate, one of the experts, the output
        gain=GATE_GAIN,
    ),
    Case(
        "joint_attention",
        joint_attention,
        joint_attention_ref,
        joint_attention_cost,
        ("out",),
        _attention,
        (
            {
                "Lq": 50, "L": 50, "B": 2, "H": 3, "d": 24, "condition": 29, "visibility": "scaled",
                "log_scale": 0.7, "extra": 5,
            },
            {"Lq": 29, "L": 50, "B": 1, "H": 2, "d": 16, "condition": 29, "visibility": "scaled", "log_scale": -2.0},
            {"Lq": 161, "L": 161, "B": 1, "H": 1, "d": 32, "condition": 70, "visibility": "separate"},
            {"Lq": 161, "L": 161, "B": 1, "H": 1, "d": 8, "condition": 33, "visibility": "independent", "fused": False},
            {"Lq": 20, "L": 37, "B": 2, "H": 1, "d": 17, "condition": 20, "visibility": "separate"},
            {"Lq": 23, "L": 23, "B": 1, "H": 2, "d": 40, "condition": 23, "visibility": "joint", "fused": False},
            {"Lq": 9, "L": 9, "B": 1, "H": 1, "d": 2, "condition": 0, "visibility": "separate", "extra": 1},
        ),
        {
            "Lq": 2560, "L": 2560, "B": 1, "H": 24, "d": 128, "condition": 1536, "visibility": "scaled",
            "log_scale": 0.5,
        },
        terms=lambda s: s["d"] + 2 * s["L"],  # scores, the sum of weights, the weighted sum
        roundings=2,  # weights, the output
    ),
]  # fmt: skip

BY_NAME = {case.name: case for case in CASES}


def small_calls() -> Iterator[tuple[Case, dict[str, Any]]]:
    """Every kernel with each set of its odd sizes."""
    for case in CASES:
        for sizes in case.small:
            yield case, sizes


def run_seed() -> int:
    """The seed of this run's random arguments: MOGLE_RT_FUZZ_SEED where it is set, else always the same."""
    return int(os.environ.get("MOGLE_RT_FUZZ_SEED") or 1)


def planted(module: Any, old: str, new: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module, made from its source with every ``old`` replaced by ``new``."""
    source = Path(module.__file__).read_text()
    assert old in source, old
    path = folder / f"faulty_{Path(module.__file__).name}"
    path.write_text(source.replace(old, new))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    faulty = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, path.stem, faulty)
    spec.loader.exec_module(faulty)
    return faulty
