"""What a step costs in the reference's way of computing: a ledger of its operations.

That code is no part of this package; the tests count benchmarks/baseline.py, which computes in the same way, beside it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from mogle_rt.bundle import schema
from mogle_rt.config import MLP_RATIO, NUM_EXPERTS, MogleConfig
from mogle_rt.cost.counting import Count
from mogle_rt.cost.job import Job


def reference_step(job: Job) -> Count:
    """One step of one image as the reference computes it (benchmarks/baseline.py), at the released setting.

    ``peak`` is of activations; it is a single block's, or somewhat more where there are none.
    """
    flux, N, T, e = job.config.transformer, job.tokens, job.text_tokens, job.dtype.itemsize
    D, C, rest = flux.width, flux.in_channels, T + N
    ledger = _Ledger(job)
    ledger.mixture(job.config.mogle, N)
    for _ in range(2):  # image, then condition
        ledger.linear(N, C, D, lora=True)
    for again in range(2):  # embedding of the step's time; then of the condition's, which is always the same
        ledger.time_embedding(flux.pooled_projection_dim, flux.guidance_embeds, first=not again)
    ledger.linear(T, flux.joint_attention_dim, D)
    for rows in (rest, N):
        ledger.rope_table(rows, flux.axes_dims_rope)
    for _ in range(flux.num_layers):
        ledger.double_block(N, T)
    ledger.each(rest * D)
    for _ in range(flux.num_single_layers):
        ledger.single_block(rest, N)
    ledger.adaln(N, 2)
    ledger.linear(N, D, C)
    ledger.euler(N * C)
    # In units of a row: hidden, text, condition, the normed two, both MLPs', q, k and v; and what is made of them when
    # most is alive: the rest's RoPE, the condition's, or attention's output in both layouts.
    single = max(14 * rest + 6 * N, 11 * rest + 14 * N) if e == 4 else max(17 * rest + 6 * N, 9 * rest + 17 * N)
    block = e * D * (single + T) + 8 * (rest + N) * flux.attention_head_dim  # with RoPE's tables
    kept = 3 if job.config.mogle.has_expert else 2  # copies of all experts' outputs
    return dataclasses.replace(ledger.count, peak=max(block, kept * e * NUM_EXPERTS * N * C))


class _Ledger:
    """The reference's operations, a method for each piece of its code.

    A layer with LoRA multiplies it out for every stream, at scale zero where it must not act. Pairs are bytes read and
    written by one operation; ``e`` is the size of an element.
    """

    def __init__(self, job: Job) -> None:
        flux = job.config.transformer
        self.D, self.heads, self.d = flux.width, flux.num_attention_heads, flux.attention_head_dim
        self.e, self.clips = job.dtype.itemsize, job.dtype == torch.float16
        self.rank = max(job.ranks.values(), default=0)
        self.count = Count()

    def ops(self, *pairs: tuple[int, int], flops: int = 0) -> None:
        for read, written in pairs:
            self.count += Count(launches=1, read=read, written=written)
        self.count += Count(flops=flops)

    def each(self, n: int, others: int = 0) -> None:
        """An operation from n elements to n elements that reads ``others`` more."""
        self.ops((self.e * (n + others), self.e * n))

    def up(self, n: int) -> list[tuple[int, int]]:
        """A conversion to float32, unless it already is."""
        return [] if self.e == 4 else [(self.e * n, 4 * n)]

    def down(self, n: int) -> list[tuple[int, int]]:
        return [(written, read) for read, written in self.up(n)]

    def linear(self, rows: int, inner: int, out: int, *, lora: bool = False) -> None:
        e, R = self.e, self.rank
        self.ops((e * (out + rows * inner + inner * out), e * rows * out), flops=2 * rows * inner * out)
        if lora:
            for i, o in ((inner, R), (R, out)):
                self.ops((e * (rows * i + i * o), e * rows * o), flops=2 * rows * i * o)
            self.each(rows * out)  # times its scale
            self.each(rows * out, rows * out)

    def mixture(self, config: MogleConfig, N: int) -> None:
        """The experts and the gate."""
        L, H, G, E = config.latent_dim, config.expert_dim, config.gate_dim, NUM_EXPERTS
        if config.has_gating:
            self.sinusoid(L)
            self.mlp(L, L)
            self.linear(N, L, L)
            self.each(N * L, N * L)
            self.each(N * L, L)
            self.linear(N, L, G)
            self.each(N * G)
            self.linear(N, G, E)
            self.each(N * E)
        for _ in range(E if config.has_expert else 0):
            self.linear(N, L, H)
            self.each(N * H)
            self.linear(N, H, L)
        self.each((E - 1) * N * L)  # the local ones stacked, then all
        self.each(E * N * L)
        if config.has_gating:
            self.each(E * N * L, E * N)
        self.ops((self.e * E * N * L, self.e * N * L))

    def sinusoid(self, size: int, *first: tuple[int, int]) -> None:
        """Of one number; half sines, half cosines. ``first``: what is done to the number before."""
        h = 4 * (size // 2)
        # arange, three of its frequency; the angle, scaled; sin, cos; joined, exchanged
        self.ops((0, h), (h, h), (h, h), (h, h), *first, (4 + h, h), (h, h), (h, h), (h, h))
        self.ops((2 * h, 2 * h), (2 * h, 2 * h), *self.down(size))

    def mlp(self, inner: int, out: int) -> None:
        """Linear, SiLU and linear layers on one row."""
        self.linear(1, inner, out)
        self.each(out)
        self.linear(1, out, out)

    def time_embedding(self, pooled: int, guidance: bool, *, first: bool) -> None:
        one = (self.e, self.e)
        if first:  # t to the dtype, / 1000, * 1000; guidance to the dtype, * 1000
            self.ops(*self.down(1), one, one)
            self.ops(*([*self.down(1), one] if guidance else []))
        else:
            self.ops((0, self.e))  # zeros like it
        for _ in range(1 + guidance):
            self.sinusoid(schema.SINUSOID_DIM, *self.up(1))
            self.mlp(schema.SINUSOID_DIM, self.D)
            self.each(self.D, self.D)
        self.mlp(pooled, self.D)

    def rope_table(self, rows: int, axes: Sequence[int]) -> None:
        for h in (axis // 2 for axis in axes):
            self.ops((0, 8 * h), *[(8 * h, 8 * h)] * 5)
            self.ops((4 * rows + 8 * h, 8 * rows * h))
            for _ in range(2):  # cos and sin, twice each, to float32
                self.ops(*((read * rows * h, written * rows * h) for read, written in ((8, 8), (8, 16), (16, 8))))
        self.ops(*[(4 * rows * self.d, 4 * rows * self.d)] * 2)

    def adaln(self, rows: int, chunks: int, *, lora: bool = False) -> None:
        self.each(self.D)
        self.linear(1, self.D, chunks * self.D, lora=lora)
        self.norm(rows)

    def norm(self, rows: int) -> None:
        """LayerNorm (mean and deviation are written too), 1 + scale, times it, plus shift."""
        n = rows * self.D
        self.ops((self.e * n, self.e * n + 8 * rows))
        self.each(self.D)
        self.each(n, self.D)
        self.each(n, self.D)

    def gated(self, rows: int) -> None:
        """Multiply by the gate, and add to the residual."""
        n = rows * self.D
        self.each(n, self.D)
        self.each(n, n)

    def qkv(self, rows: int, *, lora: bool) -> None:
        """Three projections; RMSNorm of q and k, in float32."""
        n, h = rows * self.D, rows * self.heads
        for _ in range(3):
            self.linear(rows, self.D, self.D, lora=lora)
        for _ in range(2):
            self.ops(*self.up(n), (4 * n, 4 * n), (4 * n, 4 * h), (4 * h, 4 * h), (4 * h, 4 * h))
            self.ops((self.e * n + 4 * h, 4 * n), *self.down(n))
            self.each(n, self.d)

    def rope(self, rows: int) -> None:
        n = rows * self.D
        self.each(n // 2)  # odd channels, negated
        self.each(n)  # beside the even ones
        for _ in range(2):
            self.ops(*self.up(n), (4 * (n + rows * self.d), 4 * n))
        self.ops((8 * n, 4 * n), *self.down(n))

    def attend(self, rest: int, condition: int) -> None:
        """RoPE of q and k by stream, streams joined, attention (with its log-sum-exp), heads side by side again."""
        for rows in (rest, rest, condition, condition):
            self.rope(rows)
        S = rest + condition
        n = S * self.D
        for _ in range(3):
            self.each(n)
        self.ops((3 * self.e * n, self.e * n + 4 * S * self.heads), flops=4 * S * n)
        self.each(n)

    def double_block(self, N: int, T: int) -> None:
        D, M = self.D, MLP_RATIO * self.D
        streams = ((N, True), (T, False), (N, True))  # image, text, condition; text has no LoRA
        for rows, lora in streams:
            self.adaln(rows, 6, lora=lora)
        for rows, lora in streams:
            self.qkv(rows, lora=lora)
        for _ in range(3):
            self.each((T + N) * D)
        self.attend(T + N, N)
        for rows, lora in streams:
            self.linear(rows, D, D, lora=lora)
            self.gated(rows)
            self.norm(rows)
            self.linear(rows, D, M)
            self.each(rows * M)
            self.linear(rows, M, D, lora=lora)
            self.gated(rows)
        if self.clips:
            self.each(T * D)

    def single_block(self, rest: int, condition: int) -> None:
        D, M = self.D, MLP_RATIO * self.D
        for rows in (rest, condition):
            self.adaln(rows, 3, lora=True)
            self.linear(rows, D, M, lora=True)
            self.each(rows * M)
            self.qkv(rows, lora=True)
            self.each(rows * (D + M))  # attention's output and the MLP's, side by side
            self.linear(rows, D + M, D, lora=True)
            self.gated(rows)
        self.attend(rest, condition)
        if self.clips:
            self.each(rest * D)

    def euler(self, n: int) -> None:
        """Of float32: latents, the difference of two sigmas, times the velocity, added, and back."""
        self.ops(*self.up(n), (8, 4), (4 + self.e * n, self.e * n), (4 * n + self.e * n, 4 * n), *self.down(n))
