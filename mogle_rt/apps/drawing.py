"""Drawing a job's images, as ``generate`` asks for them: what is planned, what is left to do, and how far it is."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.text import Text
from tqdm import tqdm

from mogle_rt.apps.program import console, say
from mogle_rt.bundle.bundle import Bundle
from mogle_rt.errors import InputError, OutputError
from mogle_rt.fast.choice import chosen
from mogle_rt.jobs.embeddings import EmbeddedPrompts
from mogle_rt.jobs.image_files import check_prompt, check_suffix, save_image
from mogle_rt.jobs.naming import Naming, check_writable
from mogle_rt.jobs.plan import Drawing, Existing, count_prompts, digest_of, mask_names, plan, shard, to_draw
from mogle_rt.jobs.record import Job, JobRecord, job_settings
from mogle_rt.jobs.work import Work, draw_images
from mogle_rt.masks.labels import to_labels

if TYPE_CHECKING:
    from torch import Tensor

    from mogle_rt.pipeline import Pipeline


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is to be drawn, and how.

    Attributes:
        checkpoint: a bundle, or ``demo``.
        masks: None where an image has none.
        prompts: of each mask.
        prompts_found: whether they were looked for beside the masks.
        embeds: the prompts' embeddings, where the text encoders are not to be used.
        num_images: of each mask.
        seed: of the first image; None goes on with a job's, or takes ``drawn_seed``.
        naming: what the files are called.
        existing: what happens where a file is there already.
        part: "I/N" draws part I of N of the images.
        sheet: where a contact sheet is written.
        metadata: whether prompt, seed and settings are written into the images.
        batch_size: images computed at once.
        model: arguments of `Pipeline` besides the bundle.
        call: arguments of its call. An image depends on all of them.
    """

    checkpoint: Path
    masks: Sequence[Path | None]
    prompts: Sequence[str]
    prompts_found: bool
    embeds: EmbeddedPrompts | None
    num_images: int
    seed: int | None
    drawn_seed: int
    naming: Naming
    existing: Existing
    part: str | None
    sheet: Path | None
    metadata: bool
    batch_size: int
    model: Mapping[str, Any]
    call: Mapping[str, Any]

    @property
    def share(self) -> bool:
        """Whether it may go on with a job that was begun before, or that another process is at."""
        return self.existing == "skip" or self.part is not None

    def drawings(self, job: Job) -> list[Drawing]:
        """All images, numbered as in ``job``."""
        places = None  # an asked-for seed is the first mask's, whatever was drawn before
        if self.seed is None:
            place_of = {name: place for place, name in enumerate(job.masks)}
            places = [place_of[name] for name in mask_names(self.masks)]
        return plan(self.masks, self.prompts, self.num_images, job.seed, self.naming, places)


def draw(request: Request, start: float) -> None:
    """Draw what is asked for, and tell how long it took since ``start``.

    Raises:
        InputError, MaskError, CheckpointError, OutputError, …: see `Pipeline`, and the modules of `mogle_rt.jobs`.
    """
    settings = _settings(request)
    several = len(request.masks) * request.num_images > 1
    names = mask_names(request.masks)
    with JobRecord(request.naming.folder) if several or request.share else nullcontext() as record:
        asked: dict[str, Any] = {"share": request.share, "hold_seed": request.naming.hold_seed}
        identity = (settings, request.seed, request.drawn_seed, names)
        job = Job(settings, request.drawn_seed if request.seed is None else request.seed, names)
        if record is not None:
            job = record.find(*identity, **asked)
        drawings = request.drawings(job)
        todo = to_draw(shard(drawings, request.part), request.existing)
        _check_sheet(request)
        with console.status(Text(f"reading {len(names):,} masks …")) if len(names) > 1 else nullcontext():
            shapes, digests = _read_masks(request)
        if record is not None and request.existing == "skip":
            unknown = record.check(drawings, settings, lambda drawing: digests[drawing.mask])
            if unknown:
                say(
                    f"of {unknown:,} images that are there no record tells what they were drawn from; they stay as they are"
                )
        if request.metadata:
            for drawing in todo:
                check_prompt(drawing.path, drawing.prompt)
        if todo:
            if request.prompts_found and len(names) > 1 and (line := count_prompts(todo)):
                say(line)
            pipe = load_pipeline(request.checkpoint, **request.model)
            seconds = {"load": time.perf_counter() - start}
            if record is not None:
                begun = record.begin(*identity, **asked)
                if (begun.seed, begun.masks) != (job.seed, job.masks):  # another process began it meanwhile
                    job, drawings = begun, request.drawings(begun)
                    todo = to_draw(shard(drawings, request.part), request.existing)
                job = begun
            embeddings = None if request.embeds is None else request.embeds.load()
            work = Work(
                todo,
                request.batch_size,
                lambda drawing: shapes[drawing.mask],
                record,
                request.existing,
                share=request.share,
            )
            done = 0
            with _bar(pipe, len(todo)) as bar, _told_how_to_go_on(request, record, bar):
                for batch in work:
                    _draw(pipe, batch, request, embeddings, seconds)
                    for drawing in batch:
                        if record is not None:
                            record.drawn(job, drawing, digests[drawing.mask])
                        with tqdm.external_write_mode():
                            typer.echo(drawing.path)
                    done += len(batch)
                    bar.update(len(batch))
            report(done, work.left, job.seed, time.perf_counter() - start, seconds)
        else:
            say("nothing to draw: all images are there already")
    if request.sheet is not None:
        from mogle_rt.jobs.sheet import write_sheet

        write_sheet(request.sheet, drawings, request.call["mask_order"])
        typer.echo(request.sheet)


