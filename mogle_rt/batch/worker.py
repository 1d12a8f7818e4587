"""What a worker of Ray does: it opens the bundle by its path, and draws blocks of rows into files.

Importing this needs no PyTorch: a worker decides how many threads it gets before that is loaded.
"""

from __future__ import annotations

import logging
import os
import pickle
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mogle_rt import __version__
from mogle_rt.batch.masks import MaskReader, Shape
from mogle_rt.batch.rows import Row
from mogle_rt.errors import MogleError, OutputError, printable
from mogle_rt.jobs.image_files import save_image
from mogle_rt.jobs.plan import Drawing
from mogle_rt.jobs.record import Job, JobRecord
from mogle_rt.jobs.work import Work, draw_images

if TYPE_CHECKING:
    import pyarrow

    from mogle_rt.pipeline import Pipeline

logger = logging.getLogger(__name__)

ATTEMPTS = 3  # a row that has ended its worker so often is given up
PAUSE = 0.5  # seconds until an image is asked for again that another process has in hand
THREADS = "OMP_NUM_THREADS"


@dataclass(frozen=True, kw_only=True)
class Orders:
    """What all workers of a job are told.

    Attributes:
        checkpoint: the bundle's path, or "demo". bundle: its hash.
        model: arguments of `Pipeline`. call: arguments of its call, for rows without their own.
        folder: of the images. job: as the record has it.
        batch_size: images computed at once.
        metadata: whether settings are written into the images.
        threads: the user's own OMP_NUM_THREADS; None where it isn't set.
        version: of this package.
    """

    checkpoint: str
    bundle: str
    model: Mapping[str, Any]
    call: Mapping[str, Any]
    folder: Path
    job: Job
    batch_size: int
    metadata: bool
    threads: str | None
    version: str = __version__


class Task(NamedTuple):
    """A row, its image's file, and the shape of its mask."""

    row: Row
    path: Path
    shape: Shape

    @property
    def drawing(self) -> Drawing:
        """As all commands plan an image."""
        name = None if self.row.mask is None else self.row.mask.name
        return Drawing(name, self.row.prompt, self.row.seed, self.path, self.row.options)


@dataclass
class Report:
    """What became of a block.

    Attributes:
        rows: how many it has.
        errors: by the ids of rows that have no image.
        warnings: what was warned of.
        fatal: why the whole job must end.
        begun: when its first image was begun, with the bundle open, in seconds since 1970.
    """

    rows: int = 0
    errors: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    fatal: str | None = None
    begun: float = 0.0


