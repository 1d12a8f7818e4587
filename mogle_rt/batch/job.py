"""`run`: a whole job, from the rows of a data set to their images and the table of results."""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from mogle_rt.arguments import check_names
from mogle_rt.batch.masks import check_masks
from mogle_rt.batch.options import check_call
from mogle_rt.batch.pool import Asked, choose_places, draw_blocks, largest_batch
from mogle_rt.batch.results import write_results
from mogle_rt.batch.rows import MOST_SEED, Row, read_rows
from mogle_rt.batch.session import check_installed, ray_session
from mogle_rt.batch.worker import Orders, Report, Task
from mogle_rt.bundle.bundle import Bundle
from mogle_rt.bundle.shipped import bundle_path
from mogle_rt.config import DEFAULT_GUIDANCE, ModelConfig, dtype_name, parse_bytes
from mogle_rt.errors import DeviceError, InputError, MogleError, OutputError
from mogle_rt.jobs.image_files import check_prompt
from mogle_rt.jobs.naming import Naming, check_writable
from mogle_rt.jobs.record import JobRecord, job_settings
from mogle_rt.values import quoted

Progress = Callable[[int, int, int], object]
Say = Callable[[str], object]
MOST_WARNINGS = 5  # of the workers; more of them would say the same of other rows

logger = logging.getLogger(__name__)


@dataclass
class Summary:
    """What a job came to.

    Attributes:
        rows: of the input.
        there: images that were there already. drawn: images that were drawn now.
        errors: why rows have no image, by their places, such as "row 3".
        results: the table.
        workers: how many there were.
        seconds: in all. start_up: of these, those until the first worker began to draw; 0 where nothing was to be drawn.
    """

    rows: int = 0
    there: int = 0
    drawn: int = 0
    errors: dict[str, str] = field(default_factory=dict)
    results: Path = Path()
    workers: int = 0
    seconds: float = 0.0
    start_up: float = 0.0


