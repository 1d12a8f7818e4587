"""On a GPU, streamed and resident weights give the same bytes, and as much memory is allocated as was planned."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mogle_rt import Pipeline
from mogle_rt.memory.budget import Budget

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("cuda_graphs", [True, False])
def test_streamed_on_a_card(cuda_graphs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    mask = np.kron(np.array([[0, 13], [1, 10]], dtype=np.uint8), np.ones((64, 64), dtype=np.uint8))
    images, peaks = [], []
    monkeypatch.setattr("mogle_rt.calls.memory.budget_for", lambda device, asked: Budget(10**12, 0))
    for streams_all in (False, True):
        pipe = Pipeline("demo", "cuda", "fp32", cuda_graphs=cuda_graphs)
        if streams_all:
            pipe.enable_sequential_cpu_offload()
        torch.cuda.empty_cache()
        for _ in range(2):  # in the second call, everything that is kept between calls is there
            torch.cuda.reset_peak_memory_stats()
            images.append(pipe(mask, "a hat", num_inference_steps=3, seed=1, output_type="np").images)
        peaks.append((torch.cuda.max_memory_allocated(), pipe.plan.peak))
        assert bool(pipe.plan.streamed) == streams_all
        del pipe
    assert all(np.array_equal(np.asarray(images[0]), np.asarray(other)) for other in images[1:])
    for allocated, planned in peaks:
        assert allocated <= 1.05 * planned + (32 << 20)  # 32 MB are for the workspaces of CUDA's libraries
