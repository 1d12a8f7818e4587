"""The weight format that is picked for a machine."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mogle_rt.bundle.bundle import Bundle
from mogle_rt.cost.gpus import find_gpu
from mogle_rt.cost.prediction import budget_of
from mogle_rt.cost.weights import choose_weights
from mogle_rt.errors import InsufficientMemoryError
from mogle_rt.memory.budget import Budget
from tests.conftest import make_once
from tests.sparse_bundles import write_sparse_bundle

CUDA, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.fixture(scope="module")
def released(shared_folder: Path) -> Bundle:
    """A bundle of the released model's size."""
    return Bundle(make_once(shared_folder / "released.safetensors", write_sparse_bundle))


@pytest.mark.parametrize(
    ("card", "expected"),
    [("H100 SXM", None), ("RTX 4090", None), ("RTX 4070", "int8"), ("RTX 3060", "int8"), ("RTX 4060", "int4")],
)
def test_most_exact_that_stays_in_memory(card: str, expected: str | None, released: Bundle) -> None:
    weights, plan = choose_weights(released, CUDA, torch.bfloat16, budget_of(find_gpu(card), None))
    assert weights == expected
    assert plan.streamed == ()


def test_the_smallest_where_all_are_streamed(released: Bundle) -> None:
    weights, plan = choose_weights(released, CUDA, torch.bfloat16, Budget(3 * 10**9, 0))
    assert weights == "int4"
    assert plan.streamed
    with pytest.raises(InsufficientMemoryError, match="needs at least"):
        choose_weights(released, CUDA, torch.bfloat16, Budget(10**9, 0))


def test_on_a_cpu(released: Bundle) -> None:
    """In float32, as most CPUs compute, plain weights take twice the room of the file."""
    assert choose_weights(released, CPU, torch.float32, Budget(64 * 10**9, 0))[0] is None
    assert choose_weights(released, CPU, torch.float32, Budget(24 * 10**9, 0))[0] == "int8"