def run(
    checkpoint: str | Path,
    source: str | Path,
    output: str | Path,
    *,
    num_workers: int | None = None,
    batch_size: int | Literal["auto"] = 1,
    address: str | None = None,
    num_cpus: float = 1.0,
    num_gpus: float | None = None,
    seed: int = 0,
    caption: int = 1,
    suffix: str | None = None,
    metadata: bool = True,
    device: str | None = None,
    dtype: str | None = None,
    model_config: ModelConfig | Mapping[str, Any] | None = None,
    kernels: str | None = None,
    engine: str = "torch",
    engine_path: str | Path | None = None,
    max_memory: str | int | None = None,
    say: Say = logger.warning,
    progress: Progress | None = None,
    **call: Any,
) -> Summary:
    """Draw an image for each row of a data set, by workers of Ray. What is there already is not drawn again.

    A row that is wrong has an error in the table of results, and the others are drawn. A job that was interrupted goes on
    if it is started again. docs/batch.md says more.

    Args:
        checkpoint: a bundle, or ``demo``. Each worker opens it by this path.
        source: a CSV, JSON lines or Parquet file with the columns ``mask`` and ``prompt``, and where wanted ``id``,
            ``seed`` and options of the call; a folder of Parquet files; a folder of masks; or MM-CelebA-HQ's folder.
        output: the folder of the images and of ``results.parquet``. Workers on other machines must see it, too.
        num_workers: None: one for each GPU, or as many as the CPUs and their memory suffice for.
        batch_size: images computed at once. Images of a batch agree with those drawn alone up to rounding. "auto" takes
            as many as a worker's memory has room for, see `mogle_rt.batch.pool.largest_batch`.
        address: of a Ray cluster, "host:port" or "auto"; None starts Ray on this machine for the time of the job.
        num_cpus, num_gpus: for each worker. None means 1 GPU if there are any.
        seed: changes the seeds that follow from the rows' ids, from 0.
        caption: which caption is the prompt, from 1, where a mask has several.
        suffix: "png" or "jpg"; None means "png".
        metadata: whether prompt, seed, settings and mask are written into the images.
        device, dtype, model_config, kernels, engine, engine_path, max_memory: see `Pipeline`, for each worker.
        say: called with each line for the user.
        progress: called with the number of rows that were done now, of all that are to be done now, and of all errors.
        call: options of the call for rows that don't have their own: num_inference_steps, guidance_scale, condition_scale,
            height, width, mask_order, position_delta, position_scale, max_sequence_length, mask_posterior.

    Raises:
        ConfigError, DeviceError: Ray isn't installed, or an option has a wrong value.
        InputError: see `mogle_rt.batch.rows.read_rows`.
        CheckpointError: the bundle can't be read.
        OutputError: the folder has images of other settings, or can't be written to, or another job is at work in it.
        ClusterError: Ray can't start, is too small, or stopped the job.
    """
    start = time.time()
    check_installed()
    _check_numbers(num_workers, batch_size, seed, caption, num_cpus, num_gpus)
    check_names(device=device, engine=engine, kernels=kernels)
    if device is not None and device.startswith("cuda:"):
        raise DeviceError(f"batch gives each worker a GPU of its own: device must be cpu, cuda or mps, got {device!r}")
    check_call(call)
    source, folder = (Path(path).expanduser().absolute() for path in (source, output))  # workers stand elsewhere
    _check_folders(source, folder)
    shared = {"num_inference_steps": 28, "guidance_scale": DEFAULT_GUIDANCE, "condition_scale": 1.0}
    call = shared | {"height": None, "width": None, "mask_order": "celebamask"} | call
    model: dict[str, Any] = {
        "device": device,
        "dtype": None if dtype is None else dtype_name(dtype),
        "model_config": ModelConfig.of(model_config),
        "kernels": kernels,
        "engine": engine,
        "engine_path": None if engine_path is None else Path(engine_path).absolute(),
        "max_memory": None if max_memory is None else parse_bytes(max_memory),
    }
    naming, bundle = Naming(folder, suffix, masks=2, several_images=False), Bundle(checkpoint)
    settings = job_settings(
        bundle.content_hash, call, model_config=model["model_config"].to_dict(), dtype=model["dtype"]
    )
    rows = read_rows(source, seed, caption, say)
    _check_text_encoders(bundle, checkpoint, rows)
    check_writable(folder / "image.png")
    with JobRecord(folder) as record:
        record.find(settings, seed, seed, (), share=True, hold_seed=True)
        plan = _Plan(rows, naming, record, settings, metadata=metadata)
        plan.tell_errors(say)
        job = record.begin(settings, seed, seed, (), share=True, hold_seed=True)
        if not record.hold():
            raise OutputError(f"{folder}: another mogle-rt batch is at work in it; wait until it has ended, or stop it")
        summary = Summary(len(rows), there=plan.there)
        orders = Orders(
            checkpoint="demo" if str(checkpoint) == "demo" else str(bundle_path(checkpoint).absolute()),
            bundle=bundle.content_hash,
            model=model,
            call=call,
            folder=folder,
            job=job,
            batch_size=1 if batch_size == "auto" else batch_size,
            metadata=metadata,
            threads=os.environ.get("OMP_NUM_THREADS"),
        )
        try:
            if plan.tasks:
                cpus = max(os.cpu_count() or 1, math.ceil((num_workers or 1) * num_cpus))
                with ray_session(address, cpus) as ray:
                    there = ray.cluster_resources()
                    asked = Asked(num_workers, num_cpus, num_gpus, device)
                    places = choose_places(bundle, model, there, asked, orders.batch_size)
                    summary.workers = places.workers
                    if batch_size == "auto":
                        orders = replace(orders, batch_size=largest_batch(bundle, model, call, plan.tasks, places))
                        say(f"each worker computes up to {orders.batch_size} images at once")
                    orders = replace(orders, model=model | {"device": places.device})
                    told: set[str] = set()
                    done = 0
                    for report in draw_blocks(ray, orders, plan.tasks, places):
                        _tell_warnings(report, told, say)
                        if report.fatal is not None:
                            raise OutputError(report.fatal)
                        summary.start_up = summary.start_up or report.begun - start
                        plan.errors |= report.errors
                        summary.drawn += report.rows - len(report.errors)
                        done += report.rows
                        if progress is not None:
                            progress(done, len(plan.tasks), len(plan.errors))
        finally:
            record.reread()
            summary.results = write_results(record, settings, rows, plan.paths, plan.errors)
    summary.errors = {row.place: plan.errors[row.id] for row in rows if row.id in plan.errors}
    summary.seconds = time.time() - start
    return summary


