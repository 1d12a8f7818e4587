"""Measure a folder of images: how like real ones they are, and whether they are what masks and prompts ask for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from mogle_rt.bundle.bundle import Bundle
from mogle_rt.errors import CheckpointError, InputError
from mogle_rt.masks.orders import Order, order_table
from mogle_rt.memory.devices import choose_device
from mogle_rt.quality import UnmeasurableError
from mogle_rt.quality.judges.choice import Bench, Judges
from mogle_rt.quality.metrics import Evaluation
from mogle_rt.quality.report import METRICS, Report
from mogle_rt.quality.rows import find_rows, images_in, size_of, with_captions, with_masks, with_real

BATCH, RESAMPLES = 8, 200


def evaluate(
    images: str | Path,
    *,
    against: str | Path | None = None,
    masks: str | Path | None = None,
    captions: str | Path | None = None,
    caption: int = 1,
    mask_order: Order = "celebamask",
    metrics: Sequence[str] | None = None,
    judges: Judges | None = None,
    device: str | int | torch.device | None = None,
    batch_size: int = BATCH,
    bootstrap: int = RESAMPLES,
    seed: int = 0,
    progress: bool = False,
    say: Callable[[str], object] = lambda _: None,
) -> Report:
    """Measure the images in a folder.

    Args:
        images: the folder, written by `mogle-rt generate`, by `mogle-rt batch`, or by anyone. All images have one size.
        against: a folder of real images, for fid, kid, cmmd and, where names agree, identity.
        masks: a folder of masks, named like the images' masks. None takes those that are within the images.
        captions: a folder of text files, named like the masks. None takes the prompts that images were drawn for.
        caption: which line of a text is the caption, from 1.
        mask_order: of the masks' labels, see `mogle_rt.masks.to_labels`.
        metrics: names out of `report.METRICS`; None measures all for which there is what they need.
        judges: where the judges' weights are.
        device: to compute on; None takes the best.
        batch_size: images judged at once.
        bootstrap: resamples for the 95 % intervals; 0 leaves these out.
        seed: of the resamples.
        progress: whether to show how far it is, on standard error.
        say: called with each note, as soon as it is known.

    Raises:
        InputError: a folder or what belongs to an image is missing or can't be read; a metric is unknown, or lacks what it
            needs and was asked for by name.
        CheckpointError, DownloadError: a judge that was asked for, or that a named metric needs, can't be opened.
    """
    asked = None if metrics is None else tuple(metrics)
    check_numbers(asked, batch_size, bootstrap, caption)
    order_table(mask_order)
    folder, notes = Path(images), list[str]()

    def note(line: str) -> None:
        notes.append(line)
        say(line)

    rows = with_captions(find_rows(folder, note), None if captions is None else Path(captions), caption, note)
    rows = with_masks(rows, None if masks is None else Path(masks), note)
    real: list[Path] = []
    if against is not None:
        if Path(against).resolve() == folder.resolve():
            raise InputError(f"{against}: is the folder of the images themselves; give one of real images")
        real = images_in(Path(against))
        rows = with_real(rows, Path(against), note)
    size_of(rows)
    bundles = {row.bundle for row in rows}
    if len(bundles - {None}) > 1:
        note(f"the images were drawn by {len(bundles - {None})} bundles")
    chosen = judges or Judges()
    bench = Bench(chosen, choose_device(device), of_demo=bundles == {Bundle("demo").content_hash})
    if asked is None:
        bench.open_given()
    settings = {
        "against": None if against is None else str(against),
        "masks": None if masks is None else str(masks),
        "captions": None if captions is None else str(captions),
        "bootstrap": bootstrap,
        "seed": seed,
    } | asdict(chosen)
    report = Report(folder, rows, notes=notes, settings=settings)
    work = Evaluation(report, real, bench, mask_order, batch_size, bootstrap, seed, progress, note)
    for name in METRICS if asked is None else asked:
        try:
            work.measure(name)
        except (UnmeasurableError, CheckpointError) as error:
            if asked is not None:
                raise
            report.skipped[name] = str(error)
    if not report.figures:
        raise InputError(
            f"{folder}: nothing could be measured; {'; '.join(f'{n}: {w}' for n, w in report.skipped.items())}"
        )
    return report


def check_numbers(metrics: Sequence[str] | None, batch_size: int, bootstrap: int, caption: int) -> None:
    """Check what is given to `evaluate` beside paths.

    Raises:
        InputError: a metric is unknown, none is given, or a number is out of range.
    """
    for name in metrics or ():
        if name not in METRICS:
            raise InputError(f"metrics are {', '.join(METRICS)}, got {name!r}")
    if metrics is not None and not metrics:
        raise InputError(f"no metric was given; metrics are {', '.join(METRICS)}")
    if batch_size < 1 or caption < 1:
        raise InputError(f"the batch size and the caption's number must be 1 or more, got {batch_size} and {caption}")
    if not (bootstrap == 0 or 2 <= bootstrap <= 10_000):
        raise InputError(f"bootstrap must be 0, for no intervals, or from 2 to 10,000, got {bootstrap}")
