"""Writes a quality report in Markdown: tables of what `benchmarks.quality` measured, between notes written by hand.

    python -m benchmarks.quality_report benchmarks/QUALITY.json benchmarks/QUALITY.md

Everything between the two marks in the Markdown file is replaced; the notes around it stay.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from mogle_rt.masks import CLASS_NAMES

BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
COLOURS = ("background", "hair", "clothes", "hat", "skin", "lips")


def _share(pair: list[int]) -> str:
    right, all_ = pair
    return f"{right}/{all_}" if all_ else "–"


def _rows(report: dict[str, Any], names: list[str]) -> list[str]:
    truth = report["renders"]["miou"]
    lines = [
        f"| | images | mIoU | of real renders' | faces | Fréchet | s an image | {' | '.join(COLOURS)} |",
        "|" + "---|" * (7 + len(COLOURS)),
    ]
    for name in names:
        r = report[name]
        miou = f"{r['miou']:.3f} | {r['miou'] / truth:.0%}" if "miou" in r else "– | –"
        colours = " | ".join(_share(r["colours"][c]) if "colours" in r else "–" for c in COLOURS)
        seconds = f"{r['seconds']:.2f}" if "seconds" in r else "–"
        lines.append(
            f"| {name} | {r['images']} | {miou} | {r['faces']:.0%} | {r['frechet']:.3f} | {seconds} | {colours} |"
        )
    return lines


def to_markdown(report: dict[str, Any]) -> str:
    """All tables of a report, as lines of Markdown."""
    runs = [n for n in report if isinstance(report[n], dict) and "faces" in report[n]]
    main = [n for n in runs if not n.startswith("ablation")]
    lines = [f"Bundle {report['bundle_sha256'][:16]}….", "", *_rows(report, main), ""]
    edit, spread = report["edit"], report["diversity"]
    lines += [
        f"**Edits** (hair grown into the background, the same seed): PSNR outside the edit {edit['psnr_outside']:.1f} dB; "
        f"{edit['hair_inside']:.0%} of the new region is hair by the segmentation network.",
        "",
        "**Diversity** (RMS difference of pixels, 0 to 255, between seeds; 10 cases, 4 seeds, 14 steps): "
        + ", ".join(f"{name} {value:.1f}" for name, value in spread.items())
        + ".",
        "",
        "Ablations, 28 steps; on the trained weights but for the last two, see above:",
        "",
        *_rows(report, [n for n in runs if n.startswith("ablation")]),
        "",
        "IoU by class:",
        "",
    ]
    shown = ["renders", "reconstructions", "mask and prompt, 28 steps", "mask only, 28 steps"]
    lines += [f"| | {' | '.join(shown)} |", "|" + "---|" * (1 + len(shown))]
    for c, name in enumerate(CLASS_NAMES):
        values = (report[n]["iou"].get(str(c)) for n in shown)
        lines.append(f"| {name} | {' | '.join('–' if v is None else f'{v:.2f}' for v in values)} |")
    return "\n".join(lines)


def main() -> None:
    report, page = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    before, rest = page.read_text().split(BEGIN)
    after = rest.split(END)[1]
    page.write_text(f"{before}{BEGIN}\n\n{to_markdown(report)}\n\n{END}{after}")


if __name__ == "__main__":
    main()
