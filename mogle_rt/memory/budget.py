"""How much memory the machine has in total. Free memory is not used, because decisions must not vary between runs.

Weight formats round differently. If the memory that is free at the moment decided between them, the same seed would
give different bytes whenever another program was running.
"""

from __future__ import annotations

from pathlib import Path

import psutil  # type: ignore[import-untyped]

CONTAINER_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def total_memory() -> int:
    """Bytes of memory that the machine has, or that the container may use if its limit is lower."""
    total: int = psutil.virtual_memory().total
    for path in CONTAINER_LIMITS:
        try:
            total = min(total, int(path.read_text()))
        except (OSError, ValueError):  # no such container, or no limit ("max")
            continue
    return total
