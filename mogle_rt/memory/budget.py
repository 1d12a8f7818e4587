"""How much memory a pipeline may use: as much as is free, or as much as the user allows.

How much is free decides only between plans whose results are the same to the bit, see `mogle_rt.memory.planner`.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import psutil  # type: ignore[import-untyped]
import torch

from mogle_rt.config import parse_bytes

CGROUP = Path("/sys/fs/cgroup")
# Limit and use of the container's memory, and the part of the use that the system gives up when memory is short: in
# version 2 of control groups, and in version 1.
CGROUP_FILES = (
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
)
# What Python and the libraries take without any model: 0.6 GB after all imports, measured on Linux, and what the C
# library's allocator keeps for later.
PROCESS_BYTES = 800_000_000
# What CUDA's context and the workspaces of its libraries take, of which no allocator knows.
CUDA_BYTES = 1 << 30
# Free memory that is left alone: for other programs, and for the gaps in which no tensor fits.
MARGIN, LEAST_MARGIN = 0.05, 500_000_000


class Budget(NamedTuple):
    """Bytes that weights and activations may take, and bytes that are set aside for what is in use anyway."""

    room: int
    set_aside: int


def budget_for(device: torch.device, max_memory: str | int | None) -> Budget:
    """What may be used on a device.

    Args:
        max_memory: the most that this process may use there, see `mogle_rt.config.parse_bytes`; None takes what is free
            now, less a margin.

    Raises:
        ConfigError: see `parse_bytes`.
    """
    set_aside = CUDA_BYTES if device.type == "cuda" else PROCESS_BYTES
    if max_memory is not None:
        return Budget(max(0, parse_bytes(max_memory) - set_aside), set_aside)
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        free += torch.cuda.memory_reserved(device)  # it is ours already, and serves again
        return Budget(max(0, free - _margin(free)), _margin(free))
    free = available_memory() + psutil.Process().memory_info().rss
    return Budget(max(0, free - set_aside - _margin(free)), set_aside)


def _margin(free: int) -> int:
    return max(LEAST_MARGIN, int(MARGIN * free))


def available_memory() -> int:
    """Bytes that this process can still get without swapping: of the machine, or of its container if that has less."""
    available: int = psutil.virtual_memory().available
    for limit, usage, statistics, inactive in CGROUP_FILES:
        try:
            free = int((CGROUP / limit).read_text()) - int((CGROUP / usage).read_text())
            counts = dict(line.split()[:2] for line in (CGROUP / statistics).read_text().splitlines())
            available = min(available, max(0, free + int(counts.get(inactive, 0))))
        except (OSError, ValueError):  # no such container, or no limit ("max")
            continue
    return available
