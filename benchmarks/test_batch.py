"""What Ray costs: a data set drawn by one worker of `mogle-rt batch`, beside the plain pipeline in one process.

Both write the same files. Starting Ray and its worker, which takes a few seconds once a job, doesn't count.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks.report import Row
from benchmarks.side_by_side import Neighbours, SideBySide
from mogle_rt import Pipeline
from mogle_rt.batch import run
from mogle_rt.batch.session import ray_session
from mogle_rt.bundle.shipped import write_examples
from mogle_rt.jobs.image_files import save_image
from mogle_rt.jobs.plan import Drawing
from mogle_rt.jobs.work import draw_images

pytest.importorskip("ray", reason="needs Ray, of the extra batch")

CALL: dict[str, Any] = {
    "num_inference_steps": 28,
    "guidance_scale": 3.5,
    "condition_scale": 1.0,
    "height": None,
    "width": None,
    "mask_order": "celebamask",
}


@pytest.fixture(scope="module")
def _ray() -> Iterator[None]:
    with ray_session(None, 2):
        yield


def plain(pipe: Pipeline, masks: Sequence[Path], seeds: range, folder: Path) -> float:
    """Seconds that images take in a loop."""
    start = time.perf_counter()
    for seed in seeds:
        mask = masks[seed % len(masks)]
        drawing = Drawing(mask, f"face {seed}", seed, folder / f"{seed}.png")
        ((image, settings),) = draw_images(pipe, [drawing], [mask], CALL)
        save_image(image, drawing.path, settings)
    return time.perf_counter() - start


@pytest.mark.usefixtures("_ray")
@pytest.mark.parametrize("count", [40, pytest.param(500, marks=pytest.mark.slow)])
def test_data_set(count: int, compare: SideBySide, tmp_path: Path) -> None:
    write_examples(tmp_path / "masks")
    masks = sorted((tmp_path / "masks").glob("*.png"))
    lines = [
        f'{{"mask": "{masks[i % len(masks)]}", "prompt": "face {i}", "id": "{i}", "seed": {i}}}' for i in range(count)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    pipe = Pipeline("demo")
    pipe.set_progress_bar_config(disable=True)
    plain(pipe, masks, range(2), tmp_path / "warm")
    times: list[float] = []
    others: list[float] = []
    jobs: list[float] = []

    def job() -> None:
        summary = run("demo", tmp_path / "rows.jsonl", tmp_path / "out", num_workers=1)
        assert summary.drawn == count
        jobs.append(summary.seconds - summary.start_up)

    def beside(seeds: range) -> None:
        with Neighbours() as neighbours:
            times.append(plain(pipe, masks, seeds, tmp_path / "plain"))
        others.append(neighbours.share)

    beside(range(count // 2))  # half of the plain images before the job and half after it, as the machine changes
    compare.benchmark.pedantic(job, rounds=1)  # type: ignore[no-untyped-call]
    beside(range(count // 2, count))
    for i in range(count):
        assert (tmp_path / "plain" / f"{i}.png").read_bytes() == (tmp_path / "out" / f"{i}_{i}.png").read_bytes()
    compare.record(
        Row(
            group="data set",
            name=f"an image of {count}, one worker",
            engine=1000 * jobs[0] / count,
            baseline=1000 * sum(times) / count,
            spread=abs(times[0] - times[1]) / sum(times),
            others=max(others),
        )
    )