class Attempts:
    """Counts how often each image was begun in this run. It lives in a process of its own, so that it outlasts workers."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()

    def begin(self, names: Sequence[str]) -> list[int]:
        """Count these once more, and say how often each has been begun by now."""
        self._counts.update(names)
        return [self._counts[name] for name in names]


class Worker:
    """Draws blocks of rows; Ray makes one in each of its processes.

    Args:
        orders: what to do.
        begin: `Attempts.begin`, wherever that lives.
    """

    def __init__(self, orders: Orders, begin: Callable[[Sequence[str]], list[int]]) -> None:
        self._orders, self._begin = orders, begin
        self._pipe: Pipeline | None = None
        self._record: JobRecord | None = None
        self._masks = MaskReader()

    def __call__(self, block: pyarrow.Table) -> pyarrow.Table:
        """Draw a block, see `pack`. What is returned is a table of one report, see `unpack`."""
        import pyarrow

        tasks: list[Task] = pickle.loads(block["tasks"][0].as_py())
        report = Report(rows=len(tasks))
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("default")
            for kind in (DeprecationWarning, ResourceWarning):  # these are for the authors of libraries
                warnings.simplefilter("ignore", kind)
            try:
                self._open()
                report.begun = time.time()
                self._draw_all(tasks, report)
            except MogleError as error:
                report.fatal = str(error)
            except Exception as error:
                logger.exception("a block of rows")  # this goes into Ray's own files
                report.fatal = printable(f"a worker failed: {type(error).__name__}: {error}")
        report.warnings = sorted({printable(str(warning.message)) for warning in told})
        return pyarrow.table({"report": [pickle.dumps(report)]})

    def _open(self) -> None:
        """Open the bundle, and the record of the job.

        Raises:
            MogleError: this process can't take part in the job.
        """
        if self._pipe is not None:
            return
        orders = self._orders
        if orders.version != __version__:
            raise OutputError(f"a worker has mogle_rt {__version__}, the job was begun by {orders.version}")
        # Ray says one thread for each CPU that it gives to a worker. The number has an effect on the last bits, so it is
        # what it would be in `generate`, see `suitable_threads`.
        os.environ.pop(THREADS, None)
        if orders.threads is not None:
            os.environ[THREADS] = orders.threads
        from mogle_rt.start.quick_imports import import_models

        import_models()
        from mogle_rt.pipeline import Pipeline

        record = JobRecord(orders.folder)
        record.join(orders.job)
        pipe = Pipeline(orders.checkpoint, **orders.model)
        if pipe.bundle.content_hash != orders.bundle:
            raise OutputError(f"{orders.checkpoint}: is another bundle for a worker than where the job was begun")
        pipe.set_progress_bar_config(disable=True)
        self._record, self._pipe = record, pipe

    def _draw_all(self, tasks: Sequence[Task], report: Report) -> None:
        assert self._record is not None
        by_path = {task.path: task for task in tasks}
        left: Sequence[Drawing] = [task.drawing for task in tasks]
        while left:
            work = Work(
                left,
                self._orders.batch_size,
                lambda drawing: (by_path[drawing.path].shape, drawing.options),
                self._record,
                "skip",
                share=True,
            )
            for batch in work:
                self._draw([by_path[drawing.path] for drawing in batch], report)
            # A worker of an earlier run that was killed may be at an image still; its end frees it.
            left = [d for d in left if by_path[d.path].row.id not in report.errors and not d.path.exists()]
            if left:
                time.sleep(PAUSE)

    def _draw(self, batch: Sequence[Task], report: Report) -> None:
        """Draw a batch; or its images one by one, where one of them has ended a worker before or fails."""
        counts = self._begin([task.row.id for task in batch])
        if max(counts) > ATTEMPTS and len(batch) == 1:
            report.errors[batch[0].row.id] = (
                f"its worker ended without a word, {ATTEMPTS} times; memory may be too small"
            )
            return
        if len(batch) > 1 and max(counts) > 1:
            self._one_by_one(batch, report)
            return
        try:
            self._save(batch)
        except OutputError:
            raise
        except Exception as error:  # whatever is wrong with one image is no reason to lose the others
            if len(batch) > 1:
                self._one_by_one(batch, report)
                return
            text = str(error) if isinstance(error, MogleError) else f"{type(error).__name__}: {error}"
            report.errors[batch[0].row.id] = printable(text)[:1500]
            if not isinstance(error, MogleError) and "CUDA error" in text:
                os._exit(1)  # nothing works in this process any more; Ray starts another one

    def _one_by_one(self, batch: Iterable[Task], report: Report) -> None:
        for task in batch:
            self._draw([task], report)

    def _save(self, batch: Sequence[Task]) -> None:
        assert self._pipe is not None
        assert self._record is not None
        start = time.perf_counter()
        masks = [self._masks(task.row.mask) for task in batch if task.row.mask is not None]
        drawings = [task.drawing for task in batch]
        images = draw_images(self._pipe, drawings, masks, self._orders.call, metadata=self._orders.metadata)
        seconds = (time.perf_counter() - start) / len(batch)
        for task, drawing, (image, described) in zip(batch, drawings, images, strict=True):
            # The record comes first: whatever file is there is known then, also if this process ends in between.
            self._record.drawn(self._orders.job, drawing, task.row.digest, seconds)
            save_image(image, drawing.path, described)


def pack(tasks: Sequence[Task]) -> pyarrow.Table:
    """Rows as a block of a data set, which is one row to Ray: so it goes to one worker, whole."""
    import pyarrow

    return pyarrow.table({"tasks": [pickle.dumps(list(tasks))]})


def unpack(block: pyarrow.Table) -> list[Report]:
    """What workers say."""
    return [pickle.loads(one) for one in block["report"].to_pylist()]
