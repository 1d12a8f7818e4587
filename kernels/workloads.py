"""The arguments of every kernel at FLUX.1-dev's sizes, for 512 x 512 pixels, 512 text tokens and one image."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mogle_rt.kernels.common import KernelCost, Launch, recording
from mogle_rt.kernels.gate_mix import (
    gate_mix,
    gate_mix_cost,
    gate_mix_mean,
    gate_mix_mean_cost,
    gate_mix_mean_ref,
    gate_mix_ref,
    partial_sums,
)
from mogle_rt.kernels.inputs import Epilogue, Experts, Gate, padded_rank
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

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TEXT, IMAGE = 512, 1024
HEADS, HEAD = 24, 128
WIDTH = HEADS * HEAD
LATENT, GATE, EXPERT, EXPERTS = 64, 64, 32, 20
PRESENT = 11  # pictures that a portrait's mask has: its own and ten regions
BATCH = 32  # so many images that larger tiles are chosen
RANK = 4  # of a LoRA; those of q, k, v and proj_mlp lie side by side


def tensors(arguments: dict[str, Any]) -> dict[str, Tensor]:
    """All tensors among a call's arguments, by name. Those of the gate, for example, have names like "gate.latents"."""
    found: dict[str, Any] = {}
    for name, value in arguments.items():
        if isinstance(value, Gate | Experts | Epilogue):
            found |= {f"{name}.{field.name}": getattr(value, field.name) for field in dataclasses.fields(value)}
        else:
            found[name] = value
    return {name: value for name, value in found.items() if isinstance(value, Tensor)}


@dataclass(frozen=True)
class Workload:
    """A kernel, the same in PyTorch, its declared cost, and the arguments of one call."""

    name: str
    run: Callable[..., None]
    reference: Callable[..., None]
    cost: Callable[..., KernelCost]
    arguments: dict[str, Any]

    def declared(self) -> KernelCost:
        """The least that the call takes."""
        return self.cost(**self.arguments)

    def launches(self) -> list[Launch]:
        """Record the launches of the call."""
        with recording() as launches:
            self.run(**self.arguments)
        return launches


