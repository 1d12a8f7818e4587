"""The command ``evaluate``: measure a folder of images, as a table, JSON, or a page with pictures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mogle_rt.apps.program import console, must_exist, parse_json, say
from mogle_rt.errors import ConfigError, InputError, OutputError

if TYPE_CHECKING:
    from mogle_rt.quality.report import Report

DATA, JUDGES, OUTPUT = "What belongs to the images", "Judges", "Results"


def evaluate(
    images: Annotated[Path, typer.Argument(help="The folder of images: of generate, of batch, or any other.")],
    against: Annotated[
        Path | None,
        typer.Option(help="A folder of real images, for fid, kid, cmmd and identity.", rich_help_panel=DATA),
    ] = None,
    masks: Annotated[
        Path | None,
        typer.Option(
            help="A folder of masks with the names of the images' masks. Default: those within the images.",
            rich_help_panel=DATA,
        ),
    ] = None,
    mask_order: Annotated[
        str,
        typer.Option(
            help="What a label map's numbers mean: celebamask, bisenet, farl, or class names separated by commas.",
            rich_help_panel=DATA,
        ),
    ] = "celebamask",
    captions: Annotated[
        Path | None,
        typer.Option(
            help="A folder of text files with the masks' names. Default: the prompts within the images.",
            rich_help_panel=DATA,
        ),
    ] = None,
    caption: Annotated[
        int, typer.Option(help="Which line of a text is the caption, from 1.", rich_help_panel=DATA)
    ] = 1,
    metrics: Annotated[
        str | None,
        typer.Option(
            help="Some of fid, kid, cmmd, clip, reward, mask, identity, diversity, faces and colours, separated by commas. "
            "Default: all for which there is what they need.",
        ),
    ] = None,
    features: Annotated[
        str | None,
        typer.Option(
            help="For fid, kid and diversity: a file of InceptionV3's weights, a folder or id of an image model, or demo.",
            rich_help_panel=JUDGES,
        ),
    ] = None,
    clip: Annotated[
        str | None,
        typer.Option(
            help="For cmmd and clip: a folder or hub id. Default: openai/clip-vit-large-patch14-336.",
            rich_help_panel=JUDGES,
        ),
    ] = None,
    parser: Annotated[
        str | None,
        typer.Option(
            help="For mask and faces: a folder or hub id of a segmentation model, or demo. Default: "
            "jonathandinu/face-parsing, and demo for images of the demo.",
            rich_help_panel=JUDGES,
        ),
    ] = None,
    parser_classes: Annotated[
        str | None,
        typer.Option(
            help="What the parser's classes are, if their names don't tell: an order as for --mask-order, or a JSON file of "
            "names.",
            rich_help_panel=JUDGES,
        ),
    ] = None,
    face: Annotated[
        str | None,
        typer.Option(
            help="For identity: an ONNX file of a face network, or a folder or hub id of an image model. Default: CLIP.",
            rich_help_panel=JUDGES,
        ),
    ] = None,
    reward: Annotated[
        str | None, typer.Option(help="For reward: a folder of ImageReward's files.", rich_help_panel=JUDGES)
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(help="cpu, cuda, cuda:N or mps; default: the best available.", rich_help_panel=JUDGES),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Images judged at once.", rich_help_panel=JUDGES)] = 8,
    bootstrap: Annotated[
        int, typer.Option(help="Resamples for the 95 % intervals; 0 for none.", rich_help_panel=OUTPUT)
    ] = 200,
    seed: Annotated[
        int, typer.Option(help="Of the resamples, and of the page's random images.", rich_help_panel=OUTPUT)
    ] = 0,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write all figures, also each image's.", rich_help_panel=OUTPUT)
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option(help="Write a page with the best, the worst and some random images.", rich_help_panel=OUTPUT),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace existing files of results.", rich_help_panel=OUTPUT)
    ] = False,
) -> None:
    """Measure images: how like real ones they are, and whether they are what masks and prompts ask for."""
    from mogle_rt.arguments import check_names
    from mogle_rt.jobs.naming import check_writable

    check_names(device=device)
    if seed < 0:
        raise InputError(f"--seed must be 0 or more, got {seed}")
    for path in filter(None, (json_file, html)):
        if path.exists() and not overwrite:
            raise OutputError(f"{path}: exists already; choose another name, or --overwrite")
        check_writable(path)
    for folder in filter(None, (images, against, masks, captions)):
        must_exist(folder, InputError)
    classes = _classes(parser_classes)

    from mogle_rt.quality.evaluation import evaluate as measured
    from mogle_rt.quality.judges.choice import Judges

    order = mask_order.split(",") if "," in mask_order else mask_order
    report = measured(
        images,
        against=against,
        masks=masks,
        captions=captions,
        caption=caption,
        mask_order=order,
        metrics=None if metrics is None else [name.strip() for name in metrics.split(",") if name.strip()],
        judges=Judges(features=features, clip=clip, parser=parser, parser_classes=classes, face=face, reward=reward),
        device=device,
        batch_size=batch_size,
        bootstrap=bootstrap,
        seed=seed,
        progress=console.is_terminal,
        say=say,
    )
    _show(report)
    if json_file is not None:
        report.write_json(json_file)
        typer.echo(json_file)
    if html is not None:
        from mogle_rt.quality.page import write_page

        write_page(report, html, order, seed)
        typer.echo(html)


def _classes(given: str | None) -> str | Mapping[str, str] | None:
    """The value of --parser-classes: an order's name, or what a JSON file says.

    Raises:
        InputError: the file isn't there. ConfigError: it holds something else than names by name.
    """
    if given is None or not given.endswith(".json"):
        return given
    path = Path(given)
    must_exist(path, InputError)
    try:
        names = parse_json(path.read_text("utf-8-sig"))
    except (ConfigError, UnicodeDecodeError):
        names = None
    if not names or not all(isinstance(name, str) for name in names.values()):
        raise ConfigError(f'--parser-classes {path}: must hold a JSON object of names, as {{"beard": "skin"}}')
    return names


def _show(report: Report) -> None:
    """Print the table of figures on standard output, and what was not measured on standard error."""
    from rich.console import Console
    from rich.table import Table

    from mogle_rt.quality.report import KINDS, interval, shown

    table = Table(box=None, pad_edge=False)
    for name, justify in (
        ("", "left"),
        ("value", "right"),
        ("95 % interval", "right"),
        ("of", "right"),
        ("by", "left"),
    ):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    for name, found in report.figures.items():
        arrow = {True: " ↑", False: " ↓", None: ""}[KINDS[name].higher]
        cells = [shown(name, found.figure.value), interval(name, found.figure), f"{found.figure.count:,}", found.judge]
        table.add_row(KINDS[name].title + arrow, *cells)
    Console(highlight=False, emoji=False, markup=False).print(table)
    for reason in dict.fromkeys(report.skipped.values()):
        say(f"not measured: {', '.join(name for name, why in report.skipped.items() if why == reason)}: {reason}")
