"""Whether a step of text and image alone takes the time that its FLOPs say: `python -m benchmarks.fast_steps`.

It times whole steps and steps that keep the condition (see docs/fast.md) in turn, at FLUX's width with a few blocks, in
float32 on a CPU. Times are those that the processors spent on this process, since other programs may be running.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from benchmarks import flops
from benchmarks.sizes import SIZES, Job, Models, face_mask
from mogle_rt.fast.course import Kind
from mogle_rt.fast.settings import FastConfig
from mogle_rt.loop.step import Step

KINDS = (Kind.WHOLE, Kind.KEPT)


def spent(step: Step, kind: Kind) -> float:
    """Processor seconds of one step."""
    step.seek(1)
    begin = time.process_time()
    step.advance(kind)
    return time.process_time() - begin


@torch.inference_mode()
def measure(size: str, pixels: int, rounds: int) -> dict[Kind, tuple[int, float]]:
    """FLOPs, and the median of the processor seconds, of each kind of step."""
    with tempfile.TemporaryDirectory() as folder:
        models = Models(size, Path(folder), torch.device("cpu"), torch.float32)
        job = Job(models, face_mask(), pixels, 1)
        models.engine.prepare(replace(job.conditions, fast=FastConfig(refresh_every=2)), job.schedule)
        step = models.engine.prepared
        models.engine.start(job.noise)
        counted = {kind: flops.count(partial(step.advance, kind))[1] for kind in KINDS}  # and warms up
        times: dict[Kind, list[float]] = {kind: [] for kind in KINDS}
        for _ in range(rounds):
            for kind in KINDS:
                times[kind].append(spent(step, kind))
        return {kind: (counted[kind], statistics.median(times[kind])) for kind in KINDS}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="FLUX width")
    parser.add_argument("--pixels", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    found = measure(asked.size, asked.pixels, asked.rounds)
    for kind, (count, seconds) in found.items():
        print(f"{kind.value:6} {count / 1e12:6.3f} TFLOP {seconds:7.2f} s")
    (whole, whole_time), (kept, kept_time) = (found[kind] for kind in KINDS)
    share, taken = kept / whole, kept_time / whole_time
    print(f"kept / whole: {share:.3f} of the FLOPs, {taken:.3f} of the time, {taken / share - 1:+.1%}")


if __name__ == "__main__":
    main()
