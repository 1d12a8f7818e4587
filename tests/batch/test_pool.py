"""How many workers there are, what each gets, and how rows are divided into blocks."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mogle_rt.batch.pool import MOST_ROWS, Asked, Places, blocks, choose_places, largest_batch
from mogle_rt.batch.rows import Row
from mogle_rt.batch.worker import Task
from mogle_rt.bundle.bundle import Bundle
from mogle_rt.config import ModelConfig
from mogle_rt.errors import ClusterError

pytestmark = pytest.mark.quick

EIGHT = {"CPU": 64.0, "GPU": 8.0}


def row(**options: Any) -> Task:
    """A row whose mask is square, with options of its own."""
    return Task(Row(place="", options=tuple(options.items())), Path(), (64, 64))


@pytest.mark.parametrize(
    ("asked", "there", "places"),
    [
        (Asked(None, 1, None, None), EIGHT, Places(8, 1, 1, None)),
        (Asked(None, 1, None, "cuda"), EIGHT, Places(8, 1, 1, "cuda")),
        (Asked(None, 4, 0.5, None), EIGHT, Places(16, 4, 0.5, None)),
        (Asked(3, 1, None, None), EIGHT, Places(3, 1, 1, None)),
        (Asked(3, 1, 0, None), EIGHT, Places(3, 1, 0, "cpu")),  # none of the GPUs that are there
        (Asked(3, 1, None, "cpu"), EIGHT, Places(3, 1, 0, "cpu")),
        (Asked(2, 0.5, None, None), {"CPU": 1.0}, Places(2, 0.5, 0, None)),
        (Asked(None, 1, None, "mps"), {"CPU": 8.0}, Places(1, 1, 0, "mps")),
    ],
)
def test_places(asked: Asked, there: dict[str, float], places: Places) -> None:
    assert choose_places(Bundle("demo"), {"device": asked.device}, there, asked, 1) == places


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (
            Asked(65, 1, 0, None),
            "65 workers with 1 CPUs each need more than the 64 that Ray has; give fewer --num-workers",
        ),
        (
            Asked(9, 1, 1, None),
            "9 workers with 1 GPUs each need more than the 8 that Ray has; give fewer --num-workers",
        ),
    ],
)
def test_a_cluster_that_is_too_small(asked: Asked, message: str) -> None:
    with pytest.raises(ClusterError, match=message):
        choose_places(Bundle("demo"), {"device": asked.device}, EIGHT, asked, 1)


def test_workers_on_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker for each core, as far as the free memory suffices, for a model that gains nothing from more threads.

    What this process holds itself, here 8 GB, is not free.
    """
    from mogle_rt.memory import budget

    model: dict[str, Any] = {"device": "cpu", "dtype": "fp32", "model_config": ModelConfig(), "kernels": None}
    model["engine"] = "torch"
    monkeypatch.setattr("psutil.Process.memory_info", lambda _: SimpleNamespace(rss=8 << 30))
    for free, workers in ((100 << 30, 6), (4 << 30, 3), (1 << 29, 1)):
        monkeypatch.setattr(budget, "available_memory", lambda free=free: free)
        found = choose_places(Bundle("demo"), model, {"CPU": 6.0}, Asked(None, 1, None, "cpu"), 1).workers
        assert found == workers if workers in (1, 6) else 1 < found < 6


def test_as_many_images_at_once_as_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """More memory, and smaller images, allow more of them; workers share what is free.

    In 830 MB, 30 of which are free for it, two images would have room only if more weights were streamed than for one.
    """
    from mogle_rt.memory import budget

    model: dict[str, Any] = {"device": "cpu", "dtype": "fp32", "model_config": ModelConfig(), "kernels": None}
    model |= {"engine": "torch", "max_memory": None}
    bundle = Bundle("demo")

    def found(memory: int | None, *tasks: Task, workers: int = 1, **call: Any) -> int:
        places = Places(workers, 1, 0, "cpu")
        return largest_batch(bundle, model | {"max_memory": memory}, call, tasks or [row()], places)

    counts = [found(memory) for memory in (830_000_000, 1_000_000_000, 4_000_000_000)]
    assert counts == sorted(counts)
    assert (counts[0], counts[-1]) == (1, MOST_ROWS)
    small, large = (found(1_500_000_000, height=side, width=side) for side in (64, 512))
    assert large < small
    assert (
        found(1_500_000_000, row(), row(height=512, width=512), row(), height=64, width=64) == large
    )  # the largest row
    monkeypatch.setattr(budget, "available_memory", lambda: 2_000_000_000)
    sides = {"height": 512, "width": 512}
    assert found(None, workers=2, **sides) == found(1_000_000_000, **sides) < found(None, **sides)


def test_a_batch_for_gpus_that_are_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(
        ClusterError, match="this machine has no GPU to choose a batch size for; give --batch-size a number"
    ):
        largest_batch(Bundle("demo"), {"max_memory": None}, {}, [row()], Places(2, 1, 1.0, None))


def test_blocks() -> None:
    """All rows once; rows of one shape and the same options together, if images are drawn in batches."""

    def task(number: int, shape: tuple[int, int], options: tuple[tuple[str, Any], ...] = ()) -> Task:
        return Task(Row(place="", id=str(number), options=options), Path(), shape)

    tasks = [task(i, (i % 2, 5), (("height", 32),) if i == 4 else ()) for i in range(100)]
    for size in (1, 4):
        made = list(blocks(tasks, size, 2))
        assert sorted(int(one.row.id) for block in made for one in block) == list(range(100))
        assert len(made) >= 2 * 4
    assert [[int(one.row.id) for one in block] for block in blocks(tasks[:7], 4, 1)] == [[0, 2, 6], [1, 3, 5], [4]]
    assert [one.row.id for block in blocks(tasks, 1, 2) for one in block] == [one.row.id for one in tasks]
