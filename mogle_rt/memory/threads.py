"""How many processor threads a model is worth.

The threads of one product meet at its end and wait there for the last of them. For a large product that costs nothing; for
a small one the meeting takes longer than the arithmetic, and on a machine with other work, where one thread is often
held up, many times longer. The rule: one thread for each 2^26 multiplications in the widest product of a step, at least one
and at most as many as PyTorch would take.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from mogle_rt.config import MLP_RATIO

WORTH_A_THREAD = 1 << 26  # multiplications in one product
_AT_START = torch.get_num_threads()


def worthwhile_threads(rows: int, width: int, most: int) -> int:
    """Threads for a product of ``rows`` tokens with the first matrix of an MLP, width x 4 width, from 1 to ``most``."""
    return max(1, min(most, rows * width * width * MLP_RATIO // WORTH_A_THREAD))


@contextmanager
def suitable_threads(rows: int, width: int, device: torch.device) -> Iterator[None]:
    """Take as many threads as the model is worth, and restore their number afterwards.

    Nothing is changed on a GPU, where the environment variables OMP_NUM_THREADS or MKL_NUM_THREADS are set, or where
    `torch.set_num_threads` was called since this module was imported: then somebody has chosen.

    Args:
        rows: tokens of image, condition and text of all images of a batch.
        width: of the transformer.
        device: where the model is.
    """
    before = torch.get_num_threads()
    chosen = "OMP_NUM_THREADS" in os.environ or "MKL_NUM_THREADS" in os.environ or before != _AT_START
    if device.type != "cpu" or chosen:
        yield
        return
    torch.set_num_threads(worthwhile_threads(rows, width, before))
    try:
        yield
    finally:
        torch.set_num_threads(before)
