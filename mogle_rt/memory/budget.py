"""How much memory there is. What is decided by it stays decided: it asks for what a machine has, not for what is free.

Weight formats round differently. If the free memory of a moment chose between them, one seed would give other bytes
whenever another program was running.
"""

from __future__ import annotations

from pathlib import Path

import psutil  # type: ignore[import-untyped]

CONTAINER_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def total_memory() -> int:
    """Bytes that the machine has, or that the container may take where its limit is lower."""
    total: int = psutil.virtual_memory().total
    for path in CONTAINER_LIMITS:
        try:
            total = min(total, int(path.read_text()))
        except (OSError, ValueError):  # there is no such container, or no limit: "max"
            continue
    return total
