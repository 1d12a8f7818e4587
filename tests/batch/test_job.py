"""Whole jobs on a Ray of this machine: what is drawn, that it goes on after kills, and that it equals `generate`."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest
from PIL import Image

from mogle_rt import Pipeline
from mogle_rt.batch import Summary, run
from mogle_rt.batch.rows import derived_seed
from mogle_rt.batch.session import ray_session
from tests.apps.test_cli import QUICK, draw_mask, one_thread
from tests.apps.test_cli import run as program

pytest.importorskip("ray", reason="needs Ray, of the extra batch")
parquet = pytest.importorskip("pyarrow.parquet", reason="needs pyarrow, of the extra batch")

OPTIONS: dict[str, Any] = {"num_inference_steps": 2, "height": 32, "width": 48, "device": "cpu", "dtype": "fp32"}
SEEDS = 100  # of the first row; each next row has the next, as in a job of `generate`


@pytest.fixture(scope="module", autouse=True)
def _ray() -> Iterator[None]:
    """One Ray for all jobs here, as a program may have one of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")  # what workers draw with, and `generate`
        patch.setenv("RAY_worker_niceness", "0")  # beside other tests, workers of low priority take minutes
        with ray_session(None, 3):
            yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight masks with prompts, and a table of them; the masks of four rows are in it."""
    import pyarrow

    folder = tmp_path_factory.mktemp("rows")
    rows = []
    for i in range(8):
        path = draw_mask(folder / "masks" / f"{i}.png", seed=i)
        path.with_suffix(".txt").write_text(f"face {i}")
        mask = {"bytes": path.read_bytes() if i % 2 else None, "path": f"masks/{i}.png"}
        rows.append({"id": str(i), "mask": mask, "prompt": f"face {i}", "seed": SEEDS + i})
    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "rows.parquet")
    return folder


@pytest.fixture(scope="module")
def generated(folder: Path, tiny_bundle: Path) -> dict[str, bytes]:
    """What `generate` draws from the same masks and seeds."""
    out = folder / "generated"
    with one_thread():
        result = program("generate", tiny_bundle, "-m", folder / "masks", "-o", out, "--seed", SEEDS, *QUICK)
    assert result.code == 0, result.err
    return contents(out)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.png")}


def workers() -> list[int]:
    """Process numbers of Ray's workers that draw."""
    below = psutil.Process().children(recursive=True)
    return [process.pid for process in below if "MapWorker" in " ".join(process.cmdline())]


@pytest.fixture(scope="module")
def drawn(folder: Path, tiny_bundle: Path) -> Summary:
    """A job of two workers, one of which was killed after the first image."""
    killed: list[int] = []

    def progress(done: int, total: int, errors: int) -> None:
        if not killed:
            killed.append(workers()[0])
            os.kill(killed[0], signal.SIGKILL)
        assert (total, errors) == (8, 0)

    lines: list[str] = []
    summary = run(
        tiny_bundle,
        folder / "rows.parquet",
        folder / "out",
        num_workers=2,
        say=lines.append,
        progress=progress,
        **OPTIONS,
    )
    assert killed
    assert lines == []
    return summary


def test_images_equal_those_of_generate(folder: Path, drawn: Summary, generated: dict[str, bytes]) -> None:
    assert (drawn.rows, drawn.drawn, drawn.there, drawn.errors, drawn.workers) == (8, 8, 0, {}, 2)
    assert contents(folder / "out") == generated


def test_the_table_tells_of_every_row_once(drawn: Summary) -> None:
    table = parquet.read_table(drawn.results).to_pylist()
    assert [row["id"] for row in table] == [str(i) for i in range(8)]
    for i, row in enumerate(table):
        assert (row["image"], row["mask"], row["seed"]) == (f"{i}_{SEEDS + i}.png", f"{i}.png", SEEDS + i)
        assert (row["prompt"], row["error"]) == (f"face {i}", None)
        assert row["seconds"] > 0
        assert json.loads(row["settings"])["steps"] == 2
    assert {len(row["hash"]) for row in table} == {64}
    assert len({row["hash"] for row in table}) == 8


def test_a_second_run_does_nothing(folder: Path, drawn: Summary, tiny_bundle: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (folder / "out").iterdir()}
    again = run(tiny_bundle, folder / "rows.parquet", folder / "out", **OPTIONS)
    assert (again.drawn, again.there, again.workers, again.results) == (0, 8, 0, drawn.results)
    assert {path: path.stat().st_mtime_ns for path in (folder / "out").iterdir()} == before


