"""The command ``cost``: a job's arithmetic, memory traffic and memory, here and computed in the reference's way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from mogle_rt.apps.program import format_bytes, must_exist
from mogle_rt.errors import CheckpointError, InputError, InsufficientMemoryError

if TYPE_CHECKING:
    from mogle_rt.cost.estimate import JobCost
    from mogle_rt.cost.gpus import Gpu
    from mogle_rt.cost.job import Job

STEP_NAMES = {"whole": "whole steps", "kept": "steps of text and image", "reused": "steps left out"}


def cost(
    checkpoint: Annotated[Path | None, typer.Argument(help="A bundle, of which only the shapes are read.")] = None,
    flux_dev: Annotated[bool, typer.Option("--flux-dev", help="Use FLUX.1-dev's shapes, without a bundle.")] = False,
    height: Annotated[int | None, typer.Option(help="Pixels, a multiple of 16; default: the bundle's, or 512.")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels, a multiple of 16; default: the bundle's, or 512.")] = None,
    batch: Annotated[int, typer.Option(help="Images computed at once.")] = 1,
    steps: Annotated[int, typer.Option(help="Denoising steps.")] = 28,
    text_tokens: Annotated[
        int | None, typer.Option(help="T5 tokens of the prompt; default: the bundle's, or 512.")
    ] = None,
    classes: Annotated[int, typer.Option(help="Classes in each mask; absent ones share one picture.")] = 12,
    dtype: Annotated[str | None, typer.Option(help="bf16, fp16 or fp32; default: the bundle's, or bf16.")] = None,
    kernels: Annotated[str | None, typer.Option(help="Operations that compute a step: triton or torch.")] = None,
    weights: Annotated[
        str | None, typer.Option(help="int8, fp8 or int4: the blocks' weights in fewer bits; default: the bundle's.")
    ] = None,
    fast: Annotated[
        str | None, typer.Option(help="What mogle_rt leaves out, such as steps_mask=fast,refresh_every=4, or a name.")
    ] = None,
    gpu: Annotated[
        str | None, typer.Option(help="A card, e.g. 'RTX 4090': print its shortest times and what fits on it.")
    ] = None,
    max_memory: Annotated[
        str | None, typer.Option(help="With --gpu: the most memory to use there, such as 8GB; default: all of it.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON: bytes, FLOPs, milliseconds.")] = False,
) -> None:
    """Count what a job takes, and what the reference's way of computing takes. This needs neither weights nor a GPU."""
    from mogle_rt.bundle.shipped import bundle_path
    from mogle_rt.config import dtype_name, parse_bytes
    from mogle_rt.cost.gpus import find_gpu
    from mogle_rt.fast.choice import chosen, said

    if fast is not None:
        said(fast)
    if (checkpoint is None) != flux_dev:
        raise InputError("give a bundle or --flux-dev, one of them")
    card = None if gpu is None else find_gpu(gpu)
    if max_memory is not None and card is None:
        raise InputError("--max-memory needs --gpu, the card whose memory is meant")
    allowed = None if max_memory is None else parse_bytes(max_memory)

    if checkpoint is not None:
        must_exist(bundle_path(checkpoint), CheckpointError)
    if dtype is not None:
        dtype_name(dtype)
    from mogle_rt.start.quick_imports import import_models, without_compiler

    import_models(text=False)
    import torch

    from mogle_rt.bundle.bundle import Bundle
    from mogle_rt.config import parse_dtype
    from mogle_rt.cost.estimate import estimate
    from mogle_rt.cost.job import Job
    from mogle_rt.cost.prediction import plan_on, predicted_step_ms
    from mogle_rt.ops import choice as ops

    options: dict[str, Any] = {"height": height, "width": width, "batch": batch, "steps": steps}
    options |= {"text_tokens": text_tokens, "classes": classes}
    asked = options | {"kernels": kernels, "weights": weights, "dtype": None if dtype is None else parse_dtype(dtype)}
    given = {name: value for name, value in asked.items() if value is not None}
    if checkpoint is None:
        job = Job(fast=None if fast is None else said(fast), **given)
    else:
        bundle = Bundle(checkpoint)
        job = Job.of(bundle, fast=chosen(fast, bundle), **given)
    with without_compiler(torch):
        result = estimate(job)
    ways = {"mogle_rt": result.engine, "reference": result.reference}
    plan, refused, predicted, seconds = None, "", 0.0, 0.0
    if card:
        try:
            plan = plan_on(job, card, allowed, result.parameters["vae"])
            computed = [(n, step) for n, step in result.engine.kinds if step.flops]
            times = [(n, predicted_step_ms(card, step, plan, job.dtype.itemsize, job.weights)) for n, step in computed]
            predicted, seconds = times[0][1], sum(n * ms for n, ms in times) / 1000
        except InsufficientMemoryError as error:
            refused = str(error)
    limits = {name: _limits(card, way, job) for name, way in ways.items()} if card else {}
    settings = {name: getattr(job, name) for name in options} | {
        "kernels": ops.choice(kernels, torch.device("meta")),
        "weights": job.weights or "plain",
        "dtype": str(job.dtype).removeprefix("torch."),
        "image_tokens": job.tokens,
    }
    if job.fast is not None:
        settings["fast"] = str(job.fast)
    parts = {part: {"parameters": n, "bytes": result.nbytes[part]} for part, n in result.parameters.items()}
    if as_json:
        report: dict[str, Any] = {"job": settings | {"pictures": job.pictures}, "parts": parts}
        report["cost"] = {name: way.to_dict() for name, way in ways.items()}
        report["gpu"] = vars(card) | {"limits": limits} if card else None
        if card:
            said_times = {"predicted_step_ms": predicted, "predicted_seconds_of_all_steps": seconds}
            report["plan"] = {"refused": refused} if plan is None else vars(plan) | {"peak": plan.peak} | said_times
        typer.echo(json.dumps(report, indent=2))
        return

    out = Console(soft_wrap=True, highlight=False, emoji=False)
    out.print(", ".join(f"{name.replace('_', ' ')} {value}" for name, value in settings.items()), "\n", markup=False)
    table = Table("part", "parameters", "bytes", box=None, pad_edge=False)
    for part, sizes in parts.items():
        table.add_row(part, f"{sizes['parameters']:,}", format_bytes(sizes["bytes"]))
    out.print(table, "")
    table = Table("", *ways, "ratio", box=None, pad_edge=False)
    a, b = ways.values()
    for label, mine, theirs, unit, form in (
        ("a step: TFLOP", a.step.flops, b.step.flops, 1e12, ",.2f"),
        ("  kernel launches", a.step.launches, b.step.launches, 1, ",.0f"),
        ("  GB read", a.step.read, b.step.read, 1e9, ",.1f"),
        ("  GB written", a.step.written, b.step.written, 1e9, ",.1f"),
        ("the run: TFLOP", a.flops, b.flops, 1e12, ",.1f"),
        (f"  encoding {job.pictures} or 20 pictures", a.encode.flops, b.encode.flops, 1e12, ",.1f"),
        *(
            (f"  {n} {STEP_NAMES[kind]}", n * step.flops, n * b.step.flops, 1e12, ",.1f")
            for kind, (n, step) in a.course.items()
        ),
        ("  preparing", a.prepare.flops, b.prepare.flops, 1e12, ",.1f"),
        ("  decoding", a.decode.flops, b.decode.flops, 1e12, ",.1f"),
        ("memory: GiB of weights", a.resident, b.resident, 2**30, ",.1f"),
        ("  at the peak", a.peak, b.peak, 2**30, ",.1f"),
        ("  and with text encoders", a.peak_with_text, b.peak_with_text, 2**30, ",.1f"),
    ):
        ratio = f"{theirs / mine:.2f}" if mine and theirs else ""
        table.add_row(label, f"{mine / unit:{form}}", f"{theirs / unit:{form}}", ratio)
    if card:
        table.add_row(f"{card.name}, {card.memory:g} GiB:")
        for label, key in (("  ms a step to compute", "compute_ms"), ("  ms a step to move", "memory_ms")):
            least = [way[key] for way in limits.values()]
            table.add_row(label, *(f"{ms:,.1f}" for ms in least), f"{least[1] / least[0]:.2f}")
        for label, key in (("  fits without streaming", "fits"), ("  and with text encoders", "fits_with_text")):
            table.add_row(label, *("yes" if way[key] else "no" for way in limits.values()))
    out.print(table)
    if card and plan is None:
        out.print(f"\nno plan fits {card.name}: {refused}", markup=False)
    elif plan:
        out.print(f"\n{plan}", markup=False)
        total = f"{job.steps} steps {seconds:,.1f} s"
        out.print(f"predicted, not measured: {predicted:,.0f} ms a step, {total}", markup=False)


def _limits(card: Gpu, way: JobCost, job: Job) -> dict[str, float]:
    """Limits from a card's datasheet: the shortest possible time of a step, and whether the job fits into memory."""
    return {
        "compute_ms": card.compute_ms(way.step, job.dtype.itemsize, job.weights),
        "memory_ms": card.memory_ms(way.step.moved),
        "fits": card.fits(way.peak),
        "fits_with_text": card.fits(way.peak_with_text),
    }
