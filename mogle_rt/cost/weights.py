"""Which weight format suits a machine: the most exact one with which all weights of the steps stay in its memory.

The candidates are the weights as they are, int8 and int4. fp8 is none of them, because int8 takes the same memory, runs
on more cards, and loses less.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mogle_rt.bundle.bundle import Bundle
from mogle_rt.cost.demand import demand
from mogle_rt.cost.job import Job, WeightlessBundle
from mogle_rt.cost.prediction import run_of
from mogle_rt.errors import InsufficientMemoryError
from mogle_rt.memory.budget import Budget
from mogle_rt.memory.planner import Plan, make_plan

CANDIDATES: Sequence[str | None] = (None, "int8", "int4")  # from the most exact to the smallest


def choose_weights(bundle: Bundle, device: torch.device, dtype: torch.dtype, budget: Budget) -> tuple[str | None, Plan]:
    """The format for one image of the bundle's own size, and the plan of memory with it.

    Args:
        bundle: one whose weights are stored plainly.
        device, dtype: of the computation; a "cuda" device need not be there.
        budget: what may be used on the device.

    Returns:
        The first candidate with which no weight is streamed, or else the smallest; None stands for the weights as they
        are.

    Raises:
        InsufficientMemoryError: the job doesn't fit, even with the smallest format.
    """
    job = Job.of(bundle, dtype=dtype)
    run = run_of(job, device, sum(bundle.tensors[f"vae.{name}"].numel for name in bundle.names("vae")))
    for weights in CANDIDATES:
        source = bundle if weights is None else WeightlessBundle(job.config, job.ranks, weights)
        try:
            plan = make_plan(demand(source, run), device=device.type, room=budget.room, set_aside=budget.set_aside)
        except InsufficientMemoryError:
            if weights == CANDIDATES[-1]:
                raise
            continue
        if not plan.streamed or weights == CANDIDATES[-1]:
            break
    return weights, plan