class New:
    """Makes tensors of one dtype on one device, with random values; on the meta device without contents."""

    def __init__(self, dtype: torch.dtype, device: str) -> None:
        self.dtype, self.device = dtype, device
        self._generator = None if device == "meta" else torch.Generator(device).manual_seed(0)

    def __call__(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        x = torch.empty(shape, dtype=dtype or self.dtype, device=self.device)
        return x if self._generator is None else x.normal_(0, scale, generator=self._generator)


def new_gate(new: New, batch: int) -> Gate:
    """The gate that every kernel with a gate takes."""
    return Gate(
        latents=new(IMAGE, batch, LATENT),
        gate_input=new(IMAGE, batch, LATENT),
        time=new(LATENT),
        noise_weight=new(LATENT, LATENT, scale=LATENT**-0.5),
        in_weight=new(GATE, LATENT, scale=LATENT**-0.5),
        in_bias=new(GATE),
        out_weight=new(EXPERTS, GATE, scale=GATE**-0.5),
        out_bias=new(EXPERTS),
    )


def new_experts(new: New, batch: int) -> Experts:
    """The experts that both kernels with experts take. The mask of each image has its own pictures."""
    index = torch.full((batch, EXPERTS), -1, dtype=torch.int32, device=new.device)
    pictures = torch.arange(batch * PRESENT, dtype=torch.int32, device=new.device)
    index[:, :PRESENT] = pictures.view(batch, PRESENT)
    return Experts(
        planes=new(batch * PRESENT, IMAGE, LATENT),
        index=index,
        absent=new(IMAGE, EXPERTS, LATENT),
        in_weight=new(EXPERTS, EXPERT, LATENT, scale=LATENT**-0.5),
        in_bias=new(EXPERTS, EXPERT),
        out_weight=new(EXPERTS, LATENT, EXPERT, scale=EXPERT**-0.5),
        out_bias=new(EXPERTS, LATENT),
    )


def mixtures(new: New, batch: int) -> list[Workload]:
    """All kernels that take part in the mixture of experts."""
    N, B = IMAGE, batch
    gate, experts, bank, out = new_gate(new, B), new_experts(new, B), new(N, B, EXPERTS, LATENT), new(N, B, LATENT)
    banked = {"gate": gate, "bank": bank, "out": out}
    sums = {"sums": new(partial_sums(bank), B, EXPERTS, dtype=torch.float32)}
    making = {"experts": experts, "bank": bank}
    whole = {"gate": gate, "experts": experts, "out": out}
    return [
        Workload("gate_mix", gate_mix, gate_mix_ref, gate_mix_cost, banked),
        Workload("gate_mix_mean", gate_mix_mean, gate_mix_mean_ref, gate_mix_mean_cost, banked | sums),
        Workload("region_experts", region_experts, region_experts_ref, region_experts_cost, making),
        Workload("region_expert_mix", region_expert_mix, region_expert_mix_ref, region_expert_mix_cost, whole),
    ]


def streams(new: New, rank: int, clip: bool) -> list[Workload]:
    """All kernels over rows of the residual stream. With rank 0 they have no low-rank branch."""
    L, B, D = TEXT + 2 * IMAGE, 1, WIDTH
    bounds = [TEXT + IMAGE, L]
    R, Q = padded_rank(4 * rank), padded_rank(rank)
    norm = {
        "x": new(L, B, D),
        "scale": new(2, B, D),
        "shift": new(2, B, D),
        "bounds": bounds,
        "out": new(L, B, D + R),
        "lora_down": new(D, R, scale=D**-0.5) if R else None,
        "lora_from": bounds[0],
    }
    update = {
        "y": new(L, B, D + Q),
        "gate": new(2, B, D),
        "lora_up": new(Q, D) if Q else None,
        "lora_up_from": bounds[0],
        "clip": clip,
    }
    rows = {"x": norm["x"], "bounds": bounds} | update
    both = norm | update
    of_both = residual_norm_modulate, residual_norm_modulate_ref, residual_norm_modulate_cost
    return [
        Workload("norm_modulate", norm_modulate, norm_modulate_ref, norm_modulate_cost, norm),
        Workload("residual_norm_modulate", *of_both, both),
        Workload("residual", residual, residual_ref, residual_cost, rows),
    ]


def attention(new: New, visibility: str) -> Workload:
    """Attention with one of the switches."""
    L, B = TEXT + 2 * IMAGE, 1
    q, k, v = new(L, B, 3, HEADS, HEAD).unbind(2)
    arguments = {"q": q, "k": k, "v": v, "out": new(L, B, WIDTH), "condition_from": TEXT + IMAGE}
    switch = {"visibility": visibility, "log_scale": new(1, dtype=torch.float32)}
    return Workload("joint_attention", joint_attention, joint_attention_ref, joint_attention_cost, arguments | switch)


def workloads(dtype: torch.dtype, device: str) -> list[Workload]:
    """One workload for every kernel, with random values; on the meta device without contents."""
    new, L = New(dtype, device), TEXT + 2 * IMAGE
    qk = {
        "x": new(L, 1, 3, HEADS, HEAD),
        "norm_weight": new(2, 2, HEAD),
        "bounds": [TEXT, L],
        "rope": new(L, HEAD, dtype=torch.float32),
    }
    rotated = Workload("qk_norm_rope", qk_norm_rope, qk_norm_rope_ref, qk_norm_rope_cost, qk)
    return [*streams(new, RANK, clip=False), rotated, *mixtures(new, 1), attention(new, "scaled")]


def variants(dtype: torch.dtype) -> list[Workload]:
    """Calls on the meta device whose launches are compiled into other code than those of `workloads`."""
    new = New(dtype, "meta")
    found = {
        f"batch{BATCH}": [w for w in mixtures(new, BATCH) if w.name != "region_experts"],  # its tiles are the same
        "plain": streams(new, 0, clip=False),
        "clipped": [w for w in streams(new, RANK, clip=True) if w.name != "norm_modulate"],
        **{kind: [attention(new, kind)] for kind in ("joint", "separate", "independent")},
    }
    return [dataclasses.replace(w, name=f"{w.name}-{what}") for what, works in found.items() for w in works]
