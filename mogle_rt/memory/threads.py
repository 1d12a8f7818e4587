"""How many processor threads to use for a model.

The threads of one product wait for each other at its end. For a large product that costs almost nothing. For a small
one the waiting takes longer than the arithmetic, and much longer on a busy machine, where a thread is often delayed.
The rule is one thread per 2^26 multiplications in the widest product of a step, but at least one and at most as many as
PyTorch would use.
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


def threads_are_chosen() -> bool:
    """Whether the user has chosen the number of threads, by the environment or by `torch.set_num_threads`."""
    by_environment = "OMP_NUM_THREADS" in os.environ or "MKL_NUM_THREADS" in os.environ
    return by_environment or torch.get_num_threads() != _AT_START


@contextmanager
def suitable_threads(rows: int, width: int, device: torch.device) -> Iterator[None]:
    """Use a suitable number of threads for the model, and restore the previous number afterwards.

    Nothing is changed on a GPU, where the user has chosen the number of threads.

    Args:
        rows: tokens of image, condition and text of all images of a batch.
        width: the width of the transformer.
        device: where the model is.
    """
    if device.type != "cpu" or threads_are_chosen():
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(worthwhile_threads(rows, width, before))
    try:
        yield
    finally:
        torch.set_num_threads(before)
