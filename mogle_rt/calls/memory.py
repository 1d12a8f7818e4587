"""The memory of a pipeline: a plan for each call, and errors that say what to do when memory runs out all the same."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar, cast

import torch

from mogle_rt.bundle.bundle import Bundle
from mogle_rt.calls.prompts import PromptEncoder
from mogle_rt.cost.demand import Run, demand
from mogle_rt.encoders.vae import set_weights
from mogle_rt.engines.contract import Engine
from mogle_rt.engines.torch_engine import TorchEngine
from mogle_rt.errors import InsufficientMemoryError, MogleError
from mogle_rt.memory.budget import budget_for
from mogle_rt.memory.planner import STREAMED, Demand, Plan, least_plan, make_plan, same_plan

logger = logging.getLogger(__name__)

# What PyTorch says, in a RuntimeError, where the CPU's memory has run out.
NO_MEMORY = ("not enough memory", "can't allocate memory", "cannot allocate memory")


class MemoryPlans:
    """Makes the plans of a pipeline's calls.

    Args:
        bundle: whose weights are used.
        run: device, dtype and options; sizes are those of the default image.
        max_memory: see `mogle_rt.memory.budget.budget_for`.
        streams: whether the engine can stream the weights of the steps.

    Attributes:
        plan: of the last call; before the first, of the default image.
        tile: see `Run`.
        streams_all: whether everything is streamed that can be, whatever would fit.
    """

    def __init__(self, bundle: Bundle, run: Run, max_memory: str | int | None, *, streams: bool) -> None:
        self._bundle, self._run, self._max_memory, self._streams = bundle, run, max_memory, streams
        self._demand, self._told, self.streams_all, self.tile = self._demand_of(run), False, False, 0
        try:
            self.plan = make_plan(self._demand, device=run.device.type, **self._budget())
        except InsufficientMemoryError:  # a call for a smaller image may fit
            self.plan = least_plan(self._demand, device=run.device.type, **self._budget())

    def for_call(self, **job: Any) -> Plan:
        """The plan of a call. The last one stays if it serves, since another one has weights loaded anew.

        Args:
            job: attributes of `Run`.

        Raises:
            InsufficientMemoryError: the job doesn't fit, whatever is streamed.
        """
        run = replace(self._run, tile=self.tile, **job)
        budget, self._demand = self._budget(), self._demand_of(run)
        kept = same_plan(self.plan, self._demand, **budget)
        least = least_plan(self._demand, device=run.device.type, **budget)
        if self.streams_all and least.peak <= budget["room"]:
            kept = least
        before, self.plan = self.plan, kept or make_plan(self._demand, device=run.device.type, **budget)
        if self.plan.stages != before.stages or not self._told:
            logger.info("%s", self.plan)
            self._told = True
        return self.plan

    def _budget(self) -> Mapping[str, int]:
        return budget_for(self._run.device, self._max_memory)._asdict()

    def _demand_of(self, run: Run) -> Demand:
        needed = demand(self._bundle, run)
        if self._streams:
            return needed
        weights = sum(sublayer.resident for sublayer in needed.sublayers)
        return replace(needed, always=needed.always + weights, sublayers=())

    def advice(self) -> str:
        """What to do where memory ran out under the last plan."""
        plan, device = self.plan, self._run.device.type
        least = least_plan(self._demand, device=device, **self._budget())
        smaller = max(least.peak, int(0.8 * plan.peak)) + plan.set_aside
        if least.peak > 0.95 * plan.peak:
            return "draw fewer pixels or fewer images at once, or end other programs"
        return f"with max_memory='{-(-smaller // 10**8) / 10:.1f}GB', less is held at once"


class FitsMemory:
    """The part of a pipeline that holds its plans. `Pipeline` sets the attributes.

    Attributes:
        memory_plans: makes the plans.
    """

    bundle: Bundle
    device: torch.device
    engine: Engine
    vae: Any
    prompt_encoder: PromptEncoder
    memory_plans: MemoryPlans
    _vae_dtype: torch.dtype

    @property
    def plan(self) -> Plan:
        """What the last call held in memory and what it streamed; before the first call, of the default image."""
        return self.memory_plans.plan

    def _hold(self, plan: Plan) -> None:
        """Let all parts follow a plan. What a part holds beyond it is freed, and what it lacks is loaded when used."""
        self.prompt_encoder.stream(plan.text == STREAMED)
        if isinstance(self.engine, TorchEngine):
            self.engine.follow(plan)

    def free_memory(self) -> None:
        """Free the weights and buffers of the steps; the next call loads and makes them anew."""
        if isinstance(self.engine, TorchEngine):
            self.engine.let_go()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    @contextmanager
    def _vae_in_memory(self) -> Iterator[None]:
        """Within the context, the VAE has its weights. Where it takes turns with the steps, they are freed before."""
        turns, dtype = self.plan.takes_turns, self._vae_dtype
        if turns:
            self.free_memory()
        if next(self.vae.parameters()).is_meta:
            set_weights(self.vae, self.bundle.part("vae", self.device, dtype))
        yield
        if turns:
            set_weights(self.vae, {name: p.to("meta") for name, p in self.vae.named_parameters()})


Method = TypeVar("Method", bound=Callable[..., Any])  # of a pipeline


def tells_of_memory(call: Method) -> Method:
    """If memory runs out in a call, the pipeline lets go of the steps' memory, and one line says what would fit."""

    @functools.wraps(call)
    def told(self: Any, /, *args: Any, **kwargs: Any) -> Any:
        try:
            return call(self, *args, **kwargs)
        except Exception as error:
            if not out_of_memory(error):
                raise
        # Out of the handler, the error's traceback no longer holds what was half made.
        self.free_memory()
        where = "memory" if self.device.type == "cpu" else f"memory of {self.device}"
        raise InsufficientMemoryError(f"the {where} ran out; {self.memory_plans.advice()}")

    return cast(Method, told)


def out_of_memory(error: Exception) -> bool:
    """Whether an error says that memory ran out, and is not one of ours."""
    if isinstance(error, MogleError):
        return False
    kinds = (torch.OutOfMemoryError, MemoryError)
    return isinstance(error, kinds) or (isinstance(error, RuntimeError) and any(w in str(error) for w in NO_MEMORY))
