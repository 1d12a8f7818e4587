"""How much memory may be used: as much as was asked for, or as much as is free for this process."""

from __future__ import annotations

import sys
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


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in place of the system's /proc and /sys/fs/cgroup: 20 GB are available, and there is no container."""
    monkeypatch.setattr(budget, "CGROUP", tmp_path / "cgroup")
    monkeypatch.setattr(budget, "OWN_GROUPS", tmp_path / "proc" / "self" / "cgroup")
    monkeypatch.setattr(psutil, "PROCFS_PATH", str(tmp_path / "proc"))
    write(
        tmp_path / "proc" / "meminfo", "MemTotal: 24000000 kB\nMemFree: 1 kB\nMemAvailable: 20000000 kB\nCached: 9 kB\n"
    )
    return tmp_path


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def limit_group(group: Path, version: int, limit: str, used: int, inactive: int, active: int) -> None:
    """Write the files of a control group."""
    names = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    prefix = "" if version == 2 else "total_"
    write(group / names[0], f"{limit}\n")
    write(group / names[1], f"{used}\n")
    write(group / "memory.stat", f"anon 1\n{prefix}inactive_file {inactive}\n{prefix}active_file {active}\nfile 3\n")


linux = pytest.mark.skipif(sys.platform != "linux", reason="psutil reads /proc only on Linux")
AVAILABLE = 20_000_000 * 1024


@linux
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("group", ["", "user.slice/job.scope"])
def test_a_containers_limit(version: int, group: str, system: Path) -> None:
    """A container may still take its limit less its use. Cached file pages don't count as use, as they can be freed.

    The limit is that of the root, which is the container's own group, or that of a group below.
    """
    root = system / "cgroup" / ("memory" if version == 1 else "")
    assert available_memory() == AVAILABLE  # no container
    write(system / "proc" / "self" / "cgroup", f"3:cpu,cpuacct:/x\n2:memory:/{group}\n0::/{group}\n")
    limit_group(root / group, version, "8000000000", 7 * 10**9, 3 * 10**9, 10**9)
    assert available_memory() == 5 * 10**9
    if group:
        limit_group(root / "user.slice", version, "6000000000", 5 * 10**9, 10**9, 0)
        assert available_memory() == 2 * 10**9  # the limit of a group around it holds as well
        limit_group(root / "user.slice" / "other.scope", version, "1000", 0, 0, 0)
        assert available_memory() == 2 * 10**9  # that of another one does not
        limit_group(root / "user.slice", version, "max", 5 * 10**9, 10**9, 0)
        assert available_memory() == 5 * 10**9
    limit_group(root / group, version, "max", 7 * 10**9, 3 * 10**9, 10**9)
    assert available_memory() == AVAILABLE


@linux
def test_a_group_that_only_the_outside_knows(system: Path) -> None:
    """In a container, the process may read a name of its group that is not in the container's own file system."""
    limit_group(system / "cgroup", 2, "8000000000", 7 * 10**9, 0, 0)
    for name in ("/docker/0123", "/../../docker/0123", ""):
        write(system / "proc" / "self" / "cgroup", f"0::{name}\nnonsense\n")
        assert available_memory() == 10**9


@linux
def test_pages_of_the_mapped_file_are_no_memory_that_is_taken(system: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 6 GB that this process has in memory, 5 are pages of files. They are available already, and count once."""
    own = SimpleNamespace(rss=6 * 10**9, shared=5 * 10**9)
    monkeypatch.setattr(psutil, "Process", lambda: SimpleNamespace(memory_info=lambda: own))
    free = AVAILABLE + 10**9
    assert budget_for(CPU, None) == Budget(free - PROCESS_BYTES - free // 20, PROCESS_BYTES)


def test_free_memory_of_the_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Memory of this process counts as free, since the pipeline's own memory is in it."""
    monkeypatch.setattr(budget, "CGROUP", tmp_path)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=19 * 10**9))
    monkeypatch.setattr(psutil, "Process", lambda: SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=10**9)))
    assert budget_for(CPU, None) == Budget(20 * 10**9 - PROCESS_BYTES - 10**9, PROCESS_BYTES)
