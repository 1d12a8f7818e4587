"""Times loading a bundle, and loading the files it was made of by diffusers and peft. Weights dominate at this size."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from benchmarks import peak
from benchmarks.conftest import ModelsOf
from benchmarks.report import Row
from benchmarks.side_by_side import SideBySide
from benchmarks.sizes import Models

SIZE = "width 1536"
MIB = 1 << 20


def memory(side: str, folder: Path) -> dict[str, int]:
    """The most bytes that a process of its own holds, see `benchmarks.peak`."""
    command = [sys.executable, "-m", "benchmarks.peak", side, str(folder)]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], check=True, capture_output=True, text=True)
    peaks: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return peaks


def test_load(models: ModelsOf, compare: SideBySide) -> None:
    """Load until the model can be called. Either side may leave weights in the file until they are used."""
    folder = models(SIZE).folder

    def load(how: Any) -> None:
        how(folder)

    compare(
        "load",
        f"{SIZE}, until ready",
        lambda: load(peak.load_engine),
        lambda: load(peak.load_baseline),
        before=gc.collect,
    )


def from_nothing(compare: SideBySide, side: Models, until: str, what: Callable[..., Tensor], **options: Any) -> None:
    """Time loading, followed by ``what``, a function of `benchmarks.peak`."""
    config = side.size.transformer
    inputs = peak.step_inputs(config.joint_attention_dim, config.pooled_projection_dim)

    def engine() -> Tensor:
        pipe = peak.load_engine(side.folder)
        pipe.set_progress_bar_config(disable=True)
        return what(pipe, *inputs)

    def baseline() -> Tensor:
        return what(peak.load_baseline(side.folder), *inputs)

    compare("load", f"{SIZE}, until {until}", engine, baseline, before=gc.collect, **options)


def test_load_and_draw(models: ModelsOf, compare: SideBySide) -> None:
    """Load, prepare, and draw a small image of 28 steps."""
    from_nothing(compare, models(SIZE), f"the first image of {peak.STEPS} steps", peak.first_image, budget=16)


def test_load_and_step(models: ModelsOf, compare: SideBySide) -> None:
    """Load, and make the first step of a small image, which reads every weight of the transformer."""
    side = models(SIZE)
    from_nothing(compare, side, "the first step", peak.first_step, moved=side.path.stat().st_size, budget=8)
    resident = side.resident_bytes("transformer", "lora", "mogle", "vae") / MIB
    engine, baseline = memory("engine", side.folder), memory("baseline", side.folder)
    for key, name, limit in (("loaded", "until ready", None), ("stepped", "until the first step", resident)):
        row = Row(
            group="peak memory",
            name=f"{SIZE}, {name}",
            engine=engine[key] / MIB,
            baseline=baseline[key] / MIB,
            unit="MiB",
            limit=limit,
            bound="resident weights",
        )
        compare.record(row)
