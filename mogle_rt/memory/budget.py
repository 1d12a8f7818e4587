"""How much memory a pipeline may use: as much as is free, or as much as the user allows.

How much is free decides only between plans whose results are the same to the bit, see `mogle_rt.memory.planner`.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import NamedTuple

import psutil  # type: ignore[import-untyped]
import torch

from mogle_rt.config import parse_bytes

CGROUP, OWN_GROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
# In version 2 of control groups, and in version 1: the controller's name in `OWN_GROUPS`, the folder of its groups, and in
# a group the limit and the use of memory, and what begins the names of its counts.
CGROUP_FILES = (
    ("", ".", "memory.max", "memory.current", ""),
    ("memory", "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
)
# Cached pages of files count as a group's use, but the system gives them up when memory is short: the bundle's are such.
CACHED = ("inactive_file", "active_file")
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
    own = psutil.Process().memory_info()
    # The pages of mapped files are no memory of ours: they count as available, as all cached pages do.
    free = available_memory() + own.rss - getattr(own, "shared", 0)
    return Budget(max(0, free - set_aside - _margin(free)), set_aside)


def _margin(free: int) -> int:
    return max(LEAST_MARGIN, int(MARGIN * free))


def available_memory() -> int:
    """Bytes that this process can still get without swapping: of the machine, or of its container if that has less."""
    available: int = psutil.virtual_memory().available
    for controller, folder, limit, usage, prefix in CGROUP_FILES:
        for group in _own_groups(controller, CGROUP / folder):
            try:
                free = int((group / limit).read_text()) - int((group / usage).read_text())
                counts = dict(line.split()[:2] for line in (group / "memory.stat").read_text().splitlines())
            except (OSError, ValueError):  # no such group, or no limit ("max")
                continue
            free += sum(int(counts.get(f"{prefix}{name}", 0)) for name in CACHED)
            available = min(available, max(0, free))
    return available


def _own_groups(controller: str, root: Path) -> list[Path]:
    """The folders of the group that this process is in, and of all groups around it, whose limits hold as well.

    Within a container the root is often the container's own group, and the name may be one that is known outside only.
    """
    try:
        lines = [line.split(":", 2) for line in OWN_GROUPS.read_text().splitlines()]
    except OSError:
        lines = []
    names = [line[2] for line in lines if len(line) == 3 and controller in line[1].split(",")]
    own = PurePosixPath(names[0].lstrip("/")) if names else PurePosixPath()
    return [root / name for name in (own, *own.parents) if ".." not in name.parts]
