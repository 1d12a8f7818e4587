"""A step of FLUX.1-dev at full size on a CPU, in at most 6 GB of memory, beside the time of its matrix products alone.

The bundle is a sparse file: real numbers in a few blocks, holes elsewhere, which are read as any other weights are. The
products are timed on weights in memory: one of each kind of sublayer, times their number.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.report import LargeStep
from benchmarks.side_by_side import Neighbours
from tests.sparse_bundles import write_sparse_bundle

SIZE = int(os.environ.get("STREAMING_SIZE", "512"))  # pixels of a side
ALLOWED = 6e9
REAL = (
    "transformer_blocks.0.",
    "transformer_blocks.18.",
    "single_transformer_blocks.0.",
    "single_transformer_blocks.37.",
)
STEP = """
import json, sys, time
import torch
import mogle_rt
from benchmarks.peak import peak
from mogle_rt.linear.onednn import linear
path, size, allowed = sys.argv[1], int(sys.argv[2]), sys.argv[3]
pipe = mogle_rt.Pipeline(path, "cpu", "fp32", max_memory=allowed)
g = torch.Generator().manual_seed(0)
embeds = {"prompt_embeds": torch.randn(1, 512, 4096, generator=g), "pooled_prompt_embeds": torch.randn(1, 768, generator=g)}
pipe(None, height=size, width=size, num_inference_steps=1, seed=0, output_type="latent", **embeds)
step, plan, most = pipe.last_run.seconds["denoise"], pipe.plan, peak()

tokens, text, width = (size // 16) ** 2, 512, 3072
config = pipe.bundle.config.transformer
pipe.free_memory()
def seconds(rows, inner, out):
    x, w = torch.randn(rows, inner), torch.randn(out, inner) * 0.02
    times = []
    for _ in range(3):
        start = time.perf_counter()
        linear(x, w)
        times.append(time.perf_counter() - start)
    return min(times)
shapes = [(width, 3 * width), (width, width), (width, 4 * width), (4 * width, width)]
double = sum(seconds(rows, *shape) for rows in (text, 2 * tokens) for shape in shapes)
rows = text + 2 * tokens
single = sum(seconds(rows, *shape) for shape in [(width, 3 * width), (width, 4 * width), (5 * width, width)])
products = config.num_layers * double + config.num_single_layers * single
found = {"step": step, "products": products, "peak": most}
print(json.dumps(found | {"streamed": len(plan.streamed), "sublayers": plan.sublayers}))
"""


def test_full_size_step_in_little_memory(
    benchmark: BenchmarkFixture, large_steps: list[LargeStep], tmp_path: Path
) -> None:
    path = write_sparse_bundle(tmp_path / "full.safetensors", real_blocks=REAL)
    command = [sys.executable, "-c", STEP, str(path), str(SIZE), f"{int(ALLOWED)}"]

    def run() -> dict[str, float]:
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1])
        assert done.returncode == 0, done.stderr
        return dict(json.loads(done.stdout))

    with Neighbours() as neighbours:
        found = benchmark.pedantic(run, rounds=1)  # type: ignore[no-untyped-call]
    step = LargeStep(
        name=f"FLUX.1-dev, float32 from a bfloat16 file, {SIZE} px",
        seconds=found["step"],
        products=found["products"],
        allowed=ALLOWED,
        peak=found["peak"],
        streamed=int(found["streamed"]),
        sublayers=int(found["sublayers"]),
        others=neighbours.share,
    )
    large_steps.append(step)
    benchmark.extra_info |= asdict(step)
    assert found["peak"] <= ALLOWED
