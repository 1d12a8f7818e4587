"""The images that a process draws, one batch after another, beside other processes that may work in the same folder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from mogle_rt.errors import OutputError
from mogle_rt.jobs.plan import Drawing, Existing, batches
from mogle_rt.jobs.record import JobRecord


class Work:
    """Batches of images that no other process draws.

    Args:
        drawings: what is to be drawn.
        batch_size, shapes: see `batches`.
        existing: what happens where an image is there meanwhile. Processes share the work if it is "skip".
        record: of the folder; None where one process alone is expected.
        share: whether images may be left to other processes; otherwise it is an error if one draws the same.

    Attributes:
        left: how many images were left to other processes.
    """

    def __init__(
        self,
        drawings: Sequence[Drawing],
        batch_size: int,
        shapes: Mapping[Path | None, tuple[int, ...] | None],
        record: JobRecord | None,
        existing: Existing,
        *,
        share: bool,
    ) -> None:
        self._drawings, self._batch_size, self._shapes = drawings, batch_size, shapes
        self._record, self._existing, self._share = record, existing, share
        self.left = 0

    def __iter__(self) -> Iterator[list[Drawing]]:
        """Batches in their order. At the end come images that another process had taken and did not draw.

        Raises:
            OutputError: another process draws the same images, and the work is not shared.
        """
        later: list[Drawing] = []
        for last in (False, True):
            waiting = later if last else self._drawings
            later = [] if last else later
            for batch in batches(waiting, self._batch_size, self._shapes):
                mine = []
                for drawing in batch:
                    taken = self._take(drawing)
                    if taken:
                        mine.append(drawing)
                    elif last or taken is None:
                        self.left += 1
                    else:
                        later.append(drawing)
                try:
                    if mine:
                        yield mine
                finally:
                    for drawing in mine:
                        if self._record is not None:
                            self._record.release(drawing)

    def _take(self, drawing: Drawing) -> bool | None:
        """Whether this process draws an image. False: another one has it in hand. None: it is there already."""
        if self._record is None:
            return True
        claimed = self._record.claim(drawing)
        there = self._existing != "replace" and drawing.path.exists()  # since the job was planned
        if claimed and not there:
            return True
        if claimed:
            self._record.release(drawing)
        if not self._share:
            raise OutputError(
                f"{drawing.path}: another process draws it at the same time; choose another name, or share the work with "
                "--skip-existing or --shard"
            )
        return None if there else False
