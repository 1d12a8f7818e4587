"""The pool of workers: how many there are, what each gets, and how blocks of rows go through Ray Data to them and back."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mogle_rt.batch.masks import Shape
from mogle_rt.batch.session import one_line
from mogle_rt.batch.worker import Attempts, Orders, Report, Task, Worker, pack, unpack
from mogle_rt.bundle.bundle import Bundle
from mogle_rt.config import PATCH
from mogle_rt.errors import ClusterError
from mogle_rt.masks.sizes import default_size

if TYPE_CHECKING:
    import torch

    from mogle_rt.memory.planner import Plan

MOST_ROWS = 16  # of a block: what a worker that is killed may have to look through again
BLOCKS = 8  # for each worker, if there are rows enough, so that all end at about the same time


class Asked(NamedTuple):
    """Workers, and what each gets, as they are asked for; None stands for what is to be chosen."""

    workers: int | None
    cpus: float
    gpus: float | None
    device: str | None


class Places(NamedTuple):
    """Workers, and what each gets."""

    workers: int
    cpus: float
    gpus: float
    device: str | None


def choose_places(
    bundle: Bundle,
    model: Mapping[str, Any],
    resources: Mapping[str, float],
    asked: Asked,
    batch_size: int,
) -> Places:
    """Decide what isn't asked for.

    A GPU has one worker. Without GPUs, there are as many workers as the memory holds, if each gets the threads that are
    worthwhile for the model.

    Args:
        model: arguments of `Pipeline`.
        resources: what Ray has, as "CPU" and "GPU".
        asked: what was asked for.

    Raises:
        ClusterError: Ray hasn't what was asked for.
    """
    workers, cpus, gpus, device = asked
    there = resources.get("GPU", 0.0)
    if gpus is None:
        gpus = 0.0 if device in ("cpu", "mps") or (device is None and not there) else 1.0
    elif not gpus and device is None:
        device = "cpu"
    if workers is None:
        if gpus:
            workers = max(1, int(there / gpus))
        elif device == "mps":
            workers = 1
        else:
            workers = _on_cpus(bundle, model, int(resources.get("CPU", 1.0)), batch_size)
    for name, each in (("CPU", cpus), ("GPU", gpus)):
        if workers * each > resources.get(name, 0.0):
            raise ClusterError(
                f"{workers} workers with {each:g} {name}s each need more than the {resources.get(name, 0.0):g} that Ray "
                f"has; give fewer --num-workers, or fewer --num-{name.lower()}s"
            )
    return Places(workers, cpus, gpus, device)


def _on_cpus(bundle: Bundle, model: Mapping[str, Any], cpus: int, batch_size: int) -> int:
    """How many pipelines can work beside each other on this machine."""
    from mogle_rt.memory.budget import PROCESS_BYTES, available_memory
    from mogle_rt.memory.devices import choose_device
    from mogle_rt.memory.threads import worthwhile_threads

    device = choose_device(model["device"])
    if device.type != "cpu":
        return 1
    side, tokens = bundle.default_size, bundle.default_text_tokens
    plan = _plan(bundle, model, device, (side, side), tokens, batch_size, None)
    rows = batch_size * (2 * (side // PATCH) ** 2 + tokens)
    threads = worthwhile_threads(rows, bundle.config.transformer.width, cpus)
    # This process goes on beside the workers, so what it holds is no room for them.
    return max(1, min(cpus // threads, int(available_memory() // (plan.peak + PROCESS_BYTES))))


def largest_batch(
    bundle: Bundle, model: Mapping[str, Any], call: Mapping[str, Any], tasks: Sequence[Task], places: Places
) -> int:
    """How many images a worker had best compute at once: as many as fit beside weights that stay where one image has them.

    Up to `MOST_ROWS` are tried, in powers of two, with the largest of the rows' images and texts. The memory of this
    machine is divided among the workers.

    Args:
        model: arguments of `Pipeline`.
        call: options of the call for rows that don't have their own.
        tasks: the rows.

    Raises:
        ClusterError: workers have GPUs, and this machine has none to look at.
    """
    import torch

    from mogle_rt.memory.budget import available_memory, budget_for
    from mogle_rt.memory.devices import choose_device

    if places.gpus and not torch.cuda.is_available():
        raise ClusterError("this machine has no GPU to choose a batch size for; give --batch-size a number")
    device = choose_device("cuda" if places.gpus else places.device)
    asked = [dict(call) | dict(task.row.options) for task in tasks]
    sizes = [_size(bundle, options, task.shape) for options, task in zip(asked, tasks, strict=True)]
    size = max(sizes, key=math.prod)
    tokens = max(options.get("max_sequence_length") or bundle.default_text_tokens for options in asked)
    most = model["max_memory"]
    if most is None and places.gpus:
        room, set_aside = budget_for(device, None)
        most = set_aside + int(room * places.gpus)
    elif most is None:  # what this process holds itself is no room for them
        most = available_memory() // places.workers
    alone = _plan(bundle, model, device, size, tokens, 1, most)
    for count in (MOST_ROWS, 8, 4, 2):
        plan = _plan(bundle, model, device, size, tokens, count, most)
        same = (plan.streamed, plan.text, plan.modulation) == (alone.streamed, alone.text, alone.modulation)
        if same and plan.peak <= plan.room:
            return count
    return 1


def _size(bundle: Bundle, options: Mapping[str, Any], shape: Shape) -> tuple[int, int]:
    """Height and width of a row's image, as the pipeline chooses them."""
    height = width = bundle.default_size
    if shape is not None:
        height, width = default_size([np.broadcast_to(np.uint8(0), shape)], bundle.default_size)
    return options.get("height") or height, options.get("width") or width


