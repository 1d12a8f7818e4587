"""How much memory this process may still take."""

from __future__ import annotations

from pathlib import Path

import psutil  # type: ignore[import-untyped]

CONTAINER_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def free_memory() -> int:
    """Bytes that this process may still take: the machine's, or of a container's limit what it doesn't hold itself."""
    free: int = psutil.virtual_memory().available
    for path in CONTAINER_LIMITS:
        try:
            limit = int(path.read_text())
        except (OSError, ValueError):  # no such container, or no limit: "max"
            continue
        taken = psutil.Process().memory_info()
        free = min(free, limit - (taken.rss - getattr(taken, "shared", 0)))  # a mapped file's pages can go
    return free
