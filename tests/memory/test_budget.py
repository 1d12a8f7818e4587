"""How much memory may be used: as much as was asked for, or as much as is free for this process."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest
import torch

from mogle_rt.config import parse_bytes
from mogle_rt.errors import ConfigError
from mogle_rt.memory import budget
from mogle_rt.memory.budget import CUDA_BYTES, PROCESS_BYTES, Budget, available_memory, budget_for

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("8GB", 8 * 10**9),
        ("8 gb", 8 * 10**9),
        ("7.5GiB", 15 * 2**29),
        ("500M", 5 * 10**8),
        ("1TiB", 2**40),
        ("6000000000", 6 * 10**9),
        (10**9, 10**9),
        (1.5e9, 15 * 10**8),
    ],
)
def test_sizes_as_people_write_them(written: Any, expected: int) -> None:
    assert parse_bytes(written) == expected


@pytest.mark.parametrize("wrong", ["", "8 bytes", "GB", "-1GB", "1e9", "8GBs", "0", "0GB", -5, True, {0: "8GB"}])
def test_what_is_no_size(wrong: Any) -> None:
    with pytest.raises(ConfigError, match="max_memory must be "):
        parse_bytes(wrong)


def test_an_asked_for_budget() -> None:
    assert budget_for(CPU, "6GB") == Budget(6 * 10**9 - PROCESS_BYTES, PROCESS_BYTES)
    assert budget_for(CUDA, "8GB") == Budget(8 * 10**9 - CUDA_BYTES, CUDA_BYTES)
    assert budget_for(CPU, "100MB") == Budget(0, PROCESS_BYTES)


def test_a_gpus_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that PyTorch's allocator holds counts as free, since it is used again. A margin is taken off."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (20 * 10**9, 24 * 10**9))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 2 * 10**9)
    assert budget_for(CUDA, None) == Budget(22 * 10**9 - 11 * 10**8, 11 * 10**8)


@pytest.mark.parametrize("version", [1, 2])
def test_a_containers_limit(version: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A container may still take its limit less its use. Cached file pages don't count as use, as they can be freed."""
    folder = tmp_path if version == 2 else tmp_path / "memory"
    folder.mkdir(exist_ok=True)
    names = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    key = "inactive_file" if version == 2 else "total_inactive_file"
    monkeypatch.setattr(budget, "CGROUP", tmp_path)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=20 * 10**9))
    assert available_memory() == 20 * 10**9  # no container
    (folder / names[0]).write_text("8000000000\n")
    (folder / names[1]).write_text("5000000000\n")
    (folder / "memory.stat").write_text(f"anon 1\n{key} 2000000000\nfile 3\n")
    assert available_memory() == 5 * 10**9
    (folder / names[0]).write_text("max\n")
    assert available_memory() == 20 * 10**9


def test_free_memory_of_the_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Memory of this process counts as free, since the pipeline's own memory is in it."""
    monkeypatch.setattr(budget, "CGROUP", tmp_path)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=19 * 10**9))
    monkeypatch.setattr(psutil, "Process", lambda: SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=10**9)))
    assert budget_for(CPU, None) == Budget(20 * 10**9 - PROCESS_BYTES - 10**9, PROCESS_BYTES)
