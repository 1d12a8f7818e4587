"""The command ``calibrate``: measure what fast modes cost on one's own weights and device, and choose among them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table as Shown

from mogle_rt.apps.program import (
    FACE,
    Device,
    Dtype,
    Guidance,
    Kernels,
    MaskOrder,
    MaxMemory,
    Pixels,
    Switches,
    console,
    must_exist,
    parse_json,
    say,
)
from mogle_rt.errors import CheckpointError, InputError, MaskError, OutputError

if TYPE_CHECKING:
    import torch

    from mogle_rt.bundle.bundle import Bundle
    from mogle_rt.quality.judges.contract import Parser

RESULT = "What is chosen, and files"
SEEDS = 2**62
WIDTH = 132  # characters of the table, which a narrower terminal wraps


def calibrate(
    checkpoint: Annotated[Path, typer.Argument(help="A bundle, or demo for the one in the package.")],
    masks: Annotated[
        list[Path],
        typer.Option(
            "--masks",
            "-m",
            help="Masks: a folder, files or patterns; each with its prompt in a text beside it, as generate finds it.",
            rich_help_panel=FACE,
        ),
    ],
    limit: Annotated[
        int, typer.Option(help="At most this many masks, evenly spread over all of them.", rich_help_panel=FACE)
    ] = 16,
    mask_order: MaskOrder = "celebamask",
    text_only: Annotated[
        bool, typer.Option("--text-only", help="Also draw each prompt without its mask.", rich_help_panel=FACE)
    ] = False,
    condition_scale: Annotated[
        list[float] | None,
        typer.Option(
            help="Strength of the mask; given several times, each mask is drawn with each. Default: 1.",
            rich_help_panel=FACE,
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Another one gives all cases other noise.", rich_help_panel=FACE)] = 0,
    steps: Annotated[int, typer.Option(help="Denoising steps of the exact images.", rich_help_panel=FACE)] = 28,
    guidance: Guidance = 3.5,
    height: Pixels = None,
    width: Pixels = None,
    way: Annotated[
        list[str] | None,
        typer.Option(
            help="Settings to try instead of the usual ones, such as steps_mask=fast,order=1; can be given several times.",
            rich_help_panel=RESULT,
        ),
    ] = None,
    max_drift: Annotated[
        list[str] | None,
        typer.Option(
            help="How far the images of a mode may be from exact ones, such as balanced:psnr=35,worst=30. Names: psnr and "
            "worst (dB, at least), ssim (at least), latents (relative, at most), mask (loss of IoU, at most).",
            rich_help_panel=RESULT,
        ),
    ] = None,
    parser: Annotated[
        str | None,
        typer.Option(
            help="Who finds the mask's classes in images: a face parser as of evaluate (a folder or hub id), demo, or none. "
            "Default: demo for the demo, else none.",
            rich_help_panel=RESULT,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            help="A folder for everything. Default: CKPT.calibration beside CKPT.safetensors, and the settings beside it, "
            "where --fast finds them.",
            rich_help_panel=RESULT,
        ),
    ] = None,
    device: Device = None,
    dtype: Dtype = None,
    kernels: Kernels = None,
    max_memory: MaxMemory = None,
    model_config: Switches = None,
) -> None:
    """Measure what fast modes cost on your weights and device, and choose what --fast balanced and --fast fast mean."""
    # First check everything that needs no large library, so that a mistake is reported at once.
    from mogle_rt.arguments import check_names, check_options
    from mogle_rt.bundle.shipped import bundle_path
    from mogle_rt.config import PATCH, ModelConfig, dtype_name, parse_bytes
    from mogle_rt.fast.settings import FastConfig
    from mogle_rt.jobs.captions import prompts_of
    from mogle_rt.jobs.plan import find_masks
    from mogle_rt.quality.calibration.choosing import parse_bounds

    if limit < 1:
        raise InputError(f"--limit must be 1 or more, got {limit}")
    if not 0 <= seed <= SEEDS:
        raise InputError(f"--seed must be from 0 to {SEEDS}, got {seed}")
    bounds = parse_bounds(max_drift or [])
    own_ways = [FastConfig.parse(text) for text in way or []]
    scales = condition_scale or [1.0]
    for scale in scales:
        check_options(
            num_inference_steps=steps,
            guidance_scale=guidance,
            height=PATCH if height is None else height,
            width=PATCH if width is None else width,
            condition_scale=scale,
        )
    check_names(device=device, kernels=kernels)
    switches, memory = ModelConfig.of(parse_json(model_config)), None if max_memory is None else parse_bytes(max_memory)
    asked_dtype = None if dtype is None else dtype_name(dtype)
    found = list(find_masks(masks))
    for path in found:
        must_exist(path, MaskError)
    must_exist(bundle_path(checkpoint), CheckpointError)

    from mogle_rt.apps.drawing import load_pipeline
    from mogle_rt.bundle.bundle import Bundle
    from mogle_rt.masks.labels import to_labels
    from mogle_rt.quality.calibration.cases import cases_of, spread

    bundle = Bundle(checkpoint)
    folder, stored = _places(bundle, output)
    order: Any = mask_order.split(",") if "," in mask_order else mask_order
    chosen_masks = spread(found, limit)
    if len(chosen_masks) < len(found):
        say(f"{len(chosen_masks)} of {len(found):,} masks are drawn; --limit N draws more")
    for mask in chosen_masks:
        to_labels(mask, order=order)  # so that a bad one is told before anything is drawn
    prompts = _prompts(bundle, prompts_of(None, list(chosen_masks), 1, say))
    cases = cases_of(chosen_masks, prompts, seed=seed, scales=scales, text_only=text_only)

    from importlib.util import find_spec

    from mogle_rt.start.quick_imports import import_models

    import_models()
    from tqdm import tqdm

    from mogle_rt.fast.choice import write_stored
    from mogle_rt.installed import install_command
    from mogle_rt.memory.devices import choose_device, choose_dtype, device_name
    from mogle_rt.quality.calibration.drawing import Calibration, work_left
    from mogle_rt.quality.calibration.results import Results
    from mogle_rt.quality.calibration.table import Table, competitors_left, figures_of, write_sheet
    from mogle_rt.quality.calibration.ways import candidates, with_competitors

    measured_on = choose_device(device)
    with_ssim = find_spec("torchmetrics") is not None
    if not with_ssim and any(one.ssim is not None for one in bounds.values()):
        raise InputError(f"--max-drift: ssim needs the package torchmetrics; install it: {install_command('evaluate')}")
    judge = _judge(parser, bundle, measured_on)
    settings = {
        "bundle": bundle.content_hash,
        "device": device_name(measured_on),
        "dtype": str(choose_dtype(asked_dtype, measured_on)).removeprefix("torch."),
        "steps": steps,
        "guidance": guidance,
        "size": [height, width],
        "mask_order": order,
        "model_config": switches.to_dict(),
        "kernels": kernels,
        "max_memory": memory,
        "parser": None if judge is None else judge.name,
        "ssim": with_ssim,
    }
    results = Results(folder, settings)
    ways = with_competitors(own_ways or candidates(steps), steps)
    if not ways:
        raise InputError(f"with {steps} steps there is nothing to leave out; give more with --steps")
    call = {"num_inference_steps": steps, "guidance_scale": guidance, "height": height, "width": width}
    begun = False
    # Where the velocities decide how much is computed, the price of a way is known when it was drawn.
    for told in ("", ", now with fewer steps beside all of them"):
        left = work_left(results, cases, ways, steps)
        if left:
            say(f"{len(cases)} cases, {len(ways)} ways and exact{told}: {left:,} steps to compute")
            if not begun:
                if not with_ssim:
                    say(
                        f"SSIM is left out: it needs the package torchmetrics; install it: {install_command('evaluate')}"
                    )
                if judge is None and parser is None:
                    say("mask consistency is left out; --parser measures it")
                pipe = load_pipeline(
                    checkpoint,
                    device=device,
                    dtype=asked_dtype,
                    model_config=switches,
                    kernels=kernels,
                    max_memory=memory,
                )
                pipe.set_progress_bar_config(disable=True)
                work = Calibration(pipe, results, call, order, judge, with_ssim=with_ssim)
                begun = True
            with _told_how_to_go_on(), tqdm(total=left, unit="step", desc="steps", disable=None) as bar:
                work.run(cases, ways, bar)
        figures = figures_of(results, cases, ways)
        ways += competitors_left(figures, steps)
    if not begun:
        say("nothing to draw: all images are there already")

    about = {"model": checkpoint.name, "device": settings["device"], "dtype": settings["dtype"], "steps": steps}
    table = Table(figures, bounds, steps, about | {"cases": len(cases)})
    _show(table.rows(), table.sentences())
    sheet = folder / "sheet.png"
    write_sheet(sheet, results, cases, [one.way for one in figures[1:]], order)
    for path, text in (
        (folder / "table.md", table.markdown()),
        (folder / "table.json", json.dumps(table.to_dict(), indent=2) + "\n"),
    ):
        _write(path, text)
        typer.echo(path)
    typer.echo(sheet)
    typer.echo(write_stored(bundle, table.settings, table.to_dict(), stored))
    if output is not None:
        say(f"--fast looks for {stored.name} beside {bundle.path.name}; put it there, or give the settings themselves")


def _places(bundle: Bundle, output: Path | None) -> tuple[Path, Path]:
    """The folder of the results, and the file of the settings. Both can be written.

    Raises:
        OutputError: they can't.
    """
    from mogle_rt.bundle.shipped import BUNDLE
    from mogle_rt.fast.choice import stored_path
    from mogle_rt.jobs.naming import check_writable

    if output is None:
        if bundle.path == BUNDLE:
            raise OutputError(
                "demo lies inside the package, which stays as it is; give a folder for the results with -o"
            )
        folder, stored = bundle.path.with_suffix(".calibration"), stored_path(bundle.path)
    else:
        folder, stored = output, output / stored_path(bundle.path).name
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder}: is a file; give another folder for the results with -o")
    for path in (folder / "sheet.png", stored):
        try:
            check_writable(path)
        except OutputError as error:
            raise OutputError(f"{error}; give another folder for the results with -o") from None
    return folder, stored


@contextmanager
def _told_how_to_go_on() -> Iterator[None]:
    """Where drawing is stopped, a line says how it goes on."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        say("stopped; the same command goes on")
        raise


