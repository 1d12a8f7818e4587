"""How many threads are used for a model's size, and the warning on processors that can't multiply bfloat16."""

from __future__ import annotations

import logging

import pytest
import torch

from mogle_rt.memory import devices, threads
from mogle_rt.memory.threads import suitable_threads, worthwhile_threads

pytestmark = pytest.mark.quick

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("rows", "width", "expected"),
    [
        (176, 256, 1),  # the demo's image of 128 x 128
        (4 * 176, 256, 2),  # four such images at once
        (2560, 3072, 64),  # FLUX at 512 x 512: all threads
        (1, 1, 1),
    ],
)
def test_threads_by_size(rows: int, width: int, expected: int) -> None:
    assert worthwhile_threads(rows, width, 64) == expected


def test_they_are_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        monkeypatch.setattr(threads, "_AT_START", 3)
        with suitable_threads(176, 256, CPU):
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 3
        with suitable_threads(176, 256, torch.device("cuda")):
            assert torch.get_num_threads() == 3
        for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
            monkeypatch.setenv(name, "3")
            with suitable_threads(176, 256, CPU):
                assert torch.get_num_threads() == 3
            monkeypatch.delenv(name)
        torch.set_num_threads(2)  # the user's own choice
        with suitable_threads(176, 256, CPU):
            assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_slow_bfloat16_gives_one_warning(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    devices._warn_of_slow_bfloat16.cache_clear()
    monkeypatch.setattr(devices, "_multiplies_bfloat16", lambda: True)
    with caplog.at_level(logging.WARNING):
        devices.choose_dtype("bf16", CPU)
        assert caplog.messages == []
        monkeypatch.setattr(devices, "_multiplies_bfloat16", lambda: False)
        devices.choose_dtype("fp32", CPU)
        devices.choose_dtype("bf16", torch.device("cuda"))
        assert caplog.messages == []
        assert devices.choose_dtype("bf16", CPU) == devices.choose_dtype(torch.bfloat16, CPU) == torch.bfloat16
    assert len(caplog.messages) == 1
    assert "use dtype fp32" in caplog.messages[0]