class _Plan:
    """What is to be drawn of a job, and what can't be.

    Args:
        rows: of the input. naming: of the images.
        record: of the folder. settings: of the job.
        metadata: whether images hold their prompts.

    Attributes:
        paths: of the images, by the rows' ids. errors: why rows have no image.
        tasks: what is to be drawn. there: how many images are there already.

    Raises:
        OutputError: an image that is there was drawn from something else, or nobody knows from what.
    """

    def __init__(
        self, rows: Sequence[Row], naming: Naming, record: JobRecord, settings: Mapping[str, Any], *, metadata: bool
    ) -> None:
        self._rows = rows
        self.errors = {row.id: row.error for row in rows if row.error is not None}
        right = [row for row in rows if row.error is None]
        self.paths = {row.id: naming.path(row.id, row.seed, 1, 1) for row in right}
        there = {row.id for row in right if self.paths[row.id].exists()}
        self.there = len(there)
        digests = {self.paths[row.id]: row.digest for row in right}
        planned = [Task(row, self.paths[row.id], None).drawing for row in right if row.id in there]
        for drawing in planned:
            if not record.knows(drawing.path):
                raise OutputError(
                    f"{drawing.path}: is there, and no record tells what it was drawn from; remove it, or choose another "
                    "folder"
                )
        record.check(planned, settings, lambda drawing: digests[drawing.path])
        left = [row for row in right if row.id not in there]
        self.tasks: list[Task] = []
        shapes = check_masks(left, settings["mask_order"])
        for row in left:
            shape, path = shapes[row.id], self.paths[row.id]
            if isinstance(shape, MogleError):
                self.errors[row.id] = str(shape)
                continue
            try:
                if metadata:
                    check_prompt(path, row.prompt)
            except OutputError as error:
                self.errors[row.id] = str(error)
                continue
            self.tasks.append(Task(row, path, shape))

    def tell_errors(self, say: Say) -> None:
        """Say how many rows are wrong, before anything is drawn.

        Raises:
            InputError: all are.
        """
        wrong = [row for row in self._rows if row.id in self.errors]
        if not wrong:
            return
        first = f"{wrong[0].place}: {self.errors[wrong[0].id]}"
        if len(wrong) == len(self._rows):
            raise InputError(f"none of {len(wrong):,} rows can be drawn; {first}")
        say(f"{len(wrong):,} of {len(self._rows):,} rows can't be drawn; {first}")


def _check_numbers(
    num_workers: int | None, batch_size: int | str, seed: int, caption: int, num_cpus: float, num_gpus: float | None
) -> None:
    for name, number in (("num_workers", num_workers), ("batch_size", batch_size), ("caption", caption)):
        if isinstance(number, str) and number != "auto":
            raise InputError(f"{name} must be a whole number or auto, got {quoted(number)}")
        if isinstance(number, int) and number < 1:
            raise InputError(f"{name} must be 1 or more, got {number}")
    for name, share in (("num_cpus", num_cpus), ("num_gpus", num_gpus)):
        if share is not None and not 0 <= share < 1e6:
            raise InputError(f"{name} must be a number of 0 or more, got {share}")
    if not 0 <= seed <= MOST_SEED:
        raise InputError(f"seed must be from 0 to {MOST_SEED}, got {seed}")


def _check_folders(source: Path, folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder}: is a file; the images need a folder")
    if not source.exists():
        raise InputError(f"{source}: no such file or folder")
    if source.is_dir() and folder.is_dir() and source.samefile(folder):
        raise OutputError(f"{folder}: holds the rows themselves; choose another folder for the images")


def _check_text_encoders(bundle: Bundle, checkpoint: str | Path, rows: Sequence[Row]) -> None:
    if bundle.has_text_encoders:
        return
    empty = bool(bundle.names("empty_prompt"))
    if not empty or any(row.prompt for row in rows):
        alone = "; with empty prompts it draws from masks alone" if empty else ""
        raise InputError(
            f"{checkpoint}: holds no text encoders, which batch needs for prompts; convert it with them{alone}"
        )


def _tell_warnings(report: Report, told: set[str], say: Say) -> None:
    for line in report.warnings:
        if line not in told and len(told) < MOST_WARNINGS:
            told.add(line)
            say(f"warning: {line}")