def _plan(
    bundle: Bundle,
    model: Mapping[str, Any],
    device: torch.device,
    size: tuple[int, int],
    tokens: int,
    batch: int,
    max_memory: int | None,
) -> Plan:
    from mogle_rt.calls.memory import MemoryPlans
    from mogle_rt.cost.demand import Run
    from mogle_rt.memory.devices import choose_dtype

    run = Run(
        device=device,
        dtype=choose_dtype(model["dtype"], device),
        height=size[0],
        width=size[1],
        batch=batch,
        text_tokens=tokens,
        model=model["model_config"],
        kernels=model["kernels"],
        prompts=bundle.has_text_encoders,
    )
    return MemoryPlans(bundle, run, max_memory, streams=model["engine"] == "torch").plan


def blocks(tasks: Sequence[Task], batch_size: int, workers: int) -> Iterator[list[Task]]:
    """Divide rows into blocks. If images are drawn in batches, rows of one shape and the same options are together."""
    batches = [[task] for task in tasks]
    if batch_size > 1:
        groups: dict[Any, list[Task]] = {}
        for task in tasks:
            groups.setdefault((task.shape, task.row.options), []).append(task)
        batches = [group[i : i + batch_size] for group in groups.values() for i in range(0, len(group), batch_size)]
    each = max(1, min(MOST_ROWS // batch_size, -(-len(batches) // (workers * BLOCKS))))
    for i in range(0, len(batches), each):
        yield [task for batch in batches[i : i + each] for task in batch]


class _Begin:
    """`Attempts.begin` from any process of Ray's."""

    def __init__(self, ray: Any) -> None:
        self._actor = ray.remote(num_cpus=0)(Attempts).remote()

    def __call__(self, names: Sequence[str]) -> list[int]:
        import ray

        counts: list[int] = ray.get(self._actor.begin.remote(list(names)))
        return counts


def draw_blocks(ray: Any, orders: Orders, tasks: Sequence[Task], places: Places) -> Iterator[Report]:
    """Have all rows drawn.

    A worker that ends, in whatever way, is started anew by Ray, and its block is begun again; what it has drawn of the
    block is there already.

    Args:
        ray: see `mogle_rt.batch.session.ray_session`.
        orders: for the workers.
        tasks: the rows. places: how many workers there are.

    Returns:
        A report of each block, in the order in which they are done.

    Raises:
        ClusterError: Ray stopped.
    """
    with _quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from ray.data import ActorPoolStrategy, from_arrow

        try:
            rows = from_arrow([pack(block) for block in blocks(tasks, orders.batch_size, places.workers)])
            drawn = rows.map_batches(
                Worker,
                fn_constructor_kwargs={"orders": orders, "begin": _Begin(ray)},
                batch_size=1,
                batch_format="pyarrow",
                compute=ActorPoolStrategy(size=places.workers),
                num_cpus=places.cpus,
                num_gpus=places.gpus or None,
            )
            for block in drawn.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
                yield from unpack(block)
        except (ray.exceptions.RayError, ConnectionError) as error:
            raise ClusterError(f"Ray stopped the job: {one_line(error)}; the same command goes on with it") from None


@contextmanager
def _quiet() -> Iterator[None]:
    """Ray Data without bars and log messages of its own; the program's own settings come back."""
    from ray.data import DataContext

    context, ours, log = DataContext.get_current(), {}, logging.getLogger("ray.data")
    for name, value in (("enable_progress_bars", False), ("print_on_execution_start", False)):
        ours[name] = getattr(context, name, value)
        setattr(context, name, value)
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(level)
        for name, value in ours.items():
            setattr(context, name, value)
