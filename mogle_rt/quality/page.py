"""The report as one HTML page that needs nothing else: figures, classes, and the best, worst and some random images."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image

from mogle_rt import __version__
from mogle_rt.bundle.files import atomic_write
from mogle_rt.masks.labels import colorize, resize
from mogle_rt.masks.orders import Order
from mogle_rt.quality.pictures import Picture, read_picture
from mogle_rt.quality.report import KINDS, Report, interval, shown
from mogle_rt.quality.rows import Row

SHOWN = 8  # images of a kind
SIDE = 192  # pixels: the longer side of a picture on the page
SORTED_BY = ("miou", "clip", "reward", "identity", "colours")  # the first that was measured says which images are best

STYLE = """
:root { color-scheme: light dark; --line: #8885; --faint: #888; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 68rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
table { border-collapse: collapse; } th, td { padding: .3rem .9rem .3rem 0; text-align: left; border-bottom: 1px solid var(--line); }
td.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.faint, figcaption small { color: var(--faint); }
.bar { display: inline-block; height: .7em; background: #4a7fd0; vertical-align: baseline; }
.sheet { display: grid; grid-template-columns: repeat(auto-fill, minmax(19rem, 1fr)); gap: 1.1rem; }
figure { margin: 0; } figure div { display: flex; gap: 3px; } figure img { flex: 1 1 0; min-width: 0; width: 100%; height: auto; }
figcaption { font-size: .85rem; overflow-wrap: anywhere; }
"""  # noqa: E501


def write_page(report: Report, path: Path, order: Order = "celebamask", seed: int = 0) -> None:
    """Write the page; a file that is there is replaced. Pictures are within it, and it has no scripts.

    Args:
        order: of the masks' labels. seed: of the choice of random images.

    Raises:
        OutputError: it can't be written.
    """
    title = f"{report.folder.name or report.folder}: {len(report.rows):,} images"
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="faint">mogle_rt {__version__} evaluated {escape(str(report.folder))}{_against(report)}. '
        "Intervals are of 95 %, by the bootstrap. Pictures side by side are the mask, the image, what the parser finds in "
        "it, and the real image, as far as they are there.</p>",
        _figures(report),
        *(f"<p>{escape(note)}</p>" for note in report.notes),
        _classes(report),
        _colours(report),
        *_sheets(report, order, seed),
        _skipped(report),
    ]
    body = "\n".join(filter(None, parts))
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width"><title>{escape(title)}</title><style>{STYLE}</style></head>\n'
        f"<body>\n{body}\n</body></html>\n"
    )
    with atomic_write(path) as file:
        file.write(page.encode(errors="backslashreplace"))


def _against(report: Report) -> str:
    real = report.settings.get("against")
    return f" against {escape(str(real))}" if real else ""


def _figures(report: Report) -> str:
    lines = []
    for name, found in report.figures.items():
        kind = KINDS[name]
        better = "" if kind.higher is None else "more is better" if kind.higher else "less is better"
        lines.append(
            f'<tr><th>{escape(kind.title)}</th><td class="n">{shown(name, found.figure.value)}</td><td class="n">'
            f'{interval(name, found.figure)}</td><td class="n">{found.figure.count:,}</td><td>{better}</td>'
            f"<td>{escape(found.judge)}</td></tr>"
        )
    head = "<tr><th></th><th>value</th><th>95 % interval</th><th>of</th><th></th><th>by</th></tr>"
    return f"<table>{head}{''.join(lines)}</table>"


def _classes(report: Report) -> str:
    return _bars("IoU by class", {name: (value, f"{value:.3f}") for name, value in report.classes.items()})


def _colours(report: Report) -> str:
    shares = {name: (right / count, f"{right} of {count}") for name, (right, count) in report.colours.items()}
    return _bars("Colours that are the prompt's", shares)


def _bars(title: str, values: dict[str, tuple[float, str]]) -> str:
    if not values:
        return ""
    lines = (
        f'<tr><th>{escape(name)}</th><td class="n">{text}</td><td><span class="bar" style="width:{160 * value:.0f}px">'
        "</span></td></tr>"
        for name, (value, text) in values.items()
    )
    return f"<h2>{escape(title)}</h2><table>{''.join(lines)}</table>"


def _skipped(report: Report) -> str:
    lines = "".join(f"<li>{escape(name)}: {escape(reason)}</li>" for name, reason in report.skipped.items())
    return f'<h2>Not measured</h2><ul class="faint">{lines}</ul>' if lines else ""


def _sheets(report: Report, order: Order, seed: int) -> list[str]:
    """The sections of pictures."""
    by = next((name for name in SORTED_BY if name in report.values), None)
    sections: list[tuple[str, Sequence[int]]] = []
    if by is not None:
        values = report.values[by]
        ranked = [int(i) for i in np.argsort(-values, kind="stable") if not np.isnan(values[i])]
        many = min(SHOWN, len(ranked) // 2)
        title = KINDS[by].title
        if many:
            sections += [(f"Best by {title}", ranked[:many]), (f"Worst by {title}", ranked[::-1][:many])]
    chosen = np.random.default_rng(seed).permutation(len(report.rows))[:SHOWN]
    sections.append(("At random", sorted(map(int, chosen))))
    return [
        f"<h2>{escape(title)}</h2><div class='sheet'>{''.join(_tile(report, i, order) for i in places)}</div>"
        for title, places in sections
    ]


def _tile(report: Report, place: int, order: Order) -> str:
    """An image beside its mask, what the parser finds in it, and the real image."""
    row = report.rows[place]
    picture = read_picture(row.image)
    labels = row.labels(order)
    pictures = []
    if labels is not None:
        pictures.append(("mask", colorize(resize(labels, *picture.shape[:2])), True))
    pictures.append(("image", picture, False))
    if report.parser is not None:
        pictures.append(("found in the image", colorize(report.parser.labels([picture])[0]), True))
    if row.real is not None:
        pictures.append(("real", read_picture(row.real), False))
    images = "".join(f'<img src="{_data(one, flat)}" alt="{what}" title="{what}">' for what, one, flat in pictures)
    values = ", ".join(
        f"{KINDS[name].title} {shown(name, float(values[place]))}"
        for name, values in report.values.items()
        if np.isfinite(values[place])
    )
    return (
        f"<figure><div>{images}</div><figcaption>{escape(row.name)}<br><small>{escape(values)}</small>{_prompt(row)}"
        "</figcaption></figure>"
    )


def _prompt(row: Row) -> str:
    return f"<br>{escape(row.prompt)}" if row.prompt else ""


def _data(picture: Picture, flat: bool) -> str:
    """A picture as an address that holds it."""
    image = Image.fromarray(picture)
    scale = SIDE / max(image.size)
    if scale < 1:
        size = [max(1, round(side * scale)) for side in image.size]
        image = image.resize(size, Image.Resampling.NEAREST if flat else Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True) if flat else image.save(buffer, "JPEG", quality=88)
    return f"data:image/{'png' if flat else 'jpeg'};base64,{base64.b64encode(buffer.getvalue()).decode()}"