def test_generate_goes_on_with_it(folder: Path, drawn: Summary, generated: dict[str, bytes], tiny_bundle: Path) -> None:
    """The record of both is one, and so are the images' names."""
    missing = folder / "out" / f"3_{SEEDS + 3}.png"
    missing.unlink()
    arguments = ("-m", folder / "masks", "-o", folder / "out", "--seed", SEEDS, "--skip-existing", *QUICK)
    with one_thread():
        result = program("generate", tiny_bundle, *arguments)
    assert (result.code, result.out) == (0, f"{missing}\n"), result.err
    assert contents(folder / "out") == generated


def test_more_rows_some_of_them_wrong(
    folder: Path, drawn: Summary, generated: dict[str, bytes], tiny_bundle: Path
) -> None:
    """On the command line, by another number of workers: what is missing is drawn, and what is new, with options of its own;
    and rows that are wrong are told.
    """
    out, missing = folder / "out", f"2_{SEEDS + 2}.png"
    (out / missing).unlink()
    (folder / "bad.png").write_text("no picture")
    rows: list[dict[str, Any]] = [
        {"mask": f"masks/{i}.png", "prompt": f"face {i}", "id": str(i), "seed": SEEDS + i} for i in range(8)
    ]
    rows += [
        {"mask": "bad.png", "prompt": "a", "id": "bad"},
        {"mask": None, "prompt": "b", "id": "b", "height": 64, "condition_scale": 0.5, "position_delta": [0, 1]},
        {"mask": "masks/1.png", "prompt": "c", "height": 50},
    ]
    path = folder / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    result = program("batch", tiny_bundle, path, "-o", out, "--num-workers", 1, *QUICK)
    assert (result.code, result.out) == (1, f"{out / 'results.parquet'}\n")
    assert result.err.startswith("2 of 11 rows can't be drawn; row 9: ")
    assert "2 images in " in result.err
    assert result.err.splitlines()[-1].startswith("error: 2 of 11 rows have no image; row 9: ")
    table = parquet.read_table(out / "results.parquet").to_pylist()
    assert [row["error"] is None for row in table] == [True] * 8 + [False, True, False]
    assert "bad.png" in table[8]["error"]
    assert table[10]["error"] == "height must be a multiple of 16, got 50; the nearest is 48"
    assert json.loads(table[9]["settings"])["height"] == 64

    new = f"b_{derived_seed('b', 0)}.png"
    assert table[9]["image"] == new
    assert {name: content for name, content in contents(out).items() if name != new} == generated
    pipe = Pipeline(tiny_bundle, device="cpu", dtype="fp32")
    with one_thread():
        call: dict[str, Any] = {"height": 64, "width": 48, "condition_scale": 0.5, "position_delta": (0, 1)}
        image: Any = pipe(None, "b", 2, seed=derived_seed("b", 0), **call).images[0]
    with Image.open(out / new) as there:
        assert there.tobytes() == image.tobytes()
        assert json.loads(there.info["position_delta"]) == [0, 1]


def test_evaluate_measures_what_was_drawn(folder: Path, tmp_path: Path) -> None:
    """The table of results tells it masks, prompts, seeds and seconds; and which rows have no image, and why."""
    from mogle_rt.masks import to_labels
    from mogle_rt.quality.evaluation import evaluate

    (folder / "none.png").write_text("no picture")
    rows: list[dict[str, Any]] = [
        {"mask": f"masks/{i}.png", "prompt": f"a face {i}", "id": f"row{n}", "seed": n} for n, i in enumerate((5, 2, 2))
    ]
    rows.append({"mask": "none.png", "prompt": "a", "id": "row3"})
    (folder / "few.jsonl").write_text("\n".join(map(json.dumps, rows)))
    lines: list[str] = []
    asked: dict[str, Any] = {"num_workers": 2, "batch_size": "auto", "max_memory": "3GB"}
    summary = run("demo", folder / "few.jsonl", tmp_path / "out", say=lines.append, **asked, **OPTIONS)
    assert (summary.drawn, list(summary.errors)) == (3, ["row 4"])
    assert "each worker computes up to 16 images at once" in lines

    said: list[str] = []
    report = evaluate(tmp_path / "out", device="cpu", bootstrap=0, say=said.append)
    assert said[0].startswith("1 of 4 rows have no image; the first one's error is ")
    assert [(row.image.stem, row.prompt, row.seed) for row in report.rows] == [
        (f"row{n}_{n}", row["prompt"], n) for n, row in enumerate(rows[:3])
    ]
    assert all(row.seconds is not None and row.seconds > 0 for row in report.rows)
    assert report.rows[1].group == report.rows[2].group != report.rows[0].group  # those of one mask aren't independent
    for row, one in zip(report.rows, rows, strict=False):
        labels = row.labels("celebamask")
        assert labels is not None
        assert (labels == to_labels(folder / one["mask"])).all()
    assert report.figures["miou"].judge == "demo"  # what was drawn by the demo is judged by its own network
    assert {"miou", "diversity"} <= set(report.figures)
