"""A worker by itself, without Ray: what it does with rows that fail, and when nothing can go on."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from mogle_rt.batch import worker as module
from mogle_rt.batch.rows import MaskSource, Row
from mogle_rt.batch.worker import ATTEMPTS, Attempts, Orders, Report, Task, Worker, pack, unpack
from mogle_rt.bundle.bundle import Bundle
from mogle_rt.config import ModelConfig
from mogle_rt.errors import NumericalError, OutputError
from mogle_rt.jobs.record import JobRecord
from mogle_rt.jobs.work import draw_images
from tests.apps.test_cli import draw_mask, one_thread

pytest.importorskip("pyarrow", reason="needs pyarrow, of the extra batch")


CALL: dict[str, Any] = {
    "num_inference_steps": 1,
    "guidance_scale": 3.5,
    "condition_scale": 1.0,
    "height": 32,
    "width": 48,
    "mask_order": "celebamask",
}


@pytest.fixture
def orders(tmp_path: Path, tiny_bundle: Path) -> Orders:
    folder = tmp_path / "out"
    with JobRecord(folder) as record:
        job = record.begin({"steps": 1}, 0, 0, (), share=True, hold_seed=True)
    return Orders(
        checkpoint=str(tiny_bundle),
        bundle=Bundle(tiny_bundle).content_hash,
        model={"device": "cpu", "dtype": "fp32", "model_config": ModelConfig()},
        call=CALL,
        folder=folder,
        job=job,
        batch_size=3,
        metadata=True,
        threads="1",
    )


@pytest.fixture
def tasks(tmp_path: Path, orders: Orders) -> list[Task]:
    path = draw_mask(tmp_path / "mask.png")
    mask = MaskSource(path, None, Path(path.name))
    rows = [Row(place=f"row {i}", id=str(i), seed=i, prompt=f"face {i}", mask=mask, digest="d") for i in range(3)]
    return [Task(row, orders.folder / f"{row.id}.png", (32, 48)) for row in rows]


def draw(orders: Orders, tasks: Sequence[Task], attempts: Attempts | None = None) -> Report:
    """A worker's report of one block."""
    with one_thread():
        (report,) = unpack(Worker(orders, (attempts or Attempts()).begin)(pack(tasks)))
    return report


def test_a_block_is_drawn(orders: Orders, tasks: list[Task]) -> None:
    report = draw(orders, tasks)
    assert (report.rows, report.errors, report.fatal) == (3, {}, None)
    assert report.warnings == []
    record = JobRecord(orders.folder)
    assert all(task.path.exists() and (record.seconds(task.path) or 0) > 0 for task in tasks)
    before = [task.path.stat().st_mtime_ns for task in tasks]
    assert draw(orders, tasks).fatal is None  # a block that is begun again
    assert [task.path.stat().st_mtime_ns for task in tasks] == before


def test_warnings_come_with_the_report(orders: Orders, tasks: list[Task]) -> None:
    """A worker's terminal is nobody's."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        report = draw(dataclasses.replace(orders, call=CALL | {"width": 96}), tasks[:1])
    assert report.errors == {}
    (line,) = report.warnings
    assert line.startswith("the mask is 48 x 32 pixels, width by height, and is stretched to 96 x 32; ")


def test_what_a_library_tells_its_authors_is_not_for_users(
    orders: Orders, tasks: list[Task], monkeypatch: pytest.MonkeyPatch
) -> None:
    def telling(*arguments: Any, **options: Any) -> Any:
        warnings.warn("deprecated in 0.9", DeprecationWarning, stacklevel=1)
        warnings.warn("unclosed file", ResourceWarning, stacklevel=1)
        return draw_images(*arguments, **options)

    monkeypatch.setattr(module, "draw_images", telling)
    assert draw(orders, tasks[:1]).warnings == []


def test_one_bad_image_costs_only_itself(orders: Orders, tasks: list[Task], monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(pipe: Any, batch: Any, *rest: Any, **options: Any) -> Any:
        for drawing in batch:
            if drawing.seed == 1:
                raise NumericalError("the latents hold NaN")
            if drawing.seed == 2:
                raise ValueError("of a library")
        return draw_images(pipe, batch, *rest, **options)

    monkeypatch.setattr(module, "draw_images", failing)
    report = draw(orders, tasks)
    assert report.errors == {"1": "the latents hold NaN", "2": "ValueError: of a library"}
    assert report.fatal is None
    assert [task.path.exists() for task in tasks] == [True, False, False]


def test_a_mask_that_has_gone(orders: Orders, tasks: list[Task]) -> None:
    mask = tasks[1].row.mask
    assert mask is not None
    gone = dataclasses.replace(mask, path=mask.path.with_name("gone.png"))
    tasks[1] = tasks[1]._replace(row=dataclasses.replace(tasks[1].row, mask=gone))
    report = draw(orders, tasks)
    assert list(report.errors) == ["1"]
    assert "gone.png" in report.errors["1"]
    assert [task.path.exists() for task in tasks] == [True, False, True]


def test_an_image_that_ends_its_workers_is_given_up(orders: Orders, tasks: list[Task]) -> None:
    """After one that ended its worker, the images of its batch are drawn alone, so that only the guilty one is given up."""
    attempts = Attempts()
    for _ in range(ATTEMPTS):
        attempts.begin(["1"])
    attempts.begin(["0", "2"])
    report = draw(orders, tasks, attempts)
    assert report.errors == {"1": f"its worker ended without a word, {ATTEMPTS} times; memory may be too small"}
    assert [task.path.exists() for task in tasks] == [True, False, True]


def test_a_full_disk_ends_the_job(orders: Orders, tasks: list[Task], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(image: object, path: Path, settings: object) -> None:
        raise OutputError(f"{path}: can't be written: No space left on device")

    monkeypatch.setattr(module, "save_image", full)
    report = draw(orders, tasks)
    assert report.fatal == f"{tasks[0].path}: can't be written: No space left on device"
    assert report.errors == {}


def test_the_record_knows_an_image_before_its_file_appears(
    orders: Orders, tasks: list[Task], monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(image: object, path: Path, settings: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "save_image", killed)
    with pytest.raises(KeyboardInterrupt):
        draw(orders, tasks)
    assert JobRecord(orders.folder).knows(tasks[0].path)


@pytest.mark.parametrize("change", ["bundle", "version", "folder", "job"])
def test_who_cant_take_part(change: str, orders: Orders, tasks: list[Task], tmp_path: Path) -> None:
    """A worker on a machine that has another version, another bundle at the path, or doesn't share the folder."""
    there = {
        "bundle": ({"bundle": "0" * 64}, "is another bundle for a worker than where the job was begun"),
        "version": ({"version": "0.0.1"}, "the job was begun by 0.0.1"),
        "folder": ({"folder": tmp_path / "elsewhere"}, "mogle-rt-jobs.jsonl: can't be opened: No such file"),
        "job": ({"job": dataclasses.replace(orders.job, settings={"steps": 2})}, "is the record of other jobs"),
    }
    changed, message = there[change]
    report = draw(dataclasses.replace(orders, **changed), tasks)  # type: ignore[arg-type]
    assert message in (report.fatal or "")
    assert not any(task.path.exists() for task in tasks)
    assert not (tmp_path / "elsewhere").exists()
