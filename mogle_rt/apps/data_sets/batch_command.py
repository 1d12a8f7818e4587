"""The command ``batch``: draw an image for each row of a data set, by workers of Ray."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from mogle_rt.apps.program import (
    FACE,
    MODEL,
    OUTPUT,
    ConditionScale,
    Dtype,
    EnginePath,
    Guidance,
    Kernels,
    MaskOrder,
    Metadata,
    Pixels,
    Steps,
    Switches,
    WhichEngine,
    console,
    parse_json,
    say,
)
from mogle_rt.errors import InputError

WORKERS = "Workers"


def batch(
    checkpoint: Annotated[Path, typer.Argument(help="A bundle, or demo for the one in the package.")],
    source: Annotated[
        Path,
        typer.Argument(
            metavar="INPUT",
            help="Rows: a CSV, JSON lines (.jsonl) or Parquet file with the columns mask (a path or bytes) and prompt, and "
            "where wanted id, seed and options of the call, such as num_inference_steps. Or a folder of masks with texts "
            "beside them, or MM-CelebA-HQ's folder.",
        ),
    ],
    output: Annotated[
        Path,
        typer.Option("-o", "--output", help="A folder for the images and results.parquet.", rich_help_panel=OUTPUT),
    ],
    suffix: Annotated[
        str | None, typer.Option("--format", help="png or jpg; default: png.", rich_help_panel=OUTPUT)
    ] = None,
    metadata: Metadata = True,
    mask_order: MaskOrder = "celebamask",
    caption: Annotated[
        int,
        typer.Option(
            help="Which caption is the prompt, from 1, if a mask has several (as MM-CelebA-HQ's ten).",
            rich_help_panel=FACE,
        ),
    ] = 1,
    seed: Annotated[
        int,
        typer.Option(
            help="Another number gives all rows without a seed of their own another one.", rich_help_panel=FACE
        ),
    ] = 0,
    steps: Steps = 28,
    guidance: Guidance = 3.5,
    condition_scale: ConditionScale = 1.0,
    height: Pixels = None,
    width: Pixels = None,
    num_workers: Annotated[
        int | None,
        typer.Option(
            help="Processes that draw; default: one for each GPU, or as many as CPUs and memory suffice for.",
            rich_help_panel=WORKERS,
        ),
    ] = None,
    batch_size: Annotated[
        str,
        typer.Option(
            help="Images that a worker computes at once; auto: as many as its memory has room for.",
            rich_help_panel=WORKERS,
        ),
    ] = "1",
    address: Annotated[
        str | None,
        typer.Option(
            help="A Ray cluster, as 10.0.0.1:6379, or auto for the one this machine belongs to; default: Ray is started on "
            "this machine for the time of the job.",
            rich_help_panel=WORKERS,
        ),
    ] = None,
    num_gpus: Annotated[
        float | None,
        typer.Option(help="GPUs for each worker, 0.5 for two on one; default: 1 if any.", rich_help_panel=WORKERS),
    ] = None,
    num_cpus: Annotated[
        float, typer.Option(help="CPUs that Ray counts for each worker.", rich_help_panel=WORKERS)
    ] = 1.0,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda or mps; default: the best available.", rich_help_panel=MODEL)
    ] = None,
    dtype: Dtype = None,
    kernels: Kernels = None,
    engine: WhichEngine = "torch",
    engine_path: EnginePath = None,
    max_memory: Annotated[
        str | None,
        typer.Option(
            help="The most memory that each worker may use on its device, such as 8GB. Default: what is free.",
            rich_help_panel=MODEL,
        ),
    ] = None,
    model_config: Switches = None,
) -> None:
    """Draw an image for each row of a data set, on one machine or a Ray cluster. The same command goes on after a stop."""
    from mogle_rt.batch import run

    with _progress() as progress:
        try:
            summary = run(
                checkpoint,
                source,
                output,
                num_workers=num_workers,
                batch_size=_at_once(batch_size),
                address=address,
                num_cpus=num_cpus,
                num_gpus=num_gpus,
                seed=seed,
                caption=caption,
                suffix=suffix,
                metadata=metadata,
                device=device,
                dtype=dtype,
                model_config=parse_json(model_config),
                kernels=kernels,
                engine=engine,
                engine_path=engine_path,
                max_memory=max_memory,
                say=say,
                progress=progress,
                num_inference_steps=steps,
                guidance_scale=guidance,
                condition_scale=condition_scale,
                height=height,
                width=width,
                mask_order=mask_order.split(",") if "," in mask_order else mask_order,
            )
        except (KeyboardInterrupt, SystemExit):
            say("stopped; the same command goes on")
            raise
    typer.echo(summary.results)
    images = "1 image" if summary.drawn == 1 else f"{summary.drawn:,} images"
    there = f"; {summary.there:,} were there already" if summary.there else ""
    by = f" by {summary.workers} worker{'s' * (summary.workers > 1)}" if summary.workers else ""
    say(f"{images} in {summary.seconds:.1f} s{by}{there}")
    if summary.errors:
        place, error = next(iter(summary.errors.items()))
        raise InputError(f"{len(summary.errors):,} of {summary.rows:,} rows have no image; {place}: {error}")


def _at_once(text: str) -> Any:
    """A number of images; any other text is judged by `run`."""
    try:
        return int(text)
    except ValueError:
        return text


@contextmanager
def _progress() -> Iterator[Callable[[int, int, int], None]]:
    """One line with a bar and an estimate, which appears with the first image."""
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    task = bar.add_task("starting workers", total=None)

    def show(done: int, total: int, errors: int) -> None:
        told = "images" if not errors else f"images ({errors:,} errors)"
        bar.update(task, completed=done, total=total, description=told)

    with bar:
        yield show
