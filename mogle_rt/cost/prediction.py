"""A job on a card: the same plan that a pipeline makes there, and the time that is predicted for it. Nothing is measured.

A step takes as long as its arithmetic or its copies, whichever takes longer, as both run at the same time:

    max(FLOPs / (0.6 x the datasheet's rate), streamed bytes / min(0.8 x the link's rate, 10 GB/s))

The rate is that of products of 16 bits, and of eight bits for the products with weights in int8 or fp8. Large products
usually reach 60 to 75 % of a datasheet's rate, copies from pinned memory 80 % of the link's. Streamed weights are also
copied once within the host's memory, at some 10 GB/s.
"""

from __future__ import annotations

import torch

from mogle_rt.cost.counting import Count
from mogle_rt.cost.demand import Run, demand
from mogle_rt.cost.gpus import Gpu
from mogle_rt.cost.job import Job, WeightlessBundle
from mogle_rt.memory.budget import CUDA_BYTES, Budget
from mogle_rt.memory.planner import Plan, make_plan

UTILISATION, LINK_SHARE, HOST_GBS = 0.6, 0.8, 10.0


def plan_on(job: Job, card: Gpu, max_memory: int | None, vae_parameters: int) -> Plan:
    """The plan of a job on a card with nothing else in its memory.

    Args:
        max_memory: bytes that the process may use there; None for all that the card has.
        vae_parameters: how many parameters the VAE has.

    Raises:
        InsufficientMemoryError: the job fits in no way.
    """
    run = run_of(job, torch.device("cuda"), vae_parameters)
    source = WeightlessBundle(job.config, job.ranks, job.weights)
    return make_plan(demand(source, run), device="cuda", **budget_of(card, max_memory)._asdict())


def budget_of(card: Gpu, max_memory: int | None) -> Budget:
    """What a process may use of a card with nothing else in its memory. max_memory: see `plan_on`."""
    memory = int(card.memory * 2**30)
    allowed = memory if max_memory is None else min(max_memory, memory)
    return Budget(max(0, allowed - CUDA_BYTES), CUDA_BYTES)


def run_of(job: Job, device: torch.device, vae_parameters: int) -> Run:
    """A job on a device, as the planner sees it."""
    return Run(
        device=device,
        dtype=job.dtype,
        height=job.height,
        width=job.width,
        batch=job.batch,
        steps=job.steps,
        text_tokens=job.text_tokens,
        model=job.model,
        kernels=job.kernels,
        prompts=bool(job.text),
        vae=vae_parameters,
        text=job.text,
        fast=job.fast,
    )


def predicted_step_ms(card: Gpu, step: Count, plan: Plan, itemsize: int, weights: str | None = None) -> float:
    """Milliseconds that a step is predicted to take, see above.

    Args:
        step: what it computes. plan: what it streams.
        itemsize, weights: see `Gpu.compute_ms`.
    """
    compute = card.compute_ms(step, itemsize, weights) / UTILISATION
    return max(compute, plan.streamed_bytes / min(LINK_SHARE * card.link, HOST_GBS) / 1e6)