def _prompts(bundle: Bundle, prompts: Sequence[str]) -> list[str]:
    """The prompts that the bundle can take."""
    if bundle.has_text_encoders:
        return list(prompts)
    if not bundle.names("empty_prompt"):
        raise InputError(
            f"{bundle.path}: holds no text encoders, which calibrate needs for prompts; convert it with them"
        )
    if any(prompts):
        say("the bundle holds no text encoders: all cases are drawn from their masks alone")
    return [""] * len(prompts)


def _judge(asked: str | None, bundle: Bundle, device: torch.device) -> Parser | None:
    from mogle_rt.bundle.shipped import BUNDLE
    from mogle_rt.quality.judges import demo
    from mogle_rt.quality.judges.parser import SegmentationModel

    if asked is None:
        asked = demo.NAME if bundle.path == BUNDLE else "none"
    if asked == "none":
        return None
    return demo.DemoJudge() if asked == demo.NAME else SegmentationModel(asked, device)


def _show(rows: Sequence[Sequence[str]], sentences: Sequence[str]) -> None:
    from mogle_rt.quality.calibration.table import HEADINGS

    shown = Shown(box=None, pad_edge=False)
    for i, heading in enumerate(HEADINGS):
        shown.add_column(heading, justify="right" if 0 < i < len(HEADINGS) - 2 else "left", no_wrap=True)
    for row in rows:
        shown.add_row(*row)
    out = Console(soft_wrap=True, highlight=False, emoji=False, markup=False, width=max(console.width, WIDTH))
    out.print(shown)
    for line in sentences:
        out.print(line, markup=False)


def _write(path: Path, text: str) -> None:
    from mogle_rt.bundle.files import atomic_write

    with atomic_write(path) as file:
        file.write(text.encode())