def _settings(request: Request) -> dict[str, Any]:
    """What an image depends on besides its mask, prompt and seed, for the record.

    Raises:
        CheckpointError: see `Bundle`.
        InputError: it has no text encoders.
    """
    bundle = Bundle(request.checkpoint)
    if request.embeds is None and not bundle.has_text_encoders:
        empty = bool(bundle.names("empty_prompt"))
        if not empty or any(request.prompts):
            alone = " With --prompt '' it draws from masks alone." if empty else ""
            raise InputError(
                f"{request.checkpoint}: holds no text encoders, which generate needs for prompts; convert it with them, "
                f"or give --embeds, a file that mogle-rt embed writes with such a bundle.{alone}"
            )
    fast = chosen(request.model["fast"], bundle)
    return job_settings(
        bundle.content_hash,
        request.call,
        model_config=request.model["model_config"].to_dict(),
        dtype=request.model["dtype"],
        num_images=request.num_images,
        embeds=None if request.embeds is None else [request.embeds.bundle, request.embeds.tokens],
        fast=None if fast is None else fast.to_dict(),
    )


def _read_masks(
    request: Request,
) -> tuple[dict[Path | None, tuple[int, ...] | None], dict[Path | None, str]]:
    """The shape and the digest of each mask. All are read before anything is drawn, so a bad one is an error at once."""
    order, shapes, digests = request.call["mask_order"], {}, {}
    for mask in dict.fromkeys(request.masks):
        shapes[mask] = None if mask is None else to_labels(mask, order=order).shape
        digests[mask] = digest_of(mask)
    return shapes, digests


def _check_sheet(request: Request) -> None:
    path = request.sheet
    if path is None:
        return
    check_suffix(path)
    check_writable(path)
    if path.exists() and request.existing == "refuse":
        raise OutputError(f"{path}: exists already; choose another name, --overwrite or --skip-existing")


def load_pipeline(checkpoint: Path, **model: Any) -> Pipeline:
    """Load a pipeline, and say so meanwhile. model: arguments of `Pipeline`."""
    with console.status(Text(f"loading {checkpoint} …")):
        from mogle_rt.start.quick_imports import import_models

        import_models()
        from mogle_rt.pipeline import Pipeline

        return Pipeline(checkpoint, **model)


@contextmanager
def _bar(pipe: Pipeline, images: int) -> Iterator[Any]:
    """A bar over all images, with an estimate of the time that is left; below it the steps of each batch.

    One image has the bar of its steps alone.
    """
    several = images > 1
    if several:
        pipe.set_progress_bar_config(position=1, leave=False)
    with tqdm(total=images, unit="image", disable=None if several else True, desc="images") as bar:
        yield bar


@contextmanager
def _told_how_to_go_on(request: Request, record: JobRecord | None, bar: Any) -> Iterator[None]:
    """Where drawing is stopped, a line says how the rest is drawn."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        bar.close()
        if record is not None and request.existing != "replace":
            with_skip = "" if request.existing == "skip" else " with --skip-existing"
            say(f"stopped; the same command{with_skip} goes on")
        raise


def _draw(
    pipe: Pipeline,
    batch: list[Drawing],
    request: Request,
    embeddings: Mapping[str, tuple[Tensor, Tensor]] | None,
    seconds: dict[str, float],
) -> None:
    """Draw one batch into its files, and add its times to ``seconds``."""
    masks = [drawing.mask for drawing in batch if drawing.mask is not None]
    images = draw_images(pipe, batch, masks, request.call, embeddings=embeddings, metadata=request.metadata)
    for name, value in pipe.last_run.seconds.items():
        seconds[name] = seconds.get(name, 0.0) + value
    for drawing, (image, described) in zip(batch, images, strict=True):
        save_image(image, drawing.path, described)


def report(done: int, left: int, seed: int, total: float, seconds: Mapping[str, float]) -> None:
    """Say how many images were drawn, in how many seconds of wall time, from which seed on, and how long each part took.

    Args:
        left: how many images of the job other processes have drawn.
    """
    stages = ", ".join(f"{name} {value:.2f} s" for name, value in seconds.items())
    count = "1 image" if done == 1 else f"{done:,} images"
    others = f"; {left:,} more by other processes" if left else ""
    say(f"{count} in {total:.2f} s (seed {seed}): {stages}{others}")
